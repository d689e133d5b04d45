"""Spiking Xception (Chollet, 2017): separable convolutions throughout, with an LIF neuron after every convolution."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import Residual, classifier, conv, depthwise


def separable(before: int, after: int) -> nn.Sequential:
    """Each channel convolved on its own, then a 1×1 convolution over all of them."""
    return nn.Sequential(depthwise(before, 3), conv(before, after, 1))


def halving(before: int, middle: int, after: int) -> nn.Module:
    """Two separable convolutions and a pooling layer beside a 1×1 convolution of stride 2."""
    branch = nn.Sequential(separable(before, middle), separable(middle, after), layer.MaxPool2d(3, 2, padding=1))
    return Residual(branch, conv(before, after, 1, stride=2))


def xception(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, middle: int = 8) -> nn.Sequential:
    """Entry flow, ``middle`` blocks of three separable convolutions, exit flow.

    20,873,538 parameters with ten classes: the 22,855,952 of Xception with its thousand classes, less 2,028,510 of
    the classifier, and 46,096 for the batch norm and neuron that stand here between the two halves of a
    separable convolution, so that only spikes travel. The stem has stride 1, for maps of 32×32.
    """
    w32, w64, w128, w256, w728, w1024, w1536, w2048 = (
        max(2, round(width * channels)) for channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
    )
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(conv(in_channels, w32, 3), conv(w32, w64, 3)))
    net.add_module(
        "entry", nn.Sequential(halving(w64, w128, w128), halving(w128, w256, w256), halving(w256, w728, w728))
    )
    blocks = [Residual(nn.Sequential(*(separable(w728, w728) for _ in range(3)))) for _ in range(middle)]
    net.add_module("middle", nn.Sequential(*blocks))
    net.add_module("exit", nn.Sequential(halving(w728, w728, w1024), separable(w1024, w1536), separable(w1536, w2048)))
    net.add_module("head", classifier(w2048, num_classes))
    return net
