from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_rescaw import ReScaW, Uniform
from snncompress_rescaw import gamma as gamma_module
from torch import Tensor, nn

from snncompress import OptionError


def direct_gamma(weight: Tensor, gamma: str, per_channel: bool, x: float = 0.01) -> Tensor:
    """γ as METHODS states it, by torch's own quantile."""
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    if gamma == "l1_mean":
        result = rows.abs().mean(1)
    elif gamma == "max":
        result = rows.abs().max(1).values
    else:
        result = torch.maximum(rows.quantile(x, dim=1).abs(), rows.quantile(1 - x, dim=1).abs())
    return result.view(-1, *[1] * (weight.dim() - 1)) if per_channel else result.view(())


def direct(weight: Tensor, gamma: Tensor | float, bits: int) -> Tensor:
    """Eq. 10, and with γ = 1 Eq. 4-6, literally."""
    s = 2**bits - 1
    return gamma * (2 / s * torch.round(s / 2 * (torch.clamp(weight / gamma, -1, 1) + 1)) - 1)


GAMMAS = ["l1_mean", "max", "percentile"]
ALL_GAMMAS = [*GAMMAS, "mse"]
PAPER: dict[str, Any] = {"gamma": "l1_mean", "per_channel": False}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_equation_10(gamma: Any, per_channel: bool, bits: int) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    value, scale, zero_point, bit_width = ReScaW(gamma=gamma, per_channel=per_channel).tensor_quant(bits)(weight)
    gammas = direct_gamma(weight, gamma, per_channel)
    torch.testing.assert_close(value, direct(weight, gammas, bits), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(scale, 2 * gammas / (2**bits - 1), rtol=1e-12, atol=0)
    assert zero_point.item() == (2**bits - 1) / 2
    assert bit_width.item() == bits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from(ALL_GAMMAS),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(7, 9), (3, 4, 3), (1, 1), (4, 2, 3, 3)]),
    st.floats(-3, 1),
    st.integers(0, 2**31),
)
def test_every_value_is_on_the_grid(
    bits: int, gamma: Any, per_channel: bool, dtype: torch.dtype, shape: Any, exponent: float, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(10**exponent).to(dtype)
    quant = ReScaW(gamma=gamma, per_channel=per_channel).tensor_quant(bits)
    value, scale, zero_point, _ = quant(weight)
    assert value.dtype == dtype
    assert value.shape == weight.shape
    rows = value.flatten(1) if per_channel else value.reshape(1, -1)
    assert all(len(row.unique()) <= 2**bits for row in rows)
    number = value.double() / scale.double() + zero_point
    tolerance = 2**bits * 2 * torch.finfo(dtype).eps
    assert bool(((number - number.round()).abs() <= tolerance).all())
    assert number.round().min() >= 0
    assert number.round().max() <= 2**bits - 1
    again = quant(weight)[0]
    assert torch.equal(value, again)


def test_uniform_equals_equation_6_and_ignores_the_size_of_the_weights() -> None:
    weight = torch.tensor([-2.0, -1.0, -0.4, -0.01, 0.01, 0.3, 0.9, 5.0], dtype=torch.float64).view(2, 4)
    for bits in (1, 2, 4, 8):
        value, scale, _, _ = Uniform().tensor_quant(bits)(weight)
        torch.testing.assert_close(value, direct(weight, 1.0, bits), rtol=0, atol=1e-15)
        assert scale.item() == 2 / (2**bits - 1)
    # two bits: the grid is -1, -1/3, 1/3, 1
    golden = [-1, -1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1, 1]
    torch.testing.assert_close(
        Uniform().tensor_quant(2)(weight)[0].flatten(), torch.tensor(golden, dtype=torch.float64)
    )


def test_golden_gammas() -> None:
    # mean|W| = (4 + 1 + 2 + 1)/4 = 2; max|W| = 4. Sorted -4 -1 1 2: P_25 lies at 0.75, -4 + 0.75·3 = -1.75;
    # P_75 at 2.25, 1 + 0.25·1 = 1.25; so the percentile γ is 1.75. One bit leaves ±γ.
    weight = torch.tensor([[-4.0, 1.0], [2.0, -1.0]])
    for options, gamma in [
        ({"gamma": "l1_mean"}, 2.0),
        ({"gamma": "max"}, 4.0),
        ({"gamma": "percentile", "percentile": 0.25}, 1.75),
    ]:
        value = ReScaW(per_channel=False, **options).tensor_quant(1)(weight)[0]  # type: ignore[arg-type]
        assert value.tolist() == [[-gamma, gamma], [gamma, -gamma]]
    per_channel = ReScaW(gamma="l1_mean", per_channel=True).tensor_quant(1)(weight)[0]
    assert per_channel.tolist() == [[-2.5, 2.5], [1.5, -1.5]]


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("kind", [partial(ReScaW, **PAPER), Uniform])
def test_gradient_of_both_straight_through_estimators(kind: Any, bits: int) -> None:
    # mean|W| = (0.5 + 1.5 + 1 + 1)/4 = 1, so γ = 1 for both kinds: 1.5 is outside, ±1 on the edge
    base = torch.tensor([[0.5, 1.5], [-1.0, 1.0]])
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for ste, expected in [("clip", [[1.0, 0.0], [3.0, 4.0]]), ("pass", [[1.0, 2.0], [3.0, 4.0]])]:
        weight = base.clone().requires_grad_()
        kind(ste=ste).tensor_quant(bits)(weight)[0].backward(upstream)
        torch.testing.assert_close(weight.grad, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", ["max", "l1_mean"])
def test_clip_passes_exactly_where_the_equation_clamps_nothing(gamma: Any, dtype: torch.dtype) -> None:
    for seed in range(20):
        weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        ReScaW(gamma=gamma, per_channel=False, ste="clip").tensor_quant(3)(weight)[0].sum().backward()
        wide = weight.detach().double()
        inside = wide.abs() <= direct_gamma(wide, gamma, False) * (1 + 1e-6)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, inside.to(dtype))


@pytest.mark.parametrize("gamma", ALL_GAMMAS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("ste", ["clip", "pass"])
def test_all_zero_weights_stay_zero_and_trainable(gamma: Any, per_channel: bool, ste: Any) -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    value, scale, zero_point, _ = ReScaW(gamma, per_channel, ste).tensor_quant(4)(weight)
    assert torch.equal(value, torch.zeros(3, 4))
    assert bool(torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero_point))
    value.sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", ["l1_mean", "mse"])
def test_one_all_zero_channel_does_not_disturb_the_others(gamma: Any) -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    value = ReScaW(gamma=gamma, per_channel=True).tensor_quant(1)(weight)[0]
    assert value.tolist() == [[0.0, 0.0], [2.0, -2.0]]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gamma_is_a_statistic_of_the_weights_that_exist(gamma: Any, per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator, dtype=torch.float64)
    weight[torch.rand(weight.shape, generator=generator) < 0.7] = 0.0
    weight[2] = 0.0  # a channel without any
    scale = ReScaW(gamma=gamma, per_channel=per_channel, percentile=0.1).tensor_quant(1)(weight)[1]
    for row, found in zip(weight if per_channel else [weight], scale.flatten(), strict=True):
        left = row[row != 0]
        expected = 2 * direct_gamma(left, gamma, False, 0.1) if len(left) else torch.finfo(torch.float64).tiny
        assert found.item() == pytest.approx(float(expected), rel=1e-12)


def test_golden_gammas_of_a_sparse_weight() -> None:
    # Four of eight weights exist, -4 -1 1 2 as in test_golden_gammas: 8/4 = 2 (over all eight 1), 4, 1.75 (over all
    # eight, -4 -1 0 0 0 0 1 2: P_25 at 1.75 is -0.25, P_75 at 5.25 is 0.25).
    weight = torch.tensor([[-4.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, -1.0]])
    for gamma, expected in [("l1_mean", 2.0), ("max", 4.0), ("percentile", 1.75)]:
        quant = ReScaW(gamma=gamma, per_channel=False, percentile=0.25).tensor_quant(1)  # type: ignore[arg-type]
        scale = quant(weight)[1]
        assert scale.item() == 2 * expected


def test_a_single_weight_that_exists_is_its_own_range() -> None:
    weight = torch.zeros(10, 100)
    weight[0, 0] = 3.0
    for gamma in ALL_GAMMAS:
        assert ReScaW(gamma=gamma).tensor_quant(1)(weight)[0][0, 0] == 3.0  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", ["max", "mse"])
def test_gamma_follows_the_weight_and_leaves_no_state(gamma: Any) -> None:
    quant = ReScaW(gamma=gamma).tensor_quant(8)
    weight = torch.randn(4, 4)
    assert torch.equal(quant(2 * weight)[1], 2 * quant(weight)[1])
    assert dict(quant.state_dict()) == {}
    assert list(quant.parameters()) == []
    twin = copy.deepcopy(quant)
    assert torch.equal(twin(weight)[0], quant(weight)[0])
    quant.load_state_dict({})


@pytest.mark.parametrize("bits", [8, 16])
def test_casting_the_model_does_not_spoil_the_grid(bits: int) -> None:
    weight = torch.randn(8, 8)
    reference = ReScaW(**PAPER).tensor_quant(bits)(weight.bfloat16().float())[0]
    for cast in (torch.bfloat16, torch.float16):
        quant = ReScaW(**PAPER).tensor_quant(bits).to(cast)
        value, scale, zero_point, _ = quant(weight.bfloat16())
        assert torch.equal(value, reference.bfloat16())
        assert scale.dtype == torch.float32
        assert zero_point == (2**bits - 1) / 2


@pytest.mark.parametrize("bits", [0, 17, 2.5, "4", True, None])
@pytest.mark.parametrize("quantizer", [ReScaW(), Uniform()], ids=lambda q: q.name)
def test_bits_that_cannot_be(quantizer: Any, bits: Any) -> None:
    with pytest.raises(OptionError, match="bits must be a whole number from 1 to 16"):
        quantizer.tensor_quant(bits)


@pytest.mark.parametrize(
    "options",
    [{"gamma": "mean"}, {"ste": "none"}, {"percentile": 0.5}, {"percentile": -0.1}, {"per_channel": 1}],
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ReScaW(**options)
    if "ste" in options:
        with pytest.raises(OptionError, match="ste"):
            Uniform(**options)


def test_options_are_plain() -> None:
    assert ReScaW().options() == {
        "gamma": "mse",
        "per_channel": True,
        "ste": "pass",
        "percentile": 0.01,
    }
    assert Uniform().options() == {"ste": "pass"}


@pytest.mark.filterwarnings("ignore:Named tensors:UserWarning")  # Brevitas 0.12 renames its layers' inputs
def test_the_injector_in_brevitas_layers() -> None:
    import brevitas.nn as qnn
    from snncompress_rescaw import ReScaWWeightQuant

    paper: dict[str, Any] = {"weight_gamma": "l1_mean", "weight_per_channel": False}
    conv = qnn.QuantConv2d(2, 3, 3, bias=False, weight_quant=ReScaWWeightQuant, weight_bit_width=2, **paper)
    weight = conv.weight.detach()
    expected = direct(weight, direct_gamma(weight, "l1_mean", False), 2)
    torch.testing.assert_close(conv.quant_weight().value, expected)
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, expected))
    assert list(conv.state_dict()) == ["weight"]
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))
    nn.Conv2d(2, 3, 3, bias=False).load_state_dict(conv.state_dict())

    # per channel means output channels, which a transposed convolution keeps in dimension 1
    transposed = qnn.QuantConvTranspose2d(
        2,
        3,
        3,
        weight_quant=ReScaWWeightQuant,
        weight_bit_width=1,
        weight_gamma="l1_mean",
        weight_per_channel=True,
        weight_ste="pass",
    )
    first = transposed.weight.detach().transpose(0, 1)
    expected = direct(first, direct_gamma(first, "l1_mean", True), 1).transpose(0, 1)
    torch.testing.assert_close(transposed.quant_weight().value, expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_injector_finds_the_least_error_too(per_channel: bool) -> None:
    import brevitas.nn as qnn
    from snncompress_rescaw import ReScaWWeightQuant

    weights = {"weight_quant": ReScaWWeightQuant, "weight_bit_width": 3, "weight_per_channel": per_channel}
    ours = ReScaW(per_channel=per_channel).tensor_quant(3)
    conv = qnn.QuantConv2d(4, 3, 3, **weights)
    assert torch.equal(conv.quant_weight().value, ours(conv.weight)[0])
    transposed = qnn.QuantConvTranspose2d(4, 3, 3, **weights)
    expected = ours(transposed.weight.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(transposed.quant_weight().value, expected)  # per layer it sums in another order


def squared_error(value: Tensor, weight: Tensor, per_channel: bool) -> Tensor:
    """‖W − Ŵ‖² of the weights that exist, in double precision."""
    error = (value.detach().double() - weight.double()).square() * (weight != 0)
    return error.flatten(1).sum(1) if per_channel else error.sum().view(1)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 16),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(7, 9), (3, 4, 3), (1, 1), (4, 2, 3, 3), (2, 700), (5, 8, 1, 1)]),
    st.sampled_from(["normal", "heavy tails", "even", "few values", "sparse"]),
    st.floats(-3, 1),
    st.integers(0, 2**31),
)
def test_the_least_error_is_never_above_that_of_the_maximum(
    bits: int, per_channel: bool, dtype: torch.dtype, shape: Any, kind: str, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "heavy tails":
        weight = weight**3
    elif kind == "even":
        weight = torch.rand(shape, generator=generator)
    elif kind == "few values":
        weight = (2 * weight).round()
    elif kind == "sparse":
        weight = weight * (torch.rand(shape, generator=generator) < 0.2)
    weight = weight.mul(10**exponent).to(dtype)
    value, scale, _, _ = ReScaW(gamma="mse", per_channel=per_channel).tensor_quant(bits)(weight)
    most, widest, _, _ = ReScaW(gamma="max", per_channel=per_channel).tensor_quant(bits)(weight)
    found, bound = squared_error(value, weight, per_channel), squared_error(most, weight, per_channel)
    assert bool((found <= bound).all())
    assert bool((scale <= widest).all())
    again, same, _, _ = ReScaW(gamma="mse", per_channel=per_channel).tensor_quant(bits)(weight)
    assert torch.equal(again, value)
    assert torch.equal(same, scale)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outlier"])
def test_the_least_error_is_that_of_a_search_through_thousands(kind: str, bits: int) -> None:
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    if kind == "heavy tails":
        weight = weight**3
    elif kind == "outlier":
        weight[:, 0, 0, 0] = 40.0
    value = ReScaW(gamma="mse", per_channel=True).tensor_quant(bits)(weight)[0]
    largest = direct_gamma(weight, "max", True)
    errors = [
        squared_error(direct(weight, largest * fraction, bits), weight, True)
        for fraction in torch.arange(1, 2001) / 2000
    ]
    least = torch.stack(errors).amin(0)
    found = squared_error(value, weight, True)
    assert found.sum() <= 1.06 * least.sum()
    if bits <= 3:
        assert found.sum() <= 1.005 * least.sum()


def test_golden_least_errors() -> None:
    # One bit leaves ±γ: Σ (|w| − γ)² is least at γ = mean|W|, here (1 + 1 + 4)/3 = 2; zeros don't count.
    # Two bits, grid γ · {-1, -1/3, 1/3, 1}: of 3 1 1 -1 the γ = 3 leaves no error at all. Of 3 3 1 2 with 3 3
    # on ±γ, and 1 and 2 on γ/3 (2 ≤ 2γ/3), the best is γ = Σ q|W| / Σ q² = (3 + 3 + 1/3 + 2/3) / (1 + 1 + 1/9 + 1/9) =
    # 3.15, above the maximum: so γ = 3, and 2, halfway between 1 and 3, is the only error, 1. With 2 on γ it is
    # (3 + 3 + 1/3 + 2) / (3 + 1/9) = 75/28, which leaves 2 · (9/28)² + (3/28)² + (19/28)² = 532/784 = 19/28.
    one = torch.tensor([[1.0, -1.0, 0.0, 4.0]], dtype=torch.float64)
    assert ReScaW().tensor_quant(1)(one)[0][0, [0, 1, 3]].tolist() == [2.0, -2.0, 2.0]
    two = torch.tensor([[3.0, 1.0, 1.0, -1.0], [3.0, -3.0, 1.0, 2.0]], dtype=torch.float64)
    value, scale, _, _ = ReScaW().tensor_quant(2)(two)
    gamma = 75 / 28
    golden = [[3.0, 1.0, 1.0, -1.0], [gamma, -gamma, gamma / 3, gamma]]
    torch.testing.assert_close(value, torch.tensor(golden, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(scale.flatten() * 3 / 2, torch.tensor([3, gamma], dtype=torch.float64))
    assert squared_error(value, two, True).tolist() == pytest.approx([0, 19 / 28])
    assert squared_error(ReScaW(gamma="max").tensor_quant(2)(two)[0], two, True).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_the_error_searched_is_that_of_the_values_given(bits: int, dtype: torch.dtype, per_channel: bool) -> None:
    weight = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(bits)).to(dtype)
    wide = weight.float() if dtype == torch.float16 else weight
    steps = torch.tensor(2.0**bits - 1)
    gamma = gamma_module.range_of(wide, "mse", 0 if per_channel else None, 0.0, steps, dtype)
    value, scale, _, _ = ReScaW(per_channel=per_channel).tensor_quant(bits)(weight)
    assert torch.equal(gamma_module.scale_of(gamma, steps), scale)
    flat = wide.flatten(1) if per_channel else wide.reshape(1, -1)
    ours = gamma_module._values(flat, scale.reshape(-1, 1), steps, torch.empty_like(flat))
    assert torch.equal(ours.to(dtype).view_as(value), value)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_that_do_not_exist_do_not_count_as_errors(per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    sparse = torch.zeros(4, 300, dtype=torch.float64)
    sparse[:, ::10] = left
    for bits in (1, 2, 4):
        quant = ReScaW(per_channel=per_channel).tensor_quant(bits)
        torch.testing.assert_close(quant(sparse)[1], quant(left)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_diverged_weight_is_seen(poison: float) -> None:
    weight = torch.ones(2, 3)
    weight[0, 0] = poison
    value = ReScaW().tensor_quant(4)(weight)[0]
    assert not bool(torch.isfinite(value[0]).all())
    assert torch.equal(value[1], weight[1])


def test_brevitas_is_imported_late() -> None:
    code = "import sys, snncompress_rescaw; raise SystemExit('brevitas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_attribute_of_the_package() -> None:
    import snncompress_rescaw

    with pytest.raises(AttributeError, match="nonsense"):
        _ = snncompress_rescaw.nonsense
