"""Small operations on modules, for the core and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

_MISSING = object()
_LIMIT = "_snncompress_timesteps"


@contextmanager
def patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
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


def remove_along(module: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
    """Remove ``indices`` along ``axis`` < 0 from the module's own parameters and persistent buffers, in place.

    Plain tensors among its attributes shrink too. Only tensors with ``width`` entries on that axis hold one per
    channel; others (fewer dimensions, another size) are left. The channel axis of an input [N, C, H, W] is -3: a
    threshold [C, 1, 1] shrinks, one of shape [W] doesn't.
    """
    persistent = {n for n, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    for name in [n for n, _ in module.named_parameters(recurse=False)] + sorted(persistent) + plain:
        home: Any = next(h for h in (module._parameters, module._buffers, vars(module)) if name in h)
        tensor = cast(Tensor, home[name])  # an attribute of that name may be something else
        if tensor.dim() < -axis or tensor.shape[axis] != width:
            continue
        kept = without(tensor.detach(), indices, axis)
        if isinstance(tensor, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        home[name] = kept


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


def number_at(module: nn.Module, attribute: str) -> Any:
    """An attribute, or with ``name[place]`` one entry of a list or tuple; None where there isn't one.

    >>> pool = nn.MaxPool2d((2, 3))
    >>> number_at(pool, "kernel_size[1]"), number_at(pool, "kernel_size[2]"), number_at(pool, "padding")
    (3, None, 0)
    """
    name, place = _entry(attribute)
    value = vars(module).get(name)
    if place is None:
        return value
    return value[place] if isinstance(value, (list, tuple)) and place < len(value) else None


def set_number(module: nn.Module, attribute: str, number: int) -> None:
    """Set what :func:`number_at` gives, in a list or tuple of the module's own."""
    name, place = _entry(attribute)
    if place is None:
        setattr(module, name, number)
    else:
        values = list(vars(module)[name])
        values[place] = number
        setattr(module, name, type(vars(module)[name])(values))


def _entry(attribute: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)\[(\d{1,9})\]", attribute)
    return (found[1], int(found[2])) if found else (attribute, None)


def limit_timesteps(model: nn.Module, timesteps: int) -> None:
    """From now on a Feed drives this model, which is called step by step, for at most that many steps."""
    setattr(model, _LIMIT, timesteps)


def timestep_limit(model: nn.Module) -> int | None:
    """How many steps that is, or None."""
    limit: int | None = vars(model).get(_LIMIT)
    return limit
