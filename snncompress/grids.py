"""Quantized weights as numbers on a grid, value = (number − zero point) · scale, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .parametrizations import CompressedWeight


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

    def numbers(self, values: Tensor) -> Tensor:
        """The numbers of the nearest values, as floats; the gradient passes straight through."""
        from brevitas.function.ops_ste import round_ste, tensor_clamp_ste  # Brevitas takes a second to import

        numbers = round_ste(values.to(self.scale.dtype) / self.scale + self.zero_point)
        low, high = self.scale.new_zeros(()), self.scale.new_tensor(2.0**self.bits - 1)
        return cast(Tensor, tensor_clamp_ste(numbers, low, high))


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


def gridded(compression: CompressedWeight, stored: Tensor) -> tuple[Grid, Tensor] | None:
    """The grid of a quantized layer's weight, and the number of each weight, output channels first.

    None where the values don't come from a grid of 2^bits values. Removed weights have any number.
    """
    if compression.tensor_quant is None or compression.bits is None:
        return None
    with torch.no_grad():
        value = compression.turned(compression(stored)).contiguous()
        made: Any = compression.tensor_quant(compression.turned(compression.masked(stored)))
        scale = made[1].detach()
        if made[2].numel() != 1 or tuple(scale.shape) not in ((), (len(value), *[1] * (value.dim() - 1))):
            return None
        zero_point = float(made[2])
        kept = torch.ones_like(value, dtype=torch.bool)
        if compression.mask is not None:
            kept = compression.turned(compression.mask)
        whole = torch.round(value.to(scale.dtype) / scale + zero_point)[kept]
        span = 2**compression.bits
        low = float(whole.min()) if whole.numel() else 0.0
        for start in (0.0, -span / 2, low):  # unsigned, signed, or whatever there is
            grid = Grid(scale, zero_point - start, compression.bits)
            numbers = grid.numbers(value)
            if torch.equal(grid.values(numbers, value.dtype)[kept], value[kept]):
                return grid, numbers
    return None


def hold(compression: CompressedWeight, grid: Grid) -> None:
    """Quantize to this grid from now on."""
    compression.tensor_quant = FixedGrid(grid).train(compression.training)
