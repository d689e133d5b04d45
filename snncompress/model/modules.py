"""Small operations on modules, for the core and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

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


def remove_along(module: nn.Module, indices: list[int], *, width: int, axis: int, anywhere: bool = False) -> None:
    """Remove ``indices`` along ``axis`` < 0 from what a module holds for each channel, in place.

    That is in parameters, buffers and plain tensors, in lists and mappings of these, its own and those of norms and the
    like within it; layers within it are left. The channel axis of an input [N, C, H, W] is -3: of ``width`` channels a
    threshold [C, 1, 1] shrinks, one of shape [H, W] doesn't. With ``anywhere``, of a class that may do with them
    whatever it likes, [C] does, too, and [C, C] on both axes, a matrix by which spikes come back.

    >>> neuron = nn.BatchNorm2d(3)
    >>> neuron.thresholds, neuron.recurrent, neuron.times = [torch.ones(3, 1, 1)], torch.ones(3, 3), torch.ones(4)
    >>> remove_along(neuron, [0], width=3, axis=-3, anywhere=True)
    >>> len(neuron.weight), neuron.thresholds[0].shape, neuron.recurrent.shape, neuron.times.shape
    (2, torch.Size([2, 1, 1]), torch.Size([2, 2]), torch.Size([4]))
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
                if (home is not vars(part) or name not in _OF_TORCH) and any(True for _ in tensors_in(value)):
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
    elif anywhere and tensor.shape == (width,):
        kept = without(kept, indices, 0)
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
