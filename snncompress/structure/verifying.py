"""Tests what tracing concluded, before anything is removed for good."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.cells import input_weights, layer_at
from snncompress.model.modules import tensors_in
from snncompress.model.network import ChannelGroup, Member, Network, Side
from snncompress.model.parametrizations import computed_in_forward
from snncompress.running.data import Run

from .branches import possible_reader, waiting
from .elimination import sound_together
from .mending import Mending
from .neuron_trial import Call, first_calls, held, uncuttable
from .proportions import Halves, Proportions
from .trial import Removal, Trial, UnsteadyError


def leave_out_what_breaks(network: Network, model: nn.Module, adapter: Adapter, run: Run) -> None:
    """Drop every group whose removal differs from silencing its neurons; ``network.skipped`` says so.

    ``model`` is a copy for this purpose: its parameters are overwritten. Of every group a random half, another random
    share than of other groups, and their complements are tried: code that names a channel loses it in one of them, and
    what only some channels bring about, as where a sum crosses a threshold, shows in one trial or another.
    """
    if not network.groups:
        return

    halves = Halves()
    calls = first_calls(model, adapter, run)
    trial = Trial(model, adapter, run, network.direct, halves.generator, shared=network.shared)
    network.modes = trial.modes
    unseen = waiting(model, trial.called, adapter.neurons(model))
    neurons = _Neurons(model, adapter, calls)
    refused: dict[int, str] = {}
    chosen: list[ChannelGroup] = []
    for group in network.groups:
        why = trial.flaw or _in_a_branch(possible_reader(group, model, unseen, trial.shapes))
        if why := why or neurons.flaw(group, halves.of(group)[0]):
            refused[id(group)] = why
        else:
            chosen.append(group)
    kept, network.tied, broken = list[ChannelGroup](), list[list[ChannelGroup]](), dict[int, str]()
    try:
        mending = Mending(chosen, model, trial, halves)
        kept = sorted([*mending.kept, *mending.mended], key=lambda group: network.layers.index(group.names("out")[0]))
        rounds = _Rounds(kept, model, trial, halves, mending)
        kept, broken = rounds.kept, mending.broken
        network.tied = [groups for groups in rounds.tied if len(groups) > 1]
    except UnsteadyError as unsteady:
        kept, refused = [], dict.fromkeys(map(id, network.groups), str(unsteady))
    for group in network.groups:
        why = refused.get(id(group)) or _computed(group, model) or broken.get(id(group.members)) or _TIED
        whole = (n for n in group.names("out") if not any(n in other.names("out") for other in kept))
        network.skipped.update((name, why) for name in whole if name in network.layers)
    network.groups = kept


_TIED = "its channels can't be removed safely: forward counts on as many in other layers, where they don't go"


def _in_a_branch(reader: str | None) -> str:
    if reader is None:
        return ""
    return (
        f"{reader}, which the model never calls on this input, may take its channels in: calibrate with forward= and "
        f"data that reach it, or delete it"
    )


def _computed(group: ChannelGroup, model: nn.Module) -> str:
    """Which layer of a group that stands no trial makes its weight of all channels."""
    sides: tuple[Side, ...] = ("out", "in")
    for side in sides:
        for name in group.names(side):
            if why := computed_in_forward(layer_at(model, name)):
                return why if side == "out" else f"coupled with {name}: {why}"
    return ""


class _Neurons:
    """Trials of neurons by themselves; of those that hold the same numbers, and nothing for each channel, one does."""

    def __init__(self, model: nn.Module, adapter: Adapter, calls: Mapping[str, Call]) -> None:
        self._model, self._adapter, self._calls = model, adapter, calls
        self._sound: set[Hashable] = set()

    def flaw(self, group: ChannelGroup, removed: Tensor) -> str:
        """Why one of the group's isn't the same without these channels; "" where all are."""
        for member in group.members:
            if member.side == "neuron" and member.module in self._calls:
                neuron, call = layer_at(self._model, member.module), self._calls[member.module]
                if any(map(input_weights, neuron.modules())):  # tried with its layer's rows: in the network
                    continue
                kind = _kind(neuron, call, member)
                if kind is not None and kind in self._sound:
                    continue
                if why := uncuttable(neuron, self._adapter, call, member, removed):
                    return why
                self._sound.add(kind)
        return ""


def _kind(neuron: nn.Module, call: Call, member: Member) -> Hashable:
    """What neurons have in common that do the same; None of one that may hold something for each channel."""
    common: list[Any] = [member.axis, *((t.dim(), t.dtype) for t in tensors_in(call))]
    for module in neuron.modules():
        numbers = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)))
        common += [type(module), numbers]
    return None if any(tensor.numel() > 1 for tensor in held(neuron)) else tuple(common)


class _Rounds:
    """All trials but the first, until the same groups stand each: one that is refused may have hidden others' flaws."""

    def __init__(
        self, groups: list[ChannelGroup], model: nn.Module, trial: Trial, halves: Halves, mending: Mending
    ) -> None:
        self.kept, self._trial, self._refuse = groups, trial, mending.refuse
        self._try([(group, halves.of(group)[1]) for group in groups])
        while True:
            proportions = Proportions(self.kept, model, trial, halves.generator)
            before, self.tied = len(self.kept), proportions.tied
            self._take(proportions.groups)
            if proportions.flaw is not None:
                self._try(proportions.some)
                self._try(proportions.others)
            if len(self.kept) == before:
                return
            for number in (0, 1):
                self._try([(group, halves.of(group)[number]) for group in self.kept])

    def _take(self, groups: list[ChannelGroup]) -> None:
        """These, some of which lose several channels at a time now, in the order of before."""
        now = {id(group.members): group for group in groups}
        self.kept = [now[id(group.members)] for group in self.kept]

    def _try(self, removals: list[Removal]) -> None:
        left = {id(group) for group in self.kept}
        some = [removal for removal in removals if id(removal[0]) in left]
        self.kept = [group for group, _ in sound_together(some, self._trial.difference, self._refuse)]
