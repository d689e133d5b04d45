"""All of SpikingJelly's neurons, also those that don't derive from BaseNode: pruned, read, priced as spikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, snapshot
from tests.equivalence import same as unchanged

T = 4
X, Y = torch.rand(T, 3, 1, 6, 6), torch.arange(3)


class Theta(neuron.SimpleBaseNode):
    """A threshold per channel held as a memory, as SpikingJelly's maintainers advise; or as a plain tensor."""

    def __init__(self, channels: int, *, plain: bool = False) -> None:
        super().__init__(step_mode="m")
        theta = torch.linspace(0.2, 0.6, channels).view(-1, 1, 1)
        if plain:
            self.theta = theta
        else:
            self.register_memory("theta", theta)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.5 + x

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.theta)


def gated(channels: int, channel_wise: bool) -> nn.Module:
    node = neuron.GatedLIFNode(T=T, inplane=channels if channel_wise else None, init_v_threshold=0.3)
    for parameter in node.parameters():
        parameter.data += 0.3 * torch.rand_like(parameter)
    return node


def parallel(kind: type[nn.Module], *args: Any, **named: Any) -> nn.Module:
    node = kind(*args, **named)
    nn.init.constant_(node.bias, -0.2)
    return node


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "PSN": lambda c: parallel(neuron.PSN, T=T),
    "PSN of as many steps as channels": lambda c: parallel(neuron.PSN, T=T),
    "MaskedPSN": lambda c: parallel(neuron.MaskedPSN, k=2, T=T, lambda_init=1.0, step_mode="m"),
    "SlidingPSN": lambda c: parallel(neuron.SlidingPSN, k=2, step_mode="m"),
    "GatedLIF": lambda c: gated(c, False),
    "GatedLIF per channel": lambda c: gated(c, True),
    "DSRIF": lambda c: neuron.DSRIFNode(T=T, v_threshold=1.0),
    "DSRLIF": lambda c: neuron.DSRLIFNode(T=T, v_threshold=0.2, tau=1.0, delta_t=1.0),
    "memory per channel": lambda c: Theta(c),
    "tensor per channel": lambda c: Theta(c, plain=True),
    "KLIF": lambda c: neuron.KLIFNode(step_mode="m", v_threshold=0.3),
    "PLIF": lambda c: neuron.ParametricLIFNode(step_mode="m", v_threshold=0.3),
    "CLIF": lambda c: neuron.ComplementaryLIFNode(step_mode="m", v_threshold=0.3),
    "ternary": lambda c: neuron.TernaryIFNode(step_mode="m", v_threshold=0.3),
    "ILIF": lambda c: neuron.ILIFNode(step_mode="m"),
}
READABLE = [kind for kind in KINDS if not kind.startswith("DSR") and kind not in ("ternary", "ILIF")]


def net(kind: str, head: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    torch.manual_seed(0)
    np.random.seed(0)  # GatedLIFNode draws from there
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), KINDS[kind](8), layer.Conv2d(8, 4, 3, padding=1), KINDS[kind](4),
        layer.Flatten(), layer.Linear(4 * 36, 5), head(),
    )  # fmt: skip
    with torch.no_grad():
        for index in (0, 2):
            model[index].weight.mul_(4)
    for module in model.modules():
        if isinstance(module, (layer.Conv2d, layer.Linear, layer.Flatten)):
            module.step_mode = "m"
    return model.eval()


def run(model: nn.Module) -> Tensor:
    find_adapter(model).reset(model)
    with torch.no_grad(), find_adapter(model).differentiable(model):
        out = model(X)
    find_adapter(model).reset(model)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_equals_silenced(kind: str) -> None:
    model = net(kind)
    before = snapshot(model)
    rates: list[float] = []
    for index in (1, 3):
        model[index].register_forward_hook(lambda m, a, out: rates.append(float(out.ne(0).double().mean())))
    run(model)
    assert min(rates) > 0.02
    for module in model:
        module._forward_hooks.clear()
    for criterion in ("firing_rate", "svs", "taylor", "random"):
        small = snncompress.apply(
            model, criterion, 0.5, 4 if criterion == "svs" else None, data=(X, Y), skip=[], repair=None
        )
        gone = snncompress.plan_of(small).removed_channels()
        assert [len(small[i].weight) for i in (0, 2)] == [4, 2]
        if criterion == "svs":
            continue
        silenced = net(kind)
        for index in (0, 2):
            indices = torch.tensor(gone[str(index)])
            silenced[index + 1].register_forward_hook(lambda m, a, out, i=indices: out.index_fill(2, i, 0.0))
        assert torch.allclose(run(small), run(silenced), atol=1e-5)
        again = snncompress.plan_of(small).apply(net(kind))
        assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
def test_what_neurons_put_out_is_priced_as_spikes(kind: str) -> None:
    model = net(kind)
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run(model)
    table = snncompress.profile(model, X)
    assert table.is_spiking
    assert [row.kind for row in table.layers if row.name in ("1", "3")] == ["neuron", "neuron"]
    row = next(row for row in table.layers if row.name == "1")
    height = seen[0].abs().max() if kind.startswith("DSR") else 1
    assert row.firing_rate == pytest.approx(float((seen[0].abs() / height).mean()))
    if seen[0].abs().max() == 1:
        assert table.layers[2].n_mac == 0 < table.layers[2].n_ac
    assert table.n_samples == 3


@pytest.mark.parametrize("kind", KINDS)
def test_membranes(kind: str) -> None:
    """Ũ ≥ θ where it fires, and nowhere else; sca takes it."""
    model = net(kind)
    adapter = find_adapter(model)
    if kind not in READABLE:
        with pytest.raises(ModelError, match=r"membrane potential of a \w+ can't be read"):
            snncompress.apply(model, "sca", 0.5, None, data=X, skip=[], repair=None)
        return
    small = snncompress.apply(model, "sca", 0.5, None, data=X, skip=[], repair=None)
    assert [len(small[i].weight) for i in (0, 2)] == [4, 2]
    seen: list[tuple[Tensor, Tensor]] = []
    stop = adapter.observe(model[1], lambda s, u: seen.append((s.clone(), u.clone())), membrane=True)
    out: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda m, a, y: out.append(y))
    plain = run(model)
    stop()
    handle.remove()
    spikes, potential = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert spikes.shape == potential.shape == out[0].shape
    assert torch.equal(spikes, out[0])
    assert float(potential[spikes == 1].mean()) > float(potential[spikes == 0].mean())
    assert torch.equal(plain, run(model))


def test_the_potential_of_a_parallel_neuron_is_what_it_computes() -> None:
    model = net("PSN")
    node, seen = model[1], []
    stop = find_adapter(model).observe(node, lambda s, u: seen.append(u), membrane=True)
    currents: list[Tensor] = []
    handle = node.register_forward_pre_hook(lambda m, args: currents.append(args[0]))
    run(model)
    stop()
    handle.remove()
    expected = torch.einsum("ts,s...->t...", node.weight.detach(), currents[0])
    assert torch.allclose(torch.cat(seen), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["MaskedPSN", "SlidingPSN"])
def test_parallel_neurons_step_by_step(kind: str) -> None:
    model = net(kind)
    functional.set_step_mode(model, "s")
    small = snncompress.apply(model, "sca", 0.5, None, data=X[0], timesteps=T, skip=[], repair=None)
    assert [len(small[i].weight) for i in (0, 2)] == [4, 2]


def test_a_neuron_whose_tensors_are_not_known_stays_whole() -> None:
    """As many thresholds as channels, in a form of its own."""

    def aware(channels: int) -> nn.Module:
        theta = torch.full((channels,), 0.3)
        return neuron.ActivationAwareIFNode(
            v_threshold=theta, v_offset=torch.zeros(channels), channel_dim=-3, step_mode="m"
        )

    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, step_mode="m"), aware(8), layer.Conv2d(8, 6, 3, padding=1, step_mode="m"),
        neuron.IFNode(step_mode="m"), layer.Flatten(step_mode="m"), layer.Linear(216, 5, step_mode="m"),
    ).eval()  # fmt: skip
    small = snncompress.apply(model, "magnitude", 0.5, None, data=X, skip=[], repair=None)
    assert "which tensors of a ActivationAwareIFNode belong" in snncompress.plan_of(small).skipped["0"]
    assert [len(small[i].weight) for i in (0, 2)] == [8, 3]
    run(small)


# -- readouts that never fire --


@pytest.mark.parametrize("decode", [None, "mean-mem", "max-mem", "last_mem", "max-abs-mem"])
@pytest.mark.parametrize("kind", [neuron.NonSpikingLIFNode, neuron.NonSpikingIFNode])
def test_readouts_that_never_fire(kind: type[nn.Module], decode: str | None) -> None:
    model = net("PLIF", lambda: kind(decode=decode))
    table = snncompress.profile(model, X)
    assert "6" not in [row.name for row in table.layers if row.kind == "neuron"]
    assert table.n_samples == 3
    small = snncompress.apply(model, "magnitude", 0.5, None, data=X, skip=[], repair=None)
    assert [len(small[i].weight) for i in (0, 2, 5)] == [4, 2, 5]
    if decode:
        snncompress.evaluate(small, (X, Y))


class Potentials(nn.Module):
    """The readout is the potential of the last neurons: of one timestep, or of all."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a, self.n = layer.Linear(6, 8, step_mode=mode), neuron.LIFNode(v_threshold=0.3, step_mode=mode)
        self.b = layer.Linear(8, 3, step_mode=mode)
        self.m = neuron.LIFNode(v_threshold=1e9, step_mode=mode, store_v_seq=mode == "m")

    def forward(self, x: Tensor) -> Tensor:
        self.m(self.b(self.n(self.a(x))))
        return self.m.v if self.m.step_mode == "s" else self.m.v_seq


@pytest.mark.parametrize(("mode", "shape"), [("s", (3, 6)), ("m", (4, 3, 6))])
def test_readouts_of_potentials(mode: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Potentials(mode).eval(), 3 * torch.rand(shape)
    small = snncompress.apply(model, "magnitude", 0.5, None, data=x, skip=[], repair=None)
    assert (len(small.a.weight), len(small.b.weight)) == (4, 3)
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-6


# -- versions before 2.0 --


def old(where: str, name: str, base: type[nn.Module]) -> type[nn.Module]:
    return type(name, (base,), {"__module__": where})


def test_clock_driven_says_how_to_port() -> None:
    node = old("spikingjelly.clock_driven.neuron", "MultiStepLIFNode", nn.ReLU)
    model = nn.Sequential(nn.Linear(4, 4), node(), nn.Linear(4, 2))
    for call in (snncompress.apply, snncompress.profile, snncompress.evaluate):
        with pytest.raises(ModelError, match=r"'1' is of spikingjelly\.clock_driven.*LIFNode\(\.\.\., step_mode='m'\)"):
            call(model, data=torch.rand(2, 4))


def test_neurons_in_one_file_as_in_the_version_before() -> None:
    """Known by the module that they lived in; with a surrogate gradient in train mode only."""
    home = "spikingjelly.activation_based.neuron"

    class Node(neuron.IFNode):
        __module__ = home
        jit_eval_single_step_forward_hard_reset = True

        def single_step_forward(self, x: Tensor) -> Tensor:
            spikes = super().single_step_forward(x)
            return spikes if self.training else spikes.detach()

    model = nn.Sequential(nn.Linear(4, 8), Node(0.2), nn.Linear(8, 6), Node(0.2), nn.Linear(6, 3))
    assert find_adapter(model).is_neuron(old(home, "MultiStepThing", nn.ReLU)())
    assert not find_adapter(model).is_neuron(old(home, "NonSpikingLIFNode", nn.ReLU)())
    data = torch.rand(5, 4), torch.arange(5) % 3
    before = snapshot(model.eval())
    for criterion in ("taylor", "sca", "cqp"):
        snncompress.apply(model, criterion, 0.5, None, data=data, timesteps=3, skip=[], repair=None)
    snncompress.finetune(model, data, timesteps=3, epochs=0)
    assert unchanged(before, snapshot(model))
