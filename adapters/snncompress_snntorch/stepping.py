"""Neurons of snnTorch in other forms of the same equation: fast, and in fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.extend import Emission, ModelError, StateGrid

from .equations import kind_of, leak_and_gain, unlike

_TWICE = "reset_delay=False with reset_mechanism='subtract'"
_ALPHA = "; Alpha keeps no potential, but makes it anew of two currents, which its reset mixes with the input"


def make_fast(neuron: nn.Module, emitted: Callable[[Tensor], Emission]) -> None:
    """Leaky and Lapicque, with all three resets; with ``reset_delay``, or reset to zero."""
    node: Any = neuron
    kind = kind_of(node)
    if not kind:
        raise ModelError("of snnTorch's neurons Leaky and Lapicque have a fast form")
    after = not getattr(node, "reset_delay", True)
    odd = {
        **unlike(node),
        "a threshold below 0": bool((node.threshold < 0).any()),
        _TWICE: after and node.reset_mechanism == "subtract",
        "fixed-point states": hasattr(node, "state_grid"),
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise ModelError(f"a neuron with {found[0]} has no fast form")
    gain: Tensor | None = None
    if kind == "Leaky":
        decay = node.beta.detach().clamp(0, 1)
    else:
        decay = torch.as_tensor(1 - node.time_step / (node.R * node.C)).detach()
        gain = torch.as_tensor(node.R * (1 / (node.R * node.C)) * node.time_step).detach()
    if not isinstance(node.spike_grad, _Surrogate):
        node.spike_grad = _Surrogate(node.spike_grad)
    wipes = kind == "Lapicque"
    step = _Step(_plain(decay), _plain(gain), _plain(node.threshold.detach()), node.reset_mechanism, after, wipes)
    vars(node)["forward"] = partial(_fast, node, emitted, step)


def step_on(neuron: nn.Module, grid: StateGrid) -> None:
    """Leaky, Lapicque and Synaptic, with all three resets; with ``reset_delay``, or of Leaky reset to zero.

    Synaptic's current lies on the grid of its membrane potential.
    """
    node: Any = neuron
    kind = kind_of(node, ("Leaky", "Lapicque", "Synaptic"))
    if not kind:
        why = _ALPHA if kind_of(node, ("Alpha",)) else ""
        raise ModelError(f"of snnTorch's neurons Leaky, Lapicque and Synaptic have a fixed-point form{why}")
    after = not getattr(node, "reset_delay", True)
    odd = {
        **unlike(node),
        _TWICE: after and node.reset_mechanism == "subtract",
        "reset_delay=False": after and kind == "Synaptic",
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise ModelError(f"a neuron with {found[0]} has no fixed-point form")
    node.state_grid = grid
    vars(node)["forward"] = partial(_in_fixed_point_twice if kind == "Synaptic" else _in_fixed_point, node)


def above_zero(x: Tensor) -> Tensor:
    """Spikes, as the surrogate functions have them, with no gradient."""
    return (x > 0).to(x.dtype)


@dataclass(frozen=True)
class _Step:
    """m ← decay · m + gain · x; it fires where m > threshold, and is reset in the next step, or at the end of this one.

    A reset to zero takes the potential alone, or with ``wipes``, as Lapicque has it, the next input too.
    """

    decay: Tensor | float
    gain: Tensor | float | None
    threshold: Tensor | float
    reset: str
    after: bool
    wipes: bool

    def __call__(self, m: Tensor, x: Tensor, fired: Tensor) -> Tensor:
        """The next m; ``fired`` is filled."""
        x = x if self.gain is None else x * self.gain
        late = self.reset != "none" and not self.after
        if late:
            torch.gt(m, self.threshold, out=fired)
        if late and self.reset == "zero" and not self.wipes:
            m = torch.addcmul(m, m, fired, value=-1)
        m = torch.add(x, m, alpha=self.decay) if isinstance(self.decay, float) else m * self.decay + x
        if late and self.reset == "subtract":
            if isinstance(self.threshold, float):
                m.sub_(fired, alpha=self.threshold)
            else:
                m.addcmul_(fired, self.threshold, value=-1)
        if late and self.wipes and self.reset == "zero":
            m.addcmul_(m, fired, value=-1)
        torch.gt(m, self.threshold, out=fired)
        return m.addcmul_(m, fired, value=-1) if self.after and self.reset == "zero" else m


class _Surrogate:
    """A surrogate function, which in snnTorch can't be pickled; from a file comes the comparison alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(x)

    def __deepcopy__(self, memo: Any) -> _Surrogate:
        return self

    def __reduce__(self) -> Any:
        return _Surrogate, (above_zero,)


def _plain(value: Tensor | None) -> Any:
    """A number where there is one."""
    return float(value) if value is not None and value.numel() == 1 else value


def _fast(
    node: Any, emitted: Callable[[Tensor], Emission], step: _Step, input_: Tensor, mem: Tensor | None = None
) -> Any:
    observed = "fire" in vars(node)
    if observed or (torch.is_grad_enabled() and (input_.requires_grad or (mem is not None and mem.requires_grad))):
        return type(node).forward(node, input_, mem)
    if node.init_hidden and mem is not None:
        raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
    emission = emitted(input_.unsqueeze(0))
    mem = node.mem if mem is None else mem
    for current, fired in emission.steps():
        mem = step(mem if mem.shape == current.shape else torch.zeros_like(current), current, fired)
    node.mem = mem
    spikes = emission.spikes[0]
    return spikes if node.init_hidden and not node.output else (spikes, mem)


def _in_fixed_point(node: Any, input_: Tensor, mem: Tensor | None = None) -> Any:
    """A neuron's call, its potentials on its grid."""
    grid: StateGrid = node.state_grid
    if node.init_hidden and mem is not None:
        raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
    lapicque, reset = kind_of(node) == "Lapicque", node.reset_mechanism
    leak, gain = leak_and_gain(node)
    mem = node.mem if mem is None else mem
    mem = mem if mem.shape == input_.shape else torch.zeros_like(input_)
    theta = node.threshold
    fired = grid.fire(mem, theta, lambda x: node.spike_grad(x).detach())
    if reset == "zero" and not lapicque:
        mem = mem - fired * mem
    less = fired * grid.threshold(theta) if reset == "subtract" else None
    mem = grid.charge(mem, input_, grid.leak(leak), gain, less=less)
    if reset == "zero" and lapicque:
        mem = mem - fired * mem
    spikes = grid.fire(mem, theta, lambda x: node.fire(x + theta))
    if reset == "zero" and not getattr(node, "reset_delay", True):
        mem = mem - spikes * mem
    node.mem = mem
    return spikes if node.init_hidden and not node.output else (spikes, mem)


def _in_fixed_point_twice(node: Any, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
    """A call of Synaptic, both its states on its grid; a reset to zero takes the potential, and what has just come."""
    grid: StateGrid = node.state_grid
    if node.init_hidden and (syn is not None or mem is not None):
        raise TypeError("`mem` or `syn` should not be passed as an argument while `init_hidden=True`")
    before = [node.syn if syn is None else syn, node.mem if mem is None else mem]
    syn, mem = (state if state.shape == input_.shape else torch.zeros_like(input_) for state in before)
    theta, reset = node.threshold, node.reset_mechanism
    fired = grid.fire(mem, theta, lambda x: node.spike_grad(x).detach())
    less = fired * grid.threshold(theta) if reset == "subtract" else None
    syn = grid.synapse.charge(syn, input_, grid.leak(1 - node.alpha.clamp(0, 1)), 1.0)
    mem = grid.charge(mem, syn, grid.leak(1 - node.beta.clamp(0, 1)), 1.0, less=less)
    if reset == "zero":
        mem = mem - fired * mem
    spikes = grid.fire(mem, theta, lambda x: node.fire(x + theta))
    node.syn, node.mem = syn, mem
    return spikes if node.init_hidden and not node.output else (spikes, syn, mem)
