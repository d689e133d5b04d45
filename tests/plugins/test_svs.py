from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_svs import SVS
from torch import Tensor

from snncompress import DataError, OptionError, PluginError
from snncompress.extend import Layer


def make_layer(channels: int) -> Layer:
    return Layer("conv", torch.nn.Identity(), torch.ones(channels, 1), None, None, (), torch.Generator())


def score(spikes: Tensor, steps: int | None = None, batches: int = 1, epsilon: float = 1e-6) -> Tensor:
    """Feed [T, N, C, ...] in pieces of ``steps`` timesteps and ``batches`` parts of the samples."""
    layer, criterion = make_layer(spikes.shape[2]), SVS(epsilon=epsilon)
    state = criterion.begin(layer)
    for batch in spikes.chunk(batches, dim=1):
        for piece in batch.split(steps or len(spikes)):
            state = criterion.observe(layer, state, piece, None)
        state = criterion.end_batch(layer, state)
    return criterion.score(layer, state)


def counts(spikes: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Eq. 11-13 literally, by a float64 singular value decomposition: total count per channel."""
    average = spikes.double().mean(0)
    if average.dim() <= 4:
        average = average.reshape(*average.shape, *[1] * (4 - average.dim()))
    else:
        average = average.flatten(2, -2)
    return (torch.linalg.svdvals(average) > epsilon).sum(2).sum(0)


def check(spikes: Tensor, epsilon: float = 1e-6) -> None:
    samples = spikes.shape[1]
    got = score(spikes, epsilon=epsilon)
    assert torch.equal((got * samples).floor().long(), counts(spikes, epsilon))
    # the tie-break is below half the difference that two mean counts can have
    assert bool(((got * samples).frac() < 0.5 + 1e-9).all())


def test_golden() -> None:
    # T = 2, one sample, 2 × 2 maps.
    # 0: the identity at t = 0 only: S_avg = I/2, σ = 1/2, 1/2: count 2, Σσ² = 1/2, tie-break
    #    1/2 · (1/2)/(1+1/2) = 1/6
    # 1: ones at every step: S_avg = ones, σ = 2, 0: count 1, Σσ² = 4, tie-break 1/2 · 4/(1+4) = 2/5
    # 2: silent
    spikes = torch.zeros(2, 1, 3, 2, 2)
    spikes[0, 0, 0] = torch.eye(2)
    spikes[:, 0, 1] = 1.0
    torch.testing.assert_close(score(spikes), torch.tensor([2 + 1 / 6, 1.4, 0.0], dtype=torch.float64))


def test_without_a_map_the_formula_is_literal() -> None:
    # [T, N, C]: a 1 × 1 matrix has one singular value, |S_avg|. Neuron 0 fires on both samples (1/2 and 1),
    # neuron 1 on one of two (1/2), neuron 2 never. Mean squares 5/8, 1/8; tie-breaks 1/2 · (5/13, 1/9) / 2.
    spikes = torch.tensor([[[1.0, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 0, 0]]])
    expected = torch.tensor([1 + 5 / 52, 0.5 + 1 / 36, 0], dtype=torch.float64)
    torch.testing.assert_close(score(spikes), expected)
    torch.testing.assert_close(score(spikes[..., None, None]), expected)


def test_one_and_three_dimensional_maps() -> None:
    # L × 1 has one singular value, the norm: (3, 4)/1 → 5
    line = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(score(line), torch.tensor([1 + 0.5 * 25 / 26], dtype=torch.float64))
    # 2 × 1 × 2 is flattened to 2 × 2
    volume = torch.eye(2).view(1, 1, 1, 2, 1, 2)
    assert torch.equal(score(volume), score(torch.eye(2).view(1, 1, 1, 2, 2)))


def test_a_tie_break_never_reorders_counts() -> None:
    # rank 2 with a tiny norm against rank 1 with a huge one, differing in one of 1000 samples
    spikes = torch.zeros(1, 1000, 2, 4, 4)
    spikes[0, :, 0, 0, 0] = 1e-3
    spikes[0, 0, 0, 1, 1] = 1e-3
    spikes[0, :, 1] = 1e4
    high, low = score(spikes)
    assert high > low


@pytest.mark.parametrize("size", [1.0, 0.3])  # whole numbers, whose sums are exact, and others
def test_ties_go_to_the_larger_frobenius_norm_and_then_are_equal(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = size * (torch.rand(4, 6, 1, 8, 8, generator=generator) < 0.4).float()
    permuted = base[..., torch.randperm(8, generator=generator), :]  # the same singular values
    low, high, same = score(torch.cat([base, 2 * base, permuted], 2))
    assert low == same
    assert high > low
    assert high.floor() == low.floor()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 100),
    st.sampled_from([(32, 32), (16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (1, 1), (2, 5), (7, 2), (1, 6), (5, 9)]),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
)
def test_counts_equal_the_svd_on_random_spikes(t: int, shape: tuple[int, int], rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check((torch.rand(t, 2, 3, *shape, generator=generator) < rate).float())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([(12, 12), (4, 4), (3, 3), (2, 2), (2, 6), (6, 2), (1, 4), (1, 1)]),
    st.sampled_from(["rank one", "repeated rows", "sum of rows", "nearly dependent", "constant", "scaled"]),
    st.floats(-12, 2),
    st.integers(0, 2**31),
)
def test_counts_equal_the_svd_where_it_is_hard(
    t: int, shape: tuple[int, int], kind: str, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, w = shape
    spikes = (torch.rand(t, 2, 3, h, w, generator=generator) < 0.5).double()
    size = 10.0**exponent
    if kind == "rank one":
        spikes = torch.rand(t, 2, 3, h, 1, generator=generator) * torch.rand(1, 2, 3, 1, w, generator=generator)
    elif kind == "repeated rows":
        spikes[..., h // 2 :, :] = spikes[..., : h - h // 2, :]
    elif kind == "sum of rows":
        spikes[..., -1, :] = spikes[..., :-1, :].sum(-2)
    elif kind == "nearly dependent":  # singular values all around ε
        spikes[..., -1, :] = spikes[..., 0, :]
        spikes += size * torch.rand(spikes.shape, generator=generator)
    elif kind == "constant":
        spikes = torch.full_like(spikes, size)
    else:
        spikes *= size
    check(spikes)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-2, 0.5, 3.0])
def test_any_threshold(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(1)
    spikes = (torch.rand(4, 3, 5, 10, 10, generator=generator) < 0.3).float()
    spikes[:, :, 2, 5:] = spikes[:, :, 2, :5]
    check(spikes, epsilon)


def test_counts_on_a_singular_value_of_exactly_epsilon() -> None:
    for spikes in (torch.eye(2), torch.eye(3), torch.ones(1, 1)):
        check(spikes.view(1, 1, 1, *spikes.shape) * 0.5, epsilon=0.5)  # > ε, so none counts
    assert score(torch.eye(3).view(1, 1, 1, 3, 3) * 0.5, epsilon=0.5).floor() == 0


def test_bounds_decide_nearly_all_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    spikes = (torch.rand(4, 20, 8, 24, 24, generator=generator) < 0.1).float()
    spikes[..., 1::3, :] = spikes[..., ::3, :]  # of each three rows two are the same
    expected, decomposed, svdvals = counts(spikes), [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda maps: decomposed.append(len(maps)) or svdvals(maps))
    assert torch.equal((score(spikes) * 20).floor().long(), expected)
    assert sum(decomposed) < 8  # of 160


def test_whole_numbers_whose_products_float32_cannot_hold() -> None:
    spikes = torch.randint(0, 2**20, (1, 1, 2, 3, 3), generator=torch.Generator().manual_seed(0)).float()
    spikes[..., 2, :] = spikes[..., 0, :] + spikes[..., 1, :]
    check(spikes)
    assert score(spikes).floor().tolist() == [2, 2]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_any_split_in_steps_and_batches_gives_the_same(t: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spikes = (torch.rand(t, n, 3, 5, 5, generator=generator) < 0.3).float()
    whole = score(spikes)
    for steps, batches in [(1, 1), (1, n), (t, n)]:
        torch.testing.assert_close(score(spikes, steps, batches), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool])
def test_dtypes(dtype: torch.dtype) -> None:
    spikes = torch.rand(4, 2, 3, 6, 6) < 0.3
    assert torch.equal(score(spikes.to(dtype)), score(spikes.float()))


def test_graded_spikes_summed_over_many_steps_stay_dependent() -> None:
    # rows 0.1·k and 0.3·k of one pattern: rank 1, which float32 sums over 100 steps wouldn't give
    pattern = torch.rand(100, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    factor = torch.linspace(0.125, 2, 16).view(1, 1, 1, 16, 1)
    check(pattern.float() * factor)
    assert score(pattern.float() * factor).floor() == 1


def test_threads_do_not_change_the_scores() -> None:
    spikes = (torch.rand(2, 4, 64, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = score(spikes)
        torch.set_num_threads(2)
        two = score(spikes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_the_state_does_not_hold_the_history() -> None:
    layer, criterion = make_layer(3), SVS()
    state = criterion.begin(layer)
    for _ in range(5):
        state = criterion.observe(layer, state, torch.ones(2, 4, 3, 6, 6), None)
        assert state.time_sum.shape == (4, 3, 6, 6)
    state = criterion.end_batch(layer, state)
    assert state.time_sum is None
    assert state.samples == 4


def test_the_model_s_spikes_are_not_written_to() -> None:
    spikes = torch.ones(1, 2, 3, 4, 4, dtype=torch.float64)
    layer, criterion = make_layer(3), SVS()
    state = criterion.begin(layer)
    for _ in range(3):
        state = criterion.observe(layer, state, spikes, None)
    assert torch.equal(spikes, torch.ones_like(spikes))


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, float("nan"), float("inf")])
def test_thresholds_that_cannot_be(epsilon: float) -> None:
    with pytest.raises(OptionError, match="epsilon"):
        SVS(epsilon=epsilon)


def test_errors_name_the_layer() -> None:
    layer, criterion = make_layer(2), SVS()
    with pytest.raises(PluginError, match="'conv'"):
        criterion.score(layer, criterion.end_batch(layer, criterion.begin(layer)))
    bad = torch.full((1, 1, 2, 3, 3), float("nan"))
    with pytest.raises(DataError, match=r"'conv'.*NaN"):
        criterion.end_batch(layer, criterion.observe(layer, criterion.begin(layer), bad, None))


def test_options() -> None:
    assert SVS().options() == {"epsilon": 1e-6}
    assert SVS.needs == {"spikes"}
