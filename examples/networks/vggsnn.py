"""VGGSNN (Deng et al., ICLR 2022): the network for event streams, DVS-CIFAR10 in the papers."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import conv

WIDTHS = [64, 128, 256, 256, 512, 512, 512, 512]
POOL_AFTER = (2, 4, 6, 8)


def vggsnn(num_classes: int = 10, in_channels: int = 2, width: float = 1.0, size: int = 48) -> nn.Sequential:
    """64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC for maps of ``size`` × ``size``.

    9,268,746 parameters with ten classes and two polarities of 48×48 pixels.
    """
    net = nn.Sequential()
    before = in_channels
    for number, channels in enumerate(WIDTHS, start=1):
        after = max(2, round(width * channels))
        net.add_module(f"conv{number}", conv(before, after, 3))
        if number in POOL_AFTER:
            net.add_module(f"pool{number}", layer.AvgPool2d(2))
        before = after
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(before * (size // 16) ** 2, num_classes))
    return net
