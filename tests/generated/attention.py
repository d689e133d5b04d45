"""Stages of transformers: attentions of several heads, MLPs, what mixes tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format
from .stages import Built, need, stage
from .styles import Style


class Attention(nn.Module):
    """Spiking self-attention of [..., L, C]: as Spikformer, or with other orders, scales and layouts."""

    def __init__(self, style: Style, fmt: Format, **how: Any) -> None:
        super().__init__()
        c = fmt.channels
        self.heads, self.how, self.channels = how["heads"], how, c
        self.width = c // self.heads
        if how["fused"]:
            self.qkv = style.linear(c, 3 * c)
            self.fire_qkv = style.fire(fmt.wide(3 * c))
        else:
            for name in "qkv":
                setattr(self, name, style.linear(c, c))
                setattr(self, f"norm_{name}", style.norm(fmt, "batch") if how["norms"] else nn.Identity())
                setattr(self, f"fire_{name}", style.fire(fmt))
        self.fire = style.fire(fmt) if how["fires"] else nn.Identity()
        self.projection = style.linear(c, c)
        self.scale = how["scale"]

    def _apart(self, x: Tensor) -> Tensor:
        if self.how["counts"] == "attribute":
            x = x.reshape(*x.shape[:-1], self.heads, self.channels // self.heads)
        elif self.how["counts"] == "width":
            x = x.reshape(*x.shape[:-1], self.heads, self.width)
        else:
            x = x.unflatten(-1, (self.heads, -1))
        return x.transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how["fused"]:
            made = self.fire_qkv(self.qkv(x))
            parts = made.chunk(3, -1) if self.how["fused"] == "chunk" else made.unflatten(-1, (3, -1)).unbind(-2)
        else:
            parts = tuple(
                getattr(self, f"fire_{n}")(getattr(self, f"norm_{n}")(getattr(self, n)(x))) for n in "qkv"
            )  # fmt: skip
        q, k, v = map(self._apart, parts)
        if self.how["counts"] == "rest":  # as most write it
            q = q * q.shape[-1] ** -0.5
        if self.how["order"] == "left":
            y = (q @ k.transpose(-2, -1)) * self.scale @ v
        elif self.how["order"] == "softmax":
            y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        elif self.how["order"] == "right":
            y = q @ (k.transpose(-2, -1) @ v) * self.scale
        else:  # without a product of matrices: Spike-driven Transformer V1
            y = q * (k * v).sum(-2, keepdim=True) * self.scale
        y = y.transpose(-2, -3).flatten(-2)
        return self.projection(self.fire(y))


class Around(nn.Module):
    """A residual stream of tokens."""

    def __init__(self, body: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.before, self.after = body, before, after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.body(self.before(x)))


@stage(9, "tokens")
def attention(style: Style, fmt: Format) -> Built:
    heads = style.rng.choice([h for h in (1, 2, 2, 4) if fmt.channels % h == 0])
    made: nn.Module = Attention(
        style, fmt, heads=heads, fused=style.pick("", "", "chunk", "unbind"), norms=style.odds(0.5),
        fires=style.odds(0.5), scale=style.pick(0.25, 0.5), counts=style.pick("attribute", "width", "rest"),
        order=style.pick("left", "left", "right", "right", "hadamard", "softmax"),
    )  # fmt: skip
    kind = style.pick("sew", "stream", "none")
    if kind == "none":
        return nn.Sequential(made, style.fire(fmt)), fmt
    if kind == "sew":
        return Around(made, nn.Identity(), style.fire(fmt)), fmt
    return Around(made, style.fire(fmt), style.norm(fmt, "batch")), fmt


@stage(4, "tokens")
def mlp(style: Style, fmt: Format) -> Built:
    wide = fmt.wide(2 * fmt.channels)
    sew = style.odds(0.5)
    parts = [style.linear(fmt.channels, wide.channels), style.fire(wide), style.linear(wide.channels, fmt.channels)]
    return Around(nn.Sequential(*parts), nn.Identity() if sew else style.fire(fmt),
                  style.fire(fmt) if sew else nn.Identity()), fmt  # fmt: skip


class TokenGate(nn.Module):
    """QKFormer's attention of tokens: q summed over a head's channels, fired, times k."""

    def __init__(self, style: Style, fmt: Format, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = style.linear(fmt.channels, fmt.channels), style.linear(fmt.channels, fmt.channels)
        self.fire_q, self.fire_k = style.fire(fmt), style.fire(fmt)
        self.fire = style.fire(Format("tokens", heads, fmt.sizes))
        self.projection = style.linear(fmt.channels, fmt.channels)

    def forward(self, x: Tensor) -> Tensor:
        q = self.fire_q(self.q(x)).unflatten(-1, (self.heads, -1)).sum(-1)
        k = self.fire_k(self.k(x)).unflatten(-1, (self.heads, -1))
        return self.projection((self.fire(q).unsqueeze(-1) * k).flatten(-2))


@stage(2, "tokens")
def token_gate(style: Style, fmt: Format) -> Built:
    heads = style.rng.choice([h for h in (1, 2, 4) if fmt.channels % h == 0])
    return nn.Sequential(TokenGate(style, fmt, heads), style.fire(fmt)), fmt


class OverTime(nn.Module):
    """torch's attention, whose weights are read by no layer's forward."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@stage(1, "tokens")
def torch_attention(style: Style, fmt: Format) -> Built:
    need(fmt.channels % 2 == 0)
    return nn.Sequential(style.wrap(OverTime(fmt.channels, 2)), style.fire(fmt)), fmt


class AlongTokens(nn.Module):
    """A layer on [..., C, L]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(-1, -2)).transpose(-1, -2)


@stage(3, "tokens")
def along_tokens(style: Style, fmt: Format) -> Built:
    """A convolution along the tokens, or a linear layer across them."""
    (tokens,) = fmt.sizes
    turned = Format("maps", fmt.channels, (tokens,))
    if style.odds(0.5):
        after = style.pick(fmt.channels, 8)
        made = turned.wide(after)
        inner = nn.Sequential(style.conv(turned, after, 3), *([style.fire(made)] if style.odds(0.5) else []))
        return nn.Sequential(AlongTokens(inner), style.fire(fmt.wide(after))), fmt.wide(after)
    return nn.Sequential(AlongTokens(style.linear(tokens, tokens)), style.fire(fmt)), fmt


class ClassToken(nn.Module):
    """One more token in front, which is learned."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(*x.shape[:-2], 1, x.shape[-1]), x], -2)


@stage(1, "tokens")
def class_token(style: Style, fmt: Format) -> Built:
    need(fmt.sizes[0] < 12)
    return ClassToken(fmt.channels), fmt.sized(fmt.sizes[0] + 1)
