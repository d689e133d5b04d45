"""Spiking ResNet-20, shortcuts padded by zeros: the CIFAR network of He et al. (2016), and the wide one of QP-SNN."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from snncompress import ChannelMap

from .blocks import lif


class PaddedShortcut(nn.Module):
    """Every other pixel, and channels of zeros around those that there are; nothing to learn.

    The map knows which channel each is made of, so it shrinks with the layers around it.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.map = stride, ChannelMap.padding(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x[..., :: self.stride, :: self.stride])


class BasicBlock(nn.Module):
    """Two convolutions; the shortcut joins before the second neuron."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1, self.lif1 = layer.BatchNorm2d(after), lif()
        self.conv2 = layer.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2, self.lif2 = layer.BatchNorm2d(after), lif()
        whole = stride == 1 and before == after
        self.shortcut = nn.Identity() if whole else PaddedShortcut(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.bn1(self.conv1(x)))
        return self.lif2(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet20(
    num_classes: int = 10, in_channels: int = 3, widths: tuple[int, int, int, int] = (64, 128, 256, 512)
) -> nn.Sequential:
    """conv1, and layer1, layer2, layer3 of three blocks each; ``widths`` are their channels. Maps of 32×32.

    17,048,906 parameters with ten classes: the network of QP-SNN (Wei et al., ICLR 2025), whose stem is half as wide as
    its first stage. He et al.'s, of 269,722, has ``widths=(16, 16, 32, 64)``.
    """
    net = nn.Sequential()
    net.add_module("conv1", layer.Conv2d(in_channels, widths[0], 3, padding=1, bias=False))
    net.add_module("bn1", layer.BatchNorm2d(widths[0]))
    net.add_module("lif1", lif())
    before = widths[0]
    for number, after in enumerate(widths[1:], start=1):
        stride = 1 if number == 1 else 2
        blocks = [BasicBlock(before, after, stride), BasicBlock(after, after, 1), BasicBlock(after, after, 1)]
        net.add_module(f"layer{number}", nn.Sequential(*blocks))
        before = after
    net.add_module("pool", layer.AdaptiveAvgPool2d(1))
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(before, num_classes))
    return net
