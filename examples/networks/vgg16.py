"""Spiking VGG-16 as in QP-SNN (Wei et al., ICLR 2025): 13 convolutions, each with batch norm and LIF."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import conv

WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
POOL_AFTER = (2, 4, 7, 10)


def vgg16(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """For maps of 32×32. Blocks conv1 … conv13 of convolution, batch norm and LIF, then the linear layer fc.

    14,724,042 parameters with ten classes.
    """
    net = nn.Sequential()
    before = in_channels
    for number, channels in enumerate(WIDTHS, start=1):
        after = max(2, round(width * channels))
        net.add_module(f"conv{number}", conv(before, after, 3))
        if number in POOL_AFTER:
            net.add_module(f"pool{number}", layer.MaxPool2d(2))
        before = after
    net.add_module("pool", layer.AvgPool2d(2))
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(before, num_classes))
    return net
