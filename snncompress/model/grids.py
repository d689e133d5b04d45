"""Quantized weights as numbers on a grid, value = (number − zero point) · scale, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2^bits values.

    Fields:
        scale: [] or one per output channel, [C, 1, …].
        zero_point: the number, whole or halfway between two, that stands for 0.
        bits: 1 to 16; numbers go from 0 to 2^bits − 1.
    """

    scale: Tensor
    zero_point: float
    bits: int

    def values(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers, in any shape that the scale broadcasts against → values.

        >>> Grid(torch.tensor(0.5), 1.5, 2).values(torch.arange(4), torch.float32)
        tensor([-0.7500, -0.2500,  0.2500,  0.7500])
        """
        return ((numbers.to(self.scale.dtype) - self.zero_point) * self.scale).to(dtype)

    def nonzero(self, numbers: Tensor) -> Tensor:
        """Which numbers stand for another value than 0: none of a scale so small that half of it is 0.

        >>> Grid(torch.tensor([[1.0], [1e-45]]), 0.5, 1).nonzero(torch.tensor([[0, 1], [0, 1]]))
        tensor([[ True,  True],
                [False, False]])
        """
        return self.values(numbers, self.scale.dtype) != 0

    def numbers(self, values: Tensor) -> Tensor:
        """The numbers of the nearest values, as floats; the gradient passes straight through."""
        numbers, last = values.to(self.scale.dtype) / self.scale + self.zero_point, 2.0**self.bits - 1
        if not numbers.requires_grad:
            return numbers.round().clamp(0.0, last)
        from brevitas.function.ops_ste import round_ste, tensor_clamp_ste  # Brevitas takes a second to import

        low, high = self.scale.new_zeros(()), self.scale.new_tensor(last)
        return cast(Tensor, tensor_clamp_ste(round_ste(numbers), low, high))


class FixedGrid(nn.Module):
    """A tensor quantizer whose grid stays: of weights that come from a file, without the floats behind them."""

    scale: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale, persistent=False)
        self.zero_point, self.bits = grid.zero_point, grid.bits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [C, …] → value [C, …], scale, zero point, bit width, as Brevitas has it."""
        grid = Grid(self.scale, self.zero_point, self.bits)
        value = grid.values(grid.numbers(x), x.dtype)
        return value, self.scale, self.scale.new_tensor(self.zero_point), self.scale.new_tensor(self.bits)
