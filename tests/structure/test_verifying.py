"""How the groups that break a trial are found: by halves, and never one by one where all is well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, ModelError
from snncompress.model.network import ChannelGroup, Member
from snncompress.structure.elimination import set_aside, sound_together
from snncompress.structure.trial import Flaw


def search(count: int, broken: set[int]) -> tuple[list[int], dict[int, str], int]:
    """Those kept and those refused of ``count`` groups, and the number of trials."""
    trials = 0
    refused: dict[int, str] = {}

    def difference(some: list[Any]) -> Flaw | None:
        nonlocal trials
        trials += 1
        return Flaw("it breaks") if broken & {group for group, _ in some} else None

    kept = sound_together([(n, torch.zeros(1)) for n in range(count)], difference, refused.__setitem__)
    return [group for group, _ in kept], refused, trials


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))))
def test_the_broken_are_found_by_halves(case: tuple[int, set[int]]) -> None:
    count, broken = case
    kept, refused, trials = search(count, broken)
    assert kept == [n for n in range(count) if n not in broken]
    assert refused == dict.fromkeys(sorted(broken), "it breaks")
    assert trials <= 1 + 2 * len(broken) * (count - 1).bit_length()


def test_where_all_are_sound_one_trial_does() -> None:
    assert search(100, set())[2] == 1


def test_what_breaks_only_with_another_is_refused_with_it() -> None:
    refused: dict[int, str] = {}

    def difference(some: list[Any]) -> Flaw | None:
        return Flaw("they clash") if {2, 5} <= {group for group, _ in some} else None

    kept = sound_together([(n, torch.zeros(1)) for n in range(8)], difference, refused.__setitem__)
    assert [group for group, _ in kept] == [0, 1, 2, 3, 4, 6, 7]
    assert refused == {5: "they clash"}


class Sulky(nn.Module):
    """Fails once the channels of the layer that it wraps were removed on a model that isn't a trial's."""

    def __init__(self) -> None:
        super().__init__()
        self.tired = False

    def forward(self, x: Tensor) -> Tensor:
        if self.tired:
            raise RuntimeError("no more")
        return x


def test_the_result_is_run_before_it_is_handed_out() -> None:
    net = nn.Sequential(layer.Linear(4, 8), neuron.IFNode(), Sulky(), layer.Linear(8, 3))

    def train(model: nn.Module) -> None:
        model[2].tired = True

    with pytest.raises(ModelError, match="fails where the original runs: no more"):
        snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(2, 4), timesteps=2, skip=[], finetune=train)


def test_where_the_original_fails_too_the_data_are_to_blame() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert bool((x != 0).any()), "no spike"
            return x

    net = nn.Sequential(layer.Linear(4, 8), neuron.IFNode(1e9), Picky(), layer.Linear(8, 3))
    with pytest.raises(DataError, match="no spike"):
        snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(2, 4), timesteps=2, skip=[])


def test_what_a_difference_points_at_is_set_aside_with_its_kind() -> None:
    """Of 30 layers every third breaks: one trial shows it of the first, one that the rest is sound."""
    layers = [(ChannelGroup((Member(str(n), "out", torch.arange(4)[:, None]),), 4), torch.zeros(1)) for n in range(30)]
    tried = []

    def difference(some: list[Any]) -> Flaw | None:
        names = [group.names("out")[0] for group, _ in some]
        tried.append(len(names))
        return next((Flaw("it breaks", name, "out") for name in names if int(name) % 3 == 2), None)

    kept, doubts = set_aside(layers, difference, lambda group: int(group.names("out")[0]) % 3)
    assert tried == [30, 20]
    assert [removal[0].names("out")[0] for removal in kept] == [str(n) for n in range(30) if n % 3 != 2]
    assert [doubt.refused for doubt in doubts] == [True] + [False] * 9
    assert all(doubt.sure for doubt in doubts)
    refused: list[str] = []
    tried.clear()
    sound_together(layers, difference, lambda group, why: refused.append(group.names("out")[0]))
    assert refused == [str(n) for n in range(2, 30, 3)]
    assert tried == [30 - n for n in range(11)]
