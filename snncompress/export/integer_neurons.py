"""Neurons that count in whole numbers: what a network in fixed point does, without a float.

    y = M · Σ k s + B + A · q - reset              in units of 2^-24, sums of 64 bits
    q ← saturate((|y| + 2^23 - 1 - 2^12) >> 24, with the sign of y);  it fires where q ≥ θ, or q > θ

The scale of a layer's weights, the gain of the neuron and its step δ are one multiplier M per channel, and what the
bias adds is B: with weights and potentials on one scale, M is a power of two. The same as
:class:`~snncompress.model.fixed_point.FixedPoint`, number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import ModelError
from snncompress.interfaces import Dynamics
from snncompress.model.fixed_point import LEAK_BITS, TIE, FixedPoint, nearest
from snncompress.model.spikes import Spikes

FRACTION = 24
"""Bits behind the point while a sum is made."""
_ONE = 2**FRACTION
ROUNDING = _ONE // 2 - 1 - round(_ONE * TIE)
"""What is added before the fraction is cut off: to the nearest, ties towards 0."""


class IntegerGrid(nn.Module):
    """The :class:`~snncompress.interfaces.StateGrid` of the neurons of that name, in whole numbers of their step δ.

    Of the currents that it gets, one means ``unit``, [C]; ``bias`` [C] comes on top in each timestep. A current in
    floats, which only a network's first layer may put out, goes to a fixed point first. A synaptic current is one more
    of the kind, which counts in the same steps and doesn't fire.
    """

    current: IntegerGrid | None

    multiplier: Tensor
    bias: Tensor
    decay: Tensor
    shift: Tensor
    theta: Tensor
    rest: Tensor
    scale: Tensor
    step: Tensor
    leaky: Tensor

    def __init__(
        self, name: str, grid: FixedPoint, dynamics: Dynamics, unit: Tensor, bias: Tensor, dims: int, *, analog: bool
    ) -> None:
        super().__init__()
        self.neuron = name
        self.bits, self.overflow, self.leaks = grid.bits, grid.overflow, grid.leaks
        self.inclusive, self.late, self.resets = dynamics.inclusive, dynamics.late, dynamics.reset is not None
        self.current = None
        if dynamics.synapse is not None:
            alone = replace(dynamics, leak=1 - dynamics.synapse, gain=torch.ones(()), synapse=None)
            self.current = IntegerGrid(name, grid, alone, unit, bias, dims, analog=analog)
            unit, bias, analog = grid.step.flatten(), torch.zeros(1), False
        self.analog = analog
        d, shape, step = dynamics, (-1, *[1] * dims), grid.step.double()
        per_step = d.gain.double() / step * _ONE
        whole = {
            "multiplier": unit.double().view(shape) * per_step,
            "bias": bias.double().view(shape) * per_step + d.leak.double() * d.rest / step * _ONE,
            "decay": (1 - d.leak.double()) * 2**LEAK_BITS,
            "shift": -torch.log2(d.leak.double().clamp_min(2.0**-LEAK_BITS)),
            "theta": d.threshold.double() / step,
            "rest": nearest((d.reset or 0.0) / step).clamp(-grid.top - 1, grid.top - 1),
        }
        for name, value in whole.items():  # of one axis at least: products of bytes with a scalar are bytes
            self.register_buffer(name, value.round().long().view(value.shape or (1,)))
        self.register_buffer("leaky", d.leak > 0)
        self.register_buffer("step", grid.step)
        self.register_buffer("scale", per_step)

    @property
    def synapse(self) -> IntegerGrid:
        """That of the current."""
        return self if self.current is None else self.current

    def leak(self, leak: Tensor | float) -> None:
        """It is known."""

    def threshold(self, threshold: Tensor | float) -> Tensor:
        """The number."""
        return self.theta

    def reset_value(self, value: float) -> Tensor:
        """The number."""
        return self.rest

    def charge(self, v: Any, x: Tensor, leak: Any, gain: Any, rest: float = 0.0, less: Any = None) -> Tensor:
        """Sums of spikes [N, C, …], int32 → numbers of δ, int32."""
        if not x.is_floating_point():
            y = x.long() * self.multiplier + self.bias
        elif self.analog:
            y = torch.round(x.double() * self.scale).long() + self.bias
        else:
            raise ModelError(
                f"what the layer before {self.neuron} sums up reaches it as floats: something between computes in "
                f"float, or the layer reads something else than spikes. Take integer='auto', which leaves such layers "
                f"in float."
            )
        q = v.long() if isinstance(v, Tensor) and not v.is_floating_point() else self.rest
        if self.leaks == "shift":
            y = y + ((q - torch.where(self.leaky, q >> self.shift, 0)) << FRACTION)
        else:
            y = y + ((q * self.decay) << (FRACTION - LEAK_BITS))
        if less is not None:
            y = y - (less.long() << FRACTION)
        number = torch.sign(y) * ((y.abs() + ROUNDING) >> FRACTION)
        half = 2 ** (self.bits - 1)
        saturates = self.overflow == "saturate"
        held: Tensor = number.clamp(-half, half - 1) if saturates else torch.remainder(number + half, 2 * half) - half
        return held.int()

    def fire(self, v: Tensor, threshold: Any, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        """A byte each."""
        return (v >= self.theta if self.inclusive else v > self.theta).to(torch.uint8)

    def extra_repr(self) -> str:
        """Settings."""
        return f"bits={self.bits}, overflow={self.overflow!r}, leak={self.leaks!r}"


def count_in_numbers(neuron: nn.Module, grid: IntegerGrid) -> None:
    """Let a neuron put out spikes as the network wants them, and hand on states as floats, also back to itself.

    Inside they are numbers of δ.
    """
    neuron.register_forward_pre_hook(partial(_numbered, grid), with_kwargs=True)
    neuron.register_forward_hook(partial(_handed_on, grid))


def _numbered(grid: IntegerGrid, neuron: nn.Module, args: Any, named: Any) -> Any:
    def number(state: Any) -> Any:
        is_float = isinstance(state, Tensor) and state.is_floating_point()
        known = is_float and state.dim() and state.numel()  # else it is what stands for a state that isn't there yet
        return nearest(state.double() / grid.step.double()).int() if known else state

    return (*args[:1], *map(number, args[1:])), {name: number(state) for name, state in named.items()}


def _handed_on(grid: IntegerGrid, neuron: nn.Module, args: Any, output: Any) -> Any:
    spikes, *states = output if isinstance(output, tuple) else (output,)
    if isinstance(spikes, Tensor) and spikes.dtype == torch.uint8:
        spikes = Spikes(spikes)
    floats = [q.to(grid.step.dtype) * grid.step if q.dtype == torch.int32 else q for q in states]
    return (spikes, *floats) if isinstance(output, tuple) else spikes
