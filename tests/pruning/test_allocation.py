"""What goes from where, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from snncompress.pruning.allocation import Costs, Part, allocate, losses_of


def two_layers() -> Costs:
    """4 → 8 → 5: 32 weights whose 8 outputs are the group's, 40 that read them; a cost of 1 each."""
    out = torch.tensor([[1 / 8], [0.0]], dtype=torch.float64)
    into = torch.tensor([[0.0], [1 / 8]], dtype=torch.float64)
    return Costs(torch.tensor([[32.0, 40.0]], dtype=torch.float64), out, into, torch.tensor([0.0, 0.5]).double())


def test_costs_follow_outputs_and_inputs_and_bits() -> None:
    costs = two_layers()
    channels, bits = Part(torch.ones(7), {0: 1}), Part(torch.ones(6), row=1)
    assert costs.saved([channels, bits]).flatten().tolist() == [32 / 8 + 40 / 8, 0.5]
    costs.take(channels, 2)
    assert float(costs.total()) == 32 * 6 / 8 + 40 * 6 / 8
    assert float(costs.saved([bits])) == 0.5 * 6 / 8
    costs.take(bits, 4)
    assert float(costs.total()) == 24 + (40 - 2) * 6 / 8
    costs.take(channels, -2)
    assert float(costs.total()) == 32 + 38


def test_losses_add_up_to_the_share_that_is_left() -> None:
    v = torch.tensor([3.0, 1.0, 2.0, 4.0])  # squares 9, 1, 4, 16: 30 in all, 25 without the two lowest
    assert float(losses_of(v, [1, 1]).sum()) == pytest.approx(math.log(30 / 25))
    assert float(losses_of(v, [2])) == pytest.approx(math.log(30 / 25))
    assert losses_of(v - 5, [1, 1]).tolist() == pytest.approx(losses_of(v - 1, [1, 1]).tolist())  # only order below 0


def test_the_cheapest_goes_first_and_what_was_too_much_comes_back() -> None:
    """Two groups of like cost, 10 a channel of 100 in all. The second loses less, so all that goes is its; at 71 of
    100 three must go, and the fourth of a coarse step comes back."""
    out = torch.tensor([[1 / 5, 0.0], [0.0, 1 / 5]], dtype=torch.float64)
    costs = Costs(torch.tensor([[50.0, 50.0]]).double(), out, torch.zeros_like(out))
    dear, cheap = Part(torch.full((4,), 0.5), {0: 1}), Part(torch.tensor([0.1, 0.2, 0.3, 0.4]), {1: 1})
    assert allocate([dear, cheap], costs, torch.tensor([71.0]).double())
    assert (dear.gone, cheap.gone) == (0, 3)
    assert float(costs.total()) == pytest.approx(70)
    assert not allocate([dear, cheap], costs, torch.tensor([19.0]).double())  # two channels must stay


def test_a_channel_too_much_comes_back() -> None:
    """Steps of 10 and 25: what loses least goes first, and is given back where the dear one alone is enough."""
    out = torch.eye(2, dtype=torch.float64)
    costs = Costs(torch.tensor([[10.0, 25.0]]).double(), out, torch.zeros_like(out))
    small, large = Part(torch.tensor([0.3]), {0: 1}), Part(torch.tensor([0.4]), {1: 1})
    assert allocate([small, large], costs, torch.tensor([12.0]).double())
    assert (small.gone, large.gone) == (0, 1)
