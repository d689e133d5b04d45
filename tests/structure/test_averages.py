"""What is normalized before neurons must not cancel in an average behind them."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn import functional as F

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1, step_mode="m")


class Ramp(nn.Module):
    """What it takes in has the mean 0 over the tokens, so what weights make of it has, too, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fire, self.b, self.fire2 = nn.Linear(6, 8, bias=False), fire(), nn.Linear(8, 8), fire()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(self.a(x - x.mean(2, keepdim=True)))
        y = y * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)
        return self.head(self.fire2(self.b(y.mean(2))))


def test_what_is_normalized_does_not_hide_in_an_average() -> None:
    x = torch.rand(3, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Ramp().double().eval()
    small = snncompress.apply(model, "random", 0.5, None, data=x, repair=None, skip=[])
    assert small.a.out_features == 8
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-9


class Pairs(nn.Module):
    """Of two outputs side by side the larger one counts, and the batch's size is written in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fire, self.b, self.fire2 = nn.Linear(6, 16), fire(), nn.Linear(8, 8), fire()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(F.max_pool1d(self.a(x), 2))
        return self.head(self.fire2(F.max_pool1d(self.b(y), 2)).view(3, 32, -1))


def test_outputs_that_are_pooled_in_pairs_go_in_pairs() -> None:
    x = torch.rand(3, 32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Pairs().double().eval()
    small = snncompress.apply(model, "random", 0.5, None, data=x, repair=None, skip=[])
    gone = snncompress.plan_of(small).removed_channels()
    assert (small.a.out_features, small.b.weight.shape) == (8, (4, 4))
    assert gone["a"] == [i for even in gone["a"][::2] for i in (even, even + 1)]
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-9
