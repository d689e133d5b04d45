"""The checks of criteria: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import snncompress
from snncompress import OptionError, PluginError
from snncompress.contract.registry import Entry
from snncompress.extend import Criterion, Granularity, Layer, Signal
from snncompress.testing import (
    check_criterion,
)
from tests.testing.common import broken, named


@pytest.mark.parametrize("entry", snncompress.criteria(), ids=named)
def test_our_criteria(entry: Entry) -> None:
    check_criterion(entry.cls())


class Rate(Criterion):
    """A right one, for the broken ones to start from."""

    name: ClassVar[str] = "rate"
    needs = frozenset({"spikes"})

    def begin(self, layer):
        return torch.zeros(layer.channels)

    def observe(self, layer, state, spikes, membrane):
        return state + spikes.transpose(0, 2).flatten(1).sum(1)

    def score(self, layer, state):
        return state


def test_a_right_criterion_passes() -> None:
    check_criterion(Rate())


class Nameless(Rate):
    name = ""


class ByWeight(Rate):
    granularity = "weight"


class NeedsAWord(Rate):
    needs = "spikes"


class NeedsTheUnknown(Rate):
    needs = frozenset({"spikes", "voltage"})


@dataclass
class TensorOption(Rate):
    at: Any = float


@dataclass
class TupleOption(Rate):
    at: tuple[int, ...] = (1, 2)


@dataclass
class NaNOption(Rate):
    at: float = float("nan")


class RaisesInBegin(Rate):
    def begin(self, layer):
        raise KeyError("begin")


class RaisesInObserve(Rate):
    needs = frozenset({"membrane"})

    def observe(self, layer, state, spikes, membrane):
        return state + membrane.no_such_method()


class RaisesInEndBatch(Rate):
    def end_batch(self, layer, state):
        raise OptionError("end of batch")


class Refuses(Rate):
    def begin(self, layer):
        raise PluginError("not this layer")


class RaisesInScore(Rate):
    def score(self, layer, state):
        return state / [1]


class WantsWhatItDidNotAskFor(Rate):
    def observe(self, layer, state, spikes, membrane):
        return state + membrane.abs().transpose(0, 2).flatten(1).sum(1)


class ChangesSpikes(Rate):
    def observe(self, layer, state, spikes, membrane):
        return super().observe(layer, state, spikes.mul_(2), membrane)


class ChangesWeights(Rate):
    def score(self, layer, state):
        layer.weight.zero_()
        return state


class Guesses(Rate):
    def score(self, layer, state):
        return state + torch.rand(len(state))


class Accumulates(Rate):
    total: Any = 0

    def observe(self, layer, state, spikes, membrane):
        self.total = self.total + super().observe(layer, 0, spikes, membrane)
        return state

    def score(self, layer, state):
        return self.total


class CountsCalls(Rate):
    def observe(self, layer, state, spikes, membrane):
        return super().observe(layer, state, spikes, membrane) / 2


class KeepsStateInSelf(Rate):
    def begin(self, layer):
        self.state = super().begin(layer)

    def observe(self, layer, state, spikes, membrane):
        self.state = super().observe(layer, self.state, spikes, membrane)

    def score(self, layer, state):
        return self.state


class MergesAMaximum(Rate):
    def merge(self, layer, state, other):
        return state.maximum(other)


class DividesByZero(Rate):
    def score(self, layer, state):
        return state / state.max()


class IsNaN(Rate):
    def score(self, layer, state):
        return state.log() * torch.nan


class GivesAList(Rate):
    def score(self, layer, state):
        return state.tolist()


class OnlyOne(Rate):
    def score(self, layer, state):
        return state.sum()


class PerSample(Criterion):
    """Takes the samples for channels."""

    name = "per_sample"
    needs = frozenset({"spikes"})

    def observe(self, layer, state, spikes, membrane):
        found = spikes.transpose(0, 1).flatten(1).sum(1)
        return found if state is None else state + found

    def end_batch(self, layer, state):
        return None

    def score(self, layer, state):
        return torch.zeros(3)


class ConvolutionsOnly(Rate):
    def observe(self, layer, state, spikes, membrane):
        return state + spikes.sum((0, 1, 3, 4))


class NotLinear(Rate):
    def observe(self, layer, state, spikes, membrane):
        return state + spikes.sum(-1).sum((0, 1))[: len(state)] if spikes.dim() == 3 else state


CRITERIA = {
    Nameless: "'name' must be the name that users write, not ''",
    ByWeight: "one score per weight, [6, 3, 3, 3], not [6]",
    NeedsAWord: "needs must be a frozenset",
    NeedsTheUnknown: "voltage",
    TensorOption: "can't be stored as JSON",
    TupleOption: "use plain values",
    NaNOption: "can't be stored as JSON",
    RaisesInBegin: "begin() failed: KeyError: 'begin'",
    RaisesInObserve: "observe() failed: AttributeError",
    RaisesInEndBatch: "end_batch() failed: OptionError: end of batch",
    Refuses: "conv2d: not this layer",
    RaisesInScore: "score() failed: TypeError",
    WantsWhatItDidNotAskFor: "observe() failed: AttributeError: 'NoneType'",
    ChangesSpikes: "changes in place",
    ChangesWeights: "changes in place",
    Guesses: "other scores the second time",
    Accumulates: "other scores the second time",
    CountsCalls: "at once and one by one",
    KeepsStateInSelf: "folded in turns disturb each other",
    MergesAMaximum: "put together by merge(), give other scores",
    DividesByZero: "conv2d: silent neurons: DividesByZero: scores must be finite",
    IsNaN: "conv2d: IsNaN: scores must be finite",
    GivesAList: "must return a tensor, not list",
    OnlyOne: "one score per channel, [6], not []",
    PerSample: "one score per channel, [6], not [3]",
    ConvolutionsOnly: "conv1d: ConvolutionsOnly: observe() failed",
    NotLinear: "linear: NotLinear",
}


@pytest.mark.parametrize(("cls", "said"), CRITERIA.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_criterion(cls: type[Criterion], said: str) -> None:
    assert said in broken(check_criterion, cls())


class _ByInputs(Criterion):
    """What a weight's input carries, over all samples (Sun et al., "Wanda", 2023)."""

    name: ClassVar[str] = "by_inputs"
    granularity: ClassVar[Granularity] = "weight"
    needs: ClassVar[frozenset[Signal]] = frozenset({"inputs"})

    def score(self, layer: Layer, state: Any) -> Tensor:
        assert layer.inputs is not None
        return (layer.rows.abs() * layer.inputs.square[:, None].sqrt()).reshape(layer.weight.shape)


def test_a_criterion_gets_the_inputs_that_it_asks_for() -> None:
    check_criterion(_ByInputs())
