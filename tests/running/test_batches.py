"""Whatever users hand in: what is a pair, where samples stand, and a tensor that a model writes to."""

from __future__ import annotations

import types
import warnings
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, KeptStateWarning
from snncompress.contract.detection import find_adapter
from snncompress.running.batches import own_copy, split
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores, scores_and_labels


class BatchFirst(nn.Module):
    """[N, T, 4] → [N, T, 3]; with ``time_first`` [T, N, 4] → [T, N, 3]; wrapped up as ``wrap`` says."""

    def __init__(self, wrap: Any = lambda out: out, *, time_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f1, self.l1 = nn.Linear(4, 6), snn.Leaky(beta=0.9, threshold=0.2)
        self.f2, self.l2 = nn.Linear(6, 3), snn.Leaky(beta=0.9, threshold=0.2)
        self.wrap, self.time = wrap, 0 if time_first else 1

    def forward(self, x: Tensor) -> Any:
        a, b, out = self.l1.init_leaky(), self.l2.init_leaky(), []
        for step in x.unbind(self.time):
            p, a = self.l1(self.f1(step), a)
            q, b = self.l2(self.f2(p), b)
            out.append(q)
        return self.wrap(torch.stack(out, self.time))


class Net(nn.Module):
    """Multi-step, static input; what it does to it first is up to ``before``."""

    def __init__(self, before: Any = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            layer.Linear(8, 10), neuron.LIFNode(v_threshold=0.2), layer.Linear(10, 6), neuron.IFNode(v_threshold=0.2),
            layer.Linear(6, 3),
        )  # fmt: skip
        functional.set_step_mode(self, "m")
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.before(x))


# -- pairs and labels --

X = torch.rand(4, 3, 8)
BOXES = [[torch.rand(2, 4)], [], [torch.rand(1, 4)], []]


@pytest.mark.parametrize(
    "y",
    [
        torch.arange(4), torch.rand(4, 3, 8), torch.rand(4, 8, 8), torch.randint(0, 3, (4, 8, 8)), torch.rand(4, 1),
        torch.rand(3, 4, 8), torch.ones(4, 3, dtype=torch.bool), BOXES, {"boxes": torch.rand(4, 2)}, (1, 2, 3, 4),
        "name", np.arange(4),
    ],
)  # fmt: skip
def test_a_tuple_is_a_pair_whatever_its_labels(y: Any) -> None:
    feed = Feed(find_adapter(Net()), (X, y))
    (batch,) = list(feed)
    assert batch.x is X
    assert (batch.y is y) or torch.equal(batch.y, torch.from_numpy(y))


def test_several_targets_are_not_as_many_samples() -> None:
    for y in ((torch.rand(4), torch.rand(4, 2)), [torch.rand(4), torch.rand(4), torch.rand(4)]):
        for data in ((X.transpose(0, 1), y), [[X.transpose(0, 1), y]]):  # [T, N, C]
            assert snncompress.profile(Net(), data).n_samples == 4


def test_what_goes_on_being_several_batches() -> None:
    for data, number in (([X, X], 2), ([X, torch.rand(2, 3, 8)], 2), ([X, BOXES], 1), ([X, torch.rand(4)], 1)):
        assert len(list(Feed(find_adapter(Net()), data))) == number
    pairs = ((X, torch.arange(4)), (X, torch.arange(4)))
    assert [batch.samples for batch in Feed(find_adapter(Net()), pairs)] == [4, 4]


def test_labels_of_batches_for_forward() -> None:
    y = torch.arange(4)
    named = types.SimpleNamespace(image=X, y=y)
    for raw in ({"image": X, "labels": y}, (X, torch.ones(4), y), [X, torch.ones(4), y], named, {"x": X, "target": y}):
        found, labels = split(raw)
        assert found is raw
        assert labels is y
    samples = [(X[0], 1), (X[1], 2), (X[2], 0)]  # a collate_fn that stacks nothing
    assert split(samples) == (samples, None)


@pytest.mark.parametrize(
    ("raw", "run"),
    [
        (lambda x, y: {"image": x, "label": y}, lambda m, b: m(b["image"])),
        (lambda x, y: (x, torch.ones(5), y), lambda m, b: m(b[0])),
        (lambda x, y: types.SimpleNamespace(x=x, y=y), lambda m, b: m(b.x)),
        (lambda x, y: ((x, x), y), lambda m, b: m(b[0][0])),
    ],
)
def test_such_batches_train_score_and_are_counted(raw: Any, run: Any) -> None:
    net, x, y = Net(), torch.rand(4, 5, 8), torch.arange(5) % 3
    data = [raw(x, y)] * 2
    expected = snncompress.evaluate(net, (x, y))
    assert snncompress.evaluate(net, data, forward=run).accuracy == expected.accuracy
    assert snncompress.profile(net, data, forward=run).n_samples == 10
    small = snncompress.apply(net, "taylor", 0.5, None, data=data, forward=run, finetune=1, skip=[])
    assert small.body[0].weight.shape == (5, 8)


def test_a_loss_gets_a_batch_that_names_no_labels() -> None:
    x, t = torch.rand(4, 5, 8), torch.arange(5) % 3

    def loss(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output.mean(0), batch["class"])

    data = [{"image": x, "class": t}]
    small = snncompress.apply(
        Net(), "taylor", 0.5, None, data=data, forward=lambda m, b: m(b["image"]), loss=loss, skip=[]
    )
    assert small.body[0].weight.shape == (5, 8)


def test_lists_of_boxes_go_to_the_loss_as_they_are() -> None:
    seen = []

    def loss(output: Tensor, boxes: Any) -> Tensor:
        seen.append(boxes)
        return sum((output[:, n].sum() * len(b) for n, b in enumerate(boxes)), output.sum())

    small = snncompress.apply(
        Net(), "taylor", 0.5, None, data=[(torch.rand(3, 4, 8), BOXES)], loss=loss, finetune=1, skip=[]
    )
    assert small.body[0].weight.shape == (5, 8)
    assert all(len(boxes) == 4 for boxes in seen)
    assert torch.equal(seen[0][0][0], BOXES[0][0])


def test_targets_of_every_timestep_and_the_number_of_samples() -> None:
    """Regression, time first: neither y's nor x's first axis is the number of samples."""
    x, y = torch.rand(7, 4, 8), torch.rand(7, 4, 3)
    net = Net()
    assert snncompress.profile(net, (x, y)).n_samples == 4
    loss = lambda out, target: nn.functional.mse_loss(out, target)  # noqa: E731
    small = snncompress.apply(net, "taylor", 0.5, None, data=(x, y), loss=loss, finetune=1, skip=[])
    assert small.body[0].weight.shape == (5, 8)


@pytest.mark.parametrize("y", [torch.tensor(1), torch.ones(4).to_sparse(), BOXES, torch.ones(4, dtype=torch.cfloat)])
def test_labels_that_are_no_classes(y: Any) -> None:
    with pytest.raises(DataError, match=r"Labels must be class indices.*loss=lambda"):
        snncompress.evaluate(Net(), (torch.rand(3, 4, 8), y))


# -- outputs --


@pytest.mark.parametrize("n", [2, 5, 9])
@pytest.mark.parametrize(
    "wrap", [lambda out: out, lambda out: (out, None), lambda out: {"aux": out[:1], "logits": out}, lambda out: [out]]
)
def test_samples_first_and_time_first_are_told_apart(n: int, wrap: Any) -> None:
    """5 timesteps; with 5 samples shapes alone can't tell."""
    a, b = BatchFirst(wrap), BatchFirst(wrap, time_first=True)
    x, y = torch.rand(n, 5, 4), torch.arange(n) % 3
    scores = class_scores(BatchFirst()(x), batch_first=True)
    right = float((scores.argmax(1) == y).double().mean())
    for net, data in ((a, (x, y)), (b, (x.transpose(0, 1), y))):
        assert snncompress.evaluate(net, data).accuracy == pytest.approx(right)
        p = snncompress.profile(net, data)
        assert (p.n_samples, p.n_mac) == (n, 5 * 4 * 6)
        assert snncompress.profile(net, data[0]).n_samples == n
        analysis = snncompress.temporal_analysis(net, data)
        assert (analysis.timesteps, analysis.n_samples) == (5, n)
        assert analysis.accuracy[-1] == pytest.approx(right)


def test_the_loss_averages_over_time_not_over_samples() -> None:
    """Where T = N, cross-entropy over the wrong axis is another number."""
    net, x, y = BatchFirst(), torch.rand(5, 5, 4), torch.arange(5) % 3
    expected = nn.functional.cross_entropy(net(x).mean(1), y)
    assert torch.allclose(scores_and_labels(net(x), y, batch_first=True)[0], net(x).mean(1))
    losses = []

    def watch(output: Any, labels: Any) -> Tensor:
        losses.append(nn.functional.cross_entropy(output.mean(1), labels).detach())
        return nn.functional.cross_entropy(output.mean(1), labels)

    ours = snncompress.gradient_flow(net, (x, y)).norms
    theirs = snncompress.gradient_flow(net, (x, y), loss=watch).norms
    assert ours == pytest.approx(theirs)
    assert torch.allclose(losses[-1], expected)


@pytest.mark.parametrize("wrap", [lambda out: (out, out), lambda out: {"out": out}])
def test_single_steps_that_return_several_tensors_are_stacked(wrap: Any) -> None:
    class Step(Net):
        def forward(self, x: Tensor) -> Any:
            return wrap(self.body(x))

    net, plain = Step(), Net()
    for model in (net, plain):
        functional.set_step_mode(model, "s")
    data = (torch.rand(4, 8), torch.arange(4) % 3)
    assert snncompress.evaluate(net, data, timesteps=3) == snncompress.evaluate(plain, data, timesteps=3)


# -- in place --


def halve(x: Tensor) -> Tensor:
    return x.mul_(0.5)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("timesteps", [None, 4])
def test_what_a_model_writes_to_is_a_copy(mode: str, timesteps: int | None) -> None:
    net = Net(halve)
    functional.set_step_mode(net, mode)
    shape = (4, 5, 8) if timesteps is None and mode == "m" else (5, 8)
    x, y = torch.rand(shape), torch.arange(5) % 3
    before = x.clone()
    small = snncompress.apply(net, "taylor", 0.5, 4, data=(x, y), timesteps=timesteps, skip=[], finetune=1)
    assert small.body[0].weight.shape == (5, 8)
    snncompress.profile(net, x, timesteps=timesteps)
    snncompress.finetune(net, (x, y), timesteps=timesteps)
    snncompress.evaluate(net, (x, y), timesteps=timesteps)
    assert torch.equal(x, before)


def test_neither_does_forward_nor_a_loss_reach_the_users_batch() -> None:
    def run(model: nn.Module, batch: Any) -> Any:
        batch["more"][0].zero_()
        batch["extra"] = 1
        return model(batch["image"].mul_(2))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.mean(0), y.clamp_(0, 1))

    raw = {"image": torch.rand(4, 5, 8), "more": [torch.ones(2)], "y": torch.arange(5) % 3}
    before = {"image": raw["image"].clone(), "y": raw["y"].clone()}
    snncompress.apply(Net(), "taylor", 0.5, None, data=[raw], forward=run, loss=loss, finetune=1, skip=[])
    assert set(raw) == {"image", "more", "y"}
    assert float(raw["more"][0].sum()) == 2
    assert all(torch.equal(raw[name], value) for name, value in before.items())


def test_a_copy_of_what_cannot_be_copied_is_itself() -> None:
    generator = (n for n in range(3))
    assert own_copy({"g": generator})["g"] is generator


# -- tensors that no network takes --


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(1.0), "a single number"),
        (torch.rand(3, 8).to_sparse(), "layout sparse_coo"),
        (torch.rand(3, 0), "empty"),
        (torch.full((3, 8), float("nan")), "NaN"),
        (torch.full((3, 8), complex(0, float("nan"))), "NaN"),
    ],
)
def test_tensors_that_no_network_takes(x: Tensor, message: str) -> None:
    for call in (snncompress.profile, snncompress.evaluate, snncompress.temporal_analysis):
        with pytest.raises(DataError, match=message):
            call(Net(), x, timesteps=3)
    with pytest.raises(DataError, match=message):
        snncompress.apply(Net(), data=[x, x], timesteps=3)


def test_more_or_fewer_labels_than_samples() -> None:
    """Of T = 3 steps, 3 labels would pass for those of 3 samples, the output being [T, N, K]."""
    with pytest.raises(DataError, match=r"Batch 0 has 3 labels for 4 samples"):
        snncompress.evaluate(Net(), (torch.rand(4, 8), torch.arange(3)), timesteps=3)


# -- state that stays --


class Remembers(Net):
    """Adds what it saw last, in a tensor, a list or a buffer of its own; ``harmless`` only writes it down."""

    def __init__(self, where: str, *, harmless: bool = False) -> None:
        super().__init__()
        self.where, self.harmless = where, harmless
        self.trace: Any = [torch.zeros(())] if where == "list" else torch.zeros(())
        if where == "buffer":
            del self.trace
            self.register_buffer("trace", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        last = self.trace[0] if self.where == "list" else self.trace
        out = self.body(x)
        seen = (last * 0.5 + out.mean() + 1).detach()
        self.trace = [seen] if self.where == "list" else seen
        return out if self.harmless else out + last


@pytest.mark.parametrize("where", ["tensor", "list", "buffer"])
def test_state_kept_from_batch_to_batch_is_told(where: str) -> None:
    x, y = torch.rand(4, 5, 8), torch.arange(5) % 3
    for call in (snncompress.profile, snncompress.evaluate, snncompress.finetune):
        with pytest.warns(KeptStateWarning, match=r"Remembers answers.*'trace'.*order of the batches.*forward\(\)"):
            call(Remembers(where), (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snncompress.profile(Remembers(where, harmless=True), (x, y))


def test_the_warning_points_at_the_users_line() -> None:
    with pytest.warns(KeptStateWarning) as told:
        snncompress.profile(Remembers("tensor"), torch.rand(4, 5, 8))
    assert told[0].filename == __file__
    with pytest.warns(KeptStateWarning) as told:
        snncompress.finetune(Remembers("tensor"), (torch.rand(4, 5, 8), torch.arange(5) % 3))
    assert told[0].filename == __file__
