"""Just the channels that were chosen are tried: groups that don't bear it stay, and the others go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snncompress_schedules import Iterative
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.structure import confirming
from tests.equivalence import largest_difference

X = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DOUBLES = "what last computes would change"


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1, step_mode="m")


class Moody(nn.Module):
    """Behind ``a`` it doubles what it sees at one width, which no trial of halves and shares of 8 channels meets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.a, self.fire_a, self.b, self.fire_b = nn.Linear(6, 8), fire(), nn.Linear(8, 12), fire()
        self.last, self.fire_last, self.head = nn.Linear(12, 8), fire(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire_b(self.b(self.fire_a(self.a(x))))
        x = self.fire_last(self.last(2 * x if self.a.out_features == self.width else x))
        return self.head(x)


def pruned(model: Moody, **options: Any) -> tuple[list[int], dict[str, str]]:
    small = snncompress.apply(model, "random", bits=None, data=X, repair=None, skip=[], **options)
    assert largest_difference(model, small, Feed(find_adapter(model), X)) < 1e-9
    return [m.out_features for m in (small.a, small.b, small.last)], dict(snncompress.plan_of(small).skipped)


def test_what_does_not_bear_the_choice_stays() -> None:
    widths, skipped = pruned(Moody(7).double().eval(), ratio=0.1)
    assert widths == [8, 10, 7]  # ⌈0.1 · 8⌉ of ``last`` go, ⌈0.1 · 12⌉ of ``b``
    assert set(skipped) == {"a", "head"}
    assert DOUBLES in skipped["a"]


def test_in_a_later_step_others_are_chosen() -> None:
    widths, skipped = pruned(Moody(7).double().eval(), ratio=0.2, scheduler=Iterative(steps=2))
    assert widths == [6, 9, 6]  # in the first step 1 can't go, in the second 2 can
    assert set(skipped) == {"head"}


def test_the_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirming, "_MOST", 0)
    with pytest.raises(ModelError, match=f"didn't show which layers must keep theirs: .*{DOUBLES}.*Name the layers"):
        pruned(Moody(7).double().eval(), ratio=0.1)
