"""collapse() on any network: outputs stay, and what is dead goes."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional
from torch import nn

import snncompress
from snncompress import Plan, collapse, plan_of
from snncompress.errors import EmptyLayerWarning, SilentNeuronsWarning
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import stored_weight
from tests.equivalence import outputs
from tests.networks import Case, firing_rates, snntorch_cases, spikingjelly_cases
from tests.pruning.test_collapse import collapsed, gone, net

few = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


def masked(case: Case, criterion: str, ratio: float, *, grow: float = 3.0) -> Case:
    """The case with only a share of its single weights, which are scaled up so that spikes still get through."""
    with warnings.catch_warnings():
        for category in (EmptyLayerWarning, SilentNeuronsWarning):
            warnings.simplefilter("ignore", category)
        model = snncompress.apply(
            case.model, criterion, ratio, None, data=case.x, timesteps=case.timesteps, skip=[]
        )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WEIGHT_LAYERS):
                stored_weight(module).mul_(grow)
    return Case(model, case.x, case.timesteps)


CRITERIA = st.sampled_from(["weight_random", "weight_magnitude"])


def check(case: Case) -> nn.Module:
    small = collapsed(case)
    count = [sum(p.numel() for p in model.parameters()) for model in (case.model, small)]
    plan = plan_of(small)
    assert count[1] < count[0] if len(plan.edits) > len(plan_of(case.model).edits) else count[1] == count[0]
    assert plan_of(collapse(small, case.x, timesteps=case.timesteps)) == plan  # twice is once
    return small


@few
@given(case=spikingjelly_cases(), criterion=CRITERIA, ratio=st.floats(0.8, 0.95))
def test_outputs_stay_spikingjelly(case: Case, criterion: str, ratio: float) -> None:
    check(masked(case, criterion, ratio))


@few
@given(case=snntorch_cases(), criterion=CRITERIA, ratio=st.floats(0.8, 0.95))
def test_outputs_stay_snntorch(case: Case, criterion: str, ratio: float) -> None:
    check(masked(case, criterion, ratio))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.one_of(spikingjelly_cases(), snntorch_cases()), ratio=st.floats(0.8, 0.95))
def test_the_plan_replays_on_a_fresh_model(case: Case, ratio: float) -> None:
    small = collapse(masked(case, "weight_random", ratio).model, case.x, timesteps=case.timesteps)
    plan = Plan.from_json(plan_of(small).to_json())
    assert plan == plan_of(small)
    replayed = plan.apply(case.model)
    wanted = small.state_dict()
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in replayed.state_dict().items()}
    replayed.load_state_dict(wanted)
    for a, b in zip(outputs(small, case.feed), outputs(replayed, case.feed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cases", [spikingjelly_cases, snntorch_cases])
def test_the_generated_networks_fire_and_lose_channels(cases: object) -> None:
    """On networks that are silent, or that lose nothing, equality would mean nothing."""
    alive, lost, total = 0, 0, 0

    @settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def run(case: Case) -> None:
        nonlocal alive, lost, total
        total += 1
        sparse = masked(case, "weight_random", 0.85)
        alive += min(firing_rates(sparse).values()) > 0
        lost += len(plan_of(collapse(sparse.model, case.x, timesteps=case.timesteps)).removed_channels()) > 0

    run()
    assert alive >= 0.6 * total
    assert lost >= 0.6 * total


def test_the_comparison_can_fail() -> None:
    """A channel that is read and fires must not go unnoticed."""
    case = net([[1, 1], [2, 2], [1, 2]], [0, 5, 0], [[1, 0, 2], [3, 0, 4]])
    small = collapse(case.model, case.x, timesteps=4)
    with torch.no_grad():
        case.model[2].weight[0, 1] = 1e-3
    (a,), (b,) = outputs(case.model, case.feed), outputs(small, case.feed)
    assert (a - b).abs().max() > 1e-9


def test_multi_step_models_and_models_that_loop_themselves() -> None:
    case = net([[1, 1], [0, 0]], [0, 0.2], [[1, 2], [3, 4]])
    functional.set_step_mode(case.model, "m")
    assert gone(collapsed(case)) == [1]
    sequence = case.x.expand(8, 2, 2)
    assert gone(collapse(case.model, sequence)) == []  # eight steps
    assert gone(collapse(case.model, sequence[:4])) == [1]
    assert gone(collapse(case.model, [sequence], forward=lambda model, batch: model(batch[:4]))) == [1]
