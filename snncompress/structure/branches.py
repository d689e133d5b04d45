"""Branches that the example never takes: which layers wait there, and whose channels they might read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from snncompress.model.network import WEIGHT_LAYERS, ChannelGroup, channel_axis, prunable_type, width


def waiting(model: nn.Module, called: Collection[str], neurons: Iterable[str]) -> list[str]:
    """Weight layers, outside of neurons, that weren't called."""
    inside = tuple(f"{name}." for name in neurons)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, WEIGHT_LAYERS) and name not in called and not name.startswith(inside)
    ]


def possible_reader(
    group: ChannelGroup, model: nn.Module, layers: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first of ``layers`` that the group's channels would fit, into it or out of it; None where they fit none.

    ``shapes`` are those of what goes through the group's modules.
    """
    for name in layers:
        layer = model.get_submodule(name)
        if not prunable_type(layer):
            continue
        for member in group.members:
            module = model.get_submodule(member.module)
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
