"""Spiking ResNet-20, shortcuts padded by zeros: the CIFAR network of He et al. (2016), and the wide one of QP-SNN."""

from __future__ import annotations

from torch import Tensor, nn

from snncompress import ChannelMap

from .blocks import Neuron, add_classifier, add_conv, undivided_lif


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

    def __init__(self, before: int, after: int, stride: int, neuron: Neuron) -> None:
        super().__init__()
        add_conv(self, 1, before, after, 3, stride, neuron=neuron)
        add_conv(self, 2, after, after, 3, neuron=neuron)
        whole = stride == 1 and before == after
        self.shortcut = nn.Identity() if whole else PaddedShortcut(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.bn1(self.conv1(x)))
        return self.lif2(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet20(
    num_classes: int = 10, in_channels: int = 3, widths: tuple[int, int, int, int] = (64, 128, 256, 512),
    neuron: Neuron = undivided_lif,
) -> nn.Sequential:  # fmt: skip
    """conv1, and layer1, layer2, layer3 of three blocks each; ``widths`` are their channels. Maps of 32×32.

    17,048,906 parameters with ten classes: the network of QP-SNN (Wei et al., ICLR 2025), whose stem is half as wide as
    its first stage. He et al.'s, of 269,722, has ``widths=(16, 16, 32, 64)``.
    """
    net = nn.Sequential()
    add_conv(net, 1, in_channels, widths[0], 3, neuron=neuron)
    before = widths[0]
    for number, after in enumerate(widths[1:], start=1):
        stride = 1 if number == 1 else 2
        shapes = [(before, after, stride), (after, after, 1), (after, after, 1)]
        net.add_module(f"layer{number}", nn.Sequential(*(BasicBlock(*shape, neuron) for shape in shapes)))
        before = after
    add_classifier(net, before, num_classes)
    return net
