"""Spiking Xception (Chollet, 2017): separable convolutions throughout, with an LIF neuron after every convolution."""

from __future__ import annotations

import itertools

from spikingjelly.activation_based import layer
from torch import nn

from .blocks import Residual, add_classifier, add_conv, convs


def separable(*widths: int) -> nn.Sequential:
    """From each width to the next: each channel convolved on its own, then a 1×1 convolution over all of them."""
    pairs = itertools.pairwise(widths)
    return convs(*(shape for a, b in pairs for shape in ((a, a, 3, 1, a), (a, b, 1))))


def halving(before: int, middle: int, after: int) -> nn.Module:
    """Two separable convolutions and a pooling layer beside a 1×1 convolution of stride 2."""
    branch = separable(before, middle, after)
    branch.add_module("pool", layer.MaxPool2d(3, 2, padding=1))
    return Residual(branch, convs((before, after, 1, 2)))


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
    add_conv(net, 1, in_channels, w32, 3)
    add_conv(net, 2, w32, w64, 3)
    net.add_module(
        "entry", nn.Sequential(halving(w64, w128, w128), halving(w128, w256, w256), halving(w256, w728, w728))
    )
    net.add_module("middle", nn.Sequential(*(Residual(separable(w728, w728, w728, w728)) for _ in range(middle))))
    net.add_module("exit", nn.Sequential(halving(w728, w728, w1024), separable(w1024, w1536, w2048)))
    add_classifier(net, w2048, num_classes)
    return net
