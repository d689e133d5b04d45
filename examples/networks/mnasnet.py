"""Spiking MnasNet: MnasNet-B1 (Tan et al., 2019) with an LIF neuron after every convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .blocks import Residual, add_classifier, add_conv, convs

Stage = tuple[int, int, int, int, int]
"""Kernel, stride, channels, expansion, repeats."""
STAGES: list[Stage] = [
    (3, 2, 24, 3, 3), (5, 2, 40, 3, 3), (5, 2, 80, 6, 3), (3, 1, 96, 6, 2), (5, 2, 192, 6, 4), (3, 1, 320, 6, 1),
]  # fmt: skip


def mnasnet(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stages: Sequence[Stage] = STAGES
) -> nn.Sequential:
    """Inverted residuals: expand by 1×1, convolve each channel on its own, project by 1×1, add.

    3,115,122 parameters with ten classes, as in the network of ReLUs. That one has none after a projection; here a
    neuron stands there too, so that only spikes travel. The stem has stride 1, for maps of 32×32.
    """

    def wide(channels: int) -> int:
        return max(2, round(width * channels))

    net = nn.Sequential()
    add_conv(net, 1, in_channels, wide(32), 3)
    net.add_module("separable", convs((wide(32), wide(32), 3, 1, wide(32)), (wide(32), wide(16), 1)))
    before = wide(16)
    for number, (kernel, stride, channels, expansion, repeats) in enumerate(stages, start=1):
        blocks: list[nn.Module] = []
        for repeat in range(repeats):
            inner, step = before * expansion, stride if repeat == 0 else 1
            body = convs((before, inner, 1), (inner, inner, kernel, step, inner), (inner, wide(channels), 1))
            blocks.append(body if repeat == 0 else Residual(body))
            before = wide(channels)
        net.add_module(f"stage{number}", nn.Sequential(*blocks))
    add_conv(net, "_last", before, wide(1280), 1)
    add_classifier(net, wide(1280), num_classes)
    return net
