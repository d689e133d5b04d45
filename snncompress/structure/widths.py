"""Widths that forward reads from whole-number attributes, as in ``x.reshape(n, self.hidden, h, w)``; and tensors with
an entry for each channel, as in ``x * self.gain``.

Nothing shows which attribute is read, or whether it is: those that have the right value are set on a copy, and kept
where the trial passes with them and doesn't without. Tensors show themselves: where they stay, forward fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from math import lcm

import torch
from torch import nn

from snncompress.model.cells import layer_at
from snncompress.model.network import NORMS, POOLS, WEIGHT_LAYERS, ChannelGroup, Member, width
from snncompress.model.resizing import prunable_type
from snncompress.model.settings import numbers_in, tensors_for

Name = tuple[str, str]
"""A module's name and an attribute's."""
Fits = Callable[[ChannelGroup], bool]
"""Does the group pass the trial?"""
Failing = Callable[[ChannelGroup], str | None]
"""The module in whose forward a trial of the group fails, if it does."""
_KINDS = 6  # of attributes that are tried apart: each takes trials


def widened(group: ChannelGroup, model: nn.Module, *, singly: bool = False) -> Iterator[ChannelGroup]:
    """The group with sets of attributes to try: the likely ones, all in proportion to it, or each by itself."""
    values = dict(_attributes(group, model))
    single = [(name,) for name in values] if singly else []
    yield from _with(group, [*_likely(group, values), tuple(values), *single])


def likely(group: ChannelGroup, model: nn.Module) -> list[ChannelGroup]:
    """The group with all attributes of its width, or with one kind of these; in proportion to it, if there are none."""
    values = dict(_attributes(group, model))
    return list(_with(group, _likely(group, values) or [tuple(values)]))


def _likely(group: ChannelGroup, values: dict[Name, int]) -> list[tuple[Name, ...]]:
    equal = [name for name, value in values.items() if value == group.size]
    kinds = {kind: tuple(name for name in equal if name[1] == kind) for _, kind in equal}
    few = kinds.values() if len(kinds) <= _KINDS else ()  # as many heads as channels in each, say
    return [tuple(equal), *few] if equal else []


def _with(group: ChannelGroup, sets: Iterable[tuple[Name, ...]]) -> Iterator[ChannelGroup]:
    yield from (replace(group, widths=names) for names in dict.fromkeys(sets) if names)


def widths_of_classes(group: ChannelGroup, model: nn.Module) -> tuple[tuple[type, str], ...] | None:
    """The attributes that are tried first, by the class that has them; None where there are none.

    What one module's forward reads, that of another of the same class does.
    """
    first = next(iter(likely(group, model)), None)
    if first is None:
        return None
    return tuple((type(model.get_submodule(name)), attribute) for name, attribute in first.widths)


def fewest(group: ChannelGroup, fits: Fits) -> ChannelGroup:
    """The group without those attributes that it fits without: half of them are dropped at once, then half of these."""

    def without_some(group: ChannelGroup, some: tuple[Name, ...]) -> ChannelGroup:
        fewer = replace(group, widths=tuple(name for name in group.widths if name not in some))
        if fits(fewer):
            return fewer
        half = len(some) // 2
        return without_some(without_some(group, some[:half]), some[half:]) if half else group

    return without_some(group, group.widths) if group.widths else group


def _attributes(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[Name, int]]:
    """Whole numbers that may count the group's channels, or those of one run of it.

    They are of modules around those of the group, or of one that only reshapes, as ``nn.Unflatten``, beside them.
    """
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHT_LAYERS, *NORMS, *POOLS)):
            continue
        within = f"{name}." if name and not _only_reshapes(module) else name[: name.rfind(".") + 1]
        if not any(member.module.startswith(within) for member in group.members):
            continue
        for attribute, value in numbers_in(module):
            if value < 1:
                continue
            if value % group.size == 0 or value * group.runs == group.size:
                yield (name, attribute), value


def with_tensors(
    group: ChannelGroup, model: nn.Module, neurons: Collection[nn.Module], failing: Failing
) -> ChannelGroup:
    """The group with tensors that hold an entry for each of its channels in modules of the user's own.

    Without these, forward fails in the first such module that the channels come to, as ``failing`` says: then its
    tensors go along, and the next one is looked for.
    """
    layer = next(m for m in group.members if m.side == "out")
    whole = width(layer_at(model, layer.module), "out") == group.size == len(layer.index.flatten())
    if not whole or group.part:
        return group
    done: set[str] = set()
    while (name := failing(group)) is not None and name not in done:
        done.add(name)
        module = model.get_submodule(name)
        if module in neurons or prunable_type(module):
            break
        found = tuple((name, attribute) for attribute in tensors_for(module, group.size))
        group = replace(group, widths=(*group.widths, *found))
    return group


def may_hold(model: nn.Module, sizes: Collection[int], neurons: Collection[nn.Module]) -> bool:
    """Whether any module of the user's own has tensors with as many entries as there are channels in a group."""
    return any(
        module not in neurons and not prunable_type(module) and any(True for _ in tensors_for(module, size))
        for module in model.modules()
        for size in sizes
    )


def _only_reshapes(module: nn.Module) -> bool:
    """It holds no tensors, and no modules."""
    held = (module.children(), module.parameters(), module.buffers())
    return all(next(iter(part), None) is None for part in held)


def merged(groups: list[ChannelGroup]) -> ChannelGroup | None:
    """One group of all: of each the same positions go, several from one that is several times as wide.

    None where their widths aren't multiples of the smallest, their runs don't match, or they have channels in common.
    """
    size, runs = min(group.size for group in groups), lcm(*(group.runs for group in groups))
    if size // runs < 2 or any(group.size % size or group.runs not in (1, runs) for group in groups):
        return None
    if any(group.size > size and group.runs > 1 for group in groups):
        return None
    members: dict[tuple[str, str], Member] = {}
    for member in (_folded(member, size) for group in groups for member in group.members):
        key = member.module, member.side
        if key in members:  # of parts of one layer
            if bool(torch.isin(member.index, members[key].index).any()):
                return None
            member = replace(member, index=torch.cat([members[key].index, member.index], 1))
        members[key] = member
    shifted = dict.fromkeys(way for group in groups for way in group.shifted)
    part = any(group.part for group in groups)
    return ChannelGroup(tuple(members.values()), size, runs, shifted=tuple(shifted), part=part)


def _folded(member: Member, size: int) -> Member:
    """Channel c with c + size, c + 2·size, … as one."""
    index = member.index.view(-1, size, member.index.shape[1]).transpose(0, 1).reshape(size, -1)
    return replace(member, index=index)
