"""What goes from stage to stage, and where its channels stand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Kind = Literal["maps", "tokens", "vector"]


@dataclass(frozen=True)
class Format:
    """[..., C, *sizes] of maps with one to three axes, [..., L, C] of tokens, [..., C] of a vector."""

    kind: Kind
    channels: int
    sizes: tuple[int, ...] = ()

    @property
    def axis(self) -> int:
        """Where channels stand, counted from the end."""
        return -1 - len(self.sizes) if self.kind == "maps" else -1

    @property
    def dims(self) -> int:
        """Axes of a map."""
        return len(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without time and samples."""
        return (self.channels, *self.sizes) if self.kind == "maps" else (*self.sizes, self.channels)

    @property
    def flat(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def wide(self, channels: int) -> Format:
        """With other channels."""
        return replace(self, channels=channels)

    def sized(self, *sizes: int) -> Format:
        """With other sizes."""
        return replace(self, sizes=sizes)


def cut(x: Tensor, axis: int, start: int | None = None, stop: int | None = None, step: int | None = None) -> Tensor:
    """``x[..., start:stop:step, ...]`` on an axis counted from the end."""
    return x[(..., slice(start, stop, step), *[slice(None)] * (-1 - axis))]
