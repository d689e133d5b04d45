"""NIR graphs of networks in whole numbers: integers in the file, and the network's spikes where nothing is rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, Plan, QuantizeStates
from snncompress.model.edits import QuantizeWeights
from tests.export.nir_graphs import simulate
from tests.export.test_integer_network import T, X, currents, leaky, small, spikes


def test_integers_by_hand_and_in_snntorch(tmp_path: Path) -> None:
    """Weights ±1/4 and ±3/4 are codes ±1 and ±3; with δ = 1/32 one is 8 steps, and r = 8 / leak = 16. A threshold of
    3/4 is 24, less a quarter. In the first layer, with δ = 1/4, one is 4 steps. Of (1, 1) both first neurons fire each
    time, so that the next get 8 · (3 - 1) = 16 and 8 · (1 + 3) = 32: one gets to 16, and to 16/2 + 16 = 24, the other
    fires always. Nothing is rounded.
    """
    first, second = (neuron.LIFNode(decay_input=False, v_threshold=theta) for theta in (1.0, 0.75))
    net = nn.Sequential(nn.Linear(2, 2), first, nn.Linear(2, 2, bias=False), second, nn.Linear(2, 1))
    net[0].weight.data, net[0].bias.data = torch.eye(2), torch.zeros(2)
    net[2].weight.data = torch.tensor([[0.75, -0.25], [0.25, 0.75]])
    rescaw = {"gamma": "max", "per_channel": False}
    states = (QuantizeStates("1", 8, (0.25,)), QuantizeStates("3", 8, (0.03125,)))
    model = Plan((QuantizeWeights("2", "rescaw", 2, rescaw), *states)).apply(net).eval()
    x = torch.ones(1, 2)
    whole = snncompress.freeze(model, x, timesteps=4, integer="full")
    snncompress.export(whole, tmp_path / "net.nir", data=x, timesteps=4)
    graph = nir.read(tmp_path / "net.nir")
    assert (graph.nodes["2"].weight.tolist(), graph.nodes["2"].weight.dtype) == ([[3, -1], [1, 3]], np.int8)
    assert np.allclose([graph.nodes["1"].r, graph.nodes["3"].r], [[8.0, 8.0], [16.0, 16.0]], rtol=1e-6)
    assert (graph.nodes["1"].v_threshold.tolist(), graph.nodes["3"].v_threshold.tolist()) == ([3.75] * 2, [23.75] * 2)
    assert graph.nodes["3"].v_reset.dtype == np.int8
    assert json.loads(graph.metadata["fixed_point"])["3"] == {"bits": 8, "overflow": "saturate", "step": [1.0]}
    assert simulate(graph, x.expand(4, 1, 2), "3")[:, 0].tolist() == [[0, 1], [1, 1], [0, 1], [1, 1]]

    read, state = pytest.importorskip("snntorch.import_nir").import_from_nir(graph), None
    with torch.no_grad():
        for t in range(4):
            output, state = read(x, state)
            assert torch.allclose(output, whole(x), atol=1e-6), t


KINDS = {
    leaky: ["Conv2d", "LI", "Threshold", "Threshold", "Conv2d", "LIF"],
    currents: ["Conv2d", "LI", "Threshold", "Threshold", "Conv2d", "Threshold"],
}


@pytest.mark.parametrize("make", KINDS)
def test_leaks_are_rounded_in_the_network_alone(make: Any, tmp_path: Path) -> None:
    """Few spikes differ where potentials have many bits; reset by subtraction, in convolutions, behind maxima."""
    model = make(state_bits=16)
    whole = snncompress.freeze(model, X, timesteps=T, integer="full")
    snncompress.export(whole, tmp_path / "net.nir", data=X, timesteps=T)
    graph = nir.read(tmp_path / "net.nir")
    kinds = [type(graph.nodes[name]).__name__ for name in ("0", "1_membrane", "1", "2", "3", "7")]
    assert kinds == KINDS[make]
    assert (type(graph.nodes["4.current"]).__name__ if make is currents else "LI") == "LI"
    assert {graph.nodes[name].weight.dtype.name for name in ("3", "6")} <= {"int8", "int16"}
    for name, wanted in spikes(model).items():
        assert 0 < wanted.float().mean() < 1
        assert np.mean(simulate(graph, X.expand(T, *X.shape), name) != wanted.numpy()) < 0.02


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Linear(128, 6), neuron.IFNode(v_threshold=0.2)
        self.second, self.other = nn.Linear(6, 6), neuron.IFNode(v_threshold=0.1)
        self.readout = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.one(self.first(x.flatten(1)))
        return self.readout(self.other(self.second(spikes + spikes.clone())))


def test_what_nir_has_no_node_for_is_refused(tmp_path: Path) -> None:
    whole = snncompress.freeze(small(Twice(), 4), X, timesteps=T, integer="full")
    with pytest.raises(
        ModelError, match=r"add can't be written as NIR in whole numbers: it adds one value twice.*onnx"
    ):
        snncompress.export(whole, tmp_path / "net.nir", data=X, timesteps=T)
