"""NIR graphs for chips: whole numbers and sums that fire as the network does, spike by spike."""

from __future__ import annotations

import json
from pathlib import Path

import nir
import numpy as np
import pytest
import snntorch as snn
import torch
from snncompress_chips import FPGA
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError
from tests.export.nir_graphs import simulate

EVENTS = torch.rand(6, 5, 2, 16, 16, generator=torch.Generator().manual_seed(0)).round()


def net(*, norms: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [layer.BatchNorm2d(12)] if norms else []
    model = nn.Sequential(
        layer.Conv2d(2, 12, 3, padding=1, bias=False), *norm, neuron.IFNode(v_threshold=0.7), layer.AvgPool2d(2),
        layer.AvgPool2d(2), layer.Conv2d(12, 8, 3, bias=False), neuron.IFNode(v_threshold=0.1), layer.AvgPool2d(2),
        layer.Flatten(), layer.Linear(8, 4, bias=False), neuron.IFNode(v_threshold=0.05),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    return model.eval()


def written(model: nn.Module, path: Path, target: object = "speck") -> nir.NIRGraph:
    snncompress.export(model, path, "nir", data=EVENTS, target=target)
    return nir.read(path)


def spikes(graph: nir.NIRGraph, x: Tensor) -> np.ndarray:
    """In steps of 1, in which whole numbers stay whole: 1e-4 · (1e4 · 37) needn't be 37."""
    graph.metadata["dt"] = 1.0
    for node in graph.nodes.values():
        if isinstance(node, nir.IF):
            assert np.allclose(node.r, 1e4)
            node.r = np.ones_like(node.r)
    return simulate(graph, x, "output")


def test_a_network_for_speck_in_whole_numbers(tmp_path: Path) -> None:
    small = snncompress.apply(net(), "magnitude", data=EVENTS, target="speck")
    graph = written(small, tmp_path / "small.nir")
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert kinds == {"Input", "Output", "Conv2d", "Affine", "IF", "SumPool2d", "Flatten"}
    for node in graph.nodes.values():
        if isinstance(node, (nir.Conv2d, nir.Affine)):
            assert np.array_equal(node.weight, node.weight.round())
            assert np.abs(node.weight).max() <= 127
            assert not node.bias.any()
        if isinstance(node, nir.IF):
            assert np.array_equal(node.v_threshold, node.v_threshold.round() - 0.25)
            assert len(np.unique(node.v_threshold)) == 1
    with torch.no_grad():
        wanted = small.double()(EVENTS.double())
    assert 0 < wanted.mean() < 1
    assert np.array_equal(spikes(graph, EVENTS), wanted.numpy())


def test_states_and_weights_on_one_scale(tmp_path: Path) -> None:
    """Batch norms folded, so that there are biases, which the network's states round as the file has them.

    Of all neurons one step is one in a sum of weights, as the weights are after the training.
    """

    def stretch(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)

    model = net(norms=True)
    with torch.no_grad():
        model[1].bias.uniform_(-0.2, 0.2)
    small = snncompress.apply(model, None, bits=5, data=EVENTS, target="speck", finetune=stretch)
    grids = [m.state_grid for m in small if isinstance(m, neuron.IFNode)]
    graph = written(small, tmp_path / "small.nir")
    told = json.loads(graph.metadata["fixed_point"])
    assert [(g.bits, g.step.dim()) for g in grids] == [(16, 0)] * 3
    assert all(grid["step"] == [1.0] for grid in told.values())
    assert graph.nodes["0"].bias.any()
    assert np.array_equal(graph.nodes["0"].bias, graph.nodes["0"].bias.round())
    assert all(
        np.array_equal(n.v_threshold, n.v_threshold.round() - 0.25)
        for n in graph.nodes.values()
        if isinstance(n, nir.IF)
    )
    with torch.no_grad():
        wanted = small.double()(EVENTS.double())
    assert 0 < wanted.mean() < 1
    assert np.array_equal(spikes(graph, EVENTS), wanted.numpy())


def test_neurons_that_fire_above_their_threshold_alone(tmp_path: Path) -> None:
    """As snnTorch's do: of whole numbers they must reach 3 where the threshold is 2."""
    torch.manual_seed(0)
    cell = {"beta": 1.0, "reset_mechanism": "zero", "init_hidden": True}
    model = nn.Sequential(nn.Linear(6, 8, bias=False), snn.Leaky(**cell))
    x = torch.rand(20, 6).round()
    layerwise = ReScaW(per_channel=False)
    small = snncompress.apply(model, None, 0.0, 4, quantizer=layerwise, data=x, timesteps=6, skip=[], repair=None)
    with torch.no_grad():
        small[1].threshold.fill_(2 * small[0].weight.abs().min())  # odd numbers, the least of which is 1
    snncompress.export(small, tmp_path / "small.nir", data=x, timesteps=6, target="loihi2")
    graph = nir.read(tmp_path / "small.nir")
    assert graph.metadata["fires"] == "v > v_threshold"
    assert set(np.abs(graph.nodes["0"].weight).flatten()) <= set(range(1, 16, 2))
    assert np.array_equal(graph.nodes["1"].v_threshold, np.full(8, 2.75))


def test_averages_are_averages_elsewhere(tmp_path: Path) -> None:
    snncompress.export(net(), tmp_path / "net.nir", data=EVENTS)
    kinds = [type(node).__name__ for node in nir.read(tmp_path / "net.nir").nodes.values()]
    assert kinds.count("AvgPool2d") == 3
    assert "SumPool2d" not in kinds


@pytest.mark.parametrize("bits", [None, 5])
def test_scales_by_channel_and_biases_go_into_thresholds(tmp_path: Path, bits: int | None) -> None:
    """As a chip has it that may give each channel its own: floats, or grids, with a batch norm folded in."""
    model = net(norms=True)
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)  # negative scales, too
        model[1].bias.uniform_(-0.2, 0.2)
    if bits:
        model = snncompress.apply(model, None, bits=bits, data=EVENTS, skip=[], repair=None)
    graph = written(model, tmp_path / "small.nir", FPGA())
    if bits:
        first = graph.nodes["0"]
        assert np.array_equal(first.weight, first.weight.round())
        assert np.abs(first.weight).max() <= 31
    with torch.no_grad():
        wanted = model.double()(EVENTS.double())
    assert 0 < wanted.mean() < 1
    assert np.mean(spikes(graph, EVENTS) == wanted.numpy()) > 0.99  # biases are floats of 32 bits


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"doesn't fit 'speck': '0', '4', '8': bits of a weight 32"):
        written(net(), tmp_path / "net.nir")
    with pytest.raises(OptionError, match=r"written for 'xylo_audio2' that fires there as it does here: .* current"):
        written(net(), tmp_path / "net.nir", "xylo_audio2")
    with pytest.raises(OptionError, match="target= writes NIR graphs"):
        snncompress.export(net(), tmp_path / "net.onnx", data=EVENTS, target="speck")
    with pytest.raises(OptionError, match="approximate=True is for NIR, and 'onnx' holds"):
        snncompress.export(net(), tmp_path / "net.onnx", data=EVENTS, approximate=True)


def test_chips_get_no_loops(tmp_path: Path) -> None:
    soft = nn.Sequential(layer.Linear(6, 4, bias=False), neuron.IFNode(v_reset=None)).eval()
    x = torch.rand(5, 6).round()
    with pytest.raises(ModelError, match=r"1_membrane takes several NIR nodes, I among them.*approximate=True"):
        snncompress.export(soft, tmp_path / "soft.nir", data=x, timesteps=2, target=FPGA())
    assert not (tmp_path / "soft.nir").exists()
