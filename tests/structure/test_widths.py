"""Where channels stand and how wide: tokens, sequences, single samples, time first; widths that forward reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from snncompress_schedules import Iterative
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import PlanError
from snncompress.contract.detection import find_adapter
from snncompress.model.edits import RemoveChannels
from snncompress.model.network import ChannelGroup, Member
from snncompress.running.data import Feed
from snncompress.structure.axes import reshaped
from snncompress.structure.widths import merged
from tests.equivalence import largest_difference


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.05, step_mode="m")


def prune(model: nn.Module, x: Tensor, ratio: float = 0.5, **options: object) -> nn.Module:
    """A smaller model that was held against the silenced original."""
    model.double().eval()
    x = x.double()
    small = snncompress.apply(model, "firing_rate", ratio, None, data=x, skip=[], repair=None, **options)
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-9
    return small


def conv(before: int, after: int) -> nn.Module:
    return layer.Conv1d(before, after, 1, step_mode="m")


class Through(nn.Module):
    """One layer, its neuron, what ``between`` does, another layer."""

    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor], second: nn.Module) -> None:
        super().__init__()
        self.a, self.n, self.between, self.b = first, fire(), between, second

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.n(self.a(x)))).flatten(2).mean(2)


MADE = {
    "tokens [T, N, L, C]": (nn.Linear(6, 8), lambda h: h, nn.Linear(8, 5), (3, 2, 8, 6)),
    "tokens as long as wide": (nn.Linear(6, 8), lambda h: h.transpose(2, 3), conv(8, 5), (3, 2, 8, 6)),
    "tokens to maps": (nn.Linear(6, 8), lambda h: h.transpose(2, 3), conv(8, 5), (3, 2, 4, 6)),
    "tokens flattened": (nn.Linear(6, 8), lambda h: h.flatten(2), nn.Linear(32, 5), (3, 2, 4, 6)),
    "channels flattened": (
        nn.Linear(6, 8), lambda h: h.transpose(2, 3).flatten(2), nn.Linear(32, 5), (3, 2, 4, 6),
    ),
    "sequences [T, N, C, L]": (conv(6, 8), lambda h: h, conv(8, 5), (3, 2, 6, 4)),
    "sequences to tokens": (conv(6, 8), lambda h: h.transpose(2, 3), nn.Linear(8, 5), (3, 2, 6, 8)),
    "maps to tokens": (
        layer.Conv2d(3, 8, 1, step_mode="m"), lambda h: h.flatten(3).permute(0, 1, 3, 2), nn.Linear(8, 5),
        (3, 2, 3, 4, 4),
    ),
    "parts of tokens": (
        nn.Linear(6, 8), lambda h: torch.cat(h.chunk(2, -1)[::-1], -1), nn.Linear(8, 5), (3, 2, 8, 6),
    ),
}  # fmt: skip


def test_a_module_that_unflattens_shrinks_along() -> None:
    """[..., 32] as 8 channels of 4 positions: the four that make a channel go with it."""
    small = prune(Through(nn.Linear(6, 32), nn.Unflatten(-1, (8, 4)), conv(8, 5)), torch.rand(3, 2, 6))
    assert (small.a.out_features, small.between.unflattened_size, small.b.in_channels) == (16, (4, 4), 4)
    replayed = snncompress.plan_of(small).apply(Through(nn.Linear(6, 32), nn.Unflatten(-1, (8, 4)), conv(8, 5)))
    assert replayed.between.unflattened_size == (4, 4)


@pytest.mark.parametrize("what", MADE)
def test_channels_on_any_axis(what: str) -> None:
    first, between, second, shape = MADE[what]
    small = prune(Through(first, between, second), torch.rand(shape))
    assert small.a.weight.shape[0] == 4


def test_a_layer_that_reads_positions_reads_no_channels() -> None:
    net = Through(nn.Linear(6, 8), lambda h: h.transpose(2, 3), nn.Linear(8, 5)).double()
    with pytest.warns(snncompress.errors.NothingToDoWarning, match="counts on how many there are"):
        snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(3, 2, 8, 6).double(), skip=[], repair=None)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), neuron.IFNode(0.1), nn.Conv2d(8, 4, 1)), (3, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 8, 1), neuron.IFNode(0.1), nn.Conv1d(8, 4, 1)), (3, 8)),
        (nn.Sequential(nn.Linear(3, 8), neuron.IFNode(0.1), nn.Linear(8, 4)), (3,)),
    ],
)
def test_single_samples(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert prune(model, torch.rand(shape))[0].weight.shape[0] == 4


class Reads(nn.Module):
    """Reads the width of its hidden layer as ``read`` says."""

    def __init__(self, read: Callable[[Reads, Tensor], int], hidden: int = 8) -> None:
        super().__init__()
        self.a, self.bn, self.n = nn.Conv2d(3, hidden, 1), nn.BatchNorm2d(hidden), fire()
        self.b, self.hidden, self.heads, self.head_dim, self.steps = nn.Conv2d(hidden, 5, 1), hidden, 2, hidden // 2, 8
        self.flat, self.read = hidden * 16, read

    def forward(self, x: Tensor) -> Tensor:
        t, n, _, h, w = x.shape
        x = self.bn(self.a(x.flatten(0, 1)))
        x = self.n(x.reshape(t, n, self.read(self, x), h, w))
        return self.b(x.flatten(0, 1)).reshape(t, n, 5, h, w).mean((3, 4)) * (1 if self.steps == 8 else 2)


@pytest.mark.parametrize(
    ("read", "set_"),
    [
        (lambda net, x: net.hidden, {"hidden": 4}),
        (lambda net, x: net.flat // 16, {"flat": 64}),
        (lambda net, x: x.shape[1], {}),
        (lambda net, x: -1, {}),
    ],
)
def test_widths_that_forward_reads(read: Callable[[Reads, Tensor], int], set_: dict[str, int]) -> None:
    net = Reads(read)
    before = {name: value for name, value in vars(net).items() if type(value) is int}
    small = prune(net, torch.rand(3, 2, 3, 4, 4))
    assert small.a.out_channels == 4
    assert {name: value for name, value in vars(small).items() if type(value) is int} == before | set_
    assert {name: value for name, value in vars(net).items() if type(value) is int} == before


@dataclass(frozen=True)
class Settings:
    hidden: int = 8


class Shared(Reads):
    width = 8


@pytest.mark.parametrize(
    ("name", "held", "read"),
    [
        ("settings[model][hidden]", {"model": {"hidden": 8}}, lambda held: held["model"]["hidden"]),
        ("settings.hidden", Settings(), lambda held: held.hidden),
        ("settings[1][0]", ((3,), [8]), lambda held: held[1][0]),
        ("settings", np.int64(8), int),
        ("settings[0]", torch.Size((8, 4)), lambda held: held[0]),
    ],
)
def test_widths_in_settings(name: str, held: Any, read: Callable[[Any], int]) -> None:
    def build() -> Reads:
        net = Reads(lambda net, x: read(net.settings))
        net.settings, net.hidden, net.flat, net.head_dim = held, 0, 0, 0
        return net

    net = build()
    small = prune(net, torch.rand(3, 2, 3, 4, 4))
    plan = snncompress.Plan.from_json(snncompress.plan_of(small).to_json())
    assert [(new.attribute, new.after) for new in plan.edits[0].widths] == [(name, 4)]
    assert (read(net.settings), read(small.settings), read(plan.apply(build()).settings)) == (8, 4, 4)
    assert type(small.settings) is type(held)


def test_a_width_of_the_class() -> None:
    net = Shared(lambda net, x: net.width)
    net.hidden = 0
    assert prune(net, torch.rand(3, 2, 3, 4, 4)).width == 4
    assert (Shared.width, net.width) == (8, 8)


def test_a_width_goes_with_the_plan_step_by_step() -> None:
    net, x = Reads(lambda net, x: net.hidden), torch.rand(3, 2, 3, 4, 4)
    small = prune(net, x, 0.75, scheduler=Iterative(steps=3))
    assert small.hidden == small.a.out_channels == 2
    plan = snncompress.Plan.from_json(snncompress.plan_of(small).to_json())
    again = plan.apply(net)
    assert again.hidden == 2
    assert "hidden" in plan.edits[0].describe()
    (edit,) = (e for e in plan.edits[:1] if isinstance(e, RemoveChannels))
    assert RemoveChannels.unpacked(edit.packed("e", {}), {}, _Unlimited()) == [edit]
    other = Reads(lambda net, x: net.hidden)
    other.hidden = 7
    with pytest.raises(PlanError, match="hidden = 7, where the plan expects a width of 8"):
        plan.apply(other)


class _Unlimited:
    def spend(self, count: int) -> None:
        pass


def test_a_number_for_each_timestep_is_of_no_channel() -> None:
    """As in temporal effective batch normalization."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.p = (
                layer.Conv2d(3, 8, 1, step_mode="m"),
                fire(),
                nn.Parameter(torch.rand(3, 1, 1, 1, 1)),
            )
            self.b = nn.Linear(8 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(self.a(x) * self.p).flatten(2))

    assert prune(Net(), torch.rand(3, 2, 3, 4, 4)).a.out_channels == 4


class Tied(nn.Module):
    """The second layer's output is shaped by the width of its input: both must be as wide, whatever they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.n2, self.c = nn.Linear(6, 8), fire(), nn.Linear(8, 8), fire(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x))
        return self.c(self.n2(self.b(h).reshape(h.shape)))


def test_layers_that_must_be_as_wide_shrink_together() -> None:
    small = prune(Tied(), torch.rand(3, 2, 6))
    assert (small.a.out_features, small.b.out_features) == (4, 4)


def test_groups_merge_where_their_runs_match() -> None:
    def group(name: str, size: int, runs: int) -> ChannelGroup:
        return ChannelGroup((Member(name, "out", torch.arange(size)[:, None]),), size, runs)

    whole = merged([group("a", 8, 1), group("b", 8, 4)])
    assert whole is not None
    assert (whole.size, whole.runs, whole.names("out")) == (8, 4, ("a", "b"))
    for others in (group("b", 6, 1), group("b", 8, 8), group("a", 8, 1)):
        assert merged([group("a", 8, 1), others]) is None
    assert merged([group("a", 8, 2), group("b", 8, 4)]) is None


def test_where_an_axis_goes_in_a_reshape() -> None:
    assert reshaped([3, 2, 8, 4, 4], [3, 2, 8, 16], -3) == -2
    assert reshaped([3, 2, 8, 4, 4], [6, 8, 4, 4], -3) == -3
    assert reshaped([2, 4, 8], [2, 4, 2, 4], -1) == -1
    assert reshaped([2, 4, 2, 4], [2, 4, 8], -1) == -1
    assert reshaped([2, 8, 4, 4], [2, 128], -3) == -1
