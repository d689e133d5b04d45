from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_rescaw import ReScaW, Uniform
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
    st.sampled_from(GAMMAS),
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
        value = ReScaW(**options).tensor_quant(1)(weight)[0]  # type: ignore[arg-type]
        assert value.tolist() == [[-gamma, gamma], [gamma, -gamma]]
    per_channel = ReScaW(per_channel=True).tensor_quant(1)(weight)[0]
    assert per_channel.tolist() == [[-2.5, 2.5], [1.5, -1.5]]


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("kind", [ReScaW, Uniform])
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
        ReScaW(gamma=gamma, ste="clip").tensor_quant(3)(weight)[0].sum().backward()
        wide = weight.detach().double()
        inside = wide.abs() <= direct_gamma(wide, gamma, False) * (1 + 1e-6)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, inside.to(dtype))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("ste", ["clip", "pass"])
def test_all_zero_weights_stay_zero_and_trainable(gamma: Any, per_channel: bool, ste: Any) -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    value, scale, zero_point, _ = ReScaW(gamma, per_channel, ste).tensor_quant(4)(weight)
    assert torch.equal(value, torch.zeros(3, 4))
    assert bool(torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero_point))
    value.sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))  # type: ignore[arg-type]


def test_one_all_zero_channel_does_not_disturb_the_others() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    value = ReScaW(per_channel=True).tensor_quant(1)(weight)[0]
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
        scale = ReScaW(gamma=gamma, percentile=0.25).tensor_quant(1)(weight)[1]  # type: ignore[arg-type]
        assert scale.item() == 2 * expected


def test_a_single_weight_that_exists_is_its_own_range() -> None:
    weight = torch.zeros(10, 100)
    weight[0, 0] = 3.0
    for gamma in GAMMAS:
        assert ReScaW(gamma=gamma).tensor_quant(1)(weight)[0][0, 0] == 3.0  # type: ignore[arg-type]


def test_gamma_follows_the_weight_and_leaves_no_state() -> None:
    quant = ReScaW(gamma="max").tensor_quant(8)
    weight = torch.randn(4, 4)
    assert quant(2 * weight)[1] == 2 * quant(weight)[1]
    assert dict(quant.state_dict()) == {}
    assert list(quant.parameters()) == []
    twin = copy.deepcopy(quant)
    assert torch.equal(twin(weight)[0], quant(weight)[0])
    quant.load_state_dict({})


@pytest.mark.parametrize("bits", [8, 16])
def test_casting_the_model_does_not_spoil_the_grid(bits: int) -> None:
    weight = torch.randn(8, 8)
    reference = ReScaW().tensor_quant(bits)(weight.bfloat16().float())[0]
    for cast in (torch.bfloat16, torch.float16):
        quant = ReScaW().tensor_quant(bits).to(cast)
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
        "gamma": "l1_mean",
        "per_channel": False,
        "ste": "pass",
        "percentile": 0.01,
    }
    assert Uniform().options() == {"ste": "pass"}


@pytest.mark.filterwarnings("ignore:Named tensors:UserWarning")  # Brevitas 0.12 renames its layers' inputs
def test_the_injector_in_brevitas_layers() -> None:
    import brevitas.nn as qnn
    from snncompress_rescaw import ReScaWWeightQuant

    conv = qnn.QuantConv2d(2, 3, 3, bias=False, weight_quant=ReScaWWeightQuant, weight_bit_width=2)
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
        weight_per_channel=True,
        weight_ste="pass",
    )
    first = transposed.weight.detach().transpose(0, 1)
    expected = direct(first, direct_gamma(first, "l1_mean", True), 1).transpose(0, 1)
    torch.testing.assert_close(transposed.quant_weight().value, expected)


def test_brevitas_is_imported_late() -> None:
    code = "import sys, snncompress_rescaw; raise SystemExit('brevitas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_attribute_of_the_package() -> None:
    import snncompress_rescaw

    with pytest.raises(AttributeError, match="nonsense"):
        _ = snncompress_rescaw.nonsense
