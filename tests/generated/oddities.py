"""Stages as in research code: weights that aren't what they seem, widths in attributes, branches that never run."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .formats import Format
from .stages import Built, block, need, stage, weighted, width
from .styles import Multi, Single, SpikingJelly, Style


class Scaled(nn.Module):
    """A number for each channel that belongs to no layer: a parameter, a buffer, a plain tensor."""

    def __init__(self, values: Tensor, kind: str, how: str) -> None:
        super().__init__()
        self.how = how
        if kind == "parameter":
            self.scale = nn.Parameter(values)
        elif kind == "buffer":
            self.register_buffer("scale", values)
        else:
            self.scale = values.double()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.how == "times" else x + self.scale


@stage(3, "maps", "tokens", "vector")
def numbers_per_channel(style: Style, fmt: Format) -> Built:
    values = style.per_channel(fmt, 0.5, 1.5)
    if style.odds(0.3):
        values = 0.1 * torch.rand(fmt.shape)  # positions, too
    return Scaled(values, style.pick("parameter", "buffer", "plain"), style.pick("times", "plus")), fmt


class Bare(nn.Module):
    """A parameter that forward multiplies with by itself."""

    def __init__(self, before: int, after: int, dims: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, *[kernel] * dims) * (before * kernel**dims) ** -0.5)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        if not self.dims:
            return nn.functional.linear(x, self.weight)
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.dims - 1]
        return conv(x, self.weight, padding=self.weight.shape[-1] // 2)


@stage(2, "maps", "tokens", "vector")
def bare_weight(style: Style, fmt: Format) -> Built:
    after, dims = width(style), fmt.dims if fmt.kind == "maps" else 0
    made = fmt.wide(after)
    bare = Bare(fmt.channels, after, dims, style.pick(1, 3))
    return nn.Sequential(style.wrap(bare) if dims else bare, style.fire(made)), made


@stage(2, "maps", "tokens", "vector")
def reparametrized(style: Style, fmt: Format) -> Built:
    after = width(style)
    how = style.pick(parametrizations.weight_norm, parametrizations.spectral_norm)
    return nn.Sequential(how(weighted(style, fmt, after)), style.fire(fmt.wide(after))), fmt.wide(after)


@stage(1, "maps", "vector")
def standardized(style: Style, fmt: Format) -> Built:
    """SpikingJelly's layers that compute their weight in forward."""
    need(isinstance(style, (Multi, Single)) and fmt.dims in (0, 2))
    after, mode = width(style), style.mode
    if fmt.dims:
        made = layer.WSConv2d(fmt.channels, after, 3, padding=1, step_mode=mode)
    else:
        made = layer.WSLinear(fmt.channels, after, step_mode=mode)
    return nn.Sequential(made, style.fire(fmt.wide(after))), fmt.wide(after)


@stage(2, "vector")
def recurrent(style: Style, fmt: Format) -> Built:
    """SpikingJelly's containers that feed spikes back."""
    need(isinstance(style, (Multi, Single)))
    assert isinstance(style, SpikingJelly)
    after, mode = width(style), style.mode
    inner = neuron.LIFNode(v_threshold=0.5)
    if style.odds(0.5):
        made = layer.ElementWiseRecurrentContainer(inner, lambda x, y: x + 0.5 * y, step_mode=mode)
    else:
        made = layer.LinearRecurrentContainer(inner, after, after, step_mode=mode)
    return nn.Sequential(style.linear(fmt.channels, after), made), fmt.wide(after)


class Twice(nn.Module):
    """A layer, or a whole block, that is run through more than once."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.inner(y) if self.how == "row" else y + self.inner(y)


@stage(2, "maps", "tokens", "vector")
def used_twice(style: Style, fmt: Format) -> Built:
    stateless = style.whole
    inner = block(style, fmt, fmt.channels, fires=stateless and style.odds(0.5))
    made = nn.Sequential(Twice(inner, style.pick("row", "sum")), style.fire(fmt))
    return made, fmt


@stage(2, "maps", "tokens", "vector")
def tied_weights(style: Style, fmt: Format) -> Built:
    first, second = (weighted(style, fmt, fmt.channels) for _ in range(2))
    second.weight = first.weight
    return nn.Sequential(first, style.fire(fmt), second, style.fire(fmt)), fmt


@stage(3, "maps", "tokens", "vector")
def one_neuron_twice(style: Style, fmt: Format) -> Built:
    """One object behind two layers, as where a model has a single ``self.lif``."""
    need(style.whole or type(style).__name__ == "OwnLoop")
    after = width(style)
    made = fmt.wide(after)
    fire = style.fire(made)
    return nn.Sequential(weighted(style, fmt, after), fire, weighted(style, made, after), fire), made


class Branch(nn.Module):
    """A way that is taken in training only, or never."""

    def __init__(self, inner: nn.Module, other: nn.Module, when: str) -> None:
        super().__init__()
        self.inner, self.other, self.when = inner, other, when

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if (self.when == "training" and self.training) or (self.when == "large" and bool(y.detach().mean() > 1e9)):
            y = y + self.other(y).mean() * 0.0
        return y


@stage(2, "maps", "tokens", "vector")
def branch_not_taken(style: Style, fmt: Format) -> Built:
    after = width(style)
    made = fmt.wide(after)
    other = weighted(style, made, 3)
    return Branch(block(style, fmt, after), other, style.pick("training", "large")), made


class Reshaped(nn.Module):
    """Counts channels: by an attribute, by a number, by the shape of what comes, or not at all."""

    def __init__(self, inner: nn.Module, fmt: Format, how: str, lead: int, batch: int) -> None:
        super().__init__()
        self.inner, self.how, self.lead = inner, how, lead
        self.channels, self.places = fmt.channels, fmt.flat // fmt.channels
        self.sizes, self.batch = fmt.sizes, batch

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        before = x.shape[: self.lead]
        if self.how == "attribute":
            return x.reshape(*before, self.channels, self.places).relu().reshape(*before, self.channels, *self.sizes)
        if self.how == "shape":
            c = x.shape[self.lead]
            return x.view(*before, c, -1).relu().view(*before, c, *self.sizes)
        if self.how == "rest":
            return x.reshape(*before, -1, self.places).relu().reshape(*before, -1, *self.sizes)
        if self.how == "batch":
            return x.reshape(self.batch, self.channels, *self.sizes).relu().reshape(before + x.shape[self.lead :])
        if self.how == "flat":
            return x.reshape(-1, self.channels, *self.sizes).relu().reshape(x.shape)
        return x.flatten(self.lead).relu().unflatten(self.lead, (-1, *self.sizes))


@stage(4, "maps")
def width_in_forward(style: Style, fmt: Format) -> Built:
    after = width(style)
    made = fmt.wide(after)
    how = style.pick("attribute", "attribute", "shape", "rest", "flat", "flatten", "batch")
    return Reshaped(block(style, fmt, after), made, how, style.lead, style.batch), made


class InPlace(nn.Module):
    """Changes what it was given."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * 1.0
        if self.how == "multiply":
            y.mul_(1.5)
        elif self.how == "clamp":
            y.clamp_(0.0, 0.8)
        elif self.how == "add":
            y += y.mean((-1,), keepdim=True)
        else:
            y[..., 0] = 0.0
        return y


@stage(3, "maps", "tokens", "vector")
def in_place(style: Style, fmt: Format) -> Built:
    after = width(style)
    how = style.pick("multiply", "clamp", *(["add", "write"] if fmt.kind == "maps" else []))
    return InPlace(block(style, fmt, after), how), fmt.wide(after)


class Noise(nn.Module):
    """Random numbers in forward; ``strength`` 0 is none."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return x + self.strength * torch.rand_like(x)


@stage(1, "maps", "tokens", "vector")
def noise(style: Style, fmt: Format) -> Built:
    return Noise(0.05), fmt


class ChannelsLast(nn.Module):
    """A linear layer on channels that are moved to the end for it."""

    def __init__(self, inner: nn.Module, dims: int) -> None:
        super().__init__()
        self.inner, self.dims = inner, dims

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(-1 - self.dims, -1)).movedim(-1, -1 - self.dims)


@stage(2, "maps")
def channels_last(style: Style, fmt: Format) -> Built:
    after = width(style)
    made = fmt.wide(after)
    return nn.Sequential(ChannelsLast(style.linear(fmt.channels, after), fmt.dims), style.fire(made)), made


class Mixed(nn.Module):
    """A product with a parameter over channels, or over places."""

    def __init__(self, before: int, after: int, how: str) -> None:
        super().__init__()
        self.mixing, self.how = nn.Parameter(torch.randn(after, before) * before**-0.5), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("...lc,dc->...ld", x, self.mixing)
        return self.mixing @ x


@stage(2, "tokens")
def mixing(style: Style, fmt: Format) -> Built:
    if style.odds(0.5):
        after = width(style)
        made = fmt.wide(after)
        return nn.Sequential(Mixed(fmt.channels, after, "einsum"), style.fire(made)), made
    tokens = fmt.sizes[0]
    return Mixed(tokens, tokens, "places"), fmt


class TwoScales(nn.Module):
    """Coarse and fine added."""

    def __init__(self, coarse: nn.Module, fine: nn.Module) -> None:
        super().__init__()
        self.coarse, self.fine = coarse, fine

    def forward(self, x: Tensor) -> Tensor:
        y = self.coarse(x)
        for axis in range(-1, x.dim() * -1, -1):
            if y.shape[axis] != x.shape[axis] and axis >= -3:
                y = y.repeat_interleave(2, axis)
        return self.fine(x) + y


@stage(2, "maps")
def two_scales(style: Style, fmt: Format) -> Built:
    need(fmt.dims < 3 and all(s % 2 == 0 for s in fmt.sizes))
    after = fmt.channels
    down = style.layer(f"AvgPool{fmt.dims}d", 2)
    small = fmt.sized(*(s // 2 for s in fmt.sizes))
    fires = style.odds(0.5)
    coarse = nn.Sequential(down, block(style, small, after, fires=fires))
    whole: nn.Module = TwoScales(coarse, block(style, fmt, after, fires=fires))
    return (whole if fires else nn.Sequential(whole, style.fire(fmt))), fmt


# -- what a gradient doesn't show, or a width gets into --


class Hidden(nn.Module):
    """A way past the body that no gradient shows."""

    def __init__(self, body: nn.Module, axis: int, how: str) -> None:
        super().__init__()
        self.body, self.axis, self.how = body, axis, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "detached shortcut":
            return y + x.detach()
        if self.how == "detached gate":
            return y * x.detach().mean(self.axis, keepdim=True)
        if self.how == "largest channel":
            return y + x.argmax(self.axis, keepdim=True).to(x.dtype)
        if self.how == "rounded":
            return y + (2 * x).round()
        if self.how == "switched":
            return torch.where(x.sum(self.axis, keepdim=True) > 1.0, y, -y)
        if self.how == "top two":
            return y * (y >= y.topk(2, self.axis).values.amin(self.axis, keepdim=True)).to(y.dtype)
        with torch.no_grad():
            share = x.sum(self.axis, keepdim=True)
        return y - 0.1 * share


@stage(3, "maps", "tokens", "vector")
def hidden_way(style: Style, fmt: Format) -> Built:
    how = style.pick(
        "detached shortcut", "detached gate", "largest channel", "rounded", "switched", "top two", "no grad"
    )
    return Hidden(block(style, fmt, fmt.channels, fires=style.odds(0.7)), fmt.axis, how), fmt


class Counted(nn.Module):
    """Divides by how many channels there are."""

    def __init__(self, inner: nn.Module, axis: int, how: str) -> None:
        super().__init__()
        self.inner, self.axis, self.how = inner, axis, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.how == "shape":
            return y * 4 / y.shape[self.axis]
        if self.how == "weight":
            return y * len(self.inner[0].weight) ** -0.5
        return y * torch.linspace(0.5, 1.5, y.shape[self.axis], dtype=y.dtype).view(-1, *[1] * (-1 - self.axis))


@stage(2, "maps", "tokens", "vector")
def width_in_numbers(style: Style, fmt: Format) -> Built:
    after = width(style)
    return Counted(block(style, fmt, after), fmt.axis, style.pick("shape", "weight", "ramp")), fmt.wide(after)


class Neighbours(nn.Module):
    """Channels as places: a convolution along them (ECA), or another that looks at those nearby."""

    def __init__(self, axis: int, places: tuple[int, ...]) -> None:
        super().__init__()
        self.mixing, self.axis, self.places = nn.Conv1d(1, 1, 3, padding=1), axis, places

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(self.places) if self.places else x
        gates = self.mixing(means.reshape(-1, 1, means.shape[-1])).reshape(means.shape).sigmoid()
        return x * gates.reshape(*gates.shape, *[1] * len(self.places))


@stage(2, "maps", "vector")
def neighbours(style: Style, fmt: Format) -> Built:
    if fmt.kind == "maps" and style.odds(0.4):
        return style.wrap(nn.LocalResponseNorm(3, alpha=0.5)), fmt
    return Neighbours(fmt.axis, tuple(range(-fmt.dims, 0))), fmt


class Patches(nn.Module):
    """A convolution written as patches and a linear layer, whose columns are channels times places."""

    def __init__(self, inner: nn.Module, after: int) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 3, padding=1)
        return self.inner(patches.transpose(1, 2)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


@stage(2, "maps")
def patches(style: Style, fmt: Format) -> Built:
    need(fmt.dims == 2)
    after = width(style)
    made = fmt.wide(after)
    return nn.Sequential(style.wrap(Patches(nn.Linear(9 * fmt.channels, after), after)), style.fire(made)), made


@stage(2, "maps", "tokens", "vector")
def hooked(style: Style, fmt: Format) -> Built:
    """A hook of the user's own that changes what a layer puts out, or takes in."""
    after = width(style)
    made = fmt.wide(after)
    inner = block(style, fmt, after)
    if style.odds(0.5):
        inner[0].register_forward_hook(_louder if style.odds(0.5) else Offset(fmt.axis))
    else:
        inner[0].register_forward_pre_hook(_halved)
    return inner, made


def _louder(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return 1.5 * y


def _halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (0.5 * args[0],)


class Offset:
    """A hook that adds to the first channel."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        ramp = torch.zeros(y.shape[self.axis], dtype=y.dtype)
        ramp[0] = 0.5
        return y + ramp.view(-1, *[1] * (-1 - self.axis))


@stage(2, "maps")
def padded_otherwise(style: Style, fmt: Format) -> Built:
    """Circular and reflected padding, padding by name, a slope for each channel behind it."""
    need(min(fmt.sizes) >= 2)
    after = width(style)
    made = fmt.wide(after)
    mode = style.pick("circular", "reflect" if fmt.dims < 3 else "replicate", "zeros")
    conv = style.conv(fmt, after, 3, padding=1 if mode != "zeros" else "same", padding_mode=mode)
    slopes = [style.wrap(nn.PReLU(style.pick(1, after)))] if style.odds(0.5) else []
    return nn.Sequential(conv, *slopes, style.fire(made)), made
