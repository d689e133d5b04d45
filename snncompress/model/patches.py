"""A weight layer as a matrix: each output is a row of weights times the patch of inputs that it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or a mask like it → [G, R, D]: for each of G groups R output channels that read D inputs.

    >>> as_matrix(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
    torch.Size([2, 3, 18])
    """
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, _ConvTransposeNd):
        weight = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
        return weight.flatten(3).flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def as_weight(layer: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """Back from [G, R, D] to the shape and dtype of the weight ``like``."""
    if isinstance(layer, _ConvTransposeNd):
        groups, rows = matrix.shape[:2]
        matrix = matrix.view(groups, rows, like.shape[0] // groups, *like.shape[2:]).transpose(1, 2)
    return matrix.reshape(like.shape).to(like.dtype)


def samples_first(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs or outputs [..., N, C, ...] → [N', C, ...]; of a linear layer [N', C]."""
    axes = 1 if isinstance(layer, nn.Linear) else weight_dims(layer) + 1
    return x.reshape(-1, *x.shape[-axes:])


def weight_dims(layer: Any) -> int:
    """Of space: 2 for a convolution over images, 0 for a linear layer."""
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def positions(layer: nn.Module, output: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Up to ``most`` positions of an output map [N, C, ...], drawn without repetition: [P, dims]."""
    shape = output.shape[2:]
    if isinstance(layer, nn.Linear):
        return torch.zeros(1, 0, dtype=torch.long)
    chosen = torch.randperm(shape.numel(), generator=generator)[:most].sort().values
    return torch.stack(torch.unravel_index(chosen, shape), 1)


def patches(layer: Any, x: Tensor, where: Tensor) -> Tensor:
    """What the outputs at some positions read of inputs [N, C, ...]: [N · P, G, D], in the order of :func:`as_matrix`.

    >>> layer, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.rand(1, 2, 4, 4)
    >>> read = patches(layer, x, torch.tensor([[0, 0], [3, 2]]))
    >>> made = torch.einsum("ngd,grd->ngr", read, as_matrix(layer, layer.weight))
    >>> torch.allclose(made, outputs(layer, layer(x), torch.tensor([[0, 0], [3, 2]])), atol=1e-6)
    True
    """
    if isinstance(layer, nn.Linear):
        return x.unsqueeze(1)
    dims = weight_dims(layer)
    transposed = isinstance(layer, _ConvTransposeNd)
    if transposed:
        x, stride = _spread(layer, x), (1,) * dims
    else:
        way = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, stride = F.pad(x, layer._reversed_padding_repeated_twice, mode=way), layer.stride
    for axis, (size, gap, step) in enumerate(zip(layer.kernel_size, layer.dilation, stride, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    index: tuple[Any, ...] = (slice(None), slice(None), *where.to(x.device).unbind(1))
    read = x[index]  # [N, C, P, *kernel]
    if transposed:
        read = read.flip(list(range(3, 3 + dims)))
    return read.movedim(2, 1).reshape(len(x) * len(where), layer.groups, -1)


def outputs(layer: Any, y: Tensor, where: Tensor) -> Tensor:
    """Outputs [N, C, ...] at some positions: [N · P, G, R]."""
    groups = int(getattr(layer, "groups", 1))
    if not isinstance(layer, nn.Linear):
        index: tuple[Any, ...] = (slice(None), slice(None), *where.to(y.device).unbind(1))
        y = y[index].movedim(2, 1)
    return y.reshape(-1, groups, y.shape[-1] // groups)


def _spread(layer: Any, x: Tensor) -> Tensor:
    """The input of a transposed convolution as that of an ordinary one: zeros between the values, and around them."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in layer.stride))] = x
    around: list[int] = []
    for size, gap, pad, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        edge = gap * (size - 1) - pad
        around = [edge, edge + more, *around]
    return F.pad(wide, around)
