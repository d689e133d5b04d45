"""finetune as people train: optimizers, schedules, clipping, mixed precision, validation, callbacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import DataError, Epoch, OptionError
from snncompress.contract.detection import find_adapter
from snncompress.pruning.recipe import Schedule
from tests.pruning.checkpointed_run import network

X, Y = 6 * torch.rand(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
T = 3


def trained(net: nn.Module, data: Any = (X, Y), **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return snncompress.finetune(net, data, timesteps=T, **options)


def plain() -> nn.Module:
    """Without dropout."""
    net = network("spikingjelly")
    net[2] = nn.Identity()
    return net


def lively(*layers: nn.Module) -> None:
    """Some neurons behind them fire always, some now and then."""
    for layer in layers:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        with torch.no_grad():
            weight.abs_().mul_(torch.linspace(0.05, 0.5, len(weight))[:, None])


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient(net: nn.Module) -> Tensor:
    adapter = find_adapter(net)
    adapter.reset(net)
    loss = F.cross_entropy(torch.stack([net(X) for _ in range(T)]).mean(0), Y)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    adapter.reset(net)
    return found


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_without_options_it_is_the_loop_that_anyone_would_write(framework: str) -> None:
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True)
    net, by_hand = network(framework), network(framework)
    trained(net, loader, epochs=2)
    torch.manual_seed(7)
    optimizer = Adam(by_hand.parameters(), lr=1e-3)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    adapter = find_adapter(by_hand)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            adapter.reset(by_hand)
            F.cross_entropy(torch.stack([by_hand(x) for _ in range(T)]).mean(0), y).backward()
            optimizer.step()
        schedule.step()
    assert torch.equal(weights(net), weights(by_hand))


@pytest.mark.parametrize("way", ["class", "callable", "instance"])
def test_one_step_of_another_optimizer(way: str) -> None:
    net = plain()
    start, slope = weights(net), gradient(net)
    decay = 0.01 if way == "class" else 0.0
    options: dict[str, Any] = {
        "class": {"optimizer": SGD, "lr": 0.5, "weight_decay": decay},
        "callable": {"optimizer": lambda parameters: SGD(parameters, lr=0.5)},
        "instance": {"optimizer": SGD(net.parameters(), lr=0.5)},
    }[way]
    trained(net, **options)
    torch.testing.assert_close(weights(net), start - 0.5 * (slope + decay * start))


def test_an_optimizer_of_ones_own_keeps_its_learning_rate() -> None:
    net = plain()
    own = SGD(net.parameters(), lr=0.5)
    trained(net, epochs=2, optimizer=own)
    assert own.param_groups[0]["lr"] == 0.5
    trained(net, epochs=2, optimizer=own, scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.1))
    assert own.param_groups[0]["lr"] == pytest.approx(0.005)


def test_clipped_gradients_have_the_norm_that_was_asked_for() -> None:
    net = plain()
    start, slope = weights(net), gradient(net)
    limit = 0.5 * float(slope.norm())
    trained(net, optimizer=SGD, lr=1.0, clip=limit)
    torch.testing.assert_close(weights(net), start - 0.5 * slope)


def rates(**options: Any) -> list[float]:
    seen: list[float] = []

    def note(epochs: list[Epoch]) -> None:
        assert [epoch.epoch for epoch in epochs] == list(range(1, len(epochs) + 1))
        seen.append(epochs[-1].learning_rate)

    trained(plain(), optimizer=SGD, on_epoch=note, **options)
    return seen


def test_schedules_are_stepped_when_they_want_to_be() -> None:
    assert rates(lr=0.1, epochs=3) == pytest.approx([0.1, 0.075, 0.025])  # half a cosine over three epochs
    halves = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    triangle = rates(
        data=halves, lr=0.1, epochs=3,
        scheduler=lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=4, cycle_momentum=False),
    )  # fmt: skip
    assert triangle == pytest.approx([0.1, 0.3, 0.5])  # two of four steps up in each epoch


@pytest.mark.parametrize(("mode", "validated", "left"), [("min", None, 1.0), ("max", None, 0.01), ("max", 0.1, 1.0)])
def test_a_plateau_is_one_of_loss_or_accuracy(mode: Any, validated: float | None, left: float) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = Schedule(lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=0))
    for number in (1, 2, 3):  # the loss falls, the accuracy stays, and that on other data grows, if there are any
        accuracy = None if validated is None else number * validated
        schedule.after_epoch(Epoch(number, 1 / number, 0.5, 1.0, accuracy))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(left)


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_what_an_epoch_tells(framework: str) -> None:
    net = network(framework)
    net[2] = nn.Identity()
    adapter = find_adapter(net)
    adapter.reset(net)
    with torch.no_grad():
        scores = torch.stack([net(X) for _ in range(T)]).mean(0)
    history: list[Epoch] = []
    texts: list[str] = []

    def stop(epochs: list[Epoch]) -> bool:
        history[:] = epochs
        epochs.clear()  # the list is ours
        return len(history) == 2

    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    trained(net, halves, epochs=5, lr=0.0, on_epoch=stop, progress=lambda what, done, total: texts.append(what))
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert history[0].loss == pytest.approx(float(F.cross_entropy(scores, Y)))  # the mean over samples, not batches
    assert history[0].accuracy == float((scores.argmax(1) == Y).double().mean())
    assert history[0].validation_accuracy is history[0].firing_rate is None
    first = F.cross_entropy(scores[:4], Y[:4]), (scores[:4].argmax(1) == Y[:4]).double().mean()
    so_far = f"fine-tuning, epoch 1/5: loss {float(first[0]):.4g}, accuracy {float(first[1]):.1%}"
    assert texts[:2] == ["fine-tuning, epoch 1/5", so_far]


@pytest.mark.parametrize("target", [torch.zeros(12, 1), X[:, :4]], ids=["of another shape", "of the scores' shape"])
def test_labels_that_are_no_classes(target: Tensor) -> None:
    history: list[Epoch] = []
    trained(plain(), (X, target), loss=lambda output, y: (output.mean() - y).square().mean(), on_epoch=history.extend)
    assert history[0].accuracy is None
    assert history[0].loss > 0
    with pytest.raises(DataError, match="add up to 1"):
        trained(plain(), (X, target))


def test_validation_keeps_the_best_epoch_and_leaves_training_alone() -> None:
    data = DataLoader(TensorDataset(X, Y), 4, shuffle=True)
    held_out = DataLoader(TensorDataset(X.flip(1), Y), 3, shuffle=True)  # draws from the global generator, too
    runs: dict[bool, list[Tensor]] = {}
    history: list[Epoch] = []
    for validating in (False, True):
        net, states = network("spikingjelly"), list[Tensor]()

        def note(epochs: list[Epoch], net: nn.Module = net, states: list[Tensor] = states) -> None:
            states.append(weights(net))
            history[:] = epochs

        trained(net, data, epochs=6, lr=0.05, on_epoch=note, validation=held_out if validating else None)
        runs[validating] = states
        if not validating:
            assert torch.equal(weights(net), states[-1])
    assert all(map(torch.equal, *runs.values()))
    found = [epoch.validation_accuracy for epoch in history]
    best = found.index(max(found, key=lambda value: value or 0.0))
    assert best < 5  # else this shows nothing
    assert torch.equal(weights(net), runs[True][best])
    assert snncompress.evaluate(net, held_out, timesteps=T).accuracy == found[best]


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_mixed_precision_on_a_cpu(framework: str) -> None:
    net = network(framework)
    lively(net[0], net[3])
    small = snncompress.apply(net, "magnitude", 0.25, 4, data=(X, Y), timesteps=T, skip=[])
    dtypes = set()
    small[0].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    history: list[Epoch] = []
    trained(small, epochs=15, lr=0.05, amp=True, clip=1.0, on_epoch=lambda epochs: history.append(epochs[-1]))
    assert torch.bfloat16 in dtypes
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert history[-1].loss < 0.9 * history[0].loss
    assert all(len(row.unique()) <= 16 for row in small[0].weight.detach())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of torch's classes"),
        ({"optimizer": SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, "none of this model's parameters"),
        ({"optimizer": lambda parameters: None}, "optimizer= must return a torch Optimizer, not NoneType"),
        ({"optimizer": lambda parameters: 1 / 0}, "optimizer= failed: ZeroDivisionError"),
        ({"optimizer": lambda parameters: SGD(parameters), "lr": 0.1}, "lr=0.1 says nothing to an optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS wants to compute the loss several times"),
        ({"scheduler": lambda optimizer: optimizer}, "scheduler= must return a torch LRScheduler"),
        ({"scheduler": "cosine"}, r"scheduler must be callable as scheduler\(optimizer\)"),
        ({"scheduler": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=1), "epochs": 2}, "OneCycleLR failed"),
        ({"clip": 0}, "clip is the largest norm"),
        ({"clip": "1"}, "clip must be a number"),
        ({"amp": "yes"}, "amp must be True or False"),
        ({"on_epoch": 3}, r"on_epoch must be callable as on_epoch\(epochs\)"),
        ({"rate_penalty": -1.0}, "rate_penalty must be a number of at least 0"),
        ({"rate_penalty": math.nan}, "rate_penalty must be a number of at least 0"),
        ({"teacher": "dense"}, "teacher must be a network"),
    ],
)  # fmt: skip
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        trained(plain(), **options)


def test_validation_is_looked_at_before_training() -> None:
    net = plain()
    before = weights(net)
    with pytest.raises(DataError, match="no labels"):
        trained(net, validation=X)
    assert torch.equal(weights(net), before)
