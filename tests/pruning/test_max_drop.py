"""The smallest network that keeps its accuracy on data that were held out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, OptionError, plan_of, profile
from snncompress.contract.detection import find_adapter
from snncompress.extend import Criterion, Layer
from snncompress.running.data import Feed

T = 3
X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).round()
Y = X[:, 0].long()
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]


class Chosen(Criterion):
    """Channels 0 and 1 matter most, in this order."""

    name = "chosen"

    def score(self, layer: Layer, state: object) -> Tensor:
        return 1 / torch.arange(1.0, layer.channels + 1).double() ** 3


def net() -> nn.Module:
    """Channel 0 tells the classes apart, and no other does."""
    model = nn.Sequential(layer.Linear(6, 16, bias=False), neuron.IFNode(), layer.Linear(16, 2))
    with torch.no_grad():
        model[0].weight.zero_()[0, 0] = 1.0
        model[0].weight[1:, 1] = 1.0
        model[2].weight.zero_()[:, 0] = torch.tensor([-1.0, 1.0])
        model[2].bias.copy_(torch.tensor([0.5, 0.0]))
    return model


def smallest(data: Any = BATCHES, **options: Any) -> nn.Module:
    options = {
        "budget": {"params": 1.0},
        "bits": None,
        "skip": [],
        "repair": None,
        "criterion": Chosen(),
        "max_drop": 0.0,
        **options,
    }
    return snncompress.apply(net(), data=data, timesteps=T, **options)


def test_all_goes_that_nothing_is_lost_by() -> None:
    small = smallest()
    origin = plan_of(small).origin
    assert small[0].out_features == 1  # channel 0
    assert plan_of(small).removed_channels()["0"] == list(range(1, 16))
    trials = origin["trials"]
    assert trials[0] == {"asked": 1.0, "reached": 1.0, "accuracy": 1.0}
    assert trials[-1]["reached"] == pytest.approx(10 / 130)  # 6 + 2 · 1 + 2 of 6 · 16 + 2 · 16 + 2
    assert all((trial["accuracy"] is None) == (trial["reached"] > trial["asked"]) for trial in trials)
    best = min((t for t in trials if t["accuracy"] == 1.0), key=lambda t: t["reached"])
    assert origin["budget"] == {"params": best["asked"]}
    assert (origin["max_drop"], origin["dense_accuracy"]) == (0.0, 1.0)
    kept = [batch for number, batch in enumerate(BATCHES, 1) if number != 5]
    again = snncompress.apply(
        net(), Chosen(), bits=None, data=kept, timesteps=T, skip=[], repair=None, budget=origin["budget"]
    )
    assert plan_of(again).edits == plan_of(small).edits


def test_what_the_labels_need_stays() -> None:
    """The classes are now told apart by channel 15, which goes first."""
    turned = net()
    with torch.no_grad():
        turned[0].weight.copy_(turned[0].weight.flip(0))
        turned[2].weight.copy_(turned[2].weight.flip(1))
    options: dict[str, Any] = {"bits": None, "skip": [], "repair": None, "timesteps": T}
    options["budget"] = {"params": 0.9}
    with pytest.raises(
        OptionError, match=r"The mildest budget, 0\.9 of the params, loses more than max_drop=0 already"
    ):
        snncompress.apply(turned, Chosen(), data=BATCHES, max_drop=0.0, **options)
    small = snncompress.apply(turned, Chosen(), data=BATCHES, max_drop=0.99, **options)
    trials = plan_of(small).origin["trials"]
    assert small[0].out_features == 1
    assert (trials[0]["asked"], trials[0]["accuracy"] < 1) == (0.9, True)


def test_labels_elsewhere() -> None:
    small = smallest(X, validation=(X, Y), budget={"size_kb": 0.3, "synops": 0.9})
    assert small[0].out_features == 1
    assert profile(small, X, timesteps=T).size_mb <= 0.0003
    assert set(plan_of(small).origin["budget"]) == {"size_kb", "synops", "size"}  # a share now, too


def feed(data: Any, **options: Any) -> Feed:
    return Feed(find_adapter(net()), data, **{"timesteps": T, **options})


def seen(part: Feed) -> list[list[float]]:
    return sorted(row for batch in part for row in batch.x.tolist())


@pytest.mark.parametrize("batches", [1, 3, 5, 11])
def test_what_is_held_out_is_nowhere_else(batches: int) -> None:
    x = torch.arange(44.0).view(44, 1)
    data = list(zip(x.tensor_split(batches), x.flatten().long().tensor_split(batches), strict=True))
    work, out = feed(data).parted()
    assert sorted(seen(work) + seen(out)) == x.tolist()
    assert len(seen(out)) in (8, 9)
    assert all(batch.x.flatten().tolist() == batch.y.tolist() for part in (work, out) for batch in part)
    assert seen(feed(data).parted()[1]) == seen(out)


@pytest.mark.parametrize(
    ("data", "options", "kind", "said"),
    [
        (BATCHES, {"max_drop": 1.0}, OptionError, r"a number in \[0, 1\)"),
        (BATCHES, {"max_drop": True}, OptionError, r"a number in \[0, 1\)"),
        (BATCHES, {"max_drop": None, "validation": BATCHES}, OptionError, "there is none"),
        (None, {}, OptionError, "pass labelled data"),
        (X, {}, DataError, "no labels, and max_drop"),
        (BATCHES, {"checkpoint": "run"}, OptionError, "tries several networks"),
        ((X[:1], Y[:1]), {}, DataError, "No samples of these data can be held out"),
        (BATCHES, {"budget": {"params": 0.001}}, OptionError, "can't be met"),
        (BATCHES, {"budget": {"macs": 0.5}}, OptionError, "lowers the macs, and there is none"),
    ],
)
def test_what_cannot_be(data: Any, options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        smallest(data, **options)


def test_even_the_mildest_loses_too_much() -> None:
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model[2].weight.neg_()  # type: ignore[operator]

    with pytest.raises(OptionError, match=r"The mildest budget, 1 of the energy, loses more .* is 0\.\d+ and was"):
        smallest(finetune=spoil, criterion="magnitude", bits=8, budget=None)
