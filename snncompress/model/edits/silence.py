"""Channels that are silent while training goes on, and may come back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
from snncompress.model.network import (
    WEIGHT_LAYERS,
    ChannelGroup,
    Side,
    channel_axis,
    multiplier,
    silent_members,
    width,
)
from snncompress.model.resizing import prunable_type
from snncompress.model.silencing import end_gradients, give_voice, silence_inputs, silence_spikes

from .base import Edit, find
from .slices import Slice, slice_from_dict


@dataclass(frozen=True)
class SilenceChannels(Edit):
    """Let these channels of the whole network be silent, and all others speak; their weights stay as they are.

    The network computes what it will without them. ``slices`` on side "neuron" are spikes that become 0, on side "in"
    what a layer reads of a stream that no neuron closes; on side "out" they tell whose channels these are. Only an
    unfinished run has such an edit: in the end what is silent is removed.
    """

    slices: tuple[Slice, ...]
    kind: ClassVar[str] = "silence_channels"

    @classmethod
    def of(
        cls, model: nn.Module, silent: Iterable[tuple[ChannelGroup, Tensor]], direct: Mapping[str, Collection[str]]
    ) -> SilenceChannels:
        """The edit that silences positions of coupled groups; ``direct`` is that of their network."""
        found: dict[tuple[str, Side], tuple[list[Tensor], int, int]] = {}
        for group, positions in silent:
            outs = (member for member in group.members if member.side == "out")
            layers = [m for m in outs if isinstance(layer_at(model, m.module), WEIGHT_LAYERS)]
            for member in (*layers, *silent_members(group, model, direct)):
                size = member.width or width(layer_at(model, member.module), member.side)
                parts, *_ = found.setdefault((member.module, member.side), ([], size, member.axis))
                parts.append(member.index[positions].flatten())
        return cls(
            tuple(
                Slice(module, side, tuple(sorted(set(torch.cat(parts).tolist()))), size, axis)
                for (module, side), (parts, size, axis) in found.items()
            )
        )

    def check(self, model: nn.Module) -> None:
        """Every module must be there; a layer with the width that the edit expects."""
        for piece in self.slices:
            module = find(model, piece.module, "the plan silences channels of it")
            if piece.side == "neuron":
                continue
            if not prunable_type(module, piece.side) or width(module, piece.side) != piece.width:
                raise PlanError(
                    f"{piece.module} is a {type(module).__name__} without {piece.width} {piece.side}put channels, of "
                    f"which the plan silences some. Is it another architecture?"
                )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put hooks in the place of those that are there."""
        self.check(model)
        give_voice(model)
        for piece in self.slices:
            module, indices = layer_at(model, piece.module), torch.tensor(piece.indices, dtype=torch.long)
            if piece.side == "neuron":
                silence_spikes(module, indices, piece.axis, adapter.time_axis(module))
            elif piece.side == "in":
                silence_inputs(module, indices, channel_axis(module))
            elif not multiplier(module):  # which passes on what is silent itself
                end_gradients(module, indices, channel_axis(module))

    def supersedes(self, earlier: Edit) -> bool:
        """It says of all channels whether they are silent."""
        return isinstance(earlier, SilenceChannels)

    def describe(self) -> str:
        """Layers and numbers."""
        parts = (f"{s.module}: {len(s.indices)} of {s.width}" for s in self.slices if s.side == "out")
        return "channels silent: " + ", ".join(parts)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SilenceChannels:
        """Slices must be what they can be."""
        return cls(tuple(slice_from_dict(piece) for piece in data["slices"]))
