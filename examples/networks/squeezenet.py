"""Spiking SqueezeNet: SqueezeNet 1.0 (Iandola et al., 2016) with an LIF neuron in the place of every ReLU."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .blocks import CHANNELS, lif


def after(channels: int, norm: bool) -> nn.Module:
    """What follows a convolution. LIF neurons with τ = 2 take in half of their input, so a norm starts at scale 2."""
    if not norm:
        return lif()
    bn = layer.BatchNorm2d(channels)
    nn.init.constant_(bn.weight, 2.0)
    return nn.Sequential(bn, lif())


class Fire(nn.Module):
    """Squeezes the channels by a 1×1 convolution, expands them by a 1×1 and a 3×3 one, concatenates the two."""

    def __init__(self, before: int, squeezed: int, expanded: int, norm: bool = False) -> None:
        super().__init__()
        self.squeeze = layer.Conv2d(before, squeezed, 1)
        self.after_squeeze = after(squeezed, norm)
        self.expand1x1 = layer.Conv2d(squeezed, expanded, 1)
        self.after_expand1x1 = after(expanded, norm)
        self.expand3x3 = layer.Conv2d(squeezed, expanded, 3, padding=1)
        self.after_expand3x3 = after(expanded, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_squeeze(self.squeeze(x))
        one, three = self.after_expand1x1(self.expand1x1(x)), self.after_expand3x3(self.expand3x3(x))
        return torch.cat([one, three], CHANNELS)


def squeezenet(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, norm: bool = False) -> nn.Sequential:
    """Fire modules fire2 … fire9; every convolution has a bias and is followed by an LIF neuron.

    740,554 parameters with ten classes, 735,424 of them before the classifier. The block-ablation paper gives
    736.5 k: SqueezeNet 1.0 without all but a thousand of the classifier's parameters (two classes have 1,026).
    SqueezeNet 1.1, whose first convolution is smaller, has 727,626. The paper gives 599.1 k for the fire modules 4, 6,
    8 and 9 alone; taking out 2, 3, 5 and 7 leaves 554,714 here, and 604,154 if 5 stays.

    ``norm`` puts a batch norm before every neuron, which neither SqueezeNet nor the paper has: 5,972 more parameters,
    and spikes that reach the last layers from the start.
    """

    def wide(channels: int) -> int:
        return max(2, round(width * channels))

    net = nn.Sequential()
    net.add_module("conv1", layer.Conv2d(in_channels, wide(96), 7, stride=2))
    net.add_module("after_conv1", after(wide(96), norm))
    net.add_module("pool1", layer.MaxPool2d(3, 2, ceil_mode=True))
    before = wide(96)
    for number, (squeezed, expanded) in enumerate(
        [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)], start=2
    ):
        net.add_module(f"fire{number}", Fire(before, wide(squeezed), wide(expanded), norm))
        before = 2 * wide(expanded)
        if number in (4, 8):
            net.add_module(f"pool{number}", layer.MaxPool2d(3, 2, ceil_mode=True))
    net.add_module("dropout", layer.Dropout(0.5))
    net.add_module("conv10", layer.Conv2d(before, num_classes, 1))
    net.add_module("after_conv10", after(num_classes, norm))
    net.add_module("pool10", layer.AdaptiveAvgPool2d(1))
    net.add_module("flatten", layer.Flatten())
    return net
