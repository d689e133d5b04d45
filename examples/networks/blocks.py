"""What the networks of this folder are made of: neurons, and convolutions followed by them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

CHANNELS = -3  # where the channels stand: in [N, C, H, W] as in [T, N, C, H, W]

Neuron = Callable[..., nn.Module]
"""Makes a layer of neurons; takes ``threshold=``."""


def lif(threshold: float = 1.0) -> nn.Module:
    """u ← u/2 + I/2, a spike where u reaches the threshold, then u ← 0: SpikingJelly's default."""
    return neuron.LIFNode(
        tau=2.0, v_threshold=threshold, v_reset=0.0, surrogate_function=surrogate.ATan(), detach_reset=True
    )


def undivided_lif(threshold: float = 1.0, triangle: bool = False) -> nn.Module:
    """u ← u/2 + I, as in TET (Deng et al., ICLR 2022) and QP-SNN (Wei et al., ICLR 2025).

    ``triangle`` has their surrogate gradient too, max(0, 1 − |u − threshold|), in the place of ATan's.
    """
    slope = surrogate.PiecewiseQuadratic(alpha=1.0) if triangle else surrogate.ATan()
    return neuron.LIFNode(
        tau=2.0, decay_input=False, v_threshold=threshold, v_reset=0.0, surrogate_function=slope, detach_reset=True
    )


def add_conv(
    net: nn.Module, number: int | str, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1,
    neuron: Neuron = lif,
) -> None:  # fmt: skip
    """Append conv1, bn1 and lif1 (2, 3, …): a convolution that keeps the size of the map but for the stride."""
    conv = layer.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    net.add_module(f"conv{number}", conv)
    net.add_module(f"bn{number}", layer.BatchNorm2d(after))
    net.add_module(f"lif{number}", neuron())


def convs(*shapes: tuple[int, ...], neuron: Neuron = lif) -> nn.Sequential:
    """Convolutions of these shapes (before, after, kernel, stride, groups), each with batch norm and neurons."""
    net = nn.Sequential()
    for number, shape in enumerate(shapes, start=1):
        add_conv(net, number, *shape, neuron=neuron)
    return net


def add_classifier(net: nn.Module, channels: int, num_classes: int) -> None:
    """Append the mean over the map, and the linear layer fc; its outputs are currents, not spikes."""
    net.add_module("pool", layer.AdaptiveAvgPool2d(1))
    net.add_module("flatten", layer.Flatten())
    net.add_module("fc", layer.Linear(channels, num_classes))


class Residual(nn.Sequential):
    """Adds the spikes of a branch to those of a shortcut (SEW-ADD: numbers of spikes, 0, 1, 2, …)."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module | None = None) -> None:
        super().__init__(OrderedDict(branch.named_children()))
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name, part in self.named_children():
            if name != "shortcut":
                y = part(y)
        return y + self.shortcut(x)
