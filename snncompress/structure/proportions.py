"""Groups that must lose channels in proportion: forward shapes what one puts out by the width of another.

As ``q.reshape(n, tokens, heads, width // heads)`` does, where width is that of the residual stream. Their channels
differ, their numbers don't.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.model.network import ChannelGroup, portions

from .branches import owner
from .elimination import is_at
from .trial import Flaw, Removal, Trial


class Proportions:
    """Finds out which of the groups are ``tied``, by a trial in which each loses another share.

    Where that fails, those at fault are tied to what they are made of, and so in other modules of the same class; if
    need be all that meet in the code that failed, in the end all. ``some`` and ``others`` are the removals of the last
    trial, and their complements; ``flaw`` is how it ended.
    """

    def __init__(self, groups: list[ChannelGroup], model: nn.Module, trial: Trial, generator: torch.Generator) -> None:
        self._model, self._generator = model, generator
        self.tied = [[group] for group in groups]
        self.flaw = self._tried(trial)
        while self.flaw is not None and self._tie(self.flaw):
            self.flaw = self._tried(trial)

    def _tried(self, trial: Trial) -> Flaw | None:
        removals = list[tuple[ChannelGroup, Tensor, Tensor]]()
        order = torch.randperm(len(self.tied), generator=self._generator).tolist()
        for number, groups in zip(order, self.tied, strict=True):
            share = 0.15 + 0.7 * (number + 0.5) / len(order)
            for group in groups:
                local, portion = group.size // group.runs, portions(groups)[group.size] // group.runs
                count = min(max(1, round(share * local / portion)), max(1, local // portion - 1)) * portion
                removals.append((group, *_chosen(group, count, self._generator)))
        self.some: list[Removal] = [(group, some) for group, some, _ in removals]
        self.others: list[Removal] = [(group, others) for group, _, others in removals]
        if not removals:
            return None
        flaw = trial.difference(self.some)
        return trial.difference(self.others) if flaw is None else flaw

    def _tie(self, flaw: Flaw) -> bool:
        """Tie groups that were not so before, if there are any: those at fault and what they are made of, or more."""
        code = flaw.code if flaw.code is not None or not flaw.module else owner(self._model, flaw.module)[0]
        wheres = [""]
        if code:
            kind = type(self._model.get_submodule(code))
            wheres = [f"{name}." for name, module in self._model.named_modules() if type(module) is kind]
        groups, before = [group for tied in self.tied for group in tied], len(self.tied)
        within = f"{code}." if code else ""
        if flaw.module.startswith(within):
            for where in wheres:
                place = replace(flaw, module=where + flaw.module.removeprefix(within))
                at = [group for group in groups if is_at(group, place)]
                layers = {name for group in at for name in group.names("out")}
                self._join([*at, *(group for group in groups if layers & set(group.names("in")))])
        for where in wheres if len(self.tied) == before else ():
            self._join([g for g in groups if any(member.module.startswith(where) for member in g.members)])
        if len(self.tied) == before:
            self._join(groups)
        return len(self.tied) < before

    def _join(self, groups: list[ChannelGroup]) -> None:
        rest, met, ids = list[list[ChannelGroup]](), list[ChannelGroup](), {id(group) for group in groups}
        for tied in self.tied:
            here = any(id(group) in ids for group in tied)
            met, rest = (met + tied, rest) if here else (met, [*rest, tied])
        if met and min(group.size // portions(met)[group.size] for group in met) > 1:
            self.tied = [*rest, met]


class Halves:
    """Of each group positions of a random half, and of all others.

    No two groups have the same, however alike they are, so that what ties them shows.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self._drawn: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, group: ChannelGroup) -> tuple[Tensor, Tensor]:
        """The same for a group that attributes shrink with, too."""
        if _key(group) not in self._drawn:
            self._draw(group, group.runs)
        return self._drawn[_key(group)]

    def in_proportion(self, groups: list[ChannelGroup]) -> bool:
        """Draw them anew, so that each loses the same share, where one is possible."""
        at_a_time = portions(groups)
        if any(group.size // at_a_time[group.size] < 2 for group in groups):
            return False
        for group in groups:
            self._draw(group, at_a_time[group.size])
        return True

    def _draw(self, group: ChannelGroup, portion: int) -> None:
        count = max(1, group.size // portion // 2) * (portion // group.runs)
        self._drawn[_key(group)] = _chosen(group, count, self.generator)


def _key(group: ChannelGroup) -> Any:
    first = group.members[0]
    return first.module, first.side, int(first.index[0, 0]), group.size, group.runs


def _chosen(group: ChannelGroup, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many positions from each run, and all others.

    They aren't their own mirror image, so that a flip is seen.
    """
    while True:
        chosen = torch.zeros(group.size // group.runs, dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=generator)[:count]] = True
        if not torch.equal(chosen, chosen.flip(0)):
            some, others = (which.repeat(group.runs).nonzero().flatten() for which in (chosen, ~chosen))
            return some, others
