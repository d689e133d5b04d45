"""What NIR has no node for: in several where they compute the same, else as something near, with the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import snntorch as snn
import torch
from snncompress_snntorch.adapter import SNNTorchAdapter
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F

from snncompress import ModelError
from snncompress.export.exporting import export
from snncompress.testing import check_adapter
from tests.export.nir_graphs import T, agree, alive, simulate, spikes
from tests.networks import Case, liven


def hidden(kind: Any, *args: Any, **options: Any) -> nn.Module:
    return kind(*args, init_hidden=True, **options)


def tutorial() -> nn.Module:
    """As snnTorch's tutorials have it, with all its defaults, but pooled behind the neurons."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), hidden(snn.Leaky, 0.8), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), hidden(snn.Leaky, 0.6, threshold=0.7), nn.MaxPool2d(3, 1, padding=1),
        nn.Flatten(), nn.Linear(64, 5), hidden(snn.Leaky, 1.0, output=True),
    )  # fmt: skip


def test_snntorchs_defaults(tmp_path: Path) -> None:
    graph = agree(alive(tutorial()), tmp_path / "net.nir")
    assert {("1_membrane", "1"), ("1", "1_reset"), ("1_reset", "1_membrane"), ("1", "2_sum"), ("2_sum", "2")} <= set(
        graph.edges
    )
    assert isinstance(graph.nodes["8_membrane"], nir.I)  # no leak
    np.testing.assert_allclose(graph.nodes["4_reset"].scale, -0.7)  # off θ, not off (1 - leak) θ


def test_a_reset_by_subtraction_at_once(tmp_path: Path) -> None:
    """1 - leak = 1 - 1/2.5 of θ is left when it is subtracted in the step after."""
    net = nn.Sequential(
        layer.Linear(4, 6), neuron.LIFNode(2.5, v_reset=None), layer.Linear(6, 3), neuron.IFNode(v_reset=None)
    )
    graph = agree(liven(Case(net, 2 * torch.rand(5, 4), T)), tmp_path / "net.nir")
    np.testing.assert_allclose(graph.nodes["1_reset"].scale, -0.6 * 2.5)  # gain 1/2.5
    np.testing.assert_allclose(graph.nodes["3_reset"].scale, -1)


@pytest.mark.parametrize(
    ("fire", "nodes"),
    [
        (lambda: hidden(snn.Synaptic, 0.7, 0.8), {"1_synapse": "LI", "1_membrane": "LI", "1": "Threshold"}),
        (
            lambda: hidden(snn.Synaptic, 0.5, 0.8, reset_mechanism="zero", reset_delay=False),
            {"1": "CubaLIF"},
        ),
        (
            lambda: snn.Lapicque(R=2.0, C=3.0, time_step=1.0, threshold=0.6, init_hidden=True),
            {"1_membrane": "LI", "1": "Threshold"},
        ),
        (lambda: hidden(snn.RLeaky, 0.8, linear_features=6), {"1_membrane": "LI", "1_recurrent": "Linear"}),
        (
            lambda: hidden(snn.RLeaky, 0.8, V=-0.4, all_to_all=False, reset_mechanism="zero", reset_delay=False),
            {"1": "LIF", "1_recurrent": "Scale"},
        ),
        (
            lambda: hidden(snn.RSynaptic, 0.6, 0.9, linear_features=6),
            {"1_synapse": "LI", "1_membrane": "LI", "1_recurrent": "Linear"},
        ),
    ],
    ids=["Synaptic", "Synaptic to zero", "Lapicque", "RLeaky", "RLeaky one to one", "RSynaptic"],
)
def test_currents_and_recurrence(fire: Any, nodes: dict[str, str], tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6), fire(), nn.Linear(6, 3), hidden(snn.Leaky, 0.5))
    graph = agree(liven(Case(net, torch.rand(5, 4), T)), tmp_path / "net.nir")
    assert {name: type(graph.nodes[name]).__name__ for name in nodes} == nodes


def test_a_recurrent_convolution(tmp_path: Path) -> None:
    """Its bias goes to the layer before, or, where that feeds more than the neuron, into a node of its own."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), hidden(snn.RLeaky, 0.8, conv2d_channels=3, kernel_size=3), nn.AvgPool2d(2),
        hidden(snn.RLeaky, 0.6, conv2d_channels=3, kernel_size=1, threshold=0.2),
    )  # fmt: skip
    graph = agree(alive(net), tmp_path / "net.nir")
    assert [bool(graph.nodes[name].bias.any()) for name in ("0", "1_recurrent", "3_bias", "3_recurrent")] == [
        True, False, True, False,
    ]  # fmt: skip


class Shared(nn.Module):
    """One current for two neurons, one of them recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.one, self.two, self.out = (
            hidden(snn.RLeaky, 0.8, linear_features=6),
            hidden(snn.Leaky, 0.5),
            hidden(snn.Leaky, 0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.out(self.last(self.one(x) + self.two(x)))


def test_a_recurrent_bias_reaches_its_neuron_alone(tmp_path: Path) -> None:
    graph = agree(liven(Case(Shared(), torch.rand(5, 4), T)), tmp_path / "net.nir")
    assert {("linear", "one_bias"), ("one_bias", "one_membrane"), ("linear", "two_membrane")} <= set(graph.edges)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fire, self.other = nn.Conv2d(2, 4, 3, padding=1), neuron.IFNode(), neuron.IFNode()
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_max_pool2d(F.max_pool2d(self.fire(self.conv(x)), 2), 2)
        return self.other(self.linear(pooled.flatten(1)))


def test_max_pooling_by_functions_and_twice(tmp_path: Path) -> None:
    graph = agree(alive(Functional()), tmp_path / "net.nir")
    assert sum(isinstance(node, nir.Threshold) for node in graph.nodes.values()) == 2


def test_sums_of_spikes_are_not_spikes(tmp_path: Path) -> None:
    class Sum(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.max_pool2d(self.fire(y) + self.other(y), 2)

    with pytest.raises(ModelError, match=r"max_pool2d can't be written as NIR: NIR has no max-pooling but of spikes"):
        export(Sum(), tmp_path / "net.nir", data=torch.rand(2, 2, 8, 8), timesteps=2)


def test_approximations_say_what_they_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.MaxPool2d(2), hidden(snn.Leaky, 0.8), nn.Flatten(), nn.Linear(96, 5),
        hidden(snn.Synaptic, 0.5, 0.8),
    )  # fmt: skip
    case = alive(net)
    with pytest.raises(ModelError, match=r"1 \(MaxPool2d\) .*what it pools isn't spikes.*approximate=True"):
        export(net, tmp_path / "net.nir", data=case.x, timesteps=T)
    found = export(net, tmp_path / "net.nir", data=case.x, timesteps=T, approximate=True)
    assert capsys.readouterr().out == f"{found}\n"
    graph = nir.read(tmp_path / "net.nir")
    kinds = {name: type(graph.nodes[name]).__name__ for name in found.replaced}
    assert kinds == {"1": "AvgPool2d", "2": "LIF", "5": "CubaLIF"}
    own = spikes(case)
    assert (found.samples, found.timesteps) == (len(case.x), T)
    for name in ("2", "5"):
        made = simulate(graph, case.x.expand(T, *case.x.shape), name)
        assert found.differing[name] == pytest.approx((made != own[name]).mean(), abs=1e-9)
        assert found.rates[name] == pytest.approx((own[name].mean(), made.mean()), abs=1e-6)
    assert found.differing["2"] > 0.01


def test_what_is_exact_is_not_said_to_be_approximate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode())
    assert export(net, tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2, approximate=True) is None
    assert capsys.readouterr().out == ""


class Integrator(nn.Module):
    """NIR's equation of LI, as a reader has it."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.step, self.r = torch.as_tensor(1e-4 / node.tau).float(), torch.as_tensor(node.r).float()

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor]]:
        v = 0.0 if state is None else state[0]
        v = v + self.step * (self.r * x - v)
        return v, (v,)


class Elementwise(nn.Module):
    def __init__(self, function: Any, value: Any) -> None:
        super().__init__()
        self.function, self.value = function, torch.as_tensor(value).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.value)


def test_nirtorch_runs_the_loops(tmp_path: Path) -> None:
    nirtorch = pytest.importorskip("nirtorch")
    net = nn.Sequential(
        nn.Linear(4, 6, bias=False), hidden(snn.Synaptic, 0.6, 0.8),
        nn.Linear(6, 3, bias=False), hidden(snn.RLeaky, 0.8, V=0.5, all_to_all=False),
    )  # fmt: skip
    case = liven(Case(net, torch.rand(5, 4), T))
    export(net, tmp_path / "net.nir", data=case.x, timesteps=T)
    kinds: dict[Any, Any] = {
        nir.LI: Integrator,
        nir.Threshold: lambda node: Elementwise(lambda x, y: (x > y).float(), node.threshold),
        nir.Scale: lambda node: Elementwise(torch.mul, node.scale),
    }
    read, state = nirtorch.nir_to_torch(nir.read(tmp_path / "net.nir"), kinds), None
    expected = spikes(case)["3"]
    for t in range(T):
        y, state = read(case.x, state)
        np.testing.assert_array_equal(y.detach().numpy(), expected[t])


def test_spikingjelly_reads_a_synaptic_current(tmp_path: Path) -> None:
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    fire = hidden(snn.Synaptic, 0.5, 0.8, reset_mechanism="zero", reset_delay=False)
    case = liven(Case(nn.Sequential(nn.Linear(4, 6), fire), torch.rand(5, 4), T))
    export(case.model, tmp_path / "net.nir", data=case.x, timesteps=T)
    read, state = import_from_nir(tmp_path / "net.nir"), None
    expected = spikes(case)["1"]
    for t in range(T):
        y, state = read(case.x, state)
        np.testing.assert_array_equal(y.detach().numpy(), expected[t])


def test_the_equations_are_the_neurons() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6), hidden(snn.Leaky, 0.8), nn.Linear(6, 6), hidden(snn.Synaptic, 0.7, 0.8),
        nn.Linear(6, 6), hidden(snn.RLeaky, 0.8, linear_features=6), nn.Linear(6, 6),
        hidden(snn.RSynaptic, 0.6, 0.9, V=0.3, all_to_all=False),
    )  # fmt: skip
    report = check_adapter(SNNTorchAdapter(), net, 3 * torch.rand(3, 4), timesteps=4)
    assert "equations" in str(report).splitlines()[0]
    assert "missing: equations" not in str(report)
