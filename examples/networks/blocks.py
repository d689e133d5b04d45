"""What the networks of this folder are made of: neurons, and convolutions followed by them."""

from __future__ import annotations

from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

CHANNELS = -3  # where the channels stand: in [N, C, H, W] as in [T, N, C, H, W]


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, v_threshold=1.0, v_reset=0.0, surrogate_function=surrogate.ATan(), detach_reset=True)


def conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the size of the map (but for the stride), batch norm, LIF."""
    return nn.Sequential(
        layer.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        layer.BatchNorm2d(after),
        lif(),
    )


def depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return conv(channels, channels, kernel, stride, groups=channels)


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Mean over the map, then a linear layer; its outputs are currents, not spikes."""
    return nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(channels, num_classes))


class Residual(nn.Module):
    """Adds the spikes of a branch to those of a shortcut (SEW-ADD: numbers of spikes, 0, 1, 2, …)."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)
