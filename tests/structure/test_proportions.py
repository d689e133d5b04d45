"""Widths that forward takes from another layer's: as many channels go there, in proportion, whatever was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.structure.tracing import trace
from tests.equivalence import largest_difference

X = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1, step_mode="m")


class Counting(nn.Module):
    """``q`` is shaped to four heads, and ``up`` to twice the width, of what they take in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lif, self.q, self.q_lif = nn.Linear(6, 20), fire(), nn.Linear(20, 20), fire()
        self.up, self.up_lif, self.free, self.free_lif = nn.Linear(20, 40), fire(), nn.Linear(40, 20), fire()
        self.head, self.tell = nn.Linear(20, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.embed(x))
        heads = self.q_lif(self.q(x)).reshape(*x.shape[:2], 4, x.shape[-1] // 4)
        y = self.up_lif(self.up(x).reshape(*x.shape[:2], 2 * x.shape[-1]))
        return self.head(self.free_lif(self.free(y))) + self.tell(heads.sum(-1))


def widths(**options: Any) -> tuple[list[int], snncompress.Plan]:
    model = Counting().double().eval()
    small = snncompress.apply(model, "random", bits=None, data=X, repair=None, **options)
    assert largest_difference(model, small, Feed(find_adapter(model), X)) < 1e-9
    return [m.out_features for m in (small.embed, small.q, small.up, small.free)], snncompress.plan_of(small)


def test_what_is_tied_is_found() -> None:
    model = Counting().double().eval()
    adapter = find_adapter(model)
    network = trace(model, adapter, Feed(adapter, X).example())
    assert [{group.names("out")[0] for group in groups} for groups in network.tied] == [{"embed", "q", "up"}]


@pytest.mark.parametrize(
    ("ratio", "left"),
    [
        (0.3, [12, 12, 24]),  # of five channels per head two go, though of 20 six would do
        (0.5, [8, 8, 16]),
        ({"q": 0.5, "*": 0.2}, [16, 16, 32]),
    ],
)
def test_the_smallest_share_and_the_coarsest_portion_count_for_all(ratio: Any, left: list[int]) -> None:
    found, plan = widths(ratio=ratio, skip=[])
    assert found[:3] == left
    assert found[3] == round(20 * (1 - (ratio["*"] if isinstance(ratio, dict) else ratio)))
    assert set(plan.skipped) == {"head", "tell"}


def test_where_one_stays_all_do() -> None:
    found, plan = widths(ratio=0.5, skip=["up"])
    assert found == [20, 20, 40, 10]
    assert plan.skipped["q"] == "forward counts on as many channels in up, which stays whole: skip names it"


def test_sensitivity_prunes_what_is_tied_at_once() -> None:
    model = Counting().double().eval()
    labelled = (X, torch.tensor([0, 1]))
    found = snncompress.sensitivity(model, labelled, "random", [0.5], layers="*", repair=None, progress=False)
    assert found.accuracy["embed"] == found.accuracy["q"] == found.accuracy["up"] != (None,)


class InHeads(nn.Module):
    """Halves of 12 channels fit ``reshape``, by ``width`` in three heads as by the number 12 on an even batch."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width, self.heads = width, 3
        self.a, self.fire_a, self.b, self.fire_b = nn.Linear(6, 12), fire(), nn.Linear(12, 12), fire()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire_a(self.a(x))
        if self.width is None:
            y = x.reshape(-1, 12).relu().reshape(x.shape)
        else:
            y = x.reshape(*x.shape[:-1], self.heads, self.width // self.heads).relu().flatten(-2)
        return self.head(self.fire_b(self.b(y)))


@pytest.mark.parametrize(("width", "left"), [(12, 9), (None, 12)])
def test_a_number_in_forward_does_not_fit_by_chance(width: int | None, left: int) -> None:
    model = InHeads(width).double().eval()
    small = snncompress.apply(model, "random", 0.2, None, data=X, repair=None, skip=[])
    assert small.a.out_features == left  # ⌈0.2 · 4⌉ of the positions in a head
    assert small.b.out_features == 9
    assert largest_difference(model, small, Feed(find_adapter(model), X)) < 1e-9
    whole = snncompress.plan_of(small).skipped
    assert ("a" in whole) == (width is None)
    assert width or "forward, behind fire_a, counts on how many there are" in whole["a"]


class Dividing(nn.Module):
    """What comes out last is cut into as many pieces as ``embed`` has channels: their number must divide it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lif, self.free, self.free_lif = nn.Linear(6, 16), fire(), nn.Linear(16, 24), fire()
        self.head = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lif(self.embed(x))
        return self.head(self.free_lif(self.free(hidden))).reshape(*x.shape[:2], hidden.shape[-1], -1).flatten(2)


@pytest.mark.parametrize(("ratio", "left"), [(0.2, (16, 19)), (0.3, (8, 16)), (0.7, (8, 7))])
def test_a_half_goes_where_no_other_share_can(ratio: float, left: tuple[int, int]) -> None:
    model = Dividing().double().eval()
    small = snncompress.apply(model, "random", ratio, None, data=X, skip=[], repair=None)
    assert (small.embed.out_features, small.free.out_features) == left
    assert largest_difference(model, small, Feed(find_adapter(model), X)) < 1e-9
