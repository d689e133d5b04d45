"""Tests what tracing concluded, before anything is removed for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.network import ChannelGroup, Network
from snncompress.running.data import Run

from .branches import possible_reader, waiting
from .neuron_trial import Call, first_calls, uncuttable
from .trial import Removal, Trial
from .widths import fewest, merged, widened


def leave_out_what_breaks(network: Network, model: nn.Module, adapter: Adapter, run: Run) -> None:
    """Drop every group whose removal differs from silencing its neurons; ``network.skipped`` says so.

    ``model`` is a copy for this purpose: its parameters are overwritten. Of every group a random half, a random quarter
    and their complements are tried: code that names a channel loses it in one of them.
    """
    if not network.groups:
        return

    generator = torch.Generator().manual_seed(0)
    calls = first_calls(model, adapter, run)
    trial = Trial(model, adapter, run, network.direct, generator)
    unseen = waiting(model, trial.called, adapter.neurons(model))
    refused: dict[int, str] = {}
    chosen: list[Choice] = []
    for number, group in enumerate(network.groups):
        choice = group, _subsets(group, number, generator)
        why = trial.flaw or _in_a_branch(possible_reader(group, model, unseen, trial.shapes))
        if why := why or _of_neurons(group, model, adapter, calls, choice[1][0]):
            refused[id(group)] = why
        else:
            chosen.append(choice)
    broken: dict[int, str] = {}
    sound = _sound(chosen, trial, broken)
    mended = _mended([group for group, _ in chosen if id(group) in broken], sound, model, trial)
    kept = sorted((group for group, _ in (*sound, *mended)), key=lambda g: network.layers.index(g.names("out")[0]))
    for group in network.groups:
        why = refused.get(id(group)) or broken.get(id(group)) or _TIED
        whole = (n for n in group.names("out") if not any(n in other.names("out") for other in kept))
        network.skipped.update((name, why) for name in whole if name in network.layers)
    network.groups = kept


Choice = tuple[ChannelGroup, list[Tensor]]
"""A group, and the subsets of its channels that are tried."""
_TIED = "its channels can't be removed safely: forward counts on as many in other layers, where they don't go"


def _sound(chosen: list[Choice], trial: Trial, broken: dict[int, str], beside: Sequence[Choice] = ()) -> list[Choice]:
    """Those that stand a trial of each of their subsets, with others ``beside`` them that do.

    Why the others don't goes to ``broken``.
    """

    def refuse(group: ChannelGroup, why: str) -> None:
        broken[id(group)] = why

    for number in range(len(_ORDERS[0])):
        removals = [(group, subsets[number]) for group, subsets in chosen]

        def difference(some: list[Removal], number: int = number) -> str | None:
            return trial.difference([*((group, subsets[number]) for group, subsets in beside), *some])

        found = sound_together(removals, difference, refuse)
        sound = {id(group) for group, _ in found}
        chosen = [choice for choice in chosen if id(choice[0]) in sound]
    return chosen


def _mended(broken: list[ChannelGroup], sound: list[Choice], model: nn.Module, trial: Trial) -> list[Choice]:
    """Groups that stand the trial once attributes shrink with them, or once they shrink with others of their width."""
    mended: list[Choice] = []

    def tried(groups: list[ChannelGroup], instead_of: ChannelGroup | None = None) -> list[Choice]:
        choices = []
        for group in groups:
            number = next(i for i, other in enumerate(broken) if _meet(group, other))
            choices.append((group, _subsets(group, number, torch.Generator().manual_seed(0))))
        return _sound(choices, trial, {}, [choice for choice in (*sound, *mended) if choice[0] is not instead_of])

    def keep_sound(groups: list[ChannelGroup]) -> bool:
        found = tried(groups)
        mended.extend(found)
        return bool(found)

    keep_sound([group for group in (next(widened(g, model), None) for g in broken) if group is not None])
    left: dict[int, list[ChannelGroup]] = {}
    for group in broken:
        if not any(_meet(group, other) for other, _ in mended):
            left.setdefault(group.size, []).append(group)
    for groups in left.values():
        together = merged(groups) if len(groups) > 1 else None
        tries = [] if together is None else [together, *islice(widened(together, model), 1)]
        if any(keep_sound([group]) for group in tries):
            continue
        for group in groups:
            any(keep_sound([wide]) for wide in islice(widened(group, model), 1, None))
    for number, (group, subsets) in enumerate(mended):

        def fits(other: ChannelGroup, group: ChannelGroup = group) -> bool:
            return bool(tried([other], instead_of=group))

        mended[number] = fewest(group, fits), subsets
    return mended


def _meet(one: ChannelGroup, other: ChannelGroup) -> bool:
    """Have they a layer's output channels in common?"""
    mine = next(m for m in one.members if m.side == "out")
    theirs = other.member(mine.module, "out")
    return theirs is not None and bool(torch.isin(mine.index, theirs.index).any())


def _in_a_branch(reader: str | None) -> str:
    if reader is None:
        return ""
    return (
        f"{reader}, which the model never calls on this input, may take its channels in: calibrate with forward= and "
        f"data that reach it, or delete it"
    )


def _of_neurons(
    group: ChannelGroup, model: nn.Module, adapter: Adapter, calls: Mapping[str, Call], removed: Tensor
) -> str:
    for member in group.members:
        if member.side == "neuron" and member.module in calls:
            neuron = model.get_submodule(member.module)
            if why := uncuttable(neuron, adapter, calls[member.module], member, removed):
                return why
    return ""


def sound_together(
    removals: list[Removal],
    difference: Callable[[list[Removal]], str | None],
    refuse: Callable[[ChannelGroup, str], None],
) -> list[Removal]:
    """Those that stand a trial together; the others are refused.

    All are tried at once, and where that fails, each half with what was found sound before: of n groups, one that
    breaks is found in about log2(n) trials.
    """
    kept: list[Removal] = []

    def add(some: list[Removal], why: str | None) -> None:
        if why is None:
            kept.extend(some)
        elif len(some) == 1:
            refuse(some[0][0], why)
        else:
            first, rest = some[: len(some) // 2], some[len(some) // 2 :]
            before = len(kept)
            add(first, difference([*kept, *first]))
            all_kept = len(kept) == before + len(first)  # then the rest breaks it as before
            add(rest, why if all_kept else difference([*kept, *rest]))

    if removals:
        add(removals, difference(removals))
    return kept


_ORDERS = (
    (0, 1, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3), (3, 0, 1, 2), (0, 3, 1, 2), (2, 0, 3, 1),
    (0, 1, 3, 2), (3, 0, 2, 1), (0, 2, 3, 1), (2, 3, 0, 1), (0, 3, 2, 1), (3, 2, 0, 1),
)  # fmt: skip


def _subsets(group: ChannelGroup, number: int, generator: torch.Generator) -> list[Tensor]:
    """Positions of a random half, of all others, of a random quarter, of all others; not all groups in this order.

    So no two of twelve neighbours always lose the same share, and what fits only in proportion to another is seen.
    """
    local = group.size // group.runs
    found = []
    for count in (local // 2, local // 4):
        some = _lopsided(local, max(1, count), generator)
        found += [chosen.repeat(group.runs).nonzero().flatten() for chosen in (some, ~some)]
    return [found[place] for place in _ORDERS[number % len(_ORDERS)]]


def _lopsided(size: int, count: int, generator: torch.Generator) -> Tensor:
    """A random choice of channels that isn't its own mirror image, so that a flip is seen."""
    while True:
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[torch.randperm(size, generator=generator)[:count]] = True
        if not torch.equal(chosen, chosen.flip(0)):
            return chosen
