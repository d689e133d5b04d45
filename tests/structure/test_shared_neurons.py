"""Layers whose channels reach what reads them without a neuron of their own: behind one that others share, or none."""

from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import OwnNeurons
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference

X = torch.rand(4, 3, 8, dtype=torch.float64) * 3


def fire(x: Tensor) -> Tensor:
    return (x > 0).to(x)


class Regression(nn.Module):
    """As snnTorch's tutorial: the readout's neurons, of one output, stand behind the hidden layer too.

    With ``hidden`` they keep the state themselves: one that doesn't fit is begun anew, so at equal widths they would
    carry it on.
    """

    def __init__(self, *, hidden: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 1)
        self.own = snn.Leaky(beta=torch.rand(12), threshold=0.3, learn_beta=True, spike_grad=fire)
        self.out = snn.Leaky(beta=0.8, threshold=0.1, spike_grad=fire, init_hidden=hidden, output=True, **options)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        own, mid, out = self.own.init_leaky(), self.out.init_leaky(), self.out.init_leaky()
        found = []
        for step in x:
            spikes, own = self.own(self.first(step), own)
            if self.hidden:
                spikes, _ = self.out(self.second(spikes))
                _, out = self.out(self.last(spikes))
            else:
                spikes, mid = self.out(self.second(spikes), mid)
                _, out = self.out(self.last(spikes), out)
            found.append(out)
        return torch.stack(found)


def cut(model: nn.Module, criterion: str = "magnitude", **options: Any) -> nn.Module:
    return snncompress.apply(model.eval(), criterion, 0.5, None, data=X, skip=[], repair=None, **options)


def off(model: nn.Module, small: nn.Module, *readers: str) -> float:
    return largest_difference(model, small, Feed(find_adapter(model), X), readers)


def test_a_neuron_of_several_widths_is_on_the_way_to_what_reads_its_layers() -> None:
    torch.manual_seed(0)
    model = Regression(learn_beta=True).double()
    small = cut(model)
    assert small.second.weight.shape == (5, 6)
    assert small.last.weight.shape == (1, 5)
    assert off(model, small, "last") < 1e-12
    assert off(model, small) > 1e-3  # it matters what the reader takes in
    again = snncompress.plan_of(small).apply(Regression(learn_beta=True).double())
    assert again.last.weight.shape == (1, 5)


def test_criteria_of_spikes_leave_its_layers_whole() -> None:
    torch.manual_seed(0)
    model = Regression().double()
    small = cut(model, "firing_rate")
    assert small.second.weight.shape == (10, 6)
    assert "no spiking neuron of its own follows second" in snncompress.plan_of(small).skipped["second"]
    labels = torch.zeros(3, dtype=torch.long)
    assert list(snncompress.sensitivity(model, (X, labels), "firing_rate", (0.5,)).accuracy) == ["first"]


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("options", [{"hidden": True}, {"inhibition": True}])
def test_one_that_remembers_or_mixes_channels_stays_whole(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Regression(**options).double()
    small = cut(model)
    assert small.second.weight.shape == (10, 6)
    assert snncompress.plan_of(small).skipped["second"] == "out is one neuron for layers of several widths"
    assert off(model, small) < 1e-12


def test_a_layer_that_another_reads_without_neurons_between() -> None:
    """What is silent is what the other takes in, its constant part included."""
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(8, 12), layer.BatchNorm1d(12), layer.Linear(12, 10), neuron.LIFNode(v_threshold=0.1),
        layer.Linear(10, 3),
    )  # fmt: skip
    nn.init.uniform_(net[1].bias, 0.5, 1.0)
    for module in net:
        module.step_mode = "m"
    model = net.double()
    small = cut(model)
    assert [small[n].weight.shape for n in (0, 2, 4)] == [(6, 8), (5, 6), (3, 5)]
    assert off(model, small, "2") < 1e-12
    assert off(model, small) > 1e-3
    assert cut(model, "sca")[0].weight.shape == (12, 8)


class LIF(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[..., 0]), []
        for current in x.unbind(-1):
            v = 0.5 * v + current
            spikes.append((v > 0.1).to(x))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes, -1)


class TimeBehind(nn.Module):
    """[N, C, H, W, T], as networks after STBP have it: one object behind all layers, whose calls share nothing."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Linear(64, 3)
        self.fire, self.written = LIF(), written

    def forward(self, x: Tensor) -> Tensor:
        for step in (self.a, self.b):
            currents = torch.stack([step(piece) for piece in x.unbind(-1)], -1)
            if self.written:
                currents, made = torch.zeros_like(currents), currents
                for time in range(x.shape[-1]):
                    currents[..., time] = made[..., time]
            x = self.fire(currents)
        return self.c(x.flatten(1, 3).mean(-1))


@pytest.mark.parametrize("written", [False, True])
def test_channels_stand_before_time(written: bool) -> None:
    torch.manual_seed(0)
    model, x, mine = TimeBehind(written).double().eval(), torch.rand(2, 1, 6, 6, 3, dtype=X.dtype), OwnNeurons(LIF, -1)
    small = snncompress.apply(model, "magnitude", 0.5, None, data=x, adapter=mine, skip=[], repair=None)
    assert [len(m.weight) for m in (small.a, small.b, small.c)] == [3, 2, 3]
    assert largest_difference(model, small, Feed(find_adapter(model, mine), x), ["b", "c"]) < 1e-12
