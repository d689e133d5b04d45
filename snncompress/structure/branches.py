"""Branches that the example never takes: which layers wait there, and whose channels they might read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import CodeType, FunctionType

from torch import nn

from snncompress.model.cells import layer_at
from snncompress.model.network import WEIGHT_LAYERS, ChannelGroup, channel_axis, width
from snncompress.model.resizing import prunable_type


def waiting(model: nn.Module, called: Collection[str], neurons: Iterable[str]) -> dict[str, str]:
    """Weight layers, outside of neurons, that weren't called though code names them; each with the module of that code.

    A layer that no method but the constructor speaks of is left over, and nothing to wait for.
    """
    inside = tuple(f"{name}." for name in neurons)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, WEIGHT_LAYERS) and name not in called and not name.startswith(inside):
            caller, attribute = owner(model, name)
            if caller is not None and _speaks_of(type(model.get_submodule(caller)), attribute):
                found[name] = caller
    return found


def owner(model: nn.Module, name: str) -> tuple[str | None, str]:
    """The module whose code calls a layer, and what it goes by there: past containers, whose children have numbers."""
    caller, _, attribute = name.rpartition(".")
    while type(model.get_submodule(caller)) in _CONTAINERS:
        if not caller:
            return None, ""
        caller, _, attribute = caller.rpartition(".")
    return caller, attribute


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_DYNAMIC = {"getattr", "children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}


def _speaks_of(kind: type, attribute: str) -> bool:
    """Does a method other than the constructor name the attribute, or look modules up?"""
    names: set[str] = set()
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        todo = [f.__code__ for n, f in vars(cls).items() if isinstance(f, FunctionType) and n != "__init__"]
        while todo:
            code = todo.pop()
            names.update(code.co_names)
            todo += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return attribute in names or bool(names & _DYNAMIC)


def possible_reader(
    group: ChannelGroup, model: nn.Module, layers: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first of ``layers`` that the group's channels would fit, into it or out of it; None where they fit none.

    The code that calls the layer, its module's, sees what goes through that module alone. ``shapes`` are those of what
    goes through the group's modules.
    """
    for name, owner in layers.items():
        layer = layer_at(model, name)
        seen = not owner or any(member.module.startswith(f"{owner}.") for member in group.members)
        if not seen or not prunable_type(layer):
            continue
        for member in group.members:
            module = layer_at(model, member.module)
            if member.side == "in" or not (member.width or isinstance(module, WEIGHT_LAYERS)):
                continue
            channels = member.width or width(module, "out")
            axis = member.axis or channel_axis(module)
            sizes = _flattened(shapes.get(member.module, ())[axis:][1:]) if isinstance(layer, nn.Linear) else {1}
            if width(layer, "out") == channels or width(layer, "in") in {channels * size for size in sizes}:
                return name
    return None


def _flattened(spatial: tuple[int, ...]) -> set[int]:
    """How many columns a channel may have behind a flatten: of these sizes, or pooled by a factor for all axes."""
    longest = max(spatial, default=1)
    pooled = ([max(1, round(size * long / longest)) for size in spatial] for long in range(1, longest + 1))
    found = {1}
    for sizes in pooled:
        product = 1
        for size in sizes:
            product *= size
        found.add(product)
    return found
