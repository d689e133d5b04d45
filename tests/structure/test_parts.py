"""Layers whose channels are coupled with others' in part: zeros, splits, halves, groups. Each part goes by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.functional import pad

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.model.network import ChannelGroup, Member, by_layer
from snncompress.pruning.scorer import _columns
from snncompress.running.data import Feed
from snncompress.structure.reshaping import UnfitError
from snncompress.structure.ties import tied
from snncompress.structure.widths import merged
from tests.equivalence import largest_difference

X = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    norm = layer.BatchNorm2d(after)
    nn.init.uniform_(norm.bias, -0.3, 0.7)
    return nn.Sequential(layer.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), norm)


def cut(model: nn.Module, mode: str = "m", ratio: float = 0.4, criterion: str = "firing_rate") -> dict[str, list[int]]:
    """What goes of each convolution, and of those that stay nothing; exact."""
    functional.set_step_mode(model.double().eval(), mode)
    small = snncompress.apply(model, criterion, ratio, None, data=X, timesteps=2, skip=[], repair=None)
    assert largest_difference(model, small, Feed(find_adapter(model), X, 2)) <= 1e-9
    plan = snncompress.plan_of(small)
    gone = plan.removed_channels()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert all((name in gone) != (name in plan.skipped) for name in convolutions)
    for why in plan.skipped.values():
        assert not any(text in why for text in ("Error", "tensor", "torch", "dimension"))
    fresh = snncompress.Plan.from_json(plan.to_json()).apply(model)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    return {name: gone.get(name, []) for name in convolutions}


class Padded(nn.Module):
    """The second stage is twice as wide; what it takes from the first is padded, 4 + 8 + 4 channels or 8 + 8."""

    def __init__(self, shortcut: Callable[[Padded, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.fire1 = conv(3, 8), fire()
        self.two, self.fire2 = conv(8, 16, 3, 2), fire()
        self.three, self.head, self.shortcut = conv(16, 6), layer.Linear(6, 4), shortcut
        self.front, self.behind, self.more = 4, 4, 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire1(self.one(x))
        y = self.two(x)
        x = self.fire2(y + self.shortcut(self, x[..., ::2, ::2], y))
        return self.head(self.three(x).mean((-1, -2)))


def fixed(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, 0, 4, 4))


def counted(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, 0, net.front, net.behind))


def computed(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    missing = y.shape[-3] - x.shape[-3]
    return pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


def appended(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(y[..., x.shape[-3] :, :, :])], -3)


def appended_as_counted(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-3], net.more, *x.shape[-2:])], -3)


def doubled(net: Padded, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(x)], -3)


# how many of 8 go, and of the wide layer's 4 + 8 + 4, or 8 + 8: ⌈0.4 · 4⌉ = 2, ⌈0.4 · 8⌉ = 4
SHORTCUTS = [
    (fixed, 4, (0, 4, 0)), (counted, 4, (2, 4, 2)), (computed, 4, (2, 4, 2)), (appended, 4, (4, 4)),
    (appended_as_counted, 4, (4, 4)), (doubled, 4, (4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("shortcut", "narrow", "wide"), SHORTCUTS)
def test_zeros_beside_a_narrower_stream(
    shortcut: Callable[[Padded, Tensor, Tensor], Tensor], narrow: int, wide: tuple[int, ...]
) -> None:
    gone = cut(Padded(shortcut), "s" if shortcut is fixed else "m")
    edges = (4, 12, 16) if len(wide) == 3 else (8, 16)
    found = torch.bucketize(torch.tensor(gone["two.0"], dtype=torch.long), torch.tensor(edges), right=True)
    assert torch.bincount(found, minlength=len(edges)).tolist() == list(wide)
    assert len(gone["one.0"]) == narrow
    start = 4 if len(wide) == 3 else 0
    assert [c + start for c in gone["one.0"]] == [c for c in gone["two.0"] if start <= c < start + 8]


class Appended(nn.Module):
    """The same in snnTorch, with linear layers and a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 10), nn.Linear(10, 3)
        self.lif1, self.lif2 = snn.Leaky(beta=0.9, threshold=0.1), snn.Leaky(beta=0.9, threshold=0.1)

    def forward(self, x: Tensor) -> Tensor:
        m1, m2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for _ in range(3):
            s1, m1 = self.lif1(self.one(x), m1)
            y = self.two(s1)
            s2, m2 = self.lif2(y + pad(s1, (0, y.shape[1] - s1.shape[1])), m2)
            out.append(self.three(s2))
        return torch.stack(out)


def test_zeros_in_snntorch() -> None:
    torch.manual_seed(0)
    model, x = Appended(), torch.rand(4, 5)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, skip=[], repair=None)
    gone = snncompress.plan_of(small).removed_channels()
    assert (len(gone["one"]), len(gone["two"])) == (3, 5)
    assert [c for c in gone["two"] if c < 6] == gone["one"]
    assert largest_difference(model, small, Feed(find_adapter(model), x, None)) <= 1e-6


class Mixed(nn.Module):
    """Depthwise kernels of several sizes, each on a part of the channels."""

    def __init__(self, split: Callable[[Mixed, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.one, self.fire1 = conv(3, 18, 1), fire()
        self.kernels = nn.ModuleList([conv(6, 6, kernel, groups=6) for kernel in (1, 3, 5)])
        self.fire2, self.two, self.fire3 = fire(), conv(18, 6, 1), fire()
        self.head, self.split, self.sizes = layer.Linear(6, 4), split, [6, 6, 6]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(self, self.fire1(self.one(x)))
        x = self.fire2(torch.cat([kernel(part) for kernel, part in zip(self.kernels, parts, strict=True)], -3))
        return self.head(self.fire3(self.two(x)).mean((-1, -2)))


def as_the_kernels(net: Mixed, x: Tensor) -> tuple[Tensor, ...]:
    return x.split([kernel[0].in_channels for kernel in net.kernels], -3)


def equal_parts(net: Mixed, x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(3, -3)


def as_listed(net: Mixed, x: Tensor) -> tuple[Tensor, ...]:
    return x.split(net.sizes, -3)


def by_number(net: Mixed, x: Tensor) -> tuple[Tensor, ...]:
    return x.split([6, 6, 6], -3)


@pytest.mark.parametrize(
    ("split", "goes"), [(as_the_kernels, True), (equal_parts, True), (as_listed, True), (by_number, False)]
)
def test_kernels_on_parts(split: Callable[[Mixed, Tensor], tuple[Tensor, ...]], goes: bool) -> None:
    gone = cut(Mixed(split))
    each = [gone[f"kernels.{number}.0"] for number in range(3)]
    assert [len(channels) for channels in each] == ([3, 3, 3] if goes else [0, 0, 0])
    assert gone["one.0"] == [channel + 6 * number for number, channels in enumerate(each) for channel in channels]
    if split is equal_parts:
        assert each[0] == each[1] == each[2]


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(-3, (2, -1)).transpose(-3, -4).flatten(-4, -3)


class Half(nn.Module):
    """One half of the channels passes, the other is convolved; then they are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.fire = conv(channels // 2, channels // 2), fire()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -3)
        return shuffled(torch.cat([left, self.fire(self.conv(right))], -3))


class Grouped(nn.Module):
    """ShuffleNet's unit: convolutions in two groups, a shuffle between them, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.fire1 = conv(channels, channels, 1, groups=2), fire()
        self.each, self.fire2 = conv(channels, channels, 3, groups=channels), fire()
        self.two, self.fire3 = conv(channels, channels, 1, groups=2), fire()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fire3(self.two(self.fire2(self.each(shuffled(self.fire1(self.one(x)))))))


def every(count: int, of: int) -> Tensor:
    return torch.arange(of) % count


# Which channels of a layer go together, derived by hand. Halves: the first chunk ties 0.0's p and p + 8, the second,
# behind a shuffle, p and p + 4; what 2.conv puts out stands beside the left half, what 3.conv does beside its two runs.
TIES = {
    "halves": ([Half(16), Half(16)], {"0.0": every(4, 16), "2.conv.0": every(4, 8), "3.conv.0": torch.arange(8) // 2}),
    "groups and a shuffle": ([Grouped(16)], {"2.one.0": every(4, 16), "2.each.0": torch.arange(16) // 2 % 4}),
    "groups of several sizes": (
        [conv(16, 8, groups=2), fire(), conv(8, 16, groups=4), fire()],
        {"0.0": every(8, 16), "2.0": every(2, 8), "4.0": every(4, 16)},
    ),
}


@pytest.mark.parametrize("case", TIES)
def test_of_each_half_and_group_as_many(case: str) -> None:
    body, ties = TIES[case]
    gone = cut(nn.Sequential(conv(3, 16), fire(), *body, conv(16, 8), fire(), layer.Flatten(), layer.Linear(8 * 64, 4)))
    assert all(gone.values())
    for name, tie in ties.items():
        kept = torch.ones(len(tie), dtype=torch.bool)
        kept[gone[name]] = False
        assert not set(tie[kept].tolist()) & set(tie[~kept].tolist()), name


def test_a_channel_is_scored_by_the_neurons_that_hear_it() -> None:
    """Of six channels the first four go to one neuron's columns 2 … 5, the fifth to another's; the sixth to none."""

    def part(channels: list[int], name: str, columns: list[int]) -> ChannelGroup:
        own = Member("conv", "out", torch.tensor(channels)[:, None])
        return ChannelGroup(
            (own, Member(name, "neuron", torch.tensor(columns)[:, None], 6, -1)), len(channels), part=True
        )

    groups = [part([0, 1], "a", [4, 5]), part([2, 3], "a", [2, 3]), part([4], "b", [0])]
    assert by_layer(groups, ["conv"]) == {"conv": tuple(groups)}
    table, heard = _columns(groups, "conv", "a", 6)
    assert table is not None
    assert table[:4].flatten().tolist() == [4, 5, 2, 3]
    assert heard.tolist() == [True, True, True, True, False, False]


def test_parts_of_a_layer_merge_however_their_indices_lie_in_memory() -> None:
    turned = torch.arange(8).view(2, 4).t()  # rows 0 4, 1 5, 2 6, 3 7
    one, other = (ChannelGroup((Member("layer", "out", index),), 2) for index in (turned[:2], turned[2:]))
    together = merged([one, other])
    assert together is not None
    assert together.members[0].index.tolist() == [[0, 4, 2, 6], [1, 5, 3, 7]]
    assert merged([one, one]) is None


def test_fewer_channels_than_heads_are_no_group() -> None:
    with pytest.raises(UnfitError, match="evenly"):
        tied([Member("0", "out", torch.arange(3)[:, None])], 6, nn.Sequential(nn.Linear(2, 3)))


@pytest.mark.parametrize("fires", [True, False])
def test_a_depthwise_convolution_that_multiplies(fires: bool) -> None:
    """Each of 6 channels makes two: ⌈0.4 · 6⌉ go, with both that they make. A bias that is read would stay there."""
    middle = conv(6, 12, groups=6) if fires else layer.Conv2d(6, 12, 3, padding=1, groups=6, bias=False)
    between = fire() if fires else nn.Identity()
    model = nn.Sequential(
        conv(3, 6), fire(), nn.Sequential(middle), between, conv(12, 5, 1), fire(), layer.Flatten(),
        layer.Linear(5 * 64, 3),
    )  # fmt: skip
    gone = cut(model)
    one, two = gone["0.0"], next(channels for name, channels in gone.items() if name.startswith("2."))
    assert len(one) == 3
    assert two == sorted([*(2 * c for c in one), *(2 * c + 1 for c in one)])
    small = snncompress.apply(model, "random", 0.4, 4, data=X, timesteps=2, skip=[])
    inner = next(module for module in small[2].modules() if isinstance(module, nn.Conv2d))
    assert (inner.groups, inner.in_channels, small[4][0].in_channels) == (3, 3, 6)
    assert snncompress.plan_of(small).origin["repaired"]
    replayed = snncompress.plan_of(small).apply(model)
    assert {n: p.shape for n, p in replayed.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    if fires:
        model[3] = nn.Identity()
        small = snncompress.apply(model, "random", 0.4, None, data=X, timesteps=2, skip=[], repair=None)
        assert "something adds to silent channels" in snncompress.plan_of(small).skipped["0.0"]


def test_where_the_input_is_multiplied_each_keeps_as_many() -> None:
    model = nn.Sequential(conv(3, 12, groups=3), fire(), conv(12, 5, 1), fire(), layer.Flatten(), layer.Linear(320, 3))
    gone = cut(model)["0.0"]
    assert [[channel // 4 for channel in gone].count(n) for n in range(3)] == [2, 2, 2]


class Beside(nn.Module):
    """Spikes stand between the image, or what else comes from no layer, once or on both sides."""

    def __init__(self, places: str) -> None:
        super().__init__()
        self.one, self.fire1, self.two = conv(3, 8), fire(), conv(8 + 3 * places.count("x"), 6)
        self.fire2, self.head, self.places = fire(), layer.Linear(6, 4), places

    def forward(self, x: Tensor) -> Tensor:
        parts = {"x": x, "s": self.fire1(self.one(x))}
        joined = torch.cat([parts[place] for place in self.places], 2)
        return self.head(self.fire2(self.two(joined)).mean((-2, -1)))


@pytest.mark.parametrize("places", ["xs", "sx", "xsx"])
def test_spikes_beside_what_comes_from_no_layer(places: str) -> None:
    gone = cut(Beside(places), ratio=0.5)
    assert [len(indices) for indices in gone.values()] == [4, 3]
