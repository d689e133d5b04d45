from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_baselines import BNScale, BNScaleGradient, FiringRate, Magnitude, Random, Taylor
from torch import Tensor, nn

from snncompress import OptionError, PluginError
from snncompress.extend import Criterion, Layer


def make_layer(weight: Tensor, grad: Tensor | None = None, norm: nn.Module | None = None, seed: int = 0) -> Layer:
    return Layer("conv", nn.Identity(), weight, grad, norm, (), torch.Generator().manual_seed(seed))


def test_magnitude_golden() -> None:
    # |3| + |-4| = 7 and 3² + 4² = 25; |1| + |2| = 3 and 1 + 4 = 5
    layer = make_layer(torch.tensor([[[3.0], [-4.0]], [[1.0], [2.0]]]))
    assert Magnitude(p=1).score(layer, None).tolist() == [7.0, 3.0]
    assert Magnitude().score(layer, None).tolist() == [25.0, 5.0]
    assert Magnitude().options() == {"p": 2}


@pytest.mark.parametrize("p", [0, 3, "1"])
def test_magnitude_refuses_other_norms(p: int) -> None:
    with pytest.raises(OptionError, match="p must be 1"):
        Magnitude(p=p)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(5, 3), (4, 2, 3, 3), (1, 1, 1), (3, 2, 2, 2, 2)]), st.integers(0, 2**31))
def test_magnitude_and_taylor_equal_their_equations(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(2, *shape, generator=generator)
    layer = make_layer(weight, grad)
    flat = weight.flatten(1)
    torch.testing.assert_close(Magnitude(p=1).score(layer, None), flat.abs().sum(1).double())
    torch.testing.assert_close(Magnitude(p=2).score(layer, None), flat.pow(2).sum(1).double())
    taylor = Taylor()
    scores = taylor.score(layer, taylor.end_batch(layer, taylor.begin(layer)))
    torch.testing.assert_close(scores, (flat * grad.flatten(1)).abs().sum(1).double())


def test_half_precision_weights_do_not_overflow() -> None:
    layer = make_layer(torch.full((2, 8), 300.0, dtype=torch.float16))  # 8 · 300² > 65504
    assert Magnitude().score(layer, None).tolist() == [720000.0, 720000.0]


def test_taylor_is_the_mean_over_batches() -> None:
    # batch 1: |1·1| + |2·(-1)| = 3 and |3·2| = 6; batch 2: |1·0| + |2·0.5| = 1 and 0
    weight = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    taylor = Taylor()
    state = taylor.begin(make_layer(weight))
    for grad in (torch.tensor([[1.0, -1.0], [2.0, 5.0]]), torch.tensor([[0.0, 0.5], [0.0, 1.0]])):
        state = taylor.end_batch(make_layer(weight, grad), state)
    assert taylor.score(make_layer(weight), state).tolist() == [2.0, 3.0]


def test_taylor_without_a_gradient() -> None:
    layer, taylor = make_layer(torch.ones(2, 2)), Taylor()
    with pytest.raises(PluginError, match=r"'conv' has no gradient.*requires_grad=False"):
        taylor.end_batch(layer, taylor.begin(layer))
    with pytest.raises(PluginError, match=r"'conv'.*labelled"):
        taylor.score(layer, taylor.begin(layer))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3)])
def test_bn_scale_golden(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.get_parameter("weight").copy_(torch.tensor([0.5, -2.0, 0.0]))
    assert BNScale().score(make_layer(torch.ones(3, 1), norm=norm), None).tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize(
    ("norm", "cause"),
    [
        (None, "no batch normalization"),
        (nn.BatchNorm2d(3, affine=False), "affine=False"),
        (nn.Identity(), "Identity"),
        (nn.BatchNorm2d(4), "no scale"),
    ],
)
def test_bn_scale_says_layer_cause_and_remedy(norm: nn.Module | None, cause: str) -> None:
    with pytest.raises(PluginError, match=f"'conv'.*{cause}.*Choose another criterion"):
        BNScale().score(make_layer(torch.ones(3, 1), norm=norm), None)


def test_random_follows_its_generator_only() -> None:
    weight = torch.ones(100, 1)
    first = Random().score(make_layer(weight, seed=1), None)
    torch.manual_seed(123)
    assert torch.equal(first, Random().score(make_layer(weight, seed=1), None))
    assert not torch.equal(first, Random().score(make_layer(weight, seed=2), None))
    assert first.shape == (100,)
    assert bool(((first >= 0) & (first < 1)).all())


@pytest.mark.parametrize("criterion", [Magnitude(), Random(), BNScale(), Taylor()], ids=lambda c: c.name)
def test_global_random_state_and_the_layer_stay_as_they_are(criterion: Criterion) -> None:
    weight, grad, norm = torch.randn(3, 2), torch.randn(3, 2), nn.BatchNorm1d(3)
    layer = make_layer(weight, grad, norm)
    before = [weight.clone(), grad.clone(), norm.weight.detach().clone()]
    state = torch.get_rng_state()
    criterion.score(layer, criterion.end_batch(layer, criterion.begin(layer)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, [weight, grad, norm.weight], strict=True))
    assert weight.grad is None


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]), st.integers(1, 4), st.integers(0, 2**31))
def test_firing_rate_is_the_share_of_spikes(shape: tuple[int, ...], t: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spikes = (torch.rand(t, 2, 3, *shape, generator=generator) < 0.3).float()
    layer, criterion = make_layer(torch.ones(3, 1)), FiringRate()
    at_once = criterion.observe(layer, criterion.begin(layer), spikes, None)
    stepped = criterion.begin(layer)
    for step in spikes.split(1):
        stepped = criterion.observe(layer, stepped, step, None)
    direct = spikes.double().reshape(t, 2, 3, -1).mean((0, 1, 3))
    assert torch.equal(criterion.score(layer, at_once), criterion.score(layer, stepped))
    torch.testing.assert_close(criterion.score(layer, at_once), direct)


def test_firing_rate_counts_graded_and_negative_spikes_once() -> None:
    layer, criterion = make_layer(torch.ones(1, 1)), FiringRate()
    spikes = torch.tensor([0.5, -1.0, 0.0, 0.0]).view(4, 1, 1)
    state = criterion.observe(layer, criterion.begin(layer), spikes, None)
    assert criterion.score(layer, state).tolist() == [0.5]
    with pytest.raises(PluginError, match=r"'conv'.*didn't run"):
        criterion.score(layer, criterion.begin(layer))


def gradients_of(by: BNScaleGradient, layer: nn.Module, norm: nn.Module | None, batches: Tensor) -> Tensor:
    state = None
    for x in batches:
        layer.zero_grad()
        y = layer(x)
        if norm is not None:
            norm.zero_grad()
            y = norm(y)
        y.sigmoid().square().sum().backward()
        seen = Layer("conv", layer, layer.weight.detach(), layer.weight.grad, norm, (), torch.Generator())
        state = by.end_batch(seen, by.begin(seen) if state is None else state)
    return by.score(seen, state)


def test_a_scale_of_one_stands_in_for_the_batch_norm() -> None:
    """A batch norm with mean 0, variance 1 and γ = 1 does nothing, and its ∂L/∂γ is what is said without it."""
    conv, norm = nn.Conv2d(2, 5, 3, bias=False).double(), nn.BatchNorm2d(5, eps=0.0).double().eval()
    batches = torch.randn(3, 4, 2, 6, 6, dtype=torch.float64)
    by = BNScaleGradient()
    scores = gradients_of(by, conv, norm, batches)
    assert float(scores.min()) > 0.1
    torch.testing.assert_close(scores, gradients_of(by, conv, None, batches))
    plain = nn.BatchNorm2d(5, eps=0.0, affine=False).double().eval()  # no scale of its own
    torch.testing.assert_close(scores, gradients_of(by, conv, plain, batches))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_what_stands_in_tells_the_scales_gradient_of_any_batch_norm(seed: int) -> None:
    """y = γ (W x - μ)/σ + β: γ ∂L/∂γ = Σ w ∂L/∂w - γ μ/σ ∂L/∂β, so the two differ by the mean and by γ alone."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(2, 5, 3, bias=False).double(), nn.BatchNorm2d(5).double().eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 1.5)
    norm(conv(torch.randn(4, 2, 6, 6, dtype=torch.float64))).sigmoid().square().sum().backward()
    slope, mean = norm.weight / (norm.running_var + norm.eps).sqrt(), norm.running_mean
    stand_in = (conv.weight * conv.weight.grad).flatten(1).sum(1)
    torch.testing.assert_close(norm.weight * norm.weight.grad, stand_in - slope * mean * norm.bias.grad)


def test_no_gradient_for_a_scale() -> None:
    layer, by = make_layer(torch.ones(2, 2), norm=nn.BatchNorm1d(2)), BNScaleGradient()
    with pytest.raises(PluginError, match="'conv' has no gradient"):
        by.end_batch(layer, by.begin(layer))
    with pytest.raises(PluginError, match="no gradient was recorded for layer 'conv'"):
        by.score(layer, by.begin(layer))
