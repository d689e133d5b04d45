"""Spiking ResNet-20: the CIFAR network of He et al. (2016) with LIF neurons, as QP-SNN and others prune it."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.nn import functional

from .blocks import classifier, conv, lif


class PaddedShortcut(nn.Module):
    """Every other pixel, and as many channels of zeros in front and behind as are missing; nothing to learn."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.front, self.behind = stride, (after - before) // 2, (after - before + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.behind))


class BasicBlock(nn.Module):
    """Two convolutions; the shortcut joins before the second neuron."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = conv(before, after, 3, stride)
        self.second = nn.Sequential(layer.Conv2d(after, after, 3, padding=1, bias=False), layer.BatchNorm2d(after))
        whole = stride == 1 and before == after
        self.shortcut = nn.Identity() if whole else PaddedShortcut(before, after, stride)
        self.lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.second(self.first(x)) + self.shortcut(x))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> nn.Sequential:
    """Three stages of three blocks, of ``width``, twice and four times as many channels.

    269,722 parameters with ten classes and width 16 (the 0.27 M of He et al.).
    """
    net = nn.Sequential()
    net.add_module("stem", conv(in_channels, width, 3))
    before = width
    for number in (1, 2, 3):
        after = width * 2 ** (number - 1)
        stride = 1 if number == 1 else 2
        blocks = [BasicBlock(before, after, stride), BasicBlock(after, after, 1), BasicBlock(after, after, 1)]
        net.add_module(f"stage{number}", nn.Sequential(*blocks))
        before = after
    net.add_module("head", classifier(before, num_classes))
    return net
