"""The equations of snnTorch's neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snncompress.extend import Dynamics, ModelError, StateGrid


def leak(neuron: nn.Module) -> Tensor:
    """1 - β of Leaky, RLeaky and Lapicque, however they are reset."""
    if type(neuron).__name__ not in ("Leaky", "RLeaky", "Lapicque"):
        raise ModelError("of snnTorch's neurons Leaky, RLeaky and Lapicque leak in one step alone")
    beta: Tensor = torch.as_tensor(neuron.beta).detach().double()
    return 1 - beta.clamp(0, 1)


def dynamics(neuron: nn.Module) -> Dynamics:
    """Leaky, RLeaky, Synaptic and RSynaptic: β·v + x, where x may be a synaptic current, and have recurrent parts.

    Lapicque leaks by Δt/RC, and takes R times as much of its input.

    θ is subtracted in the next step, from β·v; without delay, once more in the step after where v is still above θ,
    and no equation has that. With delay, all but Leaky are reset to zero in the next step with all that comes in
    then, and no equation has that either.
    """
    node: Any = neuron
    kind = type(node).__name__ if type(node).__module__.startswith("snntorch._neurons.") else ""
    if kind not in ("Leaky", "RLeaky", "Lapicque", "Synaptic", "RSynaptic"):
        raise ModelError("of snnTorch's neurons Leaky, RLeaky, Lapicque, Synaptic and RSynaptic are known by equation")
    after = not getattr(node, "reset_delay", True)
    odd = {
        **unlike(node),
        "reset_mechanism='none'": node.reset_mechanism == "none",
        "a negative threshold": after and bool((node.threshold < 0).any()),
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise ModelError(f"{found[0]} isn't part of the leaky neuron's equation")
    grid: StateGrid | None = getattr(node, "state_grid", None)
    leak, gain = (torch.as_tensor(value).detach().double() for value in leak_and_gain(node))
    threshold = node.threshold.detach().double()
    if grid is not None:
        leak, threshold = grid.leak(leak), grid.threshold(threshold).double()
    reset = None if node.reset_mechanism == "subtract" else 0.0
    if reset is None and after:
        raise ModelError(
            "with reset_delay=False it subtracts the threshold twice where the potential is above twice as much. "
            "Use reset_delay=True, snnTorch's default, or reset_mechanism='zero', and fine-tune"
        )
    if reset is not None and not after and kind != "Leaky":
        raise ModelError(
            "when it is reset to zero it also forgets the input of the step after the spike. Use "
            "reset_mechanism='subtract', snnTorch's default, or reset_delay=False, and fine-tune"
        )
    alpha = node.alpha.detach().double().clamp(0, 1) if hasattr(node, "alpha") else None
    if grid is not None and alpha is not None:
        alpha = 1 - grid.leak(1 - alpha)
    recurrent = getattr(node, "recurrent", None)
    if recurrent is not None and not isinstance(recurrent, (nn.Linear, nn.Conv2d)):  # one-to-one
        recurrent = torch.as_tensor(recurrent.V)
    return Dynamics(leak, gain, threshold, 0.0, reset, False, reset is None, alpha, recurrent)


def kind_of(node: nn.Module, kinds: tuple[str, ...] = ("Leaky", "Lapicque")) -> str:
    """Which of snnTorch's own classes it is; none of them: empty."""
    kind = type(node).__name__ if type(node).__module__.startswith("snntorch._neurons.") else ""
    return kind if kind in kinds else ""


def unlike(node: Any) -> dict[str, bool]:
    """What may make a neuron another than its equation says, and whether it does."""
    return {
        "inhibition=True": bool(node.inhibition),
        "state_quant": bool(node.state_quant),
        "graded_spikes_factor": bool((node.graded_spikes_factor != 1).any()),
    }


def leak_and_gain(node: Any) -> tuple[Any, Any]:
    """v ← v + leak · (0 - v) + gain · x."""
    if kind_of(node) == "Lapicque":
        leak = node.time_step / (node.R * node.C)
        return leak, node.R * leak
    return 1 - node.beta.clamp(0, 1), 1.0
