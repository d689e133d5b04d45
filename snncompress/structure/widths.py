"""Widths that forward reads from whole-number attributes, as in ``x.reshape(n, self.hidden, h, w)``.

Nothing shows which attribute is read, or whether it is: those that have the right value are set on a copy, and kept
where the trial passes with them and doesn't without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import lcm

from torch import nn

from snncompress.model.network import NORMS, WEIGHT_LAYERS, ChannelGroup

Name = tuple[str, str]
"""A module's name and an attribute's."""
Fits = Callable[[ChannelGroup], bool]
"""Does the group pass the trial?"""


def with_widths(group: ChannelGroup, model: nn.Module, fits: Fits) -> ChannelGroup | None:
    """The group with the attributes that must shrink with it; None where none make it fit."""
    for names in _candidates(group, model):
        if not fits(replace(group, widths=tuple(names))):
            continue
        for name in list(names):
            fewer = tuple(n for n in names if n != name)
            if fewer and fits(replace(group, widths=fewer)):
                names = fewer
        return replace(group, widths=tuple(names))
    return None


def _candidates(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[Name, ...]]:
    """Sets of attributes to try: all of the width itself, all that are in proportion to it, each by itself."""
    values = dict(_attributes(group, model))
    equal = tuple(name for name, value in values.items() if value == group.size)
    seen = set()
    for names in (equal, tuple(values), *((name,) for name in values)):
        if names and names not in seen:
            seen.add(names)
            yield names


def _attributes(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[Name, int]]:
    """Whole numbers of modules around those of the group that may count its channels, or those of one run of it."""
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHT_LAYERS, *NORMS)):
            continue
        if name and not any(member.module.startswith(f"{name}.") for member in group.members):
            continue
        for attribute, value in vars(module).items():
            if type(value) is not int or value < 1:
                continue
            if value % group.size == 0 or value * group.runs == group.size:
                yield (name, attribute), value


def merged(groups: list[ChannelGroup]) -> ChannelGroup | None:
    """One group of all that are as wide: of each the same positions go; None where their runs don't match."""
    first, runs = groups[0], lcm(*(group.runs for group in groups))
    if any(group.size != first.size or group.runs not in (1, runs) for group in groups):
        return None
    members = tuple(member for group in groups for member in group.members)
    if len({(m.module, m.side) for m in members}) < len(members):
        return None
    return ChannelGroup(members, first.size, runs)
