"""ONNX files, run step by step in onnxruntime, against the networks that they were written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import snntorch as snn
import torch
from onnx import numpy_helper
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError
from snncompress.contract.detection import find_adapter
from snncompress.export.exporting import export
from snncompress.extend import Quantizer
from snncompress.model.modules import tensors_in
from snncompress.model.network import weight_layers
from snncompress.model.parametrizations import quantize_weight, stored_weight, weight_mask
from tests.equivalence import same, snapshot
from tests.export.common import needs_onnx_export
from tests.networks import Case, firing_rates, liven

pytestmark = needs_onnx_export

T = 8
Arrays = dict[str, np.ndarray[Any, Any]]


def run(path: Path, xs: Tensor) -> tuple[Arrays, Arrays]:
    """Outputs stacked over time, and the last states."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    start = json.loads(session.get_modelmeta().custom_metadata_map["initial_states"])
    states = {
        i.name: np.full((xs.shape[1], *i.shape[1:]), start[i.name], np.float32)
        for i in session.get_inputs()
        if i.name != "input"
    }
    assert states.keys() == start.keys()
    names = [o.name for o in session.get_outputs()]
    steps = []
    for x in xs.numpy():
        results = dict(zip(names, session.run(None, {"input": x, **states}), strict=True))
        states = {name: results.pop(f"{name}_next") for name in states}
        steps.append(results)
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}, states


def agree(case: Case, path: Path) -> onnx.ModelProto:
    """Export, run: the outputs must be the model's, spike for spike, and the last states too, up to rounding."""
    before = snapshot(case.model)
    export(case.model, path, data=case.x, timesteps=T)
    assert same(before, snapshot(case.model))
    adapter = find_adapter(case.model)
    xs = case.x.expand(T, *case.x.shape)
    outputs, states = run(path, xs)
    with torch.no_grad():
        expected = list(tensors_in(case.feed(case.model, case.feed.first())))
    assert list(outputs) == ["output", *(f"output_{i}" for i in range(1, len(expected)))]
    np.testing.assert_array_equal(outputs["output"], expected[0])
    for name, state in states.items():
        owner, _, key = name.rpartition(".")
        wanted = adapter.states(case.model.get_submodule(owner))[key]
        np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    adapter.reset(case.model)
    fewer, _ = run(path, xs[:, :1])  # another batch size
    np.testing.assert_array_equal(fewer["output"], outputs["output"][:, :1])
    model = onnx.load(path)
    for name in weight_layers(case.model):
        np.testing.assert_array_equal(weight(model, name), case.model.get_submodule(name).weight.detach())
    return model


def weight(model: onnx.ModelProto, layer: str) -> Any:
    """What the file's layer computes with, as DequantizeLinear is defined."""
    arrays = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    name = f"model.{layer}.weight"
    if name in arrays:
        return arrays[name]
    node = next(n for n in model.graph.node if n.output[0] == name)
    assert node.op_type == "DequantizeLinear"
    integers, scale = (arrays[i] for i in node.input)
    if scale.ndim:
        axis = node.attribute[0].i
        scale = scale.reshape([-1 if i == axis else 1 for i in range(integers.ndim)])
    return integers.astype(np.float32) * scale


def kinds(model: onnx.ModelProto) -> set[str]:
    return {numpy_helper.to_array(w).dtype.name for w in model.graph.initializer if w.name.endswith(".integers")}


def spikingjelly_network() -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(tau=2.5, v_reset=None),
        layer.MaxPool2d(2),
        layer.Conv2d(8, 8, 3), layer.BatchNorm2d(8), neuron.ParametricLIFNode(decay_input=False, v_reset=-0.5),
        layer.Flatten(), layer.Linear(32, 8), neuron.IFNode(), layer.Linear(8, 5), neuron.LIFNode(v_threshold=0.3),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def snntorch_network() -> nn.Module:
    def leaky(beta: Any, **options: Any) -> nn.Module:
        return snn.Leaky(beta, init_hidden=True, **options)

    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), leaky(torch.linspace(0.1, 0.9, 8)[:, None, None]),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), leaky(0.5, reset_delay=False, reset_mechanism="zero"),
        nn.Flatten(), nn.Linear(32, 8), snn.Synaptic(0.5, 0.8, init_hidden=True, reset_delay=False),
        nn.Linear(8, 5), leaky(0.9, learn_threshold=True, graded_spikes_factor=0.5, output=True),
    )  # fmt: skip


NETWORKS = pytest.mark.parametrize("make", [spikingjelly_network, snntorch_network], ids=["spikingjelly", "snntorch"])


def alive(net: nn.Module) -> Case:
    return liven(Case(net, 2 * torch.rand(4, 2, 8, 8), T))


@NETWORKS
def test_steps(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    case = alive(make())
    assert all(0.01 < rate < 1 for rate in firing_rates(case).values())
    model = agree(case, tmp_path / "net.onnx")
    assert not kinds(model)
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    first = "2.v" if make is spikingjelly_network else "2.mem"
    assert shapes["input"] == ["batch", 2, 8, 8]
    assert shapes[first] == ["batch", 8, 8, 8]
    assert "BatchNormalization" in {n.op_type for n in model.graph.node}
    assert "snncompress/" not in str(model), "paths of this machine"
    if make is spikingjelly_network:
        assert json.loads(model.metadata_props[0].value) == {"2.v": 0.0, "6.v": -0.5, "9.v": 0.0, "11.v": 0.0}


@pytest.mark.parametrize(
    ("make", "bits", "integers"),
    [
        pytest.param(spikingjelly_network, 1, "int8", marks=pytest.mark.slow),
        (snntorch_network, 4, "int8"),
        (spikingjelly_network, 8, "int16"),
        pytest.param(snntorch_network, 16, "int32", marks=pytest.mark.slow),
    ],
)
def test_quantized_and_pruned(make: Callable[[], nn.Module], bits: int, integers: str, tmp_path: Path) -> None:
    case = alive(make())
    small = snncompress.apply(case.model, "svs", 0.5, bits, data=case.x, timesteps=T, progress=False, skip=[])
    with torch.no_grad():
        for name in weight_layers(small):
            stored_weight(small.get_submodule(name)).mul_(1.5)
    assert all(0 < rate < 1 for rate in firing_rates(Case(small, case.x, T)).values())
    model = agree(Case(small, case.x, T), tmp_path / "net.onnx")
    assert kinds(model) == {integers}
    assert sum(n.op_type == "DequantizeLinear" for n in model.graph.node) == 4


@pytest.mark.parametrize(
    ("make", "gamma"),
    [(spikingjelly_network, "mse"), pytest.param(snntorch_network, "l1_mean", marks=pytest.mark.slow)],
)
def test_masked_per_channel(make: Callable[[], nn.Module], gamma: Any, tmp_path: Path) -> None:
    case = alive(make())
    quantizer = ReScaW(gamma=gamma, per_channel=True)
    small = snncompress.apply(
        case.model,
        "weight_magnitude",
        0.5,
        3,
        quantizer=quantizer,
        data=case.x,
        timesteps=T,
        progress=False,
        skip=["0"],
    )
    mask = weight_mask(small[4])
    assert mask is not None
    model = agree(Case(small, case.x, T), tmp_path / "net.onnx")
    assert kinds(model) == {"int8"}
    assert not weight(model, "4")[~mask.numpy()].any()


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.fire = layer.ConvTranspose2d(2, 3, 3), neuron.IFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.up(x))


class Cubes(Quantizer):
    """A grid that isn't uniform, with a scale that doesn't fit it."""

    name = "cubes"

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale)

    def tensor_quant(self, bits: int) -> nn.Module:
        scale = self.scale

        class Tensorwise(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                value = (x.sign() * x.abs() ** (1 / 3) * 4).round() ** 3 / 64
                return value, scale, torch.tensor(0.0), torch.tensor(float(bits))

        return Tensorwise()


@pytest.mark.parametrize("gamma", ["l1_mean", "mse"])
def test_output_channels_second(gamma: Any, tmp_path: Path) -> None:
    net = Transposed()
    quantize_weight(net.up, ReScaW(gamma=gamma, per_channel=True), 4)
    model = agree(Case(net, 3 * torch.rand(3, 2, 5, 5), T), tmp_path / "net.onnx")
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    assert node.attribute[0].i == 1


@pytest.mark.parametrize("scale", [0.3, 2.0**-100, [0.3, 0.3, 0.3]])
def test_float_weights_where_integers_are_inexact(scale: Any, tmp_path: Path) -> None:
    net = Transposed()
    quantize_weight(net.up, Cubes(scale), 4)
    assert not kinds(agree(Case(net, 3 * torch.rand(3, 2, 5, 5), T), tmp_path / "net.onnx"))


def test_recurrent_neurons(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6), snn.RLeaky(0.8, linear_features=6, init_hidden=True))
    case = liven(Case(net, torch.rand(3, 4), T))
    model = agree(case, tmp_path / "net.onnx")
    assert [i.name for i in model.graph.input] == ["input", "1.mem", "1.spk"]


@pytest.mark.parametrize(
    ("fire", "steps"),
    [(neuron.IFNode(), [1, 3, 5, 7]), (snn.Leaky(1.0, init_hidden=True, reset_mechanism="zero"), [2, 5])],
)
def test_potential_at_the_threshold(fire: nn.Module, steps: list[int], tmp_path: Path) -> None:
    x = torch.full((2, 1), 0.5)
    agree(Case(nn.Sequential(fire), x, T), tmp_path / "net.onnx")
    outputs, _ = run(tmp_path / "net.onnx", x.expand(T, 2, 1))
    assert outputs["output"][:, 0, 0].nonzero()[0].tolist() == steps


class Odd(neuron.IFNode):
    def __init__(self) -> None:
        super().__init__()
        self.register_memory("log", None)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)


class Guess(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > -9 else -x


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Sequential(nn.Linear(4, 3), Odd()), r"1 \(Odd\) can't be exported: its memory 'log' is a NoneType"),
        (nn.Sequential(Flat(), neuron.IFNode()), r"1 has a state 'v' of shape \[1, 8\] for 2 samples"),
        (nn.Sequential(Guess(), neuron.IFNode()), r"PyTorch can't export a timestep of Sequential to ONNX: \w+: "),
    ],
)  # fmt: skip
def test_refused(net: nn.Module, why: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ModelError, match=why):
        export(net, path, data=torch.rand(2, 4), timesteps=2)
    assert not path.exists()


def test_refused_numbers_that_onnx_has_no_convolution_of(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), neuron.IFNode()).bfloat16()
    with pytest.raises(ModelError, match=r"isn't valid ONNX.*bfloat16; model\.float\(\)"):
        export(net, tmp_path / "net.onnx", data=torch.rand(2, 1, 4, 4).bfloat16(), timesteps=2)


def test_refused_unused_neuron(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), neuron.IFNode())
    net[0].add_module("idle", neuron.IFNode())
    with pytest.raises(ModelError, match=r"0\.idle isn't called on this input, so its state has no shape. Remove it"):
        export(net, tmp_path / "net.onnx", data=torch.rand(2, 4), timesteps=2)


def test_refused_memory_of_a_pooling(tmp_path: Path) -> None:
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten())
    data = 2 * torch.rand(4, 1, 6, 6)
    net = snncompress.convert(cnn, neuron="if", data=data)
    with pytest.raises(ModelError, match="or a module besides the neurons has a memory, as RateMaxPool has"):
        export(net, tmp_path / "net.onnx", data=data, timesteps=4)
