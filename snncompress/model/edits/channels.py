"""Channels that go, with all that is coupled with them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from snncompress.base.packing import pack_indices, unpack_indices
from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
from snncompress.model.fixed_point import remove_channels
from snncompress.model.network import ChannelGroup, width
from snncompress.model.resizing import prunable_type, remove_from_layer
from snncompress.model.settings import axis_for, number_at, remove_entries, set_number, tensor_at

from .base import Budget, Edit, find, integers
from .shifts import Shift, shifts
from .silence import SilenceChannels
from .slices import Slice, slice_from_dict


@dataclass(frozen=True)
class Width:
    """A whole number ``attribute`` of ``module`` ("" is the model itself), from which forward reads a width.

    Of a list or tuple, as of the sizes of a split, it is one: ``sizes[0]``; ``sizes[hidden]`` of a mapping,
    ``config.hidden`` of an object that holds settings. Or a tensor with an entry for each channel of the edit's layer.
    """

    module: str
    attribute: str
    before: int
    after: int


@dataclass(frozen=True)
class RemoveChannels(Edit):
    """Remove output channels ``indices`` of ``layer``, and from every coupled module what belongs to them.

    Indices count the channels as they stand when the edit is applied. ``slices`` spells out the whole coupled group,
    the layer included, so that a replay needs no tracing; ``widths`` what forward must count instead; ``shifts`` where
    a bias takes up what silent channels would still add.
    """

    layer: str
    indices: tuple[int, ...]
    slices: tuple[Slice, ...]
    widths: tuple[Width, ...] = ()
    shifts: tuple[Shift, ...] = ()
    kind: ClassVar[str] = "remove_channels"

    @classmethod
    def of(cls, model: nn.Module, group: ChannelGroup, removed: Tensor) -> RemoveChannels:
        """The edit that removes positions ``removed`` of ``group`` from ``model``; ``layer`` is the group's first."""
        slices = tuple(
            Slice(
                member.module,
                member.side,
                tuple(sorted(member.index[removed].flatten().tolist())),
                member.width or width(layer_at(model, member.module), member.side),
                member.axis,
            )
            for member in group.members
        )
        own = next(s for s in slices if s.side == "out")
        left = group.size - len(removed)
        widths = []
        for module, attribute in group.widths:
            tensor = tensor_at(model.get_submodule(module), attribute)
            before = own.width if tensor is not None else number_at(model.get_submodule(module), attribute)
            widths.append(Width(module, attribute, before, before * left // group.size))
        return cls(own.module, own.indices, slices, tuple(widths), shifts(model, group))

    def check(self, model: nn.Module) -> None:
        """Every module must be there, of a kind that can be shrunk, with the width the edit expects."""
        if not any((s.module, s.side) == (self.layer, "out") for s in self.slices):
            raise PlanError(f"A removal of channels of {self.layer!r} doesn't list that layer.")
        for piece in self.slices:
            module = find(model, piece.module, "the plan removes channels from it")
            if piece.side == "neuron":  # its tensors may all be scalars, so it doesn't tell its width
                found = piece.width
            elif not prunable_type(module, piece.side):
                raise PlanError(f"{piece.module} is a {type(module).__name__}, from which channels can't be removed.")
            else:
                found = width(module, piece.side)
            if found != piece.width:
                raise PlanError(
                    f"{piece.module} has {found} {piece.side}put channels, the plan expects {piece.width}. The model "
                    f"isn't of the architecture that the plan was made for, or was compressed already."
                )
            bad = [i for i in piece.indices if not 0 <= i < piece.width]
            if bad or len(set(piece.indices)) != len(piece.indices):
                raise PlanError(
                    f"{piece.module} has no channel {bad[0]}." if bad else f"{piece.module}: an index twice."
                )
            if len(piece.indices) >= piece.width:
                raise PlanError(f"The plan would remove all {piece.width} channels of {piece.module}.")
        for shift in self.shifts:
            shift.check(model, self._gone())
        for width_ in self.widths:
            module = find(model, width_.module, f"the plan sets its {width_.attribute!r}")
            number = number_at(module, width_.attribute)
            tensor = tensor_at(module, width_.attribute)
            if tensor is not None:
                number = width_.before if axis_for(tensor, width_.before) is not None else list(tensor.shape)
            if type(number) is not int or number != width_.before or not 0 < width_.after <= number:
                raise PlanError(
                    f"{width_.module or type(model).__name__} has {width_.attribute} = {number!r}, where the plan "
                    f"expects a width of {width_.before}, to set it to {width_.after}. The model isn't of the "
                    f"architecture that the plan was made for, or was compressed already."
                )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Shrink every module of the group."""
        self.check(model)
        for shift in self.shifts:
            shift.apply(model, self._gone())
        for piece in self.slices:
            if piece.side == "neuron":
                neuron = layer_at(model, piece.module)
                remove_channels(adapter, neuron, list(piece.indices), width=piece.width, axis=piece.axis)
            else:
                remove_from_layer(layer_at(model, piece.module), piece.side, list(piece.indices))
        for new in self.widths:
            module = model.get_submodule(new.module)
            if tensor_at(module, new.attribute) is None:
                set_number(module, new.attribute, new.after)
            else:
                remove_entries(module, new.attribute, list(self.indices), new.before)

    def supersedes(self, earlier: Edit) -> bool:
        """What was silent for a while is cut out."""
        return isinstance(earlier, SilenceChannels)

    def _gone(self) -> dict[tuple[str, str], tuple[int, ...]]:
        return {(piece.module, piece.side): piece.indices for piece in self.slices}

    def describe(self) -> str:
        """Layer and number of channels, and what shrinks with them."""
        others = [piece.module for piece in self.slices if piece.module != self.layer]
        others += [f"{new.module}.{new.attribute}".lstrip(".") for new in self.widths]
        beside = f", with what belongs to them in {', '.join(dict.fromkeys(others))}" if others else ""
        readers = ", ".join(dict.fromkeys(shift.reader for shift in self.shifts))
        constant = f"; what they add when silent is on the bias of {readers}" if readers else ""
        return f"{self.layer}: {len(self.indices)} channels removed{beside}{constant}"

    def to_dict(self) -> dict[str, Any]:
        """Without ``widths`` where forward reads none, and ``shifts`` where nothing is moved."""
        data = super().to_dict()
        for name in ("widths", "shifts"):
            if not data[name]:
                del data[name]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RemoveChannels:
        """Indices, slices, widths and shifts must be what they can be."""
        slices = tuple(slice_from_dict(piece) for piece in data["slices"])
        indices = integers(data["indices"])
        if min(indices, default=0) < 0:
            raise ValueError(f"channel {min(indices)}")
        widths = tuple(width_from_dict(new) for new in data.get("widths", ()))
        moved = tuple(Shift.from_dict(shift) for shift in data.get("shifts", ()))
        return cls(str(data["layer"]), indices, slices, widths, moved)

    def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Indices as bits; a slice has its own only where they differ from the layer's."""
        width = next(s.width for s in self.slices if (s.module, s.side) == (self.layer, "out"))
        slices: list[list[Any]] = []
        for piece in self.slices:
            slices.append([piece.module, piece.side, piece.width, piece.axis])
            if (piece.indices, piece.width) != (self.indices, width):
                slices[-1].append(pack_indices(piece.indices, piece.width))
        indices = pack_indices(self.indices, width)
        packed = {"edit": self.kind, "layer": self.layer, "width": width, "indices": indices, "slices": slices}
        more: dict[str, tuple[Any, ...]] = {"widths": self.widths, "shifts": self.shifts}
        return packed | {name: [asdict(entry) for entry in entries] for name, entries in more.items() if entries}

    @classmethod
    def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: Budget) -> list[Edit]:
        """Every width is spent before its bits are unfolded."""
        indices = tuple(unpack_indices(data["indices"], data["width"]))
        budget.spend(data["width"])
        slices: dict[tuple[str, str], Slice] = {}
        for module, side, size, axis, *own in data["slices"]:
            budget.spend(size)
            piece = slice_from_dict({"module": module, "side": side, "width": size, "axis": axis, "indices": []})
            found = tuple(unpack_indices(own[0], size)) if own else indices
            if (piece.module, piece.side) in slices:
                raise PlanError(f"A removal of channels lists {piece.module[:80]!r} twice.")
            slices[piece.module, piece.side] = replace(piece, indices=found)
        if data["width"] != getattr(slices.get((data["layer"], "out")), "width", None):
            raise PlanError(f"A removal of channels of {str(data['layer'])[:80]!r} doesn't list that layer.")
        widths = tuple(width_from_dict(new) for new in data.get("widths", ()))
        moved = tuple(Shift.from_dict(shift) for shift in data.get("shifts", ()))
        return [cls(data["layer"], indices, tuple(slices.values()), widths, moved)]

    @classmethod
    def summary(cls, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Layer and numbers."""
        gone = np.unpackbits(np.frombuffer(base64.b64decode(data["indices"]), np.uint8)).sum()
        return f"{data['layer']}: {gone} of {data['width']} channels removed"


def width_from_dict(data: dict[str, Any]) -> Width:
    """A width from its fields; raises KeyError, TypeError or ValueError for anything else."""
    before, after = integers([data["before"], data["after"]])
    return Width(str(data["module"]), str(data["attribute"]), before, after)
