"""Operation counts against hand-derived numbers and against triple loops in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snncompress.errors import DataError, ModelError, OptionError, UnknownNameError
from snncompress.measuring.conventions import PRESETS, Conventions, resolve_conventions
from snncompress.measuring.counting import PlainCounter, WeightCounter, count_operations, fan_out, is_spikes

# ------------------------------------------------------------------------------------------
# Brute force: every synapse is visited.


def brute_force(layer: nn.Module, x: Tensor, c: Conventions, spikes: bool) -> float:
    """Operations of one sample x [C, *spatial] (or [features]), synapse by synapse."""
    values, weights = x.numpy(), layer.weight.detach().numpy()
    if isinstance(layer, nn.Linear):
        pairs = itertools.product(range(layer.out_features), range(layer.in_features))
        return sum(_cost(values[i], weights[o, i], c, spikes) for o, i in pairs)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    with torch.no_grad():
        out_size = layer(x.unsqueeze(0)).shape[2:]
    walk = _transposed_synapses if transposed else _synapses
    # Padding holds no spikes, so it can only cost products.
    found = walk(layer, values, weights, out_size, padding=c.padding and not spikes)
    return sum(_cost(value, weight, c, spikes) for value, weight in found)


def _cost(value: float, weight: float, c: Conventions, spikes: bool) -> float:
    if weight == 0 and not c.zero_weights:
        return 0
    if spikes:
        return abs(value)
    return 1 if value != 0 or c.zero_inputs else 0


def _positions(size: Sequence[int]) -> itertools.product:
    return itertools.product(*(range(n) for n in size))


def _synapses(layer, x, weights, out_size, padding):
    per_group_out, per_group_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    if layer.padding == "same":
        left = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        left = [0] * len(layer.kernel_size) if layer.padding == "valid" else list(layer.padding)
    for o in range(layer.out_channels):
        for i in range(per_group_in):
            channel = (o // per_group_out) * per_group_in + i
            for at in _positions(out_size):
                for k in _positions(layer.kernel_size):
                    where = [
                        p * s - pad + q * d
                        for p, s, pad, q, d in zip(at, layer.stride, left, k, layer.dilation, strict=True)
                    ]
                    where, inside = _wrapped(where, x.shape[1:], layer.padding_mode)
                    if inside:
                        yield x[(channel, *where)], weights[(o, i, *k)]
                    elif padding:
                        yield 0.0, weights[(o, i, *k)]


def _wrapped(where, size, mode):
    if mode == "circular":
        return [w % n for w, n in zip(where, size, strict=True)], True
    if mode == "reflect":
        return [n - 1 - abs(n - 1 - abs(w)) for w, n in zip(where, size, strict=True)], True
    return where, all(0 <= w < n for w, n in zip(where, size, strict=True))


def _transposed_synapses(layer, x, weights, out_size, padding):
    per_group_out = layer.out_channels // layer.groups
    for i in range(layer.in_channels):
        for o in range(per_group_out):
            for at in _positions(x.shape[1:]):
                for k in _positions(layer.kernel_size):
                    lands = [
                        p * s - pad + q * d
                        for p, s, pad, q, d in zip(at, layer.stride, layer.padding, k, layer.dilation, strict=True)
                    ]
                    if padding or all(0 <= w < n for w, n in zip(lands, out_size, strict=True)):
                        yield x[(i, *at)], weights[(i, o, *k)]


def spikes_like(*shape: int, rate: float = 0.4, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


def pruned(layer: nn.Module, share: float = 0.3, seed: int = 1) -> nn.Module:
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < share] = 0
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d strided, padded, grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(2, 0), dilation=(2, 3)), (2, 7, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 1)), (2, 5, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "conv2d circular same": (
        lambda: nn.Conv2d(1, 2, (2, 3), padding="same", padding_mode="circular"),
        (1, 4, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1), (3, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 4, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2, dilation=2), (1, 2, 3, 2)),
}
RULES = {
    "default": Conventions(),
    "padding": Conventions(padding=True),
    "neurobench": PRESETS["neurobench"],
    "spikingjelly": PRESETS["spikingjelly"],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
def test_counts_equal_brute_force(build, shape, rules):
    torch.manual_seed(0)
    layer = pruned(build())
    x = torch.stack([spikes_like(*shape, seed=seed) for seed in range(2)])
    expected = sum(brute_force(layer, sample, rules, spikes=True) for sample in x)
    counts = count_operations(layer, x, rules)
    assert (counts.n_ac, counts.n_mac) == (expected, 0)
    analog = x * torch.rand(x.shape, generator=torch.Generator().manual_seed(9))
    expected = sum(brute_force(layer, sample, rules, spikes=False) for sample in analog)
    counts = count_operations(layer, analog, rules)
    assert (counts.n_ac, counts.n_mac) == (0, expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    dims=st.integers(1, 2),
    groups=st.integers(1, 2),
    transposed=st.booleans(),
    rules=st.sampled_from(sorted(RULES)),
)
def test_any_convolution_equals_brute_force(data, dims, groups, transposed, rules):
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 2)
    # Room for the kernel, and for what a transposed convolution's padding cuts off on both sides.
    size = tuple(
        d * (k - 1) + 1 + 2 * p * transposed + data.draw(st.integers(0, 3))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    channels = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
    layer = kinds[dims - 1](*channels, kernel, stride=stride, dilation=dilation, padding=padding, groups=groups)
    pruned(layer)
    x = spikes_like(channels[0], *size) * 2
    x.view(-1)[0] = 2  # all zeros would be spikes under every rule
    expected = brute_force(layer, x, RULES[rules], spikes=RULES[rules].spike_values == "integers")
    counts = count_operations(layer, x, RULES[rules])
    assert counts.n_ac + counts.n_mac == expected


# ------------------------------------------------------------------------------------------
# By hand.


def test_two_by_two_filter_on_a_three_by_three_map():
    # Filter [[a, b], [0, d]], output 2×2, no padding. A spike at (r, c) meets weight (i, j) at output
    # (r - i, c - j), where that exists:
    #   (0, 0): only a, at output (0, 0)                                          1
    #   (1, 1): a at (1, 1), b at (1, 0), [the 0 at (0, 1)], d at (0, 0)          3
    #   (2, 2): only d, at output (1, 1)                                          1
    #   (2, 0): only weight (1, 0), which is 0                                    0
    layer = nn.Conv2d(1, 1, 2, bias=True)
    layer.weight.data = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]]]])
    x = torch.zeros(1, 1, 3, 3)
    for at in ((0, 0), (1, 1), (2, 2), (2, 0)):
        x[(0, 0, *at)] = 1
    assert count_operations(layer, x).n_ac == 1 + 3 + 1 + 0
    # With the zero weight: (1, 1) gets 4 and (2, 0) gets 1.
    assert count_operations(layer, x, Conventions(zero_weights=True)).n_ac == 1 + 4 + 1 + 1
    # Analog: 3 weights × 4 outputs; non-zero inputs alone as above; a bias is 4 more additions.
    assert count_operations(layer, x * 0.5).n_mac == 12
    assert count_operations(layer, x * 0.5, Conventions(zero_inputs=False)).n_mac == 5
    with_bias = count_operations(layer, x * 0.5, Conventions(bias=True))
    assert (with_bias.n_ac, with_bias.n_mac) == (4, 12)


def test_padding_is_no_synapse_unless_asked():
    # 3×3 filter, padding 1, on a 2×2 map: each of 4 inputs reaches all 4 outputs = 16 real products;
    # 9 · 4 = 36 with the ring of zeros.
    layer = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.full((1, 1, 2, 2), 0.5)
    assert count_operations(layer, x).n_mac == 16
    assert count_operations(layer, x, Conventions(padding=True)).n_mac == 36
    assert count_operations(layer, torch.ones(1, 1, 2, 2), Conventions(padding=True)).n_ac == 16


def test_the_value_two_is_two_spikes_and_minus_one_is_one():
    layer = nn.Linear(3, 4)
    assert count_operations(layer, torch.tensor([[2.0, -1.0, 0.0]])).n_ac == (2 + 1) * 4
    assert count_operations(layer, torch.tensor([[2.0, 0.0, 0.0]]), "neurobench").n_mac == 4
    assert count_operations(layer, torch.tensor([[-1.0, 1.0, 0.0]]), "neurobench").n_ac == 8
    assert count_operations(layer, torch.tensor([[-1.0, 1.0, 0.0]]), "spikingjelly").n_mac == 12


def test_all_zero_and_two_valued_inputs():
    layer = nn.Linear(4, 3)
    for name in PRESETS:  # everyone: silence costs nothing (syops: rate 0)
        counts = count_operations(layer, torch.zeros(2, 4), name)
        assert (counts.n_ac, counts.n_mac) == (0, 0), name
    half = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    assert count_operations(layer, half).n_mac == 12
    assert count_operations(layer, half, "neurobench").n_mac == 6
    assert count_operations(layer, half, "spikingjelly").n_mac == 12
    # syops takes {0, 0.5} for spikes: rate 0.25 × (4·3 weights + 3 biases)
    assert count_operations(layer, half, "syops").n_ac == 0.25 * 15


def test_syops_is_rate_times_dense_with_padding_and_bias():
    # conv 2→3 channels, 3×3, padding 1 on 4×4: dense 2·3·9·16 = 864 products + 3·16 = 48 biases;
    # 8 spikes among 32 inputs.
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, :2] = 1
    counts = count_operations(layer, x, "syops")
    assert (counts.n_ac, counts.n_mac) == (pytest.approx((864 + 48) * 8 / 32), 0)
    counts = count_operations(layer, x * torch.linspace(0.1, 0.9, 4), "syops")
    assert (counts.n_ac, counts.n_mac) == (0, 864 + 48)


def test_normalization_and_pooling_conventions():
    norm, bare, pool = nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.AvgPool2d(2)
    x = torch.rand(3, 2, 4, 4)  # 96 elements
    spikes = spikes_like(3, 2, 4, 4)

    def count(layer: nn.Module, x: Tensor, rules: Conventions) -> tuple[float, float]:
        counter = PlainCounter(layer, rules)
        counter.add(x)
        return counter.n_ac, counter.n_mac

    assert count(norm, x, Conventions()) == (0, 0)
    assert count(norm, x, PRESETS["spikingjelly"]) == (0, 96)
    assert count(bare, x, PRESETS["spikingjelly"]) == (0, 0)
    assert count(norm, x, PRESETS["syops"]) == (0, 192)
    assert count(bare, x, PRESETS["syops"]) == (0, 96)
    assert count(norm, spikes, PRESETS["syops"]) == (2 * spikes.sum(), 0)
    assert count(pool, x, Conventions()) == (0, 0)
    assert count(pool, x, Conventions(pooling=True)) == (0, 96)
    assert count(pool, spikes, Conventions(pooling=True)) == (spikes.sum(), 0)


def test_scope_of_the_spike_decision():
    layer, spikes, analog = nn.Linear(2, 3), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    by_run, by_call = (
        WeightCounter(layer, Conventions()),
        WeightCounter(layer, Conventions(spike_scope="call")),
    )
    for counter in (by_run, by_call):
        for x in (spikes, analog, spikes):
            counter.add(x, (1, 3))
    assert by_run.totals() == (0, 18)  # one fraction: all three calls cost 2·3 products
    assert by_call.totals() == (3 + 3, 6)
    assert by_run.input_rate is None


# ------------------------------------------------------------------------------------------
# Inputs of every shape and kind.


def test_leading_dimensions_are_added_up():
    conv, linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 5)
    x = spikes_like(3, 2, 2, 5, 5)  # [T, N, C, H, W]
    whole = count_operations(conv, x).n_ac
    assert (
        whole
        == count_operations(conv, x.flatten(0, 1)).n_ac
        == sum(count_operations(conv, sample).n_ac for step in x for sample in step)
    )
    x = spikes_like(3, 2, 4)
    assert count_operations(linear, x).n_ac == x.sum() * 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_any_dtype_of_spikes(dtype):
    x = spikes_like(2, 6).to(dtype)
    counter = WeightCounter(nn.Linear(6, 4), Conventions())
    counter.add(x, (2, 4))
    assert counter.totals() == (int(x.sum()) * 4, 0)


def test_large_counts_stay_exact():
    # float32 would lose single operations beyond 2²⁴.
    layer = nn.Linear(4097, 4099, bias=False)
    counter = WeightCounter(layer, Conventions())
    for _ in range(3):
        counter.add(torch.ones(5, 4097), (5, 4099))
    assert counter.totals() == (3 * 5 * 4097 * 4099, 0)


def test_a_parametrized_weight_counts_as_the_layer_sees_it():
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Mask())
    assert count_operations(layer, torch.ones(1, 2)).n_ac == 1


def test_a_transposed_convolution_called_with_output_size():
    # Stride 2, kernel 3, padding 1: input i lands on outputs 2i - 1 … 2i + 1. Inputs 0, 1, 2 have
    # 2 + 3 + 2 = 7 of them in 0 … 4; a sixth output, asked for, adds the last one of input 2.
    layer = nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1)
    x = torch.ones(1, 1, 3)
    assert layer(x).shape[-1] == 5
    assert int(fan_out(layer, (1, 3), (1, 1, 5)).sum()) == 7
    assert layer(x, output_size=[6]).shape[-1] == 6
    assert int(fan_out(layer, (1, 3), (1, 1, 6)).sum()) == 8


def test_counting_inside_inference_mode():
    layer = pruned(nn.Conv2d(2, 3, 3))
    with torch.inference_mode():
        x = spikes_like(1, 2, 5, 5)
        inside = count_operations(layer, x)
    assert inside == count_operations(layer, x)


def test_nan_and_infinity_are_no_spikes():
    assert not is_spikes(torch.tensor([float("nan"), 1.0]))
    assert not is_spikes(torch.tensor([float("inf"), 1.0]))
    assert not is_spikes(torch.tensor([float("nan")]), "two_valued")


def test_counting_leaves_layer_and_input_alone():
    layer, x = nn.Conv2d(1, 1, 2), torch.ones(1, 1, 3, 3)
    before = [p.clone() for p in layer.parameters()]
    count_operations(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(p.grad is None for p in layer.parameters())
    assert bool((x == 1).all())


# ------------------------------------------------------------------------------------------
# Conventions and errors.


def test_conventions_are_checked():
    for wrong in (
        {"per": "image"}, {"padding": 1}, {"batch_norm_ops": 3}, {"spike_values": "bits"}, {"attention": True},
        {"direct_encoding": "twice"}, {"averaged_spikes": "counted"},
    ):  # fmt: skip
        with pytest.raises(OptionError, match=f"{next(iter(wrong))} must be one of"):
            Conventions(**wrong)
    with pytest.raises(OptionError, match="batch_norm_ops must be one of 0, 1, 2, not True"):
        Conventions(batch_norm_ops=True)


def test_presets_resolve_and_name_themselves():
    assert resolve_conventions(None) == Conventions() == resolve_conventions("snncompress")
    assert {preset.name for preset in PRESETS.values()} == set(PRESETS)
    assert resolve_conventions(Conventions(bias=True)).name == "custom"
    assert len({preset.describe() for preset in PRESETS.values()}) == len(PRESETS)
    text = Conventions(direct_encoding="every step", averaged_spikes="multiplications").describe()
    assert "constant inputs multiplied every step, averaged spikes are multiplications, attention counted" in text
    with pytest.raises(UnknownNameError, match="Available: snncompress, qp_snn, neurobench, spikingjelly, syops"):
        resolve_conventions("ptflops")
    with pytest.raises(OptionError, match="not 3"):
        resolve_conventions(3)


def test_errors_of_count_operations():
    with pytest.raises(ModelError, match="not for ReLU"):
        count_operations(nn.ReLU(), torch.ones(1))
    with pytest.raises(DataError, match=r"Linear can't take an input of shape \[1, 3\]"):
        count_operations(nn.Linear(4, 2), torch.ones(1, 3))
