"""Spikingformer (Zhou et al., 2023, arXiv 2304.11954): a transformer of spikes, its residual stream one of potentials.

Each branch begins with neurons, so that every convolution but the first reads spikes; attention has no softmax, since
products of spikes aren't negative.
"""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .blocks import Neuron, add_classifier, lif

SCALE = 0.125  # of attention, whose neurons have a threshold of 0.5


class Embedding(nn.Module):
    """Five 3×3 convolutions, from an eighth of the channels to all; pooled twice, so that a token is 4×4 pixels."""

    def __init__(self, in_channels: int, dim: int, neuron: Neuron) -> None:
        super().__init__()
        widths = [in_channels, dim // 8, dim // 4, dim // 2, dim, dim]
        for number in range(1, 6):
            before, after = widths[number - 1 : number + 1]
            self.add_module(f"lif{number}", nn.Identity() if number == 1 else neuron())
            self.add_module(f"pool{number}", layer.MaxPool2d(3, 2, padding=1) if number > 3 else nn.Identity())
            self.add_module(f"conv{number}", layer.Conv2d(before, after, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", layer.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class Attention(nn.Module):
    """From x [..., C, H, W]: what each head's q says of its k, N × N numbers of common spikes, times v."""

    def __init__(self, dim: int, heads: int, bias: bool, neuron: Neuron) -> None:
        super().__init__()
        self.heads = heads
        self.lif = neuron()
        for name in ("q", "k", "v"):
            self.add_module(name, layer.Conv1d(dim, dim, 1, bias=False))
            self.add_module(f"{name}_bn", layer.BatchNorm1d(dim))
            self.add_module(f"{name}_lif", neuron())
        self.attention_lif = neuron(threshold=0.5)
        self.proj, self.proj_bn = layer.Conv1d(dim, dim, 1, bias=bias), layer.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.lif(x).flatten(-2)
        q = self._heads(self.q_lif(self.q_bn(self.q(tokens))))
        k = self._heads(self.k_lif(self.k_bn(self.k(tokens))))
        v = self._heads(self.v_lif(self.v_bn(self.v(tokens))))
        heard = (q @ k.transpose(-1, -2) @ v * SCALE).transpose(-3, -2).flatten(-2).transpose(-1, -2)
        return self.proj_bn(self.proj(self.attention_lif(heard))).unflatten(-1, x.shape[-2:])

    def _heads(self, x: Tensor) -> Tensor:
        """[..., C, N] as [..., heads, N, C / heads]."""
        return x.transpose(-1, -2).unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class MLP(nn.Module):
    """Two 1×1 convolutions, four times as wide in between."""

    def __init__(self, dim: int, bias: bool, neuron: Neuron) -> None:
        super().__init__()
        self.lif1, self.conv1 = neuron(), layer.Conv2d(dim, 4 * dim, 1, bias=bias)
        self.bn1, self.lif2 = layer.BatchNorm2d(4 * dim), neuron()
        self.conv2, self.bn2 = layer.Conv2d(4 * dim, dim, 1, bias=bias), layer.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.lif2(self.bn1(self.conv1(self.lif1(x))))))


class Block(nn.Module):
    """Adds attention, then the MLP, to the stream."""

    def __init__(self, dim: int, heads: int, bias: bool, neuron: Neuron) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, bias, neuron)
        self.mlp = MLP(dim, bias, neuron)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def spikingformer(
    num_classes: int = 10, depth: int = 4, dim: int = 384, heads: int = 8, in_channels: int = 3,
    bias: bool = True, neuron: Neuron = lif,
) -> nn.Sequential:  # fmt: skip
    """Spikingformer-``depth``-``dim`` for maps of 32×32: embed.conv1 … conv5, blocks.0.attention.q … mlp.conv2, fc.

    9,320,122 parameters with ten classes, the paper's 9.32 M, and 9,354,772 with a hundred; QP-SNN's has no ``bias``
    in front of its batch norms, 9,216 parameters less. The heads are those of the paper's settings for CIFAR-100; they
    have no parameters. Channels go from every head at the same positions.
    """
    net = nn.Sequential()
    net.add_module("embed", Embedding(in_channels, dim, neuron))
    blocks = (Block(dim, heads, bias, neuron) for _ in range(depth))
    net.add_module("blocks", nn.Sequential(*blocks))
    add_classifier(net, dim, num_classes)
    return net
