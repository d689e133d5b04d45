"""Which channels of one module an edit is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snncompress.model.network import Side

from .base import integers


@dataclass(frozen=True)
class Slice:
    """Indices that one module loses, or has silent, on one side, of ``width`` channels.

    ``axis`` is where a neuron's channels stand (-1 in [N, C], -3 in [N, C, H, W]); 0 for a layer.
    """

    module: str
    side: Side
    indices: tuple[int, ...]
    width: int
    axis: int


def slice_from_dict(data: dict[str, Any]) -> Slice:
    """A slice from its fields; raises KeyError, TypeError or ValueError for anything else."""
    if data["side"] not in ("out", "in", "neuron"):
        raise ValueError(f"side {data['side']!r}")
    width_, axis = integers([data["width"], data["axis"]])
    if not (-8 <= axis < 0 if data["side"] == "neuron" else axis == 0):
        raise ValueError(f"axis {axis} of a slice on side {data['side']!r}")
    indices = integers(data["indices"])
    if not all(0 <= i < width_ for i in indices):
        raise ValueError(f"a channel that isn't one of {width_}")
    return Slice(str(data["module"]), data["side"], indices, width_, axis)
