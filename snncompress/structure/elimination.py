"""Which groups stand a trial together: those that a difference points at are set aside, of others halves are tried."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from snncompress.model.network import ChannelGroup

from .trial import Flaw, Removal

Difference = Callable[[list[Removal]], Flaw | None]
"""A trial of some removals."""
Refuse = Callable[[ChannelGroup, str], None]
"""Is told of a group that stands no trial, and why."""


@dataclass(frozen=True)
class Doubt:
    """A removal that was set aside, and why.

    ``sure``: a difference pointed at it, and at no other, or at one of its kind; ``refused``: at itself, so it needn't
    be tried again.
    """

    removal: Removal
    why: str
    sure: bool
    refused: bool


def set_aside(
    removals: list[Removal], difference: Difference, kind: Callable[[ChannelGroup], Hashable] = lambda group: None
) -> tuple[list[Removal], list[Doubt]]:
    """Those that stand a trial together, and those that are in doubt: of k that break, found in about k trials.

    With one that a difference points at go all of its ``kind``: what breaks one block of a row breaks the others. Where
    it points at none, halves are tried.
    """
    kept, doubts = list(removals), list[Doubt]()
    while kept and (flaw := difference(kept)) is not None:
        blamed = [group for group, _ in kept if is_at(group, flaw)]
        if not blamed:  # then maybe it wasn't those set aside either
            refused: dict[int, str] = {}
            sound = _halved(kept, flaw.why, [], difference, _noting(refused))
            doubts = [replace(doubt, refused=False) for doubt in doubts]
            found = [(r, refused[id(r[0])]) for r in kept if id(r[0]) in refused]
            return sound, [*doubts, *(Doubt(removal, why, sure=True, refused=True) for removal, why in found)]
        one = len(blamed) == 1
        alike = kind(blamed[0]) if one else None
        for removal in kept:
            at, like = any(removal[0] is group for group in blamed), alike is not None and kind(removal[0]) == alike
            if at or like:
                doubts.append(Doubt(removal, flaw.why, sure=one, refused=one and at))
        gone = {id(doubt.removal[0]) for doubt in doubts}
        kept = [removal for removal in kept if id(removal[0]) not in gone]
    return kept, doubts


def resolved(kept: list[Removal], doubts: list[Doubt], difference: Difference, refuse: Refuse) -> list[Removal]:
    """Those in doubt that stand a trial with those kept; the others are refused."""
    for doubt in doubts:
        if doubt.refused:
            refuse(doubt.removal[0], doubt.why)
    left = [doubt.removal for doubt in doubts if not doubt.refused]
    if not left or (flaw := difference([*kept, *left])) is None:
        return left
    return _halved(left, flaw.why, kept, difference, refuse)


def sound_together(removals: list[Removal], difference: Difference, refuse: Refuse) -> list[Removal]:
    """Those that stand a trial together, in order; the others are refused."""
    kept, doubts = set_aside(removals, difference)
    kept += resolved(kept, doubts, difference, refuse)
    sound = {id(group) for group, _ in kept}
    return [removal for removal in removals if id(removal[0]) in sound]


def is_at(group: ChannelGroup, flaw: Flaw) -> bool:
    """Are its channels where the difference shows?"""
    return bool(flaw.module) and any(m.module == flaw.module and m.side in (flaw.side, "neuron") for m in group.members)


def _noting(refused: dict[int, str]) -> Refuse:
    return lambda group, why: refused.update({id(group): why})


def _halved(
    some: list[Removal], why: str, before: list[Removal], difference: Difference, refuse: Refuse
) -> list[Removal]:
    """Those of ``some`` that stand a trial with those ``before``, where all together don't, and ``why``.

    Each half is tried with what was found sound before: of n groups, one that breaks is found in about log2(n) trials.
    """
    kept: list[Removal] = []

    def add(some: list[Removal], why: str | None) -> None:
        if why is None:
            kept.extend(some)
        elif len(some) == 1:
            refuse(some[0][0], why)
        else:
            first, rest = some[: len(some) // 2], some[len(some) // 2 :]
            count = len(kept)
            add(first, tried(first))
            all_kept = len(kept) == count + len(first)  # then the rest breaks it as before
            add(rest, why if all_kept else tried(rest))

    def tried(some: list[Removal]) -> str | None:
        flaw = difference([*before, *kept, *some])
        return None if flaw is None else flaw.why

    add(some, why)
    return kept
