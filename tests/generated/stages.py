"""What networks are built of: each stage takes a format in, and says what it makes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .formats import Format, Kind, cut
from .styles import Style

Built = tuple[nn.Module, Format]
Build = Callable[[Style, Format], Built]
STAGES: dict[str, tuple[Build, int, tuple[Kind, ...]]] = {}
"""Name → how it is built, its weight in the draw, what it takes."""


def stage(weight: int, *kinds: Kind) -> Callable[[Build], Build]:
    """Adds a stage; one that can't be built of a format raises ValueError."""

    def add(build: Build) -> Build:
        STAGES[build.__name__] = build, weight, kinds
        return build

    return add


def need(holds: bool) -> None:
    """The stage can't be built of this format."""
    if not holds:
        raise ValueError


def width(style: Style) -> int:
    return style.pick(4, 6, 8, 8, 12)


def weighted(style: Style, fmt: Format, after: int, kernel: int = 3) -> nn.Module:
    """A convolution that keeps sizes, or a linear layer."""
    if fmt.kind == "maps":
        return style.conv(fmt, after, kernel)
    return style.linear(fmt.channels, after)


def block(style: Style, fmt: Format, after: int, *, fires: bool = True, kernel: int = 3) -> nn.Sequential:
    """A weight layer, maybe a norm, maybe a neuron; sizes stay."""
    made = fmt.wide(after)
    parts = [weighted(style, fmt, after, kernel)]
    if style.odds(0.5):
        parts.append(style.norm(made, style.pick(None, "batch", "batch")))
    if fires:
        parts.append(style.fire(made))
    return nn.Sequential(*parts)


# -- plain rows --


@stage(14, "maps")
def convolution(style: Style, fmt: Format) -> Built:
    """Strided, dilated, grouped; norm and neuron on either side."""
    stride, dilation = style.pick(1, 1, 1, 2), style.pick(1, 1, 2)
    after, kernel = width(style), style.pick(1, 3, 3)
    groups = style.rng.choice([g for g in (1, 1, 2, 4) if fmt.channels % g == 0 and after % g == 0])
    if style.odds(0.2):
        after = fmt.channels * style.pick(1, 1, 2)
        groups = fmt.channels
    need(min(fmt.sizes) >= 2)
    conv = style.conv(
        fmt, after, kernel, stride=stride, groups=groups, dilation=dilation, padding=dilation * (kernel // 2)
    )  # fmt: skip
    made = fmt.wide(after).sized(*(-(-s // stride) for s in fmt.sizes))
    norm, fire = style.norm(made), style.fire(made)
    order = style.pick("cnf", "cnf", "cnf", "cf", "cf", "cf", "cfn", "cn", "c", "ncf", "fcn")
    if order in ("ncf", "fcn"):
        first = style.norm(fmt) if order == "ncf" else style.fire(fmt)
        return nn.Sequential(first, conv, fire if order == "ncf" else norm), made
    return nn.Sequential(*[{"c": conv, "n": norm, "f": fire}[key] for key in order]), made


@stage(3, "maps")
def transposed(style: Style, fmt: Format) -> Built:
    need(max(fmt.sizes) <= 8 and fmt.dims < 3)
    after = style.pick(fmt.channels, width(style))
    groups = style.rng.choice([g for g in (1, 2, fmt.channels) if fmt.channels % g == 0 and after % g == 0])
    conv = style.conv(fmt, after, 2, transposed=True, stride=2, groups=groups, padding=0)
    made = fmt.wide(after).sized(*(2 * s for s in fmt.sizes))
    return nn.Sequential(conv, style.fire(made)), made


@stage(10, "tokens", "vector")
def linear(style: Style, fmt: Format) -> Built:
    after = 2 * width(style)
    made = fmt.wide(after)
    parts = [style.linear(fmt.channels, after)]
    if style.odds(0.4):
        parts.append(style.norm(made))
    if style.odds(0.9):
        parts.append(style.fire(made))
    if style.odds(0.1):
        parts.append(style.norm(made))
    return nn.Sequential(*parts), made


@stage(4, "maps")
def pool(style: Style, fmt: Format) -> Built:
    need(min(fmt.sizes) >= 4)
    d, half = fmt.dims, fmt.sized(*(s // 2 for s in fmt.sizes))
    kind = style.pick("max", "avg", "adaptive", "stride", "ceil")
    if kind == "adaptive":
        return style.wrap(getattr(nn, f"AdaptiveAvgPool{d}d")(2)), fmt.sized(*[2] * d)
    if kind == "stride":
        return Strided(d), fmt.sized(*(-(-s // 2) for s in fmt.sizes))
    if kind == "ceil":
        return style.layer(f"MaxPool{d}d", 3, 2, 1), fmt.sized(*((s - 1) // 2 + 1 for s in fmt.sizes))
    return style.layer(f"{kind.capitalize()}Pool{d}d", 2), half


class Strided(nn.Module):
    """Every other place."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x[(..., *[slice(None, None, 2)] * self.dims)]


@stage(2, "maps")
def upsample(style: Style, fmt: Format) -> Built:
    need(max(fmt.sizes) <= 4 and fmt.dims < 3)
    mode = style.pick("nearest", "linear" if fmt.dims == 1 else "bilinear")
    return style.wrap(nn.Upsample(scale_factor=2, mode=mode)), fmt.sized(*(2 * s for s in fmt.sizes))


@stage(3, "maps")
def pixel_shuffle(style: Style, fmt: Format) -> Built:
    """From channels to places, or back."""
    need(fmt.dims == 2)
    h, w = fmt.sizes
    if fmt.channels % 4 == 0 and max(h, w) <= 4 and style.odds(0.5):
        made = fmt.wide(fmt.channels // 4).sized(2 * h, 2 * w)
        return nn.Sequential(nn.PixelShuffle(2), *([style.fire(made)] if style.odds(0.5) else [])), made
    need(h % 2 == 0 == w % 2 and fmt.channels <= 12)
    return nn.PixelUnshuffle(2), fmt.wide(4 * fmt.channels).sized(h // 2, w // 2)


@stage(3, "maps", "tokens", "vector")
def norm_alone(style: Style, fmt: Format) -> Built:
    if style.odds(0.2):
        return nn.LayerNorm(fmt.shape), fmt
    return style.norm(fmt), fmt


@stage(1, "maps", "tokens", "vector")
def dropout(style: Style, fmt: Format) -> Built:
    return style.layer("Dropout", 0.5), fmt


@stage(3, "maps", "tokens", "vector")
def neuron_alone(style: Style, fmt: Format) -> Built:
    return style.fire(fmt), fmt


# -- residual streams --


class Residual(nn.Module):
    """Body and shortcut, joined in one of the ways of the papers."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.shortcut, self.after, self.how = body, shortcut, after, how

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.body(x), self.shortcut(x)
        if self.how == "inplace":
            y = y * 1.0
            y += x
        elif self.how == "iand":
            y = (1 - y) * x
        elif self.how == "and":
            y = y * x
        elif self.how == "scaled":
            y = 0.5 * y + 1.5 * x
        elif self.how == "minus":
            y = x - y
        else:
            y = y + x
        return self.after(y)


@stage(10, "maps", "tokens", "vector")
def residual(style: Style, fmt: Format) -> Built:
    """SEW (spikes), Spiking ResNet (currents, then a neuron), MS-ResNet and Spikingformer (no neuron closes it)."""
    kind = style.pick("sew", "currents", "stream", "stream")
    after = fmt.channels if style.odds(0.7) else width(style)
    hidden, made = width(style), fmt.wide(after)
    first = block(style, fmt, hidden)
    if kind == "stream":
        first = nn.Sequential(style.fire(fmt), *block(style, fmt, hidden, fires=True))
    body = nn.Sequential(*first, *block(style, fmt.wide(hidden), after, fires=kind == "sew"))
    shortcut: nn.Module = nn.Identity()
    if after != fmt.channels or style.odds(0.2):
        shortcut = block(style, fmt, after, fires=kind == "sew", kernel=1)
    how = style.pick("add", "add", "add", "inplace", "scaled", "minus", *(["iand", "and"] if kind == "sew" else []))
    return Residual(body, shortcut, style.fire(made) if kind == "currents" else nn.Identity(), how), made


class Padded(nn.Module):
    """A shortcut without parameters: fewer places, more channels, which are zero."""

    def __init__(self, body: nn.Module, after: nn.Module, dims: int, more: tuple[int, int]) -> None:
        super().__init__()
        self.body, self.after, self.strided = body, after, Strided(dims)
        self.pad = [0, 0] * dims + list(more)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x) + nn.functional.pad(self.strided(x), self.pad))


@stage(2, "maps")
def padded_shortcut(style: Style, fmt: Format) -> Built:
    need(min(fmt.sizes) >= 4)
    more = style.pick((2, 2), (0, 4), (4, 0), (1, 3))
    made = fmt.wide(fmt.channels + 4).sized(*(-(-s // 2) for s in fmt.sizes))
    fires = style.odds(0.5)
    body = nn.Sequential(style.conv(fmt, made.channels, stride=2), *([style.fire(made)] if fires else []))
    return Padded(body, nn.Identity() if fires else style.fire(made), fmt.dims, more), made


# -- several ways beside one another --


class Concatenated(nn.Module):
    def __init__(self, branches: list[nn.Module], axis: int) -> None:
        super().__init__()
        self.branches, self.axis = nn.ModuleList(branches), axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.axis)


@stage(6, "maps", "tokens", "vector")
def concatenation(style: Style, fmt: Format) -> Built:
    """Dense connections, Inception, fire modules."""
    branches: list[nn.Module] = [nn.Identity()] if style.odds(0.4) and fmt.channels <= 12 else []
    total = fmt.channels if branches else 0
    for kernel in (1, 3)[: style.pick(1, 2) if branches else 2]:
        after = style.pick(4, 6)
        branches.append(block(style, fmt, after, kernel=kernel, fires=style.odds(0.8)))
        total += after
    style.rng.shuffle(branches)
    made, axis = fmt.wide(total), fmt.axis
    if style.odds(0.3) and fmt.kind == "maps" and style.lead == 1:
        axis = 1
    whole = Concatenated(branches, axis)
    return (nn.Sequential(whole, style.fire(made)) if style.odds(0.2) else whole), made


class Split(nn.Module):
    """Parts of the channels go different ways."""

    def __init__(self, branches: list[nn.Module], axis: int, sizes: list[int], how: str) -> None:
        super().__init__()
        self.branches, self.axis, self.sizes, self.how = nn.ModuleList(branches), axis, sizes, how

    def forward(self, x: Tensor) -> Tensor:
        n, axis = len(self.branches), self.axis
        if self.how == "chunk":
            parts = x.chunk(n, axis)
        elif self.how == "split":
            parts = x.split(self.sizes, axis)
        elif self.how == "shape":
            half = x.shape[axis] // 2
            parts = (cut(x, axis, 0, half), cut(x, axis, half))
        elif self.how == "numbers":
            parts = (cut(x, axis, 0, self.sizes[0]), cut(x, axis, -self.sizes[1]))
        elif self.how == "every":
            parts = tuple(cut(x, axis, i, None, n) for i in range(n))
        else:
            parts = tuple(x.unflatten(axis, (n, -1)).unbind(axis - 1 if axis < 0 else axis))
        return torch.cat([b(p) for b, p in zip(self.branches, parts, strict=True)], axis)


HOW_SPLIT = ("chunk", "split", "shape", "numbers", "every", "unbind")


@stage(5, "maps", "tokens", "vector")
def split(style: Style, fmt: Format) -> Built:
    """ShuffleNet, MixNet, Res2Net: two or more parts, one of them as it is."""
    need(fmt.channels % 2 == 0 and fmt.channels >= 4)
    how = style.rng.choice(HOW_SPLIT)
    half = fmt.channels // 2
    sizes = [half, half] if how not in ("split", "numbers") or style.odds(0.7) else [half - 1, half + 1]
    if style.odds(0.25) and fmt.kind == "maps":  # MixConv: depthwise, of several kernels
        branches = [style.conv(fmt.wide(n), n, k, groups=n) for n, k in zip(sizes, (3, 5), strict=True)]
        return nn.Sequential(Split(branches, fmt.axis, sizes, how), style.fire(fmt)), fmt
    after = style.pick(half, half, 4)
    branches = [nn.Identity(), block(style, fmt.wide(sizes[1]), after, fires=style.odds(0.8))]
    if style.odds(0.2):
        branches[0] = block(style, fmt.wide(sizes[0]), sizes[0])
    return Split(branches, fmt.axis, sizes, how), fmt.wide(sizes[0] + after)


class Folded(nn.Module):
    """Two halves of the channels, joined: gated linear units and the like."""

    def __init__(self, axis: int, how: str) -> None:
        super().__init__()
        self.axis, self.how = axis, how

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.axis)
        return a + b if self.how == "add" else a * b if self.how == "times" else torch.maximum(a, b)


@stage(3, "maps", "tokens", "vector")
def two_halves(style: Style, fmt: Format) -> Built:
    need(fmt.channels % 2 == 0)
    made = fmt.wide(fmt.channels // 2)
    parts = [Folded(fmt.axis, style.pick("add", "times", "max"))]
    return nn.Sequential(*parts, *([style.fire(made)] if style.odds(0.5) else [])), made


class Shuffled(nn.Module):
    """A channel shuffle, written out."""

    def __init__(self, axis: int, groups: int, channels: int, how: str) -> None:
        super().__init__()
        self.axis, self.groups, self.channels, self.how = axis, groups, channels, how

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.groups, -1) if self.how == "numbers" else (self.groups, self.channels // self.groups)
        if self.how == "shape":
            parts = (self.groups, x.shape[self.axis] // self.groups)
        return x.unflatten(self.axis, parts).transpose(self.axis - 1, self.axis).flatten(self.axis - 1, self.axis)


@stage(4, "maps", "tokens", "vector")
def channel_shuffle(style: Style, fmt: Format) -> Built:
    groups = style.pick(2, 2, 4)
    need(fmt.channels % groups == 0)
    shuffled = Shuffled(fmt.axis, groups, fmt.channels, style.pick("numbers", "shape", "attribute"))
    if fmt.kind == "maps" and style.odds(0.6):
        after = fmt.channels
        return nn.Sequential(
            shuffled, style.conv(fmt, after, style.pick(1, 3), groups=groups), style.fire(fmt.wide(after))
        ), fmt.wide(after)
    return shuffled, fmt


@stage(2, "maps")
def inverted_bottleneck(style: Style, fmt: Format) -> Built:
    """Wide in the middle, depthwise there; squeeze and excitation now and then."""
    wide, after = fmt.wide(2 * fmt.channels), width(style)
    need(wide.channels <= 24)
    parts = [style.conv(fmt, wide.channels, 1), style.norm(wide, "batch"), style.fire(wide)]
    parts += [style.conv(wide, wide.channels, 3, groups=wide.channels), style.norm(wide, "batch"), style.fire(wide)]
    if style.odds(0.4):
        parts.append(gate(style, wide)[0])
    parts += [style.conv(wide, after, 1), style.norm(fmt.wide(after), "batch")]
    if style.odds(0.5):
        parts.append(style.fire(fmt.wide(after)))
    return nn.Sequential(*parts), fmt.wide(after)


# -- channels that look at one another --


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, squeeze: nn.Module, excite: nn.Module, between: nn.Module, places: tuple[int, ...]) -> None:
        super().__init__()
        self.squeeze, self.excite, self.between, self.places = squeeze, excite, between, places

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(self.places) if self.places else x
        gates = torch.sigmoid(self.excite(self.between(self.squeeze(means))))
        for _ in self.places:
            gates = gates.unsqueeze(-1)
        return x * gates


@stage(3, "maps", "vector")
def gate(style: Style, fmt: Format) -> Built:
    hidden = max(2, fmt.channels // 2)
    flat = Format("vector", hidden)
    between = style.fire(flat) if style.odds(0.3) else nn.ReLU()
    squeeze, excite = style.linear(fmt.channels, hidden), style.linear(hidden, fmt.channels)
    return Gate(squeeze, excite, between, tuple(range(-fmt.dims, 0))), fmt


class Named(nn.Module):
    """Forward names channels, or mixes them without a weight."""

    def __init__(self, axis: int, how: str) -> None:
        super().__init__()
        self.axis, self.how = axis, how

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis
        if self.how == "gate by the first":
            return x * x.select(axis, 0).unsqueeze(axis)
        if self.how == "add the last":
            return x + cut(x, axis, -1)
        if self.how == "flip":
            return x.flip(axis)
        if self.how == "flipped sum":
            return x + x.flip(axis)
        if self.how == "roll":
            return x.roll(1, axis)
        if self.how == "cumulative":
            return x.cumsum(axis)
        if self.how == "less the mean":
            return x - x.mean(axis, keepdim=True)
        if self.how == "gate by the maximum":
            return x * x.amax(axis, keepdim=True)
        if self.how == "softmax":
            return x.softmax(axis)
        if self.how == "sort":
            return x.sort(axis).values
        if self.how == "zero the first":
            x = x.clone()
            cut(x, axis, 0, 1).zero_()
            return x
        if self.how == "difference":
            return cut(x, axis, 1) - cut(x, axis, 0, -1)
        return nn.functional.normalize(x, dim=axis)


NAMED = (
    "gate by the first", "add the last", "flip", "flipped sum", "roll", "cumulative", "less the mean",
    "gate by the maximum", "softmax", "sort", "zero the first", "difference", "normalize",
)  # fmt: skip


@stage(4, "maps", "tokens", "vector")
def named_channels(style: Style, fmt: Format) -> Built:
    how = style.rng.choice(NAMED)
    made = fmt.wide(fmt.channels - (how == "difference"))
    need(made.channels > 1)
    return Named(fmt.axis, how), made


@stage(2, "maps", "tokens", "vector")
def few_channels(style: Style, fmt: Format) -> Built:
    """Only some of them go on: the first, the last, every other."""
    need(fmt.channels >= 8)
    start, stop, step, left = style.pick((0, 6, None, 6), (-6, None, None, 6), (None, None, 2, (fmt.channels + 1) // 2))
    return Cut(fmt.axis, start, stop, step), fmt.wide(left)


class Cut(nn.Module):
    def __init__(self, axis: int, start: int | None, stop: int | None, step: int | None) -> None:
        super().__init__()
        self.axis, self.slice = axis, (start, stop, step)

    def forward(self, x: Tensor) -> Tensor:
        return cut(x, self.axis, *self.slice)
