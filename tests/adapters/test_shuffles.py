"""Channel shuffles and splits, however they are written in forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from tests.end_to_end.test_truths import prune
from tests.equivalence import largest_difference
from tests.networks import Case, liven


def by_view(x: Tensor) -> Tensor:
    *front, c, h, w = x.shape
    return x.view(*front, 2, c // 2, h, w).transpose(-4, -3).reshape(*front, c, h, w)


def by_permutation(x: Tensor) -> Tensor:
    axes = [*range(x.dim() - 3), x.dim() - 2, x.dim() - 3, x.dim() - 1, x.dim()]
    return x.unflatten(-3, (2, -1)).permute(axes).contiguous().flatten(-4, -3)


def by_three(x: Tensor) -> Tensor:
    return x.unflatten(-3, (3, -1)).transpose(-4, -3).flatten(-4, -3)


def in_vain(x: Tensor) -> Tensor:
    return x.unflatten(-3, (2, -1)).flatten(-4, -3)


def hard_coded(x: Tensor) -> Tensor:
    return x.unflatten(-3, (2, 12)).transpose(-4, -3).flatten(-4, -3)


SHUFFLES = {"view": by_view, "permute": by_permutation, "three": by_three, "none": in_vain, "hard": hard_coded}


def chunks(x: Tensor) -> list[Tensor]:
    return list(x.chunk(2, -3))


def slices(x: Tensor) -> list[Tensor]:
    half = x.shape[-3] // 2
    return [x[..., :half, :, :], x[..., half:, :, :]]


def strides(x: Tensor) -> list[Tensor]:
    return [x[..., ::2, :, :], x[..., 1::2, :, :]]


def computed_sizes(x: Tensor) -> list[Tensor]:
    half = x.shape[-3] // 2
    return list(x.split([half, x.shape[-3] - half], -3))


def hard_coded_sizes(x: Tensor) -> list[Tensor]:
    return list(x.split([12, 12], -3))


def uneven_chunks(x: Tensor) -> list[Tensor]:
    one, two, three, four, five = x.chunk(5, -3)
    return [torch.cat([one, two, three[..., :2, :, :]], -3), torch.cat([three[..., 2:, :, :], four, five], -3)]


SPLITS = {
    "chunk": chunks, "slice": slices, "stride": strides, "computed": computed_sizes, "hard": hard_coded_sizes,
    "uneven": uneven_chunks,
}  # fmt: skip


class Shuffled(nn.Module):
    """Two convolutions side by side, shuffled; one half goes through another convolution; shuffled again."""

    def __init__(self, mode: str, shuffle: Callable[[Tensor], Tensor], split: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.shuffle, self.split = shuffle, split
        self.left, self.right = self._conv(2, 12), self._conv(2, 12)
        self.inner = self._conv(12, 12)
        self.last, self.fc = self._conv(24, 6), layer.Linear(6 * 64, 5)
        functional.set_step_mode(self, mode)

    def _conv(self, before: int, after: int) -> nn.Module:
        return nn.Sequential(layer.Conv2d(before, after, 3, padding=1), layer.BatchNorm2d(after), neuron.LIFNode())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.shuffle(torch.cat([self.left(x), self.right(x)], -3)))
        x = self.shuffle(torch.cat([a, self.inner(b)], -3))
        return self.fc(self.last(x).flatten(-3))


# what must be pruned: "all" that is shuffled, or "none" of it
WRITTEN = [
    ("view", "chunk", "all"), ("permute", "chunk", "all"), ("view", "slice", "all"), ("none", "chunk", "all"),
    ("none", "stride", "all"), ("hard", "chunk", "none"), ("view", "hard", "none"), ("view", "uneven", "none"),
    ("three", "chunk", "any"), ("view", "stride", "any"), ("view", "computed", "any"),
]  # fmt: skip


@pytest.mark.parametrize("mode", "sm")
@pytest.mark.parametrize(("shuffle", "split", "pruned"), WRITTEN)
def test_shuffles_and_splits_however_they_are_written(mode: str, shuffle: str, split: str, pruned: str) -> None:
    """Exact at every ratio, whatever is pruned; from what forward counts on with fixed numbers nothing goes."""
    model = Shuffled(mode, SHUFFLES[shuffle], SPLITS[split]).double()
    case = liven(Case(model, torch.rand(2, 2, 8, 8, dtype=torch.float64), 2))
    for ratio in (0.1, 0.3, 0.5, 0.7):
        compressed = prune(case, "random", ratio=ratio, repair=None)
        removed = snncompress.plan_of(compressed).removed_channels()
        assert largest_difference(model, compressed, case.feed) <= 1e-9
        assert len(removed["last.0"]) == math.ceil(6 * ratio)
        shuffled = {"left.0", "right.0", "inner.0"} & set(removed)
        assert pruned == "any" or shuffled == ({"left.0", "right.0", "inner.0"} if pruned == "all" else set())


class Groups(nn.Module):
    """torch's own channel shuffle between grouped convolutions, as in the first ShuffleNet."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.one, self.sn = layer.Conv2d(2, 12, 1), neuron.LIFNode()
        self.shuffle = layer.SeqToANNContainer(nn.ChannelShuffle(3)) if mode == "m" else nn.ChannelShuffle(3)
        self.two, self.sn2 = layer.Conv2d(12, 8, 3, padding=1), neuron.LIFNode()
        self.fc = layer.Linear(8 * 64, 5)
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.sn2(self.two(self.shuffle(self.sn(self.one(x))))).flatten(-3))


@pytest.mark.parametrize("mode", "sm")
def test_torchs_own_shuffle(mode: str) -> None:
    model = Groups(mode).double()
    case = liven(Case(model, torch.rand(2, 2, 8, 8, dtype=torch.float64), 2))
    compressed = prune(case, "svs", ratio=0.5, repair=None)
    removed = snncompress.plan_of(compressed).removed_channels()
    assert largest_difference(model, compressed, case.feed) <= 1e-9
    assert sorted(c % 4 for c in removed["one"]) == sorted([c % 4 for c in removed["one"][:2]] * 3)
