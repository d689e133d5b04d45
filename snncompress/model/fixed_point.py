"""The state of a neuron in fixed point: potentials, thresholds and leaks as whole numbers of b bits.

    q ← saturate(round((1 - leak) · q + gain · x / δ))        v = δ · q,  threshold = δ · round(θ / δ)

A membrane potential and what it is compared with and reset to lie on one grid of step δ, one for a whole layer or one
per channel. What a layer adds up, its bias in it, is rounded once in a timestep, with the leaked potential. Ties go
towards 0, so that a potential that leaks by halves comes to rest there. Where δ is the step of the layer's own weights
(or a half of it, a quarter, …), sums of weights are whole already, and nothing but the leak is rounded: after MINT
(Yin et al., ASP-DAC 2024), in which weights and potentials share one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter

from .modules import without

Overflow = Literal["saturate", "wrap"]
Leak = Literal["exact", "shift"]

LEAK_BITS = 12
"""A leak is a multiple of 2^-12."""
TIE = 2.0**-12
"""What is so near to a tie counts as one: a float of 32 bits misses one by less."""
_NARROW = 12
"""Bits of a state whose arithmetic is exact in float32."""


class FixedPoint(nn.Module):
    """The fixed-point grid of one population of neurons: a :class:`~snncompress.interfaces.StateGrid` in floats.

    Potentials are floats on the grid, v = δ · q with q from -2^(bits-1) to 2^(bits-1) - 1; gradients pass straight
    through rounding and saturating. ``step`` is δ, [] or [C, 1, …] along the channels of [N, C, …].

    >>> grid = FixedPoint(torch.tensor(0.25), 4)
    >>> grid.charge(torch.tensor([1.0, 1.0]), torch.tensor([0.2, 9.0]), grid.leak(0.5), 1.0)
    tensor([0.7500, 1.7500])
    >>> grid.threshold(0.9), grid.leak(1 / 3)
    (tensor(1.), tensor(0.3333))
    """

    step: Tensor

    def __init__(self, step: Tensor, bits: int, overflow: Overflow = "saturate", leak: Leak = "exact") -> None:
        super().__init__()
        self.register_buffer("step", step, persistent=False)
        self.bits, self.overflow, self.leaks = bits, overflow, leak

    @property
    def top(self) -> int:
        """The largest number."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def synapse(self) -> FixedPoint:
        """Itself: a current lies on the grid of its potential."""
        return self

    def leak(self, leak: Tensor | float) -> Tensor:
        """The nearest multiple of 2^-12, or with a shift the nearest 2^-k; 0 stays 0."""
        exact = torch.as_tensor(leak, device=self.step.device)
        if self.leaks == "exact":
            return _straight(exact, torch.round(exact.detach() * 2**LEAK_BITS) / 2**LEAK_BITS)
        k = torch.round(-torch.log2(exact.detach().clamp_min(2.0**-LEAK_BITS))).clamp(0, LEAK_BITS)
        return _straight(exact, torch.where(exact.detach() > 0, 2.0**-k, 0.0).to(exact.dtype))

    def threshold(self, threshold: Tensor | float) -> Tensor:
        """The nearest value that a potential can exceed."""
        return self._near(threshold)

    def reset_value(self, value: float) -> Tensor:
        """The nearest value."""
        return self._near(value)

    def charge(
        self, v: Tensor | float, x: Tensor, leak: Tensor, gain: Tensor | float, rest: float = 0.0, less: Any = None
    ) -> Tensor:
        """[N, C, …] of x's dtype: in float32, whose multiples of δ are exact to 20 bits or so."""
        work = torch.promote_types(x.dtype, torch.float32 if self.bits <= _NARROW else torch.float64)
        step = self.step.to(work)
        held = _whole(torch.as_tensor(v, dtype=work, device=x.device) / step)
        gone = held * leak.to(work)
        if self.leaks == "shift":
            gone = _straight(gone, torch.floor(gone.detach()))  # q >> k
        drive = x.to(work) * gain
        if rest:
            drive = drive + leak.to(work) * rest
        made = held - gone + drive / step
        if less is not None:
            made = made - _whole(less.to(work) / step)
        return self._values(_straight(made, self.within(nearest(made.detach()))), x.dtype)

    def fire(self, v: Tensor, threshold: Tensor | float, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        """What the surrogate function makes of the difference, a whole number of steps."""
        step = self.step.to(torch.promote_types(v.dtype, torch.float32))
        apart = _whole(v / step) - _whole(self.threshold(threshold) / step)
        return surrogate((apart * step).to(self.step.dtype))

    def within(self, numbers: Tensor) -> Tensor:
        """What a register of so many bits holds of them."""
        if self.overflow == "saturate":
            return numbers.clamp(-self.top - 1, self.top)
        half = float(self.top + 1)
        return torch.remainder(numbers + half, 2 * half) - half

    def extra_repr(self) -> str:
        """Settings."""
        return f"bits={self.bits}, overflow={self.overflow!r}, leak={self.leaks!r}"

    def _near(self, value: Tensor | float) -> Tensor:
        exact = torch.as_tensor(value, dtype=self.step.dtype, device=self.step.device)
        numbers = nearest(exact.detach() / self.step).clamp(-self.top - 1, self.top - 1)
        return _straight(exact, self._values(numbers, self.step.dtype))

    def _values(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return (numbers * self.step.to(numbers.dtype)).to(dtype)


def state_grid(neuron: nn.Module) -> FixedPoint | None:
    """The grid that a neuron computes on, or None.

    >>> state_grid(nn.Identity())
    """
    found = getattr(neuron, "state_grid", None)
    return found if isinstance(found, FixedPoint) else None


def remove_channels(adapter: Adapter, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
    """As the adapter does it; a grid loses the channels' steps, if the adapter left them."""
    adapter.remove_channels(neuron, indices, width=width, axis=axis)
    grid = state_grid(neuron)
    if grid is not None and grid.step.dim() and grid.step.shape[axis] == width:
        grid.step = without(grid.step, indices, axis)


def nearest(x: Tensor) -> Tensor:
    """The nearest whole numbers; ties, and what is within 2^-12 above them, go towards 0.

    >>> nearest(torch.tensor([0.5, 1.5001, -2.5, 1.6]))
    tensor([ 0.,  1., -2.,  2.])
    """
    return torch.sign(x) * torch.ceil(x.abs() - (0.5 + TIE)) + 0.0  # not -0


def _whole(numbers: Tensor) -> Tensor:
    """Numbers that are whole but for a float's rounding."""
    return _straight(numbers, torch.round(numbers.detach()))


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of x."""
    if not x.requires_grad:
        return value
    made: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return made


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        if value.shape != x.shape:
            ctx.shape = x.shape
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.sum_to_size(ctx.shape) if hasattr(ctx, "shape") else gradient, None
