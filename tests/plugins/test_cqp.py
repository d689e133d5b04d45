from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_cqp import CQP, CQPRelaxed
from torch import Tensor, nn

import snncompress
from snncompress import OptionError, PluginError
from snncompress.extend import Layer
from snncompress.testing import check_criterion


def layer(weight: Tensor, gradient: Tensor | None = None) -> Layer:
    return Layer("fc", nn.Identity(), weight, gradient, None, (), torch.Generator())


def score(criterion: CQP, weight: Tensor, *gradients: Tensor) -> Tensor:
    state = criterion.begin(layer(weight))
    for gradient in gradients:
        state = criterion.end_batch(layer(weight, gradient), state)
    return criterion.score(layer(weight), state)


def test_golden() -> None:
    # mean |g| over the two batches: [[(4+2)/2, (1+1)/2], [(0+0)/2, (3+0)/2]] = [[3, 1], [0, 1.5]]; over max 3:
    # criticality [[1, 1/3], [0, 1/2]]. v = |w| · c: [[0.5, 1], [0, 2]].
    # LAMP: 0.25 / (0.25 + 1 + 4), 1 / (1 + 4), 0, 4 / 4.
    weight = torch.tensor([[0.5, -3.0], [9.0, 4.0]])
    batches = torch.tensor([[4.0, 1.0], [0.0, -3.0]]), torch.tensor([[-2.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([[0.25 / 5.25, 0.2], [0, 1]]).double()
    torch.testing.assert_close(score(CQP(alpha=1.0), weight, *batches), expected)
    # τ = 0.4: two weights are critical, and stand above all others
    critical = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(score(CQP(alpha=1.0, tau=0.4), weight, *batches), expected + critical)
    # α = 0 is magnitude: 81 / 81 for 9, 16 / 97 for 4, 9 / 106 for 3, 0.25 / 106.25 for 0.5
    by_size = torch.tensor([[0.25 / 106.25, 9 / 106], [1, 16 / 97]]).double()
    torch.testing.assert_close(score(CQP(alpha=0), weight, *batches), by_size)
    # α = 1/2: v² = w² · c = [[0.25, 3], [0, 8]]
    by_root = torch.tensor([[0.25 / 11.25, 3 / 11], [0, 1]]).double()
    torch.testing.assert_close(score(CQP(alpha=0.5), weight, *batches), by_root)


def test_the_defaults_are_the_measured_ones() -> None:
    assert CQP().options() == {"alpha": 0.25, "tau": 1.0, "unit": "weight", "scope": "global"}


def test_golden_by_input() -> None:
    # columns: mean|w| = [(1+3)/2, (2+0)/2] = [2, 1]; mean|g| = [(1+1)/2, (4+0)/2] = [1, 2], criticality [1/2, 1];
    # v = [2 · 1/2, 1 · 1] = [1, 1]: LAMP gives 1 / (1+1+1+1) to all but the last; column 1 is critical
    weight, gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[1.0, 4.0], [-1.0, 0.0]])
    scores = score(CQP(alpha=1.0, tau=0.9, unit="input"), weight, gradient)
    torch.testing.assert_close(scores, torch.tensor([[0.25, 2.25], [0.25, 3]]).double())


def test_an_input_of_a_convolution_is_a_channel() -> None:
    weight = torch.rand(4, 3, 2, 2)
    criterion = CQP(unit="input")
    scores = score(criterion, weight, torch.rand(4, 3, 2, 2))
    gone = criterion.select(scores.flatten(), 16).view(4, 3, 2, 2)  # a third
    assert sorted(int(gone[:, i].sum()) for i in range(3)) == [0, 0, 16]


weights = st.lists(st.floats(-2, 2, width=32), min_size=7, max_size=7)
slopes = st.lists(st.floats(0, 1, width=32), min_size=7, max_size=7)


@settings(max_examples=60, deadline=None)
@given(weights, slopes, st.floats(0, 2), st.floats(0, 1), st.integers(0, 7))
def test_sorting_solves_the_quadratic_program(w: list[float], g: list[float], alpha: float, tau: float, k: int) -> None:
    weight, slope = torch.tensor([w]).double(), torch.tensor([g]).double()
    criterion = CQP(alpha=alpha, tau=tau)
    gone = criterion.select(score(criterion, weight, slope).flatten(), k)
    assert int(gone.sum()) == k
    criticality = (slope / slope.max().clamp_min(1e-300)).flatten()
    v = weight.abs().flatten() * criticality**alpha
    critical = criticality > tau
    if int((~critical).sum()) < k:  # infeasible: every uncritical weight goes first
        assert bool(gone[~critical].all())
        return
    assert not bool((gone & critical).any())
    free = (~critical).nonzero().flatten().tolist()
    best = min((float(sum(v[i] ** 2 for i in choice)) for choice in itertools.combinations(free, k)), default=0.0)
    assert float((v[gone] ** 2).sum()) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_a_weight_that_is_gone_stays_gone() -> None:
    scores = torch.tensor([0.3, -float("inf"), 0.1, -float("inf")])
    assert CQP().select(scores, 3).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": -1}, "alpha must be a number from 0 to 100, not -1"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"tau": 1.5}, "tau must be a number from 0 to 1, not 1.5"),
        ({"unit": "neuron"}, "unit must be one of weight, input, not 'neuron'"),
        ({"scope": "network"}, "scope must be one of layer, global"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        CQP(**options)


def test_a_layer_without_gradient_is_named() -> None:
    criterion = CQP()
    with pytest.raises(PluginError, match="'fc' has no gradient"):
        criterion.end_batch(layer(torch.ones(2, 2)), criterion.begin(layer(torch.ones(2, 2))))
    with pytest.raises(PluginError, match="no gradient was recorded"):
        score(criterion, torch.ones(2, 2))


@pytest.mark.parametrize("unit", ["weight", "input"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_keeps_the_contract(unit: str, scope: str) -> None:
    check_criterion(CQP(alpha=0.5, tau=0.7, unit=unit, scope=scope))


# -- the relaxation --


def closed_form(v: Tensor, most: Tensor, count: int) -> Tensor:
    """min Σ (v r)², Σ r = count, 0 ≤ r ≤ most: r = min(most, λ/v²), with λ found by bisection."""
    low, high = 0.0, float(count * (v**2).max() + 1)
    for _ in range(200):
        middle = (low + high) / 2
        r = torch.minimum(most, middle / v**2)
        low, high = (middle, high) if float(r.sum()) < count else (low, middle)
    return r


def test_osqp_finds_the_relaxed_minimum() -> None:
    pytest.importorskip("osqp")
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(400, dtype=torch.float64, generator=generator) + 0.2
    critical = torch.rand(400, generator=generator) > 0.9
    count = 300
    removed = closed_form(v, torch.where(critical, 0.15, 1.0).double(), count)
    settled = (removed - 0.5).abs() > 0.02  # of the others OSQP's tolerance decides
    scores = v / (1 + v) + 2 * critical.double()
    gone = CQPRelaxed().select(scores, count)
    assert torch.equal(gone[settled], (removed > 0.5)[settled])
    assert not bool((gone & critical).any())


@pytest.mark.parametrize(("asked", "got"), [(6, 10), (4, 0)])
def test_the_trap_by_hand(asked: int, got: int) -> None:
    """Ten equal weights: by symmetry every mask is 1 - k/10, so at k = 6 all fall below 0.5, at k = 4 none does."""
    pytest.importorskip("osqp")
    scores = torch.full((10,), 0.5)
    assert int(CQPRelaxed().select(scores, asked).sum()) == got
    assert int(CQP().select(scores, asked).sum()) == asked


def test_a_relaxed_program_without_solution_is_an_error() -> None:
    pytest.importorskip("osqp")
    with pytest.raises(
        OptionError, match=r"no mask removes 9 of 10 weights and keeps 0\.85 of each of the 10 critical"
    ):
        CQPRelaxed().select(torch.linspace(2.1, 2.2, 10), 9)


def test_without_osqp_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "osqp", None)
    with pytest.raises(OptionError, match=r"pip install 'snncompress\[relaxed\]'"):
        CQPRelaxed().select(torch.rand(10), 5)


def test_from_apply_both_prune_weights() -> None:
    pytest.importorskip("osqp")
    from spikingjelly.activation_based import neuron

    net = nn.Sequential(nn.Linear(6, 20), neuron.LIFNode(), nn.Linear(20, 3))
    data = torch.rand(8, 6) * 3, torch.arange(8) % 3
    for criterion in ("cqp", "cqp_relaxed"):
        small = snncompress.apply(net, criterion, 0.5, None, data=data, timesteps=4)
        got = sum(int((small[i].weight == 0).sum()) for i in (0, 2))
        assert (got == 90) == (criterion == "cqp")  # half of 6 · 20 + 20 · 3
