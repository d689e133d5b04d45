"""The five edits: all that compression ever does to a network.

Each is immutable, has a JSON form, and is applied in place to a model that has the structure it expects. Where a
module isn't there or has another width, PlanError is raised before anything is changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .errors import OptionError, PlanError
from .interfaces import Adapter, Quantizer
from .network import ChannelGroup, Side, prunable_type, remove_from_layer, width
from .parametrizations import computed_weight, quantize_weight, weight_bits
from .registry import registry


@dataclass(frozen=True)
class Edit:
    """One change to a model."""

    kind: ClassVar[str]

    def check(self, model: nn.Module) -> None:
        """Raise PlanError unless the edit fits the model."""
        raise PlanError(f"This version of snncompress can't replay {self.kind!r} edits. Upgrade snncompress.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Change the model, in place."""
        self.check(model)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"edit": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Slice:
    """Indices that one module loses on one side, of ``width`` channels.

    ``axis`` is where a neuron's channels stand (-1 in [N, C], -3 in [N, C, H, W]); 0 for a layer.
    """

    module: str
    side: Side
    indices: tuple[int, ...]
    width: int
    axis: int


@dataclass(frozen=True)
class RemoveChannels(Edit):
    """Remove output channels ``indices`` of ``layer``, and from every coupled module what belongs to them.

    Indices count the channels as they stand when the edit is applied. ``slices`` spells out the whole coupled group,
    the layer included, so that a replay needs no tracing.
    """

    layer: str
    indices: tuple[int, ...]
    slices: tuple[Slice, ...]
    kind: ClassVar[str] = "remove_channels"

    @classmethod
    def of(cls, model: nn.Module, group: ChannelGroup, removed: Tensor) -> RemoveChannels:
        """The edit that removes positions ``removed`` of ``group`` from ``model``; ``layer`` is the group's first."""
        slices = tuple(
            Slice(
                member.module,
                member.side,
                tuple(sorted(member.index[removed].flatten().tolist())),
                member.width or width(model.get_submodule(member.module), member.side),
                member.axis,
            )
            for member in group.members
        )
        own = next(s for s in slices if s.side == "out")
        return cls(own.module, own.indices, slices)

    def check(self, model: nn.Module) -> None:
        """Every module must be there, of a kind that can be shrunk, with the width the edit expects."""
        for piece in self.slices:
            module = _find(model, piece.module, "the plan removes channels from it")
            if piece.side == "neuron":  # its tensors may all be scalars, so it doesn't tell its width
                found = piece.width
            elif not prunable_type(module):
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

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Shrink every module of the group."""
        self.check(model)
        for piece in self.slices:
            if piece.side == "neuron":
                neuron = model.get_submodule(piece.module)
                adapter.remove_channels(neuron, list(piece.indices), width=piece.width, axis=piece.axis)
            else:
                remove_from_layer(model.get_submodule(piece.module), piece.side, list(piece.indices))


@dataclass(frozen=True)
class QuantizeWeights(Edit):
    """Fake-quantize the weight of ``layer`` to ``bits`` bits with the named quantizer and its options."""

    layer: str
    quantizer: str
    bits: int
    options: dict[str, Any]
    kind: ClassVar[str] = "quantize_weights"

    @classmethod
    def of(cls, layer: str, quantizer: Quantizer, bits: int) -> QuantizeWeights:
        """The edit for a quantizer instance."""
        return cls(layer, quantizer.name, bits, quantizer.options())

    def check(self, model: nn.Module) -> None:
        """The layer must be there, have a weight, and not be quantized yet."""
        module = _find(model, self.layer, "the plan quantizes it")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"{self.layer} is a {type(module).__name__} without a weight to quantize.")
        if why := computed_weight(module):
            raise PlanError(
                f"{self.layer} can't be quantized: {why}. Make it a plain parameter first, or skip the layer."
            )
        if (bits := weight_bits(module)) is not None:
            raise PlanError(
                f"{self.layer!r} is already quantized to {bits} bits. Start from the float model, or leave bits=None."
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the quantizer before the layer's weight."""
        self.check(model)
        cls = registry().find("quantizer", self.quantizer)
        try:
            quantizer = cls(**self.options)
        except TypeError as error:
            raise OptionError(f"Quantizer {self.quantizer!r} doesn't take {self.options}: {error}") from error
        quantize_weight(model.get_submodule(self.layer), quantizer, self.bits)


@dataclass(frozen=True)
class MaskWeights(Edit):
    """Hold single weights of ``layer`` at zero."""

    layer: str
    kind: ClassVar[str] = "mask_weights"


@dataclass(frozen=True)
class RemoveBlock(Edit):
    """Remove a whole block of layers."""

    name: str
    kind: ClassVar[str] = "remove_block"


@dataclass(frozen=True)
class TruncateTimesteps(Edit):
    """Run ``timesteps`` steps only."""

    timesteps: int
    kind: ClassVar[str] = "truncate_timesteps"


def edit_from_dict(data: Any) -> Edit:
    """The edit a JSON object describes; raises PlanError for anything else."""
    if not isinstance(data, dict) or "edit" not in data:
        raise PlanError(f"Not an edit: {str(data)[:80]!r}.")
    fields = {k: v for k, v in data.items() if k != "edit"}
    try:
        if data["edit"] == RemoveChannels.kind:
            slices = tuple(_slice(s) for s in fields["slices"])
            return RemoveChannels(str(fields["layer"]), _integers(fields["indices"]), slices)
        if data["edit"] == QuantizeWeights.kind:
            bits, options = fields["bits"], dict(fields["options"])
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
                raise PlanError(f"{fields['layer']}: bits must be 1 to 16, not {bits!r}.")
            return QuantizeWeights(str(fields["layer"]), str(fields["quantizer"]), bits, options)
        others: dict[str, type[Edit]] = {c.kind: c for c in (MaskWeights, RemoveBlock, TruncateTimesteps)}
        return others[data["edit"]](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"Damaged edit {str(data)[:80]!r}: {type(error).__name__} {error}") from error


def _slice(data: dict[str, Any]) -> Slice:
    if data["side"] not in ("out", "in", "neuron"):
        raise ValueError(f"side {data['side']!r}")
    width_, axis = _integers([data["width"], data["axis"]])
    return Slice(str(data["module"]), data["side"], _integers(data["indices"]), width_, axis)


def _integers(values: Any) -> tuple[int, ...]:
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError("whole numbers expected")
    return tuple(values)


def _find(model: nn.Module, name: str, why: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"{type(model).__name__} has no module {name!r}; {why}. Is it another architecture?") from error
