"""SEW-ResNet-18 (Fang et al., NeurIPS 2021): spikes are added to spikes; shortcuts of other width are convolutions."""

from __future__ import annotations

from torch import nn

from .blocks import Residual, add_classifier, add_conv, convs


def sew_resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Sequential:
    """Four stages of two blocks of ``width`` to eight times as many channels; stem for maps of 32×32.

    11,173,962 parameters with ten classes and width 64. The paper's network for ImageNet begins with a 7×7 convolution
    and a pooling layer instead.
    """
    net = nn.Sequential()
    add_conv(net, 1, in_channels, width, 3)
    before = width
    for number in (1, 2, 3, 4):
        after = width * 2 ** (number - 1)
        stride = 1 if number == 1 else 2
        shortcut = convs((before, after, 1, stride)) if stride == 2 else None
        first = Residual(convs((before, after, 3, stride), (after, after, 3)), shortcut)
        second = Residual(convs((after, after, 3), (after, after, 3)))
        net.add_module(f"layer{number}", nn.Sequential(first, second))
        before = after
    add_classifier(net, before, num_classes)
    return net
