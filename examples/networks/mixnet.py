"""Spiking MixNet: MixNet-S (Tan and Le, 2019), whose depthwise convolutions mix kernels of several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .blocks import CHANNELS, Residual, add_classifier, add_conv, lif

Stage = tuple[tuple[int, ...], int, int, int, int]
"""Kernels, stride, channels, expansion, repeats."""
STAGES: list[Stage] = [
    ((3,), 1, 16, 1, 1), ((3,), 2, 24, 6, 1), ((3,), 1, 24, 3, 1),
    ((3, 5, 7), 2, 40, 6, 1), ((3, 5), 1, 40, 6, 3),
    ((3, 5, 7), 2, 80, 6, 1), ((3, 5), 1, 80, 6, 2),
    ((3, 5, 7), 1, 120, 6, 1), ((3, 5, 7, 9), 1, 120, 3, 2),
    ((3, 5, 7, 9, 11), 2, 200, 6, 1), ((3, 5, 7, 9), 1, 200, 6, 2),
]  # fmt: skip


class MixConv(nn.Module):
    """Depthwise convolution of equal parts of the channels, each with a kernel of its own size, and batch norm; LIF.

    The parts are as wide as their convolutions, whatever pruning has left of them.
    """

    def __init__(self, channels: int, kernels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        part = channels // len(kernels)
        self.convs = nn.ModuleList(
            layer.Conv2d(part, part, kernel, stride, padding=kernel // 2, groups=part, bias=False) for kernel in kernels
        )
        self.norms = nn.ModuleList(layer.BatchNorm2d(part) for _ in kernels)
        self.lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([conv.in_channels for conv in self.convs], CHANNELS)
        mixed = [norm(conv(part)) for conv, norm, part in zip(self.convs, self.norms, parts, strict=True)]
        return self.lif(torch.cat(mixed, CHANNELS))


def mixnet(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stages: Sequence[Stage] = STAGES
) -> nn.Sequential:
    """Inverted residuals, as in MnasNet, with mixed kernels.

    2,294,242 parameters with ten classes. MixNet-S has 4.13 M with a thousand; it also has squeeze-and-excitation,
    which scales channels by real numbers and has no spiking form, and cuts some of its 1×1 convolutions into two
    groups; both are left out. The stem has stride 1, for maps of 32×32.
    """

    def wide(channels: int) -> int:
        return max(2, round(width * channels))

    net = nn.Sequential()
    add_conv(net, 1, in_channels, wide(16), 3)
    before = wide(16)
    for number, (kernels, stride, channels, expansion, repeats) in enumerate(stages, start=1):
        blocks: list[nn.Module] = []
        for repeat in range(repeats):
            step = stride if repeat == 0 else 1
            inner = before * expansion // len(kernels) * len(kernels)
            body = nn.Sequential()
            if expansion > 1:
                add_conv(body, 1, before, inner, 1)
            body.add_module("mix", MixConv(inner, kernels, step))
            add_conv(body, 2, inner, wide(channels), 1)
            blocks.append(Residual(body) if step == 1 and before == wide(channels) else body)
            before = wide(channels)
        net.add_module(f"stage{number}", nn.Sequential(*blocks))
    add_conv(net, "_last", before, wide(1536), 1)
    add_classifier(net, wide(1536), num_classes)
    return net
