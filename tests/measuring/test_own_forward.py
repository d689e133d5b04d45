"""Layers of users' own classes, whose forward turns what it multiplies, or goes on behind the product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from tests.equivalence import same, snapshot


class TimeLastLinear(nn.Linear):
    """[N, C, T] to [N, C', T], as in spiking VAEs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.weight, self.bias).transpose(1, 2)


class PooledConv(nn.Conv2d):
    """A convolution and what follows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super().forward(x), 2)


def test_what_is_multiplied_is_counted_whatever_goes_in_and_comes_out() -> None:
    """Spikes times synapses of the product itself; with as many timesteps as channels no shape would tell."""
    for width in (4, 6):
        x = (torch.rand(2, width, 4) < 0.5).float()
        model = nn.Sequential(TimeLastLinear(width, 3, bias=False), neuron.IFNode())
        row = snncompress.profile(model, x).layers[0]
        assert row.n_ac == 3 * float(x.sum()) / 2
    image = (torch.rand(2, 1, 4, 4) < 0.5).float()
    row = snncompress.profile(nn.Sequential(PooledConv(1, 5, 1, bias=False), neuron.IFNode()), image).layers[0]
    assert row.n_ac == 5 * float(image.sum()) / 2


def test_they_stay_whole_and_the_rest_is_compressed_frozen_and_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 1), neuron.IFNode(v_threshold=0.2), TimeLastLinear(6, 8), neuron.IFNode(v_threshold=0.2),
        nn.Conv1d(8, 3, 1),
    ).eval()  # fmt: skip
    x = torch.rand(3, 2, 4)
    before = snapshot(model)
    small = snncompress.apply(model, "svs", 0.5, 8, data=x, skip=[], progress=False)
    assert same(before, snapshot(model))
    assert snncompress.plan_of(small).skipped.keys() >= {"2"}
    with torch.no_grad():
        wanted = small(x)
        small[1].reset(), small[3].reset()
        assert torch.allclose(snncompress.freeze(small, x, integer="auto")(x), wanted, atol=1e-6)


class FiringConv(nn.Conv2d):
    """A convolution and its neurons."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.fire = neuron.IFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(super().forward(x))


def test_a_layer_that_fires_itself_is_told() -> None:
    told, x = "{0}.fire fires in the forward of {0} itself", torch.rand(2, 1, 4, 4)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), neuron.IFNode(), FiringConv(6, 4, 1), nn.Conv2d(4, 2, 1))
    small = snncompress.apply(model, "magnitude", 0.5, None, data=x, timesteps=2, skip=[], repair=None)
    assert small[2].weight.shape == (4, 3, 1, 1)
    assert told.format(2) in snncompress.plan_of(small).skipped["2"]
    with pytest.raises(snncompress.ModelError, match=told.format(0)):
        snncompress.apply(nn.Sequential(FiringConv(1, 6, 3)), "magnitude", 0.5, None, data=x, timesteps=2)
