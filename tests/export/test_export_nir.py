"""NIR files, read back and run, against the networks that they were written from."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

import snncompress
from snncompress import DataError, ModelError, OptionError, StorageError
from snncompress.contract.detection import find_adapter
from snncompress.contract.plain import PlainAdapter
from snncompress.export.exporting import export
from snncompress.extend import Adapter
from snncompress.model.network import weight_layers
from snncompress.model.parametrizations import stored_weight
from tests.equivalence import PAPER
from tests.export.common import needs_onnx_export
from tests.export.nir_graphs import T, agree, alive, spikes
from tests.networks import Case, liven


def spikingjelly_network(multi_step: bool) -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1, bias=False), layer.BatchNorm2d(6), neuron.LIFNode(tau=2.5),
        layer.AvgPool2d(2, padding=1),
        layer.Conv2d(6, 6, 3, padding=2, stride=2, dilation=2, groups=3), layer.BatchNorm2d(6),
        neuron.ParametricLIFNode(init_tau=3.0, decay_input=False, v_threshold=0.8),
        layer.Dropout(0.5), layer.AdaptiveAvgPool2d(1), layer.Flatten(),
        layer.Linear(6, 8), neuron.IFNode(), layer.Linear(8, 5, bias=False),
        neuron.LIFNode(tau=3.0, decay_input=False, v_reset=-0.25),
    )  # fmt: skip
    functional.set_step_mode(net, "m" if multi_step else "s")
    return net


def snntorch_network() -> nn.Module:
    def leaky(beta: Any, **options: Any) -> nn.Module:
        return snn.Leaky(beta, init_hidden=True, reset_mechanism="zero", **options)

    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6),
        leaky(torch.linspace(0.1, 0.9, 6)[:, None, None], learn_beta=True),
        nn.AvgPool2d(2, divisor_override=1),
        nn.Conv2d(6, 4, 3), leaky(0.7, reset_delay=False, threshold=torch.rand(4, 2, 2) + 0.5),
        nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(16, 8), nn.BatchNorm1d(8), leaky(1.0), nn.Linear(8, 5), leaky(0.9, threshold=0.6, output=True),
    )  # fmt: skip


NETWORKS = pytest.mark.parametrize(
    "make",
    [lambda: spikingjelly_network(True), lambda: spikingjelly_network(False), snntorch_network],
    ids=["spikingjelly multi-step", "spikingjelly", "snntorch"],
)


@NETWORKS
def test_spikes_of_every_neuron(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    case = alive(make())
    graph = agree(case, tmp_path / "net.nir")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in graph.nodes.values())
    assert graph.nodes["input"].input_type["input"].tolist() == [2, 8, 8]
    assert graph.nodes["output"].output_type["output"].tolist() == [5]
    assert graph.nodes["2"].tau.shape == (6, 8, 8)
    fires = "v >= v_threshold" if find_adapter(case.model).framework == "spikingjelly" else "v > v_threshold"
    assert graph.metadata == {"dt": 1e-4, "fires": fires}


@NETWORKS
def test_compressed(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    case = alive(make())
    options: dict[str, Any] = {"data": case.x, "timesteps": T, "progress": False, "skip": [], "quantizer": PAPER}
    small = snncompress.apply(case.model, "svs", 0.5, 4, repair=None, **options)
    with torch.no_grad():
        for name in weight_layers(small):
            stored_weight(small.get_submodule(name)).mul_(1.5)
    graph = agree(Case(small, case.x, T), tmp_path / "net.nir")
    assert graph.nodes["0"].weight.shape[0] == 3
    last = max((name for name in graph.nodes if hasattr(graph.nodes[name], "weight")), key=int)
    assert len(np.unique(graph.nodes[last].weight)) <= 16


class Block(nn.Module):
    def __init__(self, fire: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.fire = nn.Conv2d(4, 4, 3, padding=1), fire()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(self.conv(x))
        y += x
        return y


class Residual(nn.Module):
    """Sums, functions, a neuron with two outputs."""

    def __init__(self, fire: Callable[[], nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.stem, self.fire = nn.Conv2d(2, 4, 3, padding=1), fire()
        self.blocks = nn.Sequential(Block(fire), Block(fire))
        self.head, self.last = nn.Linear(4, 3), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.fire(self.stem(x)))
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 2)
        x = x.mean((2, 3)).view(x.shape[0], x.size(1) + 0)
        spikes = self.last(self.head(F.dropout(x, 0.5, self.training)))
        if isinstance(self.last, snn.Leaky):
            spikes, _ = spikes
        return spikes


def leaky(**options: Any) -> nn.Module:
    return snn.Leaky(0.8, init_hidden=True, reset_mechanism="zero", **options)


@pytest.mark.parametrize(
    "make", [lambda: Residual(neuron.LIFNode, neuron.LIFNode()), lambda: Residual(leaky, leaky(output=True))]
)
def test_sums_and_functions(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    graph = agree(alive(make()), tmp_path / "net.nir")
    assert {("fire", "blocks.1.conv"), ("blocks.0.fire", "blocks.1.conv"), ("blocks.0.fire", "avg_pool2d")} < set(
        graph.edges
    )


def test_one_dimension(tmp_path: Path) -> None:
    net = nn.Sequential(
        layer.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), neuron.LIFNode(), layer.Flatten(), layer.Linear(16, 3)
    )
    case = liven(Case(net, 3 * torch.rand(2, 2, 8), T))
    graph = agree(case, tmp_path / "net.nir")
    assert graph.nodes["3"].weight.shape == (3, 16)


def test_half_precision(tmp_path: Path) -> None:
    """numpy has no bfloat16: the same numbers are written at 32 bits."""
    net = nn.Sequential(layer.Conv2d(2, 3, 3), neuron.IFNode(), layer.Flatten(), layer.Linear(12, 2)).bfloat16()
    export(net, tmp_path / "half.nir", data=torch.rand(2, 2, 4, 4).bfloat16(), timesteps=2)
    nodes = nir.read(tmp_path / "half.nir").nodes
    for name in ("0", "3"):
        assert torch.equal(torch.from_numpy(nodes[name].weight), net.get_submodule(name).weight.float())


def test_format_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(neuron.LIFNode())
    export(net, tmp_path / "net", "nir", data=torch.rand(1, 4), timesteps=2)
    assert list(nir.read(tmp_path / "net").nodes) == ["0", "input", "output"]


def test_decay_beyond_one_is_none(tmp_path: Path) -> None:
    net = nn.Sequential(snn.Leaky(1.2, init_hidden=True, reset_mechanism="zero"))
    graph = agree(Case(net, torch.rand(3, 4), T), tmp_path / "net.nir")
    assert isinstance(graph.nodes["0"], nir.IF)


def test_data_as_they_are(tmp_path: Path) -> None:
    case = alive(spikingjelly_network(True))
    export(case.model, tmp_path / "whole.nir", data=case.x.expand(T, *case.x.shape))
    export(case.model, tmp_path / "steps.nir", data=[(case.x, torch.zeros(4))], timesteps=T)
    whole, steps = (nir.read(tmp_path / name) for name in ("whole.nir", "steps.nir"))
    assert whole.edges == steps.edges
    np.testing.assert_array_equal(whole.nodes["4"].weight, steps.nodes["4"].weight)


def test_spikingjelly_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    case = alive(spikingjelly_network(False))
    export(case.model, tmp_path / "net.nir", data=case.x, timesteps=T)
    graph, state = import_from_nir(tmp_path / "net.nir"), None
    expected = spikes(case)["13"]
    for t in range(T):
        y, state = graph(case.x, state)
        np.testing.assert_array_equal(y.detach().numpy(), expected[t])


@pytest.mark.filterwarnings("ignore:nirtorch.load is being deprecated:DeprecationWarning")  # snnTorch 0.9.4 calls it
def test_snntorch_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nirtorch")
    from snntorch.import_nir import import_from_nir

    net = nn.Sequential(nn.Linear(4, 6), leaky(), nn.Linear(6, 3, bias=False), leaky(threshold=0.5))
    case = liven(Case(net, torch.rand(5, 4), T))
    export(net, tmp_path / "net.nir", data=case.x, timesteps=T)
    back, state = import_from_nir(nir.read(tmp_path / "net.nir")), None
    expected = spikes(case)["3"]
    for t in range(T):
        y, state = back(case.x, state)
        np.testing.assert_array_equal(y.detach().numpy(), expected[t])


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.MaxPool2d(2, dilation=2), r"1 \(MaxPool2d\) can't be written as NIR: NIR's pooling has no dilation"),
        (nn.MaxPool2d(3, ceil_mode=True), r"leaves incomplete windows out"),
        (nn.AvgPool2d(3, ceil_mode=True), r"leaves incomplete windows out; set ceil_mode=False"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), r"set count_include_pad=True"),
        (nn.AvgPool2d(2, divisor_override=3), r"leave divisor_override out"),
        (nn.AdaptiveAvgPool2d(3), r"\[3, 3\] doesn't divide \[8, 8\]; use nn.AvgPool2d"),
        (nn.BatchNorm2d(2), r"1 \(BatchNorm2d\) .* doesn't follow a layer it could be folded into"),
        (nn.ReLU(), r"1 \(ReLU\) can't be written as NIR: NIR has no node for ReLU"),
        (nn.Linear(8, 3), r"NIR's linear node takes vectors, and this one gets \[2, 8, 8\]; put an nn.Flatten"),
        (nn.Flatten(2), r"NIR flattens a sample whole, and this turns \[2, 8, 8\] into \[2, 64\]"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), r"NIR pads with zeros, not 'circular'"),
        (
            nn.Conv2d(2, 2, (1, 3)),
            r"infers the output shape \[2, 8, 8\] instead of \[2, 8, 6\], as it takes kernels for",
        ),
        (nn.ConvTranspose2d(2, 2, 3), r"NIR has no node for ConvTranspose2d"),
    ],
)
def test_refused_layers(module: nn.Module, why: str, tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    path.write_bytes(b"before")
    net = nn.Sequential(neuron.IFNode(), module, neuron.IFNode())
    with pytest.raises(ModelError, match=why):
        export(net, path, data=torch.rand(2, 2, 8, 8), timesteps=2)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any], fire: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.fire, self.function = nn.Linear(4, 4), fire or neuron.IFNode(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.linear(x))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: torch.cat([m.fire(x), x], 1), r"Apply: cat can't be written as NIR: .*its edges only add up"),
        (lambda m, x: m.fire(F.max_pool1d(x, 2)), r"Apply: max_pool1d .*NIR pools in two dimensions"),
        (lambda m, x: m.fire(x) * 2, r"Apply: mul can't be written as NIR: NIR has nothing for mul"),
        (lambda m, x: m.fire(x) * x, r"NIR has nothing for mul"),
        (lambda m, x: m.fire(x) + x.chunk(2, 1)[0].sum(), r"NIR has nothing for getitem"),
        (lambda m, x: m.fire(x) + 1, r"NIR adds what two layers put out, not a constant"),
        (lambda m, x: torch.add(m.fire(x), x, alpha=2), r"not with a factor"),
        (lambda m, x: m.fire(x) + x.mean(1, keepdim=True), r"NIR has nothing for mean"),
        (lambda m, x: m.fire(x) + x[:1], r"NIR has nothing for getitem"),
        (lambda m, x: (lambda y: x + y + x)(m.fire(x)), r"it adds one tensor twice"),
        (lambda m, x: (lambda y: m.fire(y.add_(x)) + y)(m.linear(x)), r"Apply: add .*it changes in place what is used"),
        (lambda m, x: m.fire(m.fire(x)), r"fire \(IFNode\) .* called twice in one timestep; give each use"),
        (lambda m, x: m.fire(x) if x.sum() > -9 else x, r"torch.fx can't trace Apply: TraceError: .*Keep loops over"),
        (lambda m, x: m.fire(x.view(-1, 2, 2)), r"turns \[4\] into \[2, 2\]"),
    ],
)  # fmt: skip
def test_refused_operations(function: Callable[..., Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        export(Apply(function), tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


def test_refused_subclass(tmp_path: Path) -> None:
    net = nn.Sequential(Halved(4, 3), neuron.IFNode())
    with pytest.raises(ModelError, match=r"0 \(Halved\) .* its class computes something else than Linear"):
        export(net, tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


class OwnIF(neuron.IFNode):
    pass


@pytest.mark.parametrize(
    ("fire", "why"),
    [
        (
            snn.Leaky(0.5, init_hidden=True, reset_delay=False),
            r"1 \(Leaky\) .*Use reset_delay=True",
        ),
        (
            snn.Synaptic(0.5, 0.5, init_hidden=True, reset_mechanism="zero"),
            r"1 \(Synaptic\) .*also forgets the input of the step after the spike. Use reset_mechanism='subtract'",
        ),
        (neuron.QIFNode(), r"1 \(QIFNode\) .*IFNode, LIFNode and ParametricLIFNode are known by equation"),
        (OwnIF(), r"1 \(OwnIF\) .*are known by equation"),
        (snn.Alpha(0.6, 0.5, init_hidden=True), r"1 \(Alpha\) .*Synaptic and RSynaptic are known by equation"),
        (snn.Leaky(0.5, init_hidden=True, reset_mechanism="none"), r"reset_mechanism='none' isn't part of the leaky"),
        (leaky(graded_spikes_factor=2.0), r"graded_spikes_factor isn't part"),
        (leaky(reset_delay=False, threshold=-0.5), r"a negative threshold isn't part"),
        (leaky(state_quant=torch.round), r"state_quant isn't part"),
        (snn.Leaky(torch.tensor([0.5, 1, 1]), init_hidden=True, reset_mechanism="zero"), r"some of its neurons leak"),
        (snn.Leaky(torch.full((2, 3), 0.5), init_hidden=True, reset_mechanism="zero"), r"shape \[2, 3\] doesn't fit"),
    ],
)
def test_refused_neurons(fire: nn.Module, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        export(nn.Sequential(nn.Linear(4, 3), fire), tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.both, self.fire = nn.Linear(4, 4), nn.Bilinear(4, 4, 3), neuron.IFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.both(x, self.linear(x)))


def test_refused_two_inputs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"both \(Bilinear\) can't be written as NIR: it must have one input"):
        export(Product(), tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


def test_refused_inhibition(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Inhibition"):
        fire = leaky(inhibition=True)
    with pytest.raises(ModelError, match="inhibition=True isn't part of the leaky neuron's equation"):
        export(nn.Sequential(nn.Linear(4, 3), fire), tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


def test_refused_membrane_potential(tmp_path: Path) -> None:
    net = Apply(lambda m, x: m.fire(x)[0] + m.fire.mem, leaky(output=True))
    with pytest.raises(ModelError, match="can't be written as NIR"):
        export(net, tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)
    net = Apply(lambda m, x: m.fire(x)[1], leaky(output=True))
    with pytest.raises(ModelError, match="the membrane potential is used"):
        export(net, tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)
    net = Apply(lambda m, x: (m.fire(x), x), leaky())
    with pytest.raises(ModelError, match="the model must return one tensor, or a neuron's"):
        export(net, tmp_path / "net.nir", data=torch.rand(2, 4), timesteps=2)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fire = nn.Linear(4, 3), snn.Leaky(0.5)

    def forward(self, xs: Tensor) -> Tensor:
        mem, out = torch.zeros(xs.shape[1], 3), []
        for x in xs:
            spikes, mem = self.fire(self.linear(x), mem)
            out.append(spikes)
        return torch.stack(out)


class MeanOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fire = layer.Linear(4, 3, step_mode="m"), neuron.IFNode(step_mode="m")

    def forward(self, xs: Tensor) -> Tensor:
        return self.fire(self.linear(xs)).mean(0)


class Counting(nn.Module):
    """A memory that no neuron has."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("format", ["nir", pytest.param("onnx", marks=needs_onnx_export)])
def test_no_single_timestep(format: Any, tmp_path: Path) -> None:
    def write(net: nn.Module) -> None:
        export(net, tmp_path / "net", format, data=torch.rand(2, 4), timesteps=3)

    with pytest.raises(ModelError, match=r"fire \(Leaky\) gets its state from Loop.forward, which loops over time"):
        write(Loop())
    with pytest.raises(ModelError, match=r"MeanOverTime computes something else .*a mean over time"):
        write(MeanOverTime())
    with pytest.raises(ModelError, match="or a module besides the neurons has a memory"):
        write(nn.Sequential(nn.Linear(4, 3), neuron.IFNode(), nn.Linear(3, 2), Counting(), neuron.IFNode()))
    with pytest.raises(ModelError, match="PSN needs all timesteps at once"):
        write(nn.Sequential(layer.Linear(4, 3, step_mode="m"), neuron.PSN(3), neuron.IFNode(step_mode="m")))
    with pytest.raises(ModelError, match=r"can't be run for 4 timesteps, as it is and one by one, in float64"):
        write(Apply(lambda m, x: m.fire(x) @ torch.ones(4, 4)))
    assert not list(tmp_path.iterdir())


class Foreign(PlainAdapter):
    framework = "foreign"

    def is_neuron(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Threshold)


def test_an_adapter_that_knows_nothing_of_it(tmp_path: Path) -> None:
    adapter: Adapter = Foreign()
    with pytest.raises(ModelError, match="The adapter of foreign can't take a model apart into timesteps"):
        export(nn.Sequential(nn.Threshold(1, 0)), tmp_path / "a.nir", data=torch.rand(2, 4), adapter=adapter)
    fire = nn.Threshold(1, 0)
    for call in (adapter.states, adapter.make_traceable, adapter.dynamics, lambda n: adapter.set_states(n, {})):
        with pytest.raises(ModelError, match="adapter of foreign"):
            call(fire)


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = nn.Sequential(nn.Linear(4, 3), neuron.IFNode()), torch.rand(2, 4)
    with pytest.raises(OptionError, match="format must be 'nir', 'onnx' or 'integer', not 'pt'"):
        export(net, tmp_path / "net.pt", data=data, timesteps=2)
    with pytest.raises(StorageError, match="can't be written"):
        export(net, tmp_path / "nowhere" / "net.nir", data=data, timesteps=2)
    with pytest.raises(DataError, match=r"torch\.float64"):
        export(net, tmp_path / "net.nir", data=data.double(), timesteps=2)
    with pytest.raises(ModelError, match="no spiking neuron"):
        export(nn.Linear(4, 3), tmp_path / "net.nir", data=data, timesteps=2)
    for package, format in (("nir", "nir"), ("onnxscript", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(OptionError, match=rf"'{format}' needs {package} .*pip install 'snncompress\[export\]'"):
            export(net, tmp_path / f"net.{format}", data=data, timesteps=2)


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128"])
def test_onnx_needs_a_newer_torch(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    net = nn.Sequential(nn.Linear(4, 3), neuron.IFNode())
    with pytest.raises(OptionError, match=rf"torch 2\.10 or newer, and this is {re.escape(version)}"):
        export(net, tmp_path / "net.onnx", data=torch.rand(2, 4), timesteps=2)
    assert list(tmp_path.iterdir()) == []
