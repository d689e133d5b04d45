"""freeze(integer="full") and its file: every spike is that of the network in fixed point, and of the page's numpy."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import snntorch as snn
import torch
from safetensors import safe_open
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, Plan, QuantizeStates
from snncompress.contract.detection import find_adapter
from snncompress.export.integer_layers import SumLayer
from snncompress.export.integer_network import heard
from snncompress.model.edits import QuantizeWeights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "integer.md").read_text()
X = 3 * torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
T = 4


def interpreter() -> Any:
    """The class that the page has."""
    found: dict[str, Any] = {}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S) if "class" in block), found)
    return found["Interpreter"]


def jelly(mode: str = "m", bits: int = 4, groups: int = 2, **options: Any) -> nn.Module:
    """States of 6 bits, so that some saturate."""
    first = neuron.LIFNode(tau=3.0, detach_reset=True, v_threshold=0.5)
    second = neuron.ParametricLIFNode(v_threshold=0.3, v_reset=-0.1, decay_input=False)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, bias=False), layer.BatchNorm2d(6), first, layer.MaxPool2d(2),
        layer.Conv2d(6, 8, 2, padding=1, groups=groups, stride=2), layer.BatchNorm2d(8), second, layer.Flatten(),
        layer.Linear(32, 6), neuron.IFNode(v_reset=None, v_threshold=0.2), layer.Linear(6, 3),
    )  # fmt: skip
    net[5].weight.data = torch.linspace(-2, 2, 8)
    net[1].bias.data = torch.linspace(-0.5, 0.5, 6)
    functional.set_step_mode(net, mode)
    return small(net, bits, **options)


def leaky(**options: Any) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), snn.Leaky(0.8, init_hidden=True, threshold=0.5), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), snn.Leaky(torch.full((8, 1, 1), 0.6), init_hidden=True, threshold=0.2), nn.Flatten(),
        nn.Linear(8, 5), snn.Leaky(0.5, init_hidden=True, threshold=0.1, reset_mechanism="zero"),
    )  # fmt: skip
    return small(net, 8, skip=["0"], **options)


class Residual(nn.Module):
    """Spikes of two populations added up, and maxima of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=1, dilation=2, groups=2)
        self.one, self.other = neuron.LIFNode(v_threshold=0.3), neuron.IFNode(v_threshold=0.2)
        self.conv, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.pool, self.end = nn.MaxPool2d(2, padding=1), neuron.IFNode(v_threshold=0.2)
        self.readout = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        x = x + self.other(self.conv(x))
        return self.readout(self.end(self.pool(self.last(x))).flatten(1))


def currents(**options: Any) -> nn.Module:
    """snnTorch's Lapicque, and Synaptic of images and of spikes."""
    hidden = {"init_hidden": True, "threshold": 0.4}
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), snn.Synaptic(0.6, 0.7, **hidden), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), snn.Synaptic(torch.full((8, 1, 1), 0.5), 0.8, **hidden), nn.Flatten(),
        nn.Linear(8, 5), snn.Lapicque(R=2.0, C=3.0, time_step=1.0, **hidden), nn.Linear(5, 2),
    )  # fmt: skip
    return small(net, 4, **options)


def small(net: nn.Module, bits: int, **options: Any) -> nn.Module:
    given = {"data": X, "timesteps": T, "repair": None, "progress": False, "state_bits": 6, **options}
    return snncompress.apply(net.eval(), None, None, bits, **given)


CASES = {
    "SpikingJelly": jelly,
    "step by step, all layers": lambda: jelly("s", skip=[]),
    "by shifts, wrapping": lambda: jelly(state_leak="shift", state_overflow="wrap"),
    "8 bits": lambda: jelly(bits=8, groups=1, quantizer="rescaw"),
    "sums": lambda: small(Residual(), 4, skip=[]),
    "snnTorch, 16 bits": lambda: leaky(state_bits=16),
    "snnTorch, by shifts": lambda: leaky(state_leak="shift"),
    "currents": currents,
    "currents, by shifts": lambda: currents(state_leak="shift"),
}


class Engine:
    """ONNX Runtime, step by step, with the spikes that are inside the model."""

    def __init__(self, path: Path, neurons: Iterable[str]) -> None:
        ort = pytest.importorskip("onnxruntime")
        model = onnx.load(path)
        self.made = [value.name for value in model.graph.output]
        self.start = json.loads(next(p.value for p in model.metadata_props if p.key == "initial_states"))
        model.graph.output.extend(onnx.ValueInfoProto(name=f"{name}.out") for name in neurons)
        self.kinds = {node.op_type for node in model.graph.node}
        self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.states: dict[str, Any] = {}

    def step(self, x: Any) -> dict[str, Any]:
        given = {"input": x}
        for value in self.session.get_inputs()[1:]:
            assert value.type == "tensor(int32)"
            first = np.broadcast_to(np.array(self.start[value.name], np.int32), [len(x), *value.shape[1:]])
            given[value.name] = self.states.get(value.name, first)
        names = [value.name for value in self.session.get_outputs()]
        made = dict(zip(names, self.session.run(None, given), strict=True))
        self.states = {name.removesuffix("_next"): v for name, v in made.items() if name.endswith(".q_next")}
        return made


def spikes(model: nn.Module) -> dict[str, Tensor]:
    adapter = find_adapter(model)

    def run(net: nn.Module) -> None:
        adapter.reset(net)
        adapter.run(net, X, T)

    return heard(model, adapter, run)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_spikes_are_those_of_floats_and_of_both_files(make: Any, tmp_path: Path) -> None:
    model = make()
    whole = snncompress.freeze(model, X, timesteps=T, integer="full")
    wanted, found = spikes(model), spikes(whole)
    assert all(0 < s.float().mean() < 0.9 for s in wanted.values())
    assert all(torch.equal(found[name], s) for name, s in wanted.items())
    assert sum(isinstance(module, SumLayer) for module in whole.modules()) >= 2
    again = pickle.loads(pickle.dumps(whole)) if "LIF" in str(model) else whole
    assert all(torch.equal(spikes(again)[name], s) for name, s in wanted.items())

    snncompress.export(whole, tmp_path / "net.safetensors", data=X, timesteps=T)
    snncompress.export(whole, tmp_path / "net.onnx", data=X, timesteps=T)
    net, engine = interpreter()(tmp_path / "net.safetensors"), Engine(tmp_path / "net.onnx", wanted)
    assert {"ConvInteger", "MatMulInteger"} <= engine.kinds
    assert not engine.kinds & {"Conv", "Gemm", "DequantizeLinear"}
    for t in range(T):
        output, made = net.step(X.numpy()), engine.step(X.numpy())
        for name, s in wanted.items():
            assert np.array_equal(net.spikes[name], s[t].numpy())
            assert np.array_equal(made[f"{name}.out"], s[t].numpy())
            assert np.array_equal(made[f"{name}.q_next"], np.broadcast_to(net.q[name], s[t].shape))
        assert np.allclose(made["output"], output, rtol=1e-6, atol=1e-7)
    find_adapter(whole).reset(whole)
    assert torch.allclose(find_adapter(whole).run(whole, X, T)[-1].double(), torch.tensor(output).double(), atol=1e-5)


def test_neurons_that_are_silent_in_the_example_put_out_spikes_all_the_same() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 6, bias=False), neuron.IFNode(v_threshold=0.1), nn.Linear(6, 6))
    model = small(net.extend([neuron.IFNode(v_threshold=0.1), nn.Linear(6, 2)]), 4)
    whole = snncompress.freeze(model, torch.zeros(1, 2, 8, 8), timesteps=T, integer="full")
    assert [row.name for row in snncompress.frozen_layers(whole).layers if row.integer] == ["3"]
    wanted, found = spikes(model), spikes(whole)
    assert all(s.any() and torch.equal(found[name], s) for name, s in wanted.items())


class Looping(nn.Module):
    """snnTorch's own style: states go through the loop's hands, and the last neuron's are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(128, 12), snn.Synaptic(alpha=0.7, beta=0.8, threshold=0.2)
        self.fc2, self.lif2 = nn.Linear(12, 5), snn.Leaky(0.9, threshold=0.2)

    def forward(self, x: Tensor) -> Tensor:
        (syn1, mem1), mem2, found = self.lif1.init_synaptic(), self.lif2.init_leaky(), []
        for _ in range(T):
            spk1, syn1, mem1 = self.lif1(self.fc1(x.flatten(1)), syn1, mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            found.append(mem2)
        return torch.stack(found)


def test_states_that_a_network_hands_on_are_floats_outside() -> None:
    model = small(Looping(), 4, skip=[], timesteps=None)
    whole = snncompress.freeze(model, X, integer="full")
    assert torch.equal(whole(X), model(X))
    assert model(X).unique().numel() > 20


def test_the_numbers_of_a_network_by_hand(tmp_path: Path) -> None:
    """Weights ±1/2 and ±3/2 of s = 0.5 are odd quarters; with δ = 0.125 one in a sum is 2 δ, and with a gain of 1/2
    (τ = 2, the input leaks too) 1 δ: M = 2^24. A bias of 0.3 is 0.3 · 0.5 / 0.125 = 1.2 δ, A = 2^11, and θ = 8 δ.
    """
    net = nn.Sequential(nn.Linear(2, 2), neuron.IFNode(), nn.Linear(2, 2), neuron.LIFNode(), nn.Linear(2, 1))
    net[0].weight.data, net[0].bias.data = torch.eye(2), torch.zeros(2)
    net[2].weight.data = torch.tensor([[0.75, -0.25], [0.25, 0.75]])
    net[2].bias.data = torch.tensor([0.3, 0.0])
    rescaw = {"gamma": "max", "per_channel": False}
    edits = (
        QuantizeWeights("2", "rescaw", 2, rescaw),
        QuantizeStates("1", 8, (0.25,)),
        QuantizeStates("3", 8, (0.125,)),
    )
    model = Plan(edits).apply(net).eval()
    x = torch.ones(1, 2)
    snncompress.export(model, tmp_path / "net.safetensors", data=x, timesteps=3)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator
        nodes = json.loads(file.metadata()["integer_network"])["nodes"]
    assert [node["op"] for node in nodes] == ["linear", "neuron", "linear", "neuron", "linear"]
    assert found["2.weight"].tolist() == [[3, -1], [1, 3]]
    assert found["2.weight"].dtype == torch.int8
    assert (found["3.multiplier"] - 2**24).abs().max() <= 2  # the layer's scale is found from floats of 32 bits
    assert (found["3.bias"] - torch.tensor([round(1.2 * 2**24), 0])).abs().max() <= 2
    assert (found["3.decay"].item(), found["3.threshold"].item(), found["3.rest"].item()) == (2048, 8, 0)
    # both first neurons fire each time, so 3 - 1 + 1.2 = 3.2 → 3, 1.5 + 3.2 → 5, 2.5 + 3.2 → 6; and 4, 6, 7: silent
    numbers = interpreter()(tmp_path / "net.safetensors")
    assert [(numbers.step(x.numpy()), numbers.q["3"].tolist())[1] for _ in range(3)] == [[[3, 4]], [[5, 6]], [[6, 7]]]


def averaging() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), neuron.IFNode(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), neuron.IFNode(), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    return small(net, 4)


def between() -> nn.Module:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2.0

    net = nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), neuron.IFNode(v_threshold=0.1), nn.Linear(6, 6), Doubling(),
        neuron.IFNode(v_threshold=0.1), nn.Linear(6, 2),
    )  # fmt: skip
    return small(net, 4)


def pooled_norm() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), neuron.IFNode(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), neuron.IFNode(),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    return small(net, 4)


def remembering() -> nn.Module:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fire = nn.Linear(128, 6), neuron.IFNode(v_threshold=0.1)

        def forward(self, x: Tensor) -> Any:
            return self.fire(self.fc(x.flatten(1))), self.fire.v

    return small(Reading(), 4, skip=[])


REFUSED = {
    "states in float": (lambda: jelly(state_bits=None), "2: its state is in float, see state_bits.*; 6: its"),
    "weights in float": (lambda: jelly(skip={"quantize": ["4"]}), "4: its weight isn't quantized. Quantize"),
    "averages": (averaging, "3: its input isn't spikes: averages of them"),
    "a batch norm behind a pooling": (pooled_norm, "takes none. Likely cause: a batch norm that can't be folded"),
    "a state that is read": (remembering, "puts out something else in whole numbers.* reads what a neuron remembers"),
    "a factor": (between, "what the layer before 5 sums up reaches it as floats"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cant_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        snncompress.freeze(make(), X, timesteps=T, integer="full")


def test_no_such_integers() -> None:
    with pytest.raises(OptionError, match="'auto' or 'full', not 'all'"):
        snncompress.freeze(nn.Sequential(neuron.IFNode()), X, integer="all")  # type: ignore[arg-type]


def test_what_counts_in_whole_numbers_is_not_frozen_or_written_again(tmp_path: Path) -> None:
    whole = snncompress.freeze(jelly(), X, timesteps=T, integer="full")
    with pytest.raises(ModelError, match="can't be frozen: it counts in whole numbers already"):
        snncompress.freeze(whole, X, timesteps=T)
    with pytest.raises(ModelError, match="can't be written for a target, or approximately: it counts"):
        snncompress.export(whole, tmp_path / "net.nir", data=X, timesteps=T, target="speck")
    with pytest.raises(ModelError, match=r"the layer before 6 .* or the layer reads something else than spikes"):
        whole[6](whole[4](torch.full((1, 1, 6, 3, 3), 0.5)))
    assert {row.bits for row in snncompress.profile(whole, X, timesteps=T).layers if row.kind == "neuron"} == {6}


def test_nir_tells_what_it_cant_express(tmp_path: Path) -> None:
    import nir

    net = small(nn.Sequential(nn.Flatten(), nn.Linear(128, 4), neuron.LIFNode(), nn.Linear(4, 2)), 4, skip=[])
    snncompress.export(net, tmp_path / "net.nir", data=X, timesteps=T)
    told = json.loads(nir.read(tmp_path / "net.nir").metadata["fixed_point"])
    assert (told["2"]["bits"], told["2"]["overflow"], len(told["2"]["step"])) == (6, "saturate", 4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jelly, leaky])
def test_onnx_rounds_as_the_network_does(make: Any, tmp_path: Path) -> None:
    """Of a network in fixed point the exported timestep has the rounding, in floats."""
    ort = pytest.importorskip("onnxruntime")
    model = make()
    snncompress.export(model, tmp_path / "net.onnx", data=X, timesteps=T)
    session = ort.InferenceSession(tmp_path / "net.onnx")
    names = [value.name for value in session.get_outputs()]
    states = {
        value.name: np.full([4, *value.shape[1:]], -0.1 if value.name == "6.v" else 0.0, np.float32)
        for value in session.get_inputs()[1:]
    }
    adapter, outputs = find_adapter(model), []
    for _ in range(T):
        made = dict(zip(names, session.run(None, {"input": X.numpy(), **states}), strict=True))
        outputs.append(made["output"])
        states = {name: made[f"{name}_next"] for name in states}
    with torch.no_grad():
        assert np.allclose(np.stack(outputs), adapter.run(model, X, T).numpy(), atol=1e-5)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run, one after the other."""
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)), {})
