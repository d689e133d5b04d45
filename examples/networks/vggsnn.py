"""VGGSNN (Deng et al., ICLR 2022): the network for event streams, DVS-CIFAR10 in the papers."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import Neuron, add_conv, undivided_lif

WIDTHS = [64, 128, 256, 256, 512, 512, 512, 512]
POOL_AFTER = (2, 4, 6, 8)


def vggsnn(
    num_classes: int = 10, image_size: int = 48, in_channels: int = 2, width: float = 1.0, max_pool: bool = True,
    neuron: Neuron = undivided_lif,
) -> nn.Sequential:  # fmt: skip
    """64C3-128C3-P2-256C3-256C3-P2-512C3-512C3-P2-512C3-512C3-AP2-FC: conv1 … conv8, and the linear layer fc.

    9,268,746 parameters with ten classes and two polarities of 48×48 pixels. QP-SNN (Wei et al., ICLR 2025) pools by
    the maximum, but for the last time; Deng et al. by the mean throughout (``max_pool=False``), so that what the next
    layer takes in is no spike any more.
    """
    net = nn.Sequential()
    before = in_channels
    for number, channels in enumerate(WIDTHS, start=1):
        after = max(2, round(width * channels))
        add_conv(net, number, before, after, 3, neuron=neuron)
        if number in POOL_AFTER:
            pool = layer.MaxPool2d if max_pool and number < len(WIDTHS) else layer.AvgPool2d
            net.add_module(f"pool{number}", pool(2))
        before = after
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(before * (image_size // 16) ** 2, num_classes))
    return net
