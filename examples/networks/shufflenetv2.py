"""Spiking ShuffleNetV2 (Ma et al., 2018), with an LIF neuron after every convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import CHANNELS, add_classifier, add_conv, convs


def shuffled(x: Tensor) -> Tensor:
    """Channels of the first and the second half in turn: 0, C/2, 1, C/2 + 1, …"""
    return x.unflatten(CHANNELS, (2, -1)).transpose(CHANNELS, CHANNELS - 1).flatten(CHANNELS - 1, CHANNELS)


class Unit(nn.Module):
    """Convolves one half of the channels and passes the other on; then the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = convs((half, half, 1), (half, half, 3, 1, half), (half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, CHANNELS)
        return shuffled(torch.cat([left, self.branch(right)], CHANNELS))


class HalvingUnit(nn.Module):
    """Two branches of stride 2 over all channels, shuffled."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = after // 2
        self.left = convs((before, before, 3, 2, before), (before, half, 1))
        self.right = convs((before, half, 1), (half, half, 3, 2, half), (half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(torch.cat([self.left(x), self.right(x)], CHANNELS))


def shufflenetv2(
    num_classes: int = 10,
    in_channels: int = 3,
    widths: tuple[int, int, int, int, int] = (24, 116, 232, 464, 1024),
    units: tuple[int, int, int] = (4, 8, 4),
) -> nn.Sequential:
    """``widths`` of the stem, of three stages with so many ``units`` each, and of the last convolution.

    1,263,854 parameters with ten classes and the widths of the paper's 1× network, as in the network of ReLUs. That one
    has none behind a depthwise convolution; here a neuron stands there too, so that only spikes travel. The stem has
    stride 1 and no pooling, for maps of 32×32.
    """
    net = nn.Sequential()
    add_conv(net, 1, in_channels, widths[0], 3)
    for number, (before, after, count) in enumerate(zip(widths, widths[1:4], units, strict=False), start=2):
        net.add_module(
            f"stage{number}", nn.Sequential(HalvingUnit(before, after), *(Unit(after) for _ in range(count - 1)))
        )
    add_conv(net, "_last", widths[3], widths[4], 1)
    add_classifier(net, widths[4], num_classes)
    return net
