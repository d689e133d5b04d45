"""Targets and the lowest scores."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snncompress_baselines import WeightMagnitude
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.base.ranking import layer_adaptive
from snncompress.model.network import ChannelGroup, Member, without
from snncompress.pruning.selection import Target, lowest


def group(size: int, runs: int = 1, layers: int = 1) -> ChannelGroup:
    index = torch.arange(size)[:, None]
    return ChannelGroup(tuple(Member(f"layer{i}", "out", index) for i in range(layers)), size, runs)


@pytest.mark.parametrize(
    ("ratio", "size", "count"),
    # 0.45·64 = 28.8; 0.5·64 is 32 exactly; 0.1·30 = 3.0000000000000004 and 0.07·100 = 7.000000000000001 in floats
    [(0.45, 64, 29), (0.5, 64, 32), (0.1, 30, 3), (0.07, 100, 7), (0.51, 512, 262), (0.01, 8, 1), (0.0, 8, 0)],
)
def test_count_is_the_ceiling_guarded_against_float_error(ratio: float, size: int, count: int) -> None:
    assert Target(group(size), size, ratio).count(ratio) == count


@given(st.integers(2, 200), st.floats(0, 0.99))
def test_count_never_rounds_below_the_ratio(size: int, ratio: float) -> None:
    count = Target(group(size), size, ratio).count(ratio)
    assert count / size >= ratio - 1e-8
    assert count <= math.ceil(ratio * size)


def test_count_in_steps_and_blocks() -> None:
    """12 channels in 4 runs of 3: ⌈0.5·3⌉ = 2 of each; after 4 are gone, 4 more."""
    target = Target(group(12, runs=4), 12, 0.5)
    assert target.count(0.5) == 8
    target.group = group(8, runs=4)
    assert target.count(0.5) == 4


def test_lowest_breaks_ties_by_index() -> None:
    scores = {"layer0": torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)}
    assert lowest(group(5), scores, 3).tolist() == [0, 1, 3]


def test_coupled_layers_weigh_the_same() -> None:
    """Means 13 and 0.5; divided by them the sums are [1.94, 2.69, 1.37]; undivided, [20.2, 10, 10.3], 1 would go."""
    scores = {
        "layer0": torch.tensor([20.0, 9.0, 10.0], dtype=torch.float64),
        "layer1": torch.tensor([0.2, 1.0, 0.3], dtype=torch.float64),
    }
    assert lowest(group(3, layers=2), scores, 1).tolist() == [2]


def test_blocks_lose_the_same_positions() -> None:
    """Two runs of three; position sums [0+5, 3+0, 1+1]: position 2 goes in both."""
    scores = {"layer0": torch.tensor([0.0, 3.0, 1.0, 5.0, 0.0, 1.0], dtype=torch.float64)}
    assert lowest(group(6, runs=2), scores, 2).tolist() == [2, 5]


def test_other_groups_move_up_when_a_shared_module_shrinks() -> None:
    """A concatenation of 3 + 3 channels: removing the first's channel 1 shifts the second's columns by one."""
    first = ChannelGroup((Member("cat", "in", torch.tensor([[0], [1], [2]])),), 3)
    second = ChannelGroup((Member("cat", "in", torch.tensor([[3], [4], [5]])),), 3)
    a, b = without([first, second], 0, torch.tensor([1]))
    assert a.members[0].index.flatten().tolist() == [0, 1]
    assert b.members[0].index.flatten().tolist() == [2, 3, 4]


def test_flattened_columns_are_renumbered() -> None:
    """Two columns per channel; without channel 1 the columns of channel 2 become 2 and 3."""
    member = Member("fc", "in", torch.tensor([[0, 1], [2, 3], [4, 5]]))
    (left,) = without([ChannelGroup((member,), 3)], 0, torch.tensor([1]))
    assert left.members[0].index.tolist() == [[0, 1], [2, 3]]


def exactly_lamp(v: Tensor) -> Tensor:
    """By the equation: v_u² over the sum of all v_w² no less."""
    return torch.stack([u**2 / (v[v >= u] ** 2).sum() for u in v])


STEPS = st.tuples(st.integers(-138, 68), st.floats(0, 0.8))  # whole steps of 10 %, and up to 8 % more: 1e-6 … 1e3


@given(st.lists(STEPS, min_size=1, max_size=12, unique_by=lambda step: step[0]))
def test_layer_adaptive_is_lamp(steps: list[tuple[int, float]]) -> None:
    v = torch.tensor([math.exp(0.1 * (k + f)) for k, f in steps], dtype=torch.float64)  # 2 % apart: no two share a bin
    torch.testing.assert_close(layer_adaptive(v), exactly_lamp(v), rtol=1e-5, atol=0)


def test_layer_adaptive_on_many_weights() -> None:
    v = torch.randn(20_000).abs()
    got = layer_adaptive(v.view(100, 200)).flatten()
    assert torch.equal(got.argsort(stable=True), v.argsort(stable=True))
    ordered = v.double().sort().values ** 2
    expected = ordered / ordered.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(got.sort().values[:19_800], expected[:19_800], rtol=0.05, atol=0)
    assert float(got.max()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layer_adaptive_at_the_edges(dtype: torch.dtype) -> None:
    assert layer_adaptive(torch.zeros(3, dtype=dtype)).tolist() == [0, 0, 1]  # a dead layer keeps a weight
    assert layer_adaptive(torch.tensor([-0.0, 2.0], dtype=dtype)).tolist() == [0, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_the_default_selection_is_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float64)
    gone = WeightMagnitude().select(scores, count).nonzero().flatten().tolist()
    assert gone == sorted(scores.argsort(stable=True)[:count].tolist())


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def stream(width: int = 8) -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(1, width, 3, padding=1), neuron.IFNode(),
        *(Residual(nn.Sequential(layer.Conv2d(width, width, 3, padding=1), neuron.IFNode())) for _ in range(2)),
        layer.Flatten(), layer.Linear(16 * width, 3),
    )  # fmt: skip


def chain(width: int, last: int) -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(1, width, 3, padding=1), neuron.IFNode(), layer.Conv2d(width, width, 3, padding=1),
        neuron.IFNode(), layer.Conv2d(width, last, 1), neuron.IFNode(), layer.Flatten(), layer.Linear(16 * last, 3),
    )  # fmt: skip


def separable() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode(), layer.Conv2d(8, 6, 1), neuron.IFNode(),
        layer.Conv2d(6, 6, 3, padding=1, groups=6), neuron.IFNode(), layer.Flatten(), layer.Linear(96, 3),
    )  # fmt: skip


def by_default(model: nn.Module, **options: object) -> snncompress.Plan:
    x = torch.rand(2, 1, 4, 4)
    return snncompress.plan_of(snncompress.apply(model, "magnitude", 0.5, None, data=x, timesteps=2, **options))


def test_by_default_the_layer_is_protected_and_the_stream_is_not() -> None:
    assert set(by_default(stream()).removed_channels()) == {"0", "2.body.0", "3.body.0"}
    assert set(by_default(chain(8, 6)).removed_channels()) == {"0", "2"}
    plan = by_default(separable())
    assert set(plan.removed_channels()) == {"0"}
    assert plan.skipped["2"] == "coupled with 4: it feeds the classifier"


def test_defaults_that_leave_much_alone_say_so() -> None:
    with pytest.warns(snncompress.DefaultSkipWarning, match=r"'4' keeps its channels, .*: 37% of the parameters"):
        by_default(chain(8, 48))
    for model, options in (
        (chain(8, 6), {}), (stream(), {}), (chain(8, 48), {"skip": []}), (chain(8, 48), {"skip": {"prune": ["4"]}}),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            by_default(model, **options)


def test_a_ratio_that_nobody_asked_for_leaves_one_channel() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2), neuron.IFNode(), nn.Linear(2, 3)), torch.rand(2, 4)
    options = {"data": x, "timesteps": 2, "skip": [], "repair": None}
    assert len(snncompress.apply(model, "magnitude", bits=None, **options)[0].weight) == 1
    with pytest.raises(snncompress.OptionError, match="would remove all 2 channels"):
        snncompress.apply(model, "magnitude", 0.6, None, **options)
