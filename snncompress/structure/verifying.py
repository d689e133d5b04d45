"""Tests what tracing concluded, before anything is removed for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.network import ChannelGroup, Network
from snncompress.running.data import Run

from .branches import possible_reader, waiting
from .neuron_trial import Call, first_calls, uncuttable
from .trial import Removal, Trial


def leave_out_what_breaks(network: Network, model: nn.Module, adapter: Adapter, run: Run) -> None:
    """Drop every group whose removal differs from silencing its neurons; ``network.skipped`` says so.

    ``model`` is a copy for this purpose: its parameters are overwritten. Of every group a random half, a random quarter
    and their complements are tried: code that names a channel loses it in one of them.
    """
    if not network.groups:
        return

    def refuse(group: ChannelGroup, why: str) -> None:
        network.skipped.update({n: why for n in group.names("out") if n in network.layers})

    generator = torch.Generator().manual_seed(0)
    calls = first_calls(model, adapter, run)
    trial = Trial(model, adapter, run, generator)
    unseen = waiting(model, trial.called, adapter.neurons(model))
    subsets = []
    for group in network.groups:
        chosen = list(_subsets(group, generator))
        why = trial.flaw or _in_a_branch(possible_reader(group, model, unseen, trial.shapes))
        if why := why or _of_neurons(group, model, adapter, calls, chosen[0]):
            refuse(group, why)
        else:
            subsets.append((group, chosen))
    if not subsets:
        network.groups = []
        return
    for number in range(len(subsets[0][1])):
        removals = [(group, some[number]) for group, some in subsets]
        sound = {id(group) for group, _ in sound_together(removals, trial.difference, refuse)}
        subsets = [(group, some) for group, some in subsets if id(group) in sound]
    network.groups = [group for group, _ in subsets]


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


def _subsets(group: ChannelGroup, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of a random half, of all others, of a random quarter, of all others."""
    local = group.size // group.runs
    for count in (local // 2, local // 4):
        some = _lopsided(local, max(1, count), generator)
        for chosen in (some, ~some):
            yield chosen.repeat(group.runs).nonzero().flatten()


def _lopsided(size: int, count: int, generator: torch.Generator) -> Tensor:
    """A random choice of channels that isn't its own mirror image, so that a flip is seen."""
    while True:
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[torch.randperm(size, generator=generator)[:count]] = True
        if not torch.equal(chosen, chosen.flip(0)):
            return chosen
