"""Small operations on modules, for the core and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
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


_OF_TORCH = set(vars(nn.Module()))
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^.\[\]]+)\]")
_DEPTH = 3  # a setting of settings of settings; beyond it there are graphs of objects


def numbers_in(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Whole numbers among a module's attributes, those of its class and those in lists, mappings and plain objects.

    >>> pool = nn.MaxPool2d((2, 3))
    >>> pool.settings = {"widths": [5]}
    >>> [(name, number) for name, number in numbers_in(pool) if number > 1]
    [('kernel_size[0]', 2), ('kernel_size[1]', 3), ('stride[0]', 2), ('stride[1]', 3), ('settings[widths][0]', 5)]
    """
    seen: set[int] = set()

    def within(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
        if _is_number(value):
            yield path, int(value)
        elif depth and id(value) not in seen:
            if not isinstance(value, tuple):  # those are set one by one
                seen.add(id(value))
            for step, part in _parts(value):
                yield from within(path + step, part, depth - 1)

    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    for name, value in {**_of_class(module), **own}.items():
        yield from within(name, value, _DEPTH)


def number_at(module: nn.Module, attribute: str) -> Any:
    """An attribute, or with ``name[place]``, ``name[key]``, ``name.field`` a part of it; None where there isn't one.

    >>> pool = nn.MaxPool2d((2, 3))
    >>> number_at(pool, "kernel_size[1]"), number_at(pool, "kernel_size[2]"), number_at(pool, "padding")
    (3, None, 0)
    """
    name, steps = _taken_apart(attribute)
    value: Any = vars(module).get(name, _of_class(module).get(name))
    for step in steps:
        value = dict(_parts(value)).get(step)
    return int(value) if _is_number(value) else value


def set_number(module: nn.Module, attribute: str, number: int) -> None:
    """Set what :func:`number_at` gives, in a container of the module's own."""
    name, steps = _taken_apart(attribute)
    setattr(module, name, _changed(vars(module).get(name, _of_class(module).get(name)), steps, number))


def _changed(value: Any, steps: list[str], number: int) -> Any:
    """The value with a number in it replaced; tuples are made anew."""
    if not steps:
        return type(value)(number)
    new = _changed(dict(_parts(value))[steps[0]], steps[1:], number)
    if isinstance(value, tuple):
        parts = [new if step == steps[0] else part for step, part in _parts(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        value[int(steps[0][1:-1])] = new
    else:
        held = value if isinstance(value, dict) else vars(value)  # as the class of a frozen record doesn't let one
        held[next(key for key in held if _step(value, key) == steps[0])] = new
    return value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a list, a tuple, a mapping or an object without behaviour holds, by the step that leads there."""
    if isinstance(value, (list, tuple)):
        yield from ((f"[{place}]", part) for place, part in enumerate(value))
    elif not (isinstance(value, (Tensor, np.ndarray)) or callable(value)):
        held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        steps = ((_step(value, key), part) for key, part in held.items())
        yield from ((step, part) for step, part in steps if _STEP.fullmatch(step))


def _step(value: Any, key: Any) -> str:
    return f"[{key}]" if isinstance(value, dict) else f".{key}"


def _is_number(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def _of_class(module: nn.Module) -> dict[str, Any]:
    """Numbers that all objects of the user's class share."""
    own = [cls for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    return {name: value for cls in reversed(own) for name, value in vars(cls).items() if type(value) is int}


def _taken_apart(attribute: str) -> tuple[str, list[str]]:
    """The attribute's own name, and the steps from there."""
    name = re.split(r"[.\[]", attribute, maxsplit=1)[0]
    steps = [found[0] for found in _STEP.finditer(attribute, len(name))]
    return (name, steps) if name + "".join(steps) == attribute else (attribute, [])


def limit_timesteps(model: nn.Module, timesteps: int) -> None:
    """From now on a Feed drives this model, which is called step by step, for at most that many steps."""
    setattr(model, _LIMIT, timesteps)


def timestep_limit(model: nn.Module) -> int | None:
    """How many steps that is, or None."""
    limit: int | None = vars(model).get(_LIMIT)
    return limit
