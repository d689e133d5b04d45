"""How many channels groups may lose: some of them in proportion, some only so many at a time.

Forward shapes what one puts out by the width of another, as ``q.reshape(n, tokens, heads, width // heads)`` does where
width is that of the residual stream: their channels differ, their numbers don't. Where width is their own, it is still
a multiple of heads.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.model.network import ChannelGroup, portions

from .branches import owner
from .elimination import is_at, sound_together
from .trial import Flaw, Removal, Trial


class Proportions:
    """Finds out which of the groups are ``tied``, by a trial in which each loses another share.

    What a share leaves has no divisor in common with the whole, so that no number in forward fits it by chance. Where
    that fails, those at fault lose a multiple of a number that the code that failed can read, or are tied to what they
    are made of, and so in other modules of the same class; if need be all that meet in that code, in the end all. Where
    nothing of this helps, some may lose a half and nothing else: what is left must divide another number. ``some`` and
    ``others`` are the removals of the last trial, and their complements; ``flaw`` is how it ended.
    """

    def __init__(self, groups: list[ChannelGroup], model: nn.Module, trial: Trial, generator: torch.Generator) -> None:
        self._model, self._generator = model, generator
        self.tied = [[group] for group in groups]
        self.flaw = self._tried(trial)
        while self.flaw is not None and (self._in_steps(self.flaw, trial) or self._tie(self.flaw)):
            self.flaw = self._tried(trial)
        if self.flaw is not None:
            self._in_halves(groups, trial)

    @property
    def groups(self) -> list[ChannelGroup]:
        """All of them, some in steps now."""
        return [group for tied in self.tied for group in tied]

    def _tried(self, trial: Trial) -> Flaw | None:
        self._draw()
        if not self.some:
            return None
        flaw = trial.difference(self.some)
        return trial.difference(self.others) if flaw is None else flaw

    def _draw(self) -> None:
        removals = list[tuple[ChannelGroup, Tensor, Tensor]]()
        order = torch.randperm(len(self.tied), generator=self._generator).tolist()
        for number, groups in zip(order, self.tied, strict=True):
            share = 0.15 + 0.7 * (number + 0.5) / len(order)
            for group in groups:
                local, portion = group.size // group.runs, portions(groups)[group.size] // group.runs
                count = _uneven(local // portion, share) * portion
                removals.append((group, *_chosen(group, count, self._generator)))
        self.some: list[Removal] = [(group, some) for group, some, _ in removals]
        self.others: list[Removal] = [(group, others) for group, _, others in removals]

    def _code(self, flaw: Flaw) -> tuple[str | None, list[str]]:
        """The module whose code failed, and what names of modules below it, and below those alike, begin with."""
        code = flaw.code if flaw.code is not None or not flaw.module else owner(self._model, flaw.module)[0]
        if not code:
            return code, [""]
        kind = type(self._model.get_submodule(code))
        return code, [f"{name}." for name, module in self._model.named_modules() if type(module) is kind]

    def _in_steps(self, flaw: Flaw, trial: Trial) -> bool:
        """Let groups in the code that failed lose multiples of a number there, if it doesn't fail then."""
        code, wheres = self._code(flaw)
        if code is None:
            return False
        numbers = {v for v in vars(self._model.get_submodule(code)).values() if type(v) is int and v > 1}
        before, tried = self.tied, (self.some, self.others)
        for step in sorted(numbers):
            self.tied = [[_stepped(group, step, wheres) for group in tied] for tied in before]
            if all(a is b for old, new in zip(before, self.tied, strict=True) for a, b in zip(old, new, strict=True)):
                continue
            after = self._tried(trial)
            if after is None or self._code(after)[0] != code:
                return True
        self.tied, (self.some, self.others) = before, tried
        return False

    def _in_halves(self, groups: list[ChannelGroup], trial: Trial) -> None:
        """Let some of the untied groups lose a half or nothing, and the others any share, if nothing fails then."""
        before, self.tied = (self.tied, self.some, self.others, self.flaw), [[_in_half(group)] for group in groups]
        halved = {id(group.members) for group in self.groups if group.step > 1}
        self.flaw = self._tried(trial) if halved else before[3]
        if self.flaw is not None:
            self.tied, self.some, self.others, self.flaw = before
            return
        halves = {id(removal[0].members): removal for removal in self.some}
        self.tied = [[group] for group in groups]

        def difference(uneven: list[Removal]) -> Flaw | None:
            ids = {id(group.members) for group, _ in uneven}
            return trial.difference([*uneven, *(half for one, half in halves.items() if one not in ids)])

        self._draw()
        coarse = set[int]()
        sound_together(self.some, difference, lambda group, _: coarse.add(id(group.members)))
        self.tied = [[_in_half(group) if id(group.members) in coarse else group] for group in groups]
        self.flaw = self._tried(trial)

    def _tie(self, flaw: Flaw) -> bool:
        """Tie groups that were not so before, if there are any: those at fault and what they are made of, or more."""
        code, wheres = self._code(flaw)
        groups, before = self.groups, len(self.tied)
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


def _stepped(group: ChannelGroup, step: int, wheres: list[str]) -> ChannelGroup:
    """The group in steps, if it has a layer there and three steps or more."""
    local = group.size // group.runs
    here = any(m.side == "out" and m.module.startswith(where) for m in group.members for where in wheres)
    return replace(group, step=step) if here and group.step == 1 and local % step == 0 and local // step > 2 else group


def _in_half(group: ChannelGroup) -> ChannelGroup:
    """The group in steps of half its channels, if it has an even number of them and goes in no other steps."""
    local = group.size // group.runs
    return replace(group, step=local // 2) if group.step == 1 and local % 2 == 0 and local > 2 else group


def _uneven(parts: int, share: float) -> int:
    """About a share of so many parts, at least one and not all, which has no divisor in common with them.

    >>> [_uneven(parts, 0.5) for parts in (2, 3, 4, 8, 12)]
    [1, 1, 1, 3, 5]
    """
    fitting = [count for count in range(1, max(2, parts)) if gcd(count, parts) == 1]
    return min(fitting, key=lambda count: abs(count - share * parts))


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
            self._draw(group, group.portion)
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
    return first.module, first.side, int(first.index[0, 0]), group.size, group.portion


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
