"""What a result may cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snncompress
from snncompress import OptionError, plan_of, profile
from snncompress.pruning.budgets import Budget

X = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(2, 24, 3, padding=1), layer.BatchNorm2d(24), neuron.IFNode(v_threshold=0.5),
        layer.Conv2d(24, 32, 3, padding=1), layer.BatchNorm2d(32), neuron.IFNode(v_threshold=0.5),
        layer.AvgPool2d(4), layer.Flatten(), layer.Linear(128, 24), neuron.IFNode(v_threshold=0.1),
        layer.Linear(24, 4),
    ).eval()  # fmt: skip


def within(budget: dict[str, float], **options: Any) -> tuple[nn.Module, snncompress.Profile, snncompress.Profile]:
    dense = net()
    options = {"bits": None, "skip": [], "repair": None, "criterion": "magnitude", **options}
    small = snncompress.apply(dense, data=X, timesteps=3, budget=budget, **options)
    return small, *(profile(model, X, timesteps=3) for model in (small, dense))


@pytest.mark.parametrize("kind", ["n_params", "size_mb", "energy_pj", "n_ac"])
def test_a_share_is_met_from_below(kind: str) -> None:
    key = {"n_params": "params", "size_mb": "size", "energy_pj": "energy", "n_ac": "synops"}[kind]
    small, now, before = within({key: 0.5})
    assert 0.47 < getattr(now, kind) / getattr(before, kind) <= 0.5  # a channel of 24 is up to 3 %
    assert plan_of(small).origin["budget"] == {key: 0.5}


def test_numbers_in_units_and_several_at_once() -> None:
    _, now, before = within({"size_kb": 12.0, "params": 4000, "energy": 0.6})
    assert now.size_mb <= 0.012
    assert now.n_params <= 4000
    assert now.energy_pj <= 0.6 * before.energy_pj


def test_bits_are_shared_out_with_channels() -> None:
    small, now, before = within({"size": 0.12}, bits="auto", repair="membrane")
    assert 0.115 < now.size_mb / before.size_mb <= 0.12
    bits = {row.name: row.bits for row in now.layers if row.kind == "weight"}
    assert all(2 <= width <= 8 for width in bits.values() if width is not None)
    fresh = plan_of(small).apply(net())
    assert {row.name: row.bits for row in profile(fresh, X, timesteps=3).layers if row.kind == "weight"} == bits


def test_single_weights_within_a_budget_of_additions() -> None:
    _, now, before = within({"synops": 0.4}, criterion="weight_magnitude", repair="membrane")
    assert 0.37 < now.n_ac / before.n_ac <= 0.4


def test_timesteps() -> None:
    small, _, _ = within({"timesteps": 0.7}, ratio=0.25)
    assert plan_of(small).origin["truncate"] == 2  # of 3
    assert small[0].out_channels == 18  # of 24


def test_ratio_is_a_ceiling_and_widths_are_rounded() -> None:
    small, _, _ = within({"params": 0.6}, ratio={"0": 0.4, "3": 0.9, "8": 0.0}, round_to=8)
    assert small[0].out_channels in (16, 24)
    assert small[3].out_channels % 8 == 0
    assert small[8].out_features == 24
    assert plan_of(small).skipped["8"] == "ratio is 0"
    nothing, _, _ = within({"params": 1.0}, ratio={"0": 0.4, "3": 0.9})
    reasons = plan_of(nothing).skipped
    assert reasons["0"] == reasons["3"] == "the budget takes nothing from it"
    assert reasons["8"] == "no key of ratio matches it"


@pytest.mark.parametrize(
    ("budget", "options", "match"),
    [
        ({}, {}, "must be a mapping"),
        ({"joule": 0.5}, {}, "no budget 'joule'"),
        ({"energy": 2.0}, {}, "With a unit: 'energy_pj'"),
        ({"params": -1}, {}, "above 0"),
        ({"params": True}, {}, "above 0"),
        ({"params": 0.001}, {}, "can't be met: params"),
        ({"params": 0.5}, {"criterion": "weight_magnitude"}, "still are"),
        ({"energy": 0.5}, {"bits": "auto"}, "there is none"),
        ({"params": 0.5}, {"round_to": 0}, "round_to"),
    ],
)
def test_what_cannot_be(budget: dict[str, float], options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        within(budget, **options)


def test_what_goes_in_large_pieces_is_met_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter leaves 6,160 parameters, half of the channels 2,860: below 6,000 the goal must fall on, to 3,000."""
    pieces = lambda goals: ({"ratio": 0.25 if goals["params"] > 3000 else 0.5}, True)  # noqa: E731
    monkeypatch.setattr("snncompress.pruning.meeting._guess", lambda *_: pieces)
    _, now, _ = within({"params": 6000})
    assert now.n_params == 12 * 19 + 24 + 16 * 109 + 32 + 12 * 65 + 4 * 13 == 2860


def test_a_silent_network_costs_no_additions() -> None:
    dense = net()
    for module in dense:
        if isinstance(module, neuron.IFNode):
            module.v_threshold = 1e9
    small = snncompress.apply(dense, "magnitude", bits=None, data=X, timesteps=3, budget={"synops": 0.5}, skip=[])
    assert plan_of(small).edits == ()  # half of nothing is nothing


def test_bits_need_a_budget() -> None:
    with pytest.raises(OptionError, match="budget of size"):
        snncompress.apply(net(), "magnitude", 0.5, "auto", data=X, timesteps=3)


def test_kinds() -> None:
    asked = Budget.of({"size_kb": 3, "energy_uj": 2, "macs": 0.5, "params": 1000, "timesteps": 2})
    assert asked.numbers == {"size": 0.003, "energy": 2e6, "params": 1000}
    assert (asked.shares, asked.timesteps, asked.kinds) == ({"macs": 0.5}, 2, ("energy", "size", "params", "macs"))
