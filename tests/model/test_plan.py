"""Plans: indices, JSON, and models they can't be replayed on."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snncompress
from snncompress import Plan, QuantizeWeights, RemoveChannels
from snncompress.model.edits import Slice


def removal(*indices: int, width: int) -> RemoveChannels:
    return RemoveChannels("conv", indices, (Slice("conv", "out", indices, width, 0),))


def test_later_indices_count_what_is_left() -> None:
    """Of 0 … 7 the first edit leaves 0 2 3 5 6 7; its 1 and 4 are then 2 and 6."""
    plan = Plan((removal(1, 4, width=8), removal(1, 4, width=6)))
    assert plan.removed_channels() == {"conv": [1, 2, 4, 6]}


@given(st.data())
def test_removed_channels_match_a_list_that_is_really_cut(data: st.DataObject) -> None:
    left, edits = list(range(12)), []
    for _ in range(3):
        gone = data.draw(st.lists(st.integers(0, len(left) - 1), max_size=3, unique=True).map(sorted))
        edits.append(removal(*gone, width=len(left)))
        left = [c for i, c in enumerate(left) if i not in gone]
    assert Plan(tuple(edits)).removed_channels()["conv"] == sorted(set(range(12)) - set(left))


def network() -> nn.Sequential:
    return nn.Sequential(
        layer.Conv2d(1, 8, 3),
        neuron.IFNode(),
        layer.Conv2d(8, 4, 3),
        neuron.IFNode(),
        layer.Flatten(),
        layer.Linear(64, 3),
    )


@pytest.fixture
def plan() -> Plan:
    return snncompress.plan_of(
        snncompress.apply(network(), "random", 0.5, 4, data=torch.rand(1, 1, 8, 8), timesteps=2, skip=[])
    )


def damaged(plan: Plan, path: list[object], value: object) -> str:
    data = json.loads(plan.to_json())
    here = data["edits"]
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ([3, "slices", 0, "indices"], [0, 99]),
        ([3, "slices", 0, "indices"], [-1]),
        ([3, "slices", 0, "indices"], [0, 0]),
        ([3, "slices", 0, "indices"], list(range(8))),
        ([3, "slices", 0, "indices"], ["0"]),
        ([3, "slices", 0, "indices"], 5),
        ([3, "slices", 0, "width"], 9),
        ([3, "slices", 0, "side"], "up"),
        ([3, "slices", 0, "module"], "nowhere"),
        ([3, "slices", 0, "module"], "4"),
        ([3, "slices"], None),
        ([3, "edit"], "explode"),
        ([0, "bits"], -4),
        ([0, "bits"], 4.5),
        ([0, "layer"], "1"),
        ([0, "layer"], "nowhere"),
        ([0, "quantizer"], "nobody"),
        ([0, "options"], {"surprise": 1}),
        ([0], 7),
    ],
)
def test_a_damaged_plan_is_refused_and_the_model_stays(plan: Plan, path: list[object], value: object) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(snncompress.SNNCompressError):
        Plan.from_json(damaged(plan, path, value)).apply(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_damage_is_what_is_refused(plan: Plan) -> None:
    """The same route without damage works."""
    assert [e.kind for e in plan.edits] == ["quantize_weights"] * 3 + ["remove_channels"] * 2
    Plan.from_json(plan.to_json()).apply(network())


def test_prints_what_was_done(plan: Plan) -> None:
    text = str(plan)
    assert "0: 4 channels removed" in text
    assert "bits=4" in text
    assert "5 kept whole: 5 is the classifier" in text


def test_a_deep_copy_keeps_its_plan(plan: Plan) -> None:
    import copy

    model = plan.apply(network())
    assert snncompress.plan_of(copy.deepcopy(model)) == plan
    assert not any("plan" in key for key in model.state_dict())


def test_an_unregistered_quantizer_works_but_its_plan_says_what_is_missing() -> None:
    from snncompress_rescaw import Uniform

    class Mine(Uniform):
        name = "mine"

    model = network()
    small = snncompress.apply(model, None, 0, 4, data=torch.rand(1, 1, 8, 8), timesteps=2, quantizer=Mine())
    assert snncompress.plan_of(small).edits == (QuantizeWeights("2", "mine", 4, {"ste": Mine().ste}),)
    with pytest.raises(snncompress.UnknownNameError, match="There is no quantizer 'mine'"):
        snncompress.plan_of(small).apply(model)
