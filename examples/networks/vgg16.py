"""Spiking VGG-16 as in QP-SNN (Wei et al., ICLR 2025): 13 convolutions, each with batch norm and LIF."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import Neuron, add_conv, undivided_lif

WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
POOL_AFTER = (2, 4, 7, 10)


def vgg16(
    num_classes: int = 10, image_size: int = 32, in_channels: int = 3, width: float = 1.0,
    neuron: Neuron = undivided_lif,
) -> nn.Sequential:  # fmt: skip
    """conv1 … conv13, each followed by bn and lif, max-pooling on the way, and the linear layer fc.

    14,724,042 parameters with ten classes and maps of 32×32, of which one pixel is left; of 64×64, four are.
    """
    net = nn.Sequential()
    before = in_channels
    for number, channels in enumerate(WIDTHS, start=1):
        after = max(2, round(width * channels))
        add_conv(net, number, before, after, 3, neuron=neuron)
        if number in POOL_AFTER:
            net.add_module(f"pool{number}", layer.MaxPool2d(2))
        before = after
    net.add_module("pool", layer.AvgPool2d(2))
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(before * (image_size // 32) ** 2, num_classes))
    return net
