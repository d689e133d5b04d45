"""A frozen network's neurons fire as the framework's own, remember the same, and step back where they are observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snncompress_snntorch.adapter import SNNTorchAdapter
from snncompress_spikingjelly.adapter import SpikingJellyAdapter
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snncompress import ModelError
from snncompress.model.modules import tensors_in
from snncompress.model.spikes import Emitted, EmittedBytes, Spikes, in_float

STEPS = 3 * torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).contiguous()
CHANNELS = torch.tensor([0.3, 0.7, 1.1]).view(3, 1, 1)

JELLY: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "IF, soft": lambda: neuron.IFNode(v_threshold=0.7, v_reset=None),
    "IF, reset elsewhere": lambda: neuron.IFNode(v_reset=-0.4),
    "LIF": lambda: neuron.LIFNode(tau=3.0),
    "LIF, soft": lambda: neuron.LIFNode(v_reset=None, v_threshold=0.3),
    "LIF, rest elsewhere": lambda: neuron.LIFNode(tau=2.5, v_reset=0.2),
    "LIF, whole input": lambda: neuron.LIFNode(tau=2.5, decay_input=False, v_reset=0.1),
    "PLIF": lambda: neuron.ParametricLIFNode(init_tau=1.4),
}
TORCH: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{kind.__name__}, {reset}": lambda kind=kind, reset=reset: kind(
            beta=0.7, init_hidden=True, reset_mechanism=reset, threshold=0.6
        )
        for kind in (snn.Leaky, snn.Lapicque)
        for reset in ("subtract", "zero", "none")
    },
    "per channel": lambda: snn.Leaky(beta=CHANNELS / 2, threshold=CHANNELS, init_hidden=True),
    "at once": lambda: snn.Leaky(beta=0.6, init_hidden=True, reset_mechanism="zero", reset_delay=False),
    "both out": lambda: snn.Leaky(beta=0.9, init_hidden=True, output=True),
}


def ran(node: nn.Module, steps: Tensor = STEPS) -> list[Tensor]:
    """What the neuron puts out and remembers, step by step."""
    found = []
    with torch.no_grad():
        for x in steps:
            found += list(tensors_in(node(x)))
            found += [state for name, state in vars(node).get("_memories", {}).items() if name == "v"]
            found += [state for name, state in node.named_buffers() if name == "mem"]
    return [in_float(t).clone() for t in found]


def compared(node: nn.Module, adapter: Any, steps: Tensor = STEPS) -> None:
    wanted = ran(node, steps)
    assert 0 < sum(float((t == 1).double().mean()) for t in wanted) < len(wanted)
    before = steps.clone()
    for emitted in (Emitted, EmittedBytes):
        adapter.make_fast(node, emitted)
        adapter.reset(node)
        made = ran(node, steps)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(made, wanted, strict=True))
    with torch.no_grad():
        assert isinstance(next(tensors_in(node(steps[0]))), Spikes)
    assert torch.equal(steps, before)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("kind", JELLY)
def test_spikingjelly(kind: str, mode: str) -> None:
    node: Any = JELLY[kind]().eval()
    node.step_mode = mode
    compared(node, SpikingJellyAdapter(), STEPS if mode == "s" else STEPS.unsqueeze(0).repeat(2, 1, 1, 1, 1, 1))


@pytest.mark.parametrize("kind", TORCH)
def test_snntorch(kind: str) -> None:
    compared(TORCH[kind]().eval(), SNNTorchAdapter())


def test_snntorch_with_the_potential_handed_in() -> None:
    node, adapter = snn.Leaky(beta=0.8).eval(), SNNTorchAdapter()

    def loop() -> list[Tensor]:
        mem, found = torch.zeros(0), []
        with torch.no_grad():
            for x in STEPS:
                spikes, mem = node(x, mem)
                found += [in_float(spikes), mem]
        return found

    wanted = loop()
    adapter.make_fast(node, EmittedBytes)
    adapter.reset(node)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loop(), wanted, strict=True))


@pytest.mark.parametrize(
    ("node", "adapter", "said"),
    [
        (neuron.QIFNode(), SpikingJellyAdapter(), "known by equation"),
        (neuron.LIFNode(store_v_seq=True), SpikingJellyAdapter(), "stores its potentials"),
        (snn.Synaptic(alpha=0.5, beta=0.5), SNNTorchAdapter(), "have a fast form"),
        (snn.Leaky(beta=0.5, reset_delay=False), SNNTorchAdapter(), "reset_delay=False"),
        (snn.Leaky(beta=0.5, graded_spikes_factor=2.0), SNNTorchAdapter(), "graded_spikes_factor"),
        (snn.Leaky(beta=0.5, threshold=-1.0), SNNTorchAdapter(), "threshold below 0"),
    ],
)
def test_others_stay_as_they_are(node: nn.Module, adapter: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        adapter.make_fast(node, Emitted)
    assert "forward" not in vars(node)


@pytest.mark.parametrize(
    ("node", "adapter"),
    [(neuron.LIFNode().eval(), SpikingJellyAdapter()), (snn.Leaky(beta=0.5, init_hidden=True), SNNTorchAdapter())],
)
def test_observed_or_differentiated_they_compute_as_they_did(node: Any, adapter: Any) -> None:
    x = STEPS[0].clone().requires_grad_()
    adapter.make_fast(node, EmittedBytes)
    assert node(x).requires_grad
    adapter.reset(node)
    seen: list[Tensor] = []
    stop = adapter.observe(node, lambda s, u: seen.extend([s, u]), membrane=True)
    with torch.no_grad():
        node(STEPS[0])
    stop()
    assert len(seen) == 2
    assert bool((seen[1][seen[0] == 1] >= 1).all())
    adapter.reset(node)
    with torch.no_grad():
        assert isinstance(node(STEPS[0]), Spikes)
    adapter.make_traceable(node)
    assert "forward" not in vars(node)
