"""What a module holds beside layers: whole numbers, wherever (``width``, ``kernel_size[1]``, ``config.channels[out]``),
and tensors with an entry for each channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from .modules import OF_TORCH, without

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

    own = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
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


def tensors_for(module: nn.Module, channels: int) -> Iterator[str]:
    """Names of parameters, buffers and plain tensors of the module itself, that have so many entries on one axis.

    >>> import torch
    >>> module = nn.Module()
    >>> module.gain, module.square, module.all = nn.Parameter(torch.ones(3, 1, 1)), torch.ones(3, 3), torch.ones(())
    >>> list(tensors_for(module, 3))
    ['gain']
    """
    own = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
    for name, value in {**module._parameters, **module._buffers, **own}.items():
        if isinstance(value, Tensor) and axis_for(value, channels) is not None:
            yield name


def tensor_at(module: nn.Module, name: str) -> Tensor | None:
    """The parameter, buffer or plain tensor of that name; None where there isn't one."""
    value = next((home[name] for home in (module._parameters, module._buffers, vars(module)) if name in home), None)
    return value if isinstance(value, Tensor) else None


def axis_for(tensor: Tensor, channels: int) -> int | None:
    """The one axis with an entry for each channel; None where there is none, or are several."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == channels]
    return axes[0] if len(axes) == 1 else None


def remove_entries(module: nn.Module, name: str, indices: list[int], channels: int) -> None:
    """Remove those of some channels from a tensor that :func:`tensors_for` names."""
    tensor = cast(Tensor, tensor_at(module, name))
    kept = without(tensor.detach(), indices, cast(int, axis_for(tensor, channels)))
    setattr(module, name, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)


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
