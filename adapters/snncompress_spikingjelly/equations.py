"""The equation of SpikingJelly's plain neurons, and the same in other forms: fast, and in fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from snncompress.extend import Dynamics, Emission, ModelError, StateGrid

from .ancestry import is_multi_step, lives_in


def dynamics(neuron: nn.Module) -> Dynamics:
    """IFNode, LIFNode and ParametricLIFNode: v + (v_reset - v)/τ + x, or x/τ with ``decay_input``."""
    node: Any = neuron
    grid: StateGrid | None = getattr(node, "state_grid", None)
    leak = _leak(node, torch.float64).detach()
    threshold = torch.as_tensor(node.v_threshold, dtype=torch.float64)
    if grid is not None:
        leak, threshold = grid.leak(leak), grid.threshold(threshold).double()
    gain = leak if getattr(node, "decay_input", False) else torch.ones_like(leak)
    return Dynamics(leak, gain, threshold, node.v_reset or 0.0, node.v_reset, inclusive=True)


def make_fast(neuron: nn.Module, emitted: Callable[[Tensor], Emission]) -> None:
    """IFNode, LIFNode and ParametricLIFNode with their step in as few passes over memory as torch allows."""
    d, node = dynamics(neuron), cast(Any, neuron)
    _check_plain(node)
    if hasattr(node, "state_grid"):
        raise ModelError("it computes in fixed point")
    leak, gain, threshold = float(d.leak), float(d.gain), float(d.threshold)
    vars(node)["forward"] = partial(_fast, node, emitted, _Step(leak, gain, leak * d.rest, threshold, d.reset))


def step_on(neuron: nn.Module, grid: StateGrid) -> None:
    """IFNode, LIFNode and ParametricLIFNode."""
    node: Any = neuron
    _leak(node, torch.float32)
    _check_plain(node)
    node.state_grid = grid
    vars(node)["forward"] = partial(_in_fixed_point, node)


def _leak(node: Any, dtype: torch.dtype) -> Tensor:
    """1/τ, with its gradient; raises ModelError for a neuron of another equation."""
    kind = type(node).__name__ if lives_in(type(node), "neuron") else ""
    if kind == "ParametricLIFNode":
        return cast(Tensor, node.w.to(dtype).sigmoid())
    if kind not in ("IFNode", "LIFNode"):
        raise ModelError("of SpikingJelly's neurons IFNode, LIFNode and ParametricLIFNode are known by equation")
    return torch.tensor(1 / node.tau if kind == "LIFNode" else 0.0, dtype=dtype)


def _check_plain(node: Any) -> None:
    if node.store_v_seq or node._neuron_precision is not None:
        raise ModelError("it stores its potentials, or computes in a precision of its own")


@dataclass(frozen=True)
class _Step:
    """v ← (1 - leak) · v + gain · x + drift; it fires where v ≥ threshold, and is reset to ``reset``, else by θ."""

    leak: float
    gain: float
    drift: float
    threshold: float
    reset: float | None

    def __call__(self, v: Tensor | float, x: Tensor, fired: Tensor, *, out: Tensor | None) -> Tensor:
        """The next v, in ``out`` where that is given."""
        if not isinstance(v, Tensor):
            v = torch.add(x * self.gain, (1 - self.leak) * v) if v else x * self.gain
        elif self.gain == self.leak:
            v = torch.lerp(v, x, self.leak, out=out)
        else:
            v = torch.add(x if self.gain == 1 else x * self.gain, v, alpha=1 - self.leak, out=out)
        if self.drift:
            v += self.drift
        torch.ge(v, self.threshold, out=fired)
        if self.reset is None:
            return v.sub_(fired, alpha=self.threshold)
        v.addcmul_(v, fired, value=-1)  # faster than masked_fill_
        return v.add_(fired, alpha=self.reset) if self.reset else v


def _fast(node: Any, emitted: Callable[[Tensor], Emission], step: _Step, x: Tensor) -> Tensor:
    observed = not lives_in(type(node.surrogate_function), "surrogate")
    if observed or node.training or (torch.is_grad_enabled() and x.requires_grad):
        return cast(Tensor, type(node).forward(node, x))
    multi = is_multi_step(node)
    emission = emitted(x if multi else x.unsqueeze(0))
    v, out = node.v, None
    for current, fired in emission.steps():
        v = out = step(v, current, fired, out=out)  # in place from the second step on, as the first v may be kept
    node.v = v
    return emission.spikes if multi else emission.spikes[0]


def _in_fixed_point(node: Any, x: Tensor) -> Tensor:
    """A neuron's call, its potentials on its grid."""
    grid: StateGrid = node.state_grid
    leak = grid.leak(_leak(node, torch.float32))
    gain = leak if getattr(node, "decay_input", False) else 1.0
    multi, v, made = is_multi_step(node), node.v, []
    for current in x if multi else (x,):
        v = grid.charge(v, current, leak, gain, node.v_reset or 0.0)
        spikes = grid.fire(v, node.v_threshold, node.surrogate_function)
        made.append(spikes)
        fired = spikes.detach() if node.detach_reset else spikes
        lost = grid.threshold(node.v_threshold) if node.v_reset is None else v - grid.reset_value(node.v_reset)
        v = v - fired * lost
    node.v = v
    return torch.stack(made) if multi else made[0]
