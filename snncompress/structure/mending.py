"""The first trial of all groups: what breaks it is mended where it can be, by widths or by shrinking with others."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from snncompress.model.network import ChannelGroup

from .branches import owner
from .elimination import Doubt, resolved, set_aside, sound_together
from .proportions import Halves
from .trial import Flaw, Removal, Trial
from .widths import fewest, likely, may_hold, merged, widened, widths_of_classes, with_tensors


class Mending:
    """Finds the groups that stand a trial together, of half of the channels of each.

    Groups that don't may do so once attributes shrink with them (:mod:`snncompress.structure.widths`), once they lose
    as many channels as others, or the same. ``kept`` and ``mended`` do; ``broken`` says why others don't.
    """

    def __init__(self, groups: list[ChannelGroup], model: nn.Module, trial: Trial, halves: Halves) -> None:
        self.model, self.trial, self._halves = model, trial, halves
        self.broken: dict[int, str] = {}
        """By the id of the group's members, which stay when widths or steps are added."""
        self.mended: list[ChannelGroup] = []
        groups = self._with_tensors(groups)
        everything = self._removals(groups)
        self._kept, doubts = set_aside(everything, trial.difference, lambda g: widths_of_classes(g, model))
        self._settle(doubts)
        self._merge([group for group in groups if id(group.members) in self.broken])
        self._drop_widths()

    def _with_tensors(self, groups: list[ChannelGroup]) -> list[ChannelGroup]:
        inside = {m for neuron in self.trial.adapter.neurons(self.model).values() for m in neuron.modules()}
        if not may_hold(self.model, {group.size for group in groups}, inside):
            return groups

        def failing(group: ChannelGroup) -> str | None:
            flaw = self.trial.difference(self._removals([group]))
            return None if flaw is None else flaw.code

        return [with_tensors(group, self.model, inside, failing) for group in groups]

    @property
    def kept(self) -> list[ChannelGroup]:
        """Those that needed no mending."""
        return [group for group, _ in self._kept]

    def _settle(self, doubts: list[Doubt]) -> None:
        """Try with attributes first what surely needs mending, then all others as they are, then these so too."""
        left = [*self._widen([d for d in doubts if d.sure]), *(d for d in doubts if not d.sure)]
        self._kept += resolved(self._settled(), left, self.trial.difference, self.refuse)
        self._widen([d for d in left if not d.sure and id(d.removal[0].members) in self.broken])

    def _widen(self, doubts: list[Doubt]) -> list[Doubt]:
        """Try them with attributes that are likely, the same choice for all that have one; those that are left."""
        choices = {id(d.removal[0]): likely(d.removal[0], self.model) for d in doubts}
        for number in range(max(map(len, choices.values()), default=0)):
            some = [choices[id(d.removal[0])] for d in doubts]
            if not any(len(sets) > number for sets in some):
                break
            self._keep_sound([sets[number if number < len(sets) else 0] for sets in some if sets])
            mended = {id(group.members) for group in self.mended}
            doubts = [d for d in doubts if id(d.removal[0].members) not in mended]
        return doubts

    def _merge(self, broken: list[ChannelGroup]) -> None:
        """Try groups that meet in a module's code together, and attributes one by one."""
        left = [group for group in broken if not self._is_mended(group)]
        for meeting in self._meeting(left):
            sizes = {group.size: [g for g in meeting if g.size == group.size] for group in meeting}
            if not (self._keep_in_proportion(meeting) or self._keep_merged(meeting)):
                for alike in sizes.values() if len(sizes) > 1 else ():
                    self._keep_merged(alike)
        for group in left:
            if id(group.members) in self.broken and not self._is_mended(group):
                any(self._keep_sound([wide]) for wide in islice(widened(group, self.model, singly=True), 1, None))

    def _is_mended(self, group: ChannelGroup) -> bool:
        """Do its channels go with a group that is?"""
        own = next(m for m in group.members if m.side == "out")
        others = (other.member(own.module, "out") for other in self.mended)
        return any(other is not None and bool(torch.isin(own.index, other.index).any()) for other in others)

    def _keep_in_proportion(self, groups: list[ChannelGroup]) -> bool:
        if len(groups) < 2 or not self._halves.in_proportion(groups):
            return False
        if self.trial.difference([*self._settled(), *self._removals(groups)]) is not None:
            return False
        self._kept += self._removals(groups)
        for group in groups:
            del self.broken[id(group.members)]
        return True

    def _keep_merged(self, groups: list[ChannelGroup]) -> bool:
        together = merged(groups) if len(groups) > 1 else None
        if together is None:
            return False
        return any(self._keep_sound([group]) for group in (together, *widened(together, self.model)))

    def _meeting(self, groups: list[ChannelGroup]) -> list[list[ChannelGroup]]:
        """Groups whose channels go through the forward of one module, or of a row of modules."""
        rows: list[tuple[set[str | None], list[ChannelGroup]]] = []
        for group in groups:
            owners = {owner(self.model, member.module)[0] for member in group.members}
            met, rows = [r for r in rows if r[0] & owners], [r for r in rows if not r[0] & owners]
            rows.append((owners.union(*(row[0] for row in met)), [*(g for row in met for g in row[1]), group]))
        return [row[1] for row in rows]

    def _drop_widths(self) -> None:
        """Leave the attributes alone that aren't needed."""
        for number, group in enumerate(self.mended):

            def fits(fewer: ChannelGroup, group: ChannelGroup = group) -> bool:
                others = [removal for removal in self._settled() if removal[0] is not group]
                return self.trial.difference([*others, *self._removals([fewer])]) is None

            self.mended[number] = fewest(group, fits)

    def _keep_sound(self, groups: list[ChannelGroup]) -> bool:
        before = self._settled()

        def difference(some: list[Removal]) -> Flaw | None:
            return self.trial.difference([*before, *some])

        found = sound_together(self._removals(groups), difference, lambda group, why: None)
        self.mended += [group for group, _ in found]
        return bool(found)

    def _settled(self) -> list[Removal]:
        return [*self._kept, *self._removals(self.mended)]

    def _removals(self, groups: list[ChannelGroup]) -> list[Removal]:
        return [(group, self._halves.of(group)[0]) for group in groups]

    def refuse(self, group: ChannelGroup, why: str) -> None:
        """Note why a group doesn't stand a trial."""
        self.broken[id(group.members)] = why
