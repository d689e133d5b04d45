"""Small operations on modules, for the core and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_MISSING = object()
_LIMIT = "_snncompress_timesteps"
OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


@contextmanager
def patched(module: object, name: str, value: Any) -> Iterator[None]:
    """Inside, the instance attribute ``name`` is ``value``; afterwards it is gone or as it was."""
    attributes = vars(module)
    before = attributes.get(name, _MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del attributes[name]
        else:
            attributes[name] = before


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, all modules are in train or eval mode; afterwards each is in its own again."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def remove_along(module: nn.Module, indices: list[int], *, width: int, axis: int, anywhere: bool = False) -> None:
    """Remove ``indices`` along ``axis`` < 0 from what a module holds for each channel, in place.

    That is in parameters, buffers and plain tensors, in lists and mappings of these, its own and those of norms and the
    like within it; layers within it are left. The channel axis of an input [N, C, H, W] is -3: of ``width`` channels a
    threshold [C, 1, 1] shrinks, one of shape [H, W] doesn't. With ``anywhere``, of a class that may do with them
    whatever it likes, [C] does, too, and [T, C], and [C, C] on both axes, a matrix by which spikes come back.

    >>> neuron = nn.BatchNorm2d(3)
    >>> neuron.thresholds, neuron.recurrent, neuron.gains = [torch.ones(3, 1, 1)], torch.ones(3, 3), torch.ones(4, 3)
    >>> remove_along(neuron, [0], width=3, axis=-3, anywhere=True)
    >>> len(neuron.weight), neuron.thresholds[0].shape, neuron.recurrent.shape, neuron.gains.shape
    (2, torch.Size([2, 1, 1]), torch.Size([2, 2]), torch.Size([4, 2]))
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _without_channels(value, indices, width, axis, anywhere=anywhere)
        if type(value) is dict:
            return {key: cut(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(cut, value))
        return value

    for part in _without_layers(module):
        for home in (part._parameters, part._buffers, vars(part)):
            for name, value in list(home.items()):
                if (home is not vars(part) or name not in OF_TORCH) and any(True for _ in tensors_in(value)):
                    home[name] = cut(value)
        if getattr(part, "num_features", None) == width:
            setattr(part, "num_features", width - len(indices))  # noqa: B010 - of norms


def _without_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those within it, but for layers, and what they hold."""
    yield module
    for child in module.children():
        if not isinstance(child, (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase)):
            yield from _without_layers(child)


def _without_channels(tensor: Tensor, indices: list[int], width: int, axis: int, *, anywhere: bool) -> Tensor:
    kept = tensor.detach()
    if anywhere and tensor.shape == (width, width):
        kept = without(without(kept, indices, 0), indices, 1)
    elif tensor.dim() >= -axis and tensor.shape[axis] == width:
        kept = without(kept, indices, axis)
    elif anywhere and list(tensor.shape).count(width) == 1:
        kept = without(kept, indices, list(tensor.shape).index(width))
    else:
        return tensor
    return nn.Parameter(kept, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def without(tensor: Tensor, indices: list[int], axis: int) -> Tensor:
    """A tensor without some entries on an axis.

    >>> without(torch.arange(6).view(2, 3), [1], -1)
    tensor([[0, 2],
            [3, 5]])
    """
    keep = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    keep[indices] = False
    return tensor.movedim(axis, 0)[keep].movedim(0, axis).contiguous()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def stacked(outputs: list[Any]) -> Any:
    """The outputs of single timesteps as one: tensors [N, ...] → [T, N, ...], in tuples, lists and mappings too.

    >>> stacked([(torch.ones(2, 3), None), (torch.zeros(2, 3), None)])[0].shape
    torch.Size([2, 2, 3])
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(outputs)
    if isinstance(first, dict):
        return {key: stacked([output[key] for output in outputs]) for key in first}
    if isinstance(first, (tuple, list)):
        parts = [stacked(list(parts)) for parts in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def limit_timesteps(model: nn.Module, timesteps: int) -> None:
    """From now on a Feed drives this model, which is called step by step, for at most that many steps."""
    setattr(model, _LIMIT, timesteps)


def timestep_limit(model: nn.Module) -> int | None:
    """How many steps that is, or None."""
    limit: int | None = vars(model).get(_LIMIT)
    return limit
