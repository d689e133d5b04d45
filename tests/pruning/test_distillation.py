"""A teacher's class scores and firing rates, and the penalty on spikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import snncompress
from snncompress import DataError, Distillation, Epoch, ModelError, OptionError, OwnNeurons
from snncompress.contract.detection import find_adapter
from snncompress.interfaces import Observer
from snncompress.running.firing import watched
from tests.equivalence import same, snapshot
from tests.pruning.test_recipes import T, X, Y, gradient, lively, plain, trained, weights


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return (v >= 1).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


class Own(nn.Module):
    """[N, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return Fire.apply(x)


def networks() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
    import snntorch
    from spikingjelly.activation_based import functional, neuron

    class Loop(nn.Module):
        """A loop of its own, states handed on."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.lif, self.b = nn.Linear(16, 8), snntorch.Leaky(beta=0.9), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            mem, out = self.lif.reset_mem(), []
            for step in x:
                spikes, mem = self.lif(self.a(step), mem)
                out.append(self.b(spikes))
            return torch.stack(out)

    def of(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), *layers, nn.Linear(8, 4))

    def multi_step(fire: nn.Module) -> nn.Module:
        net = of(fire)
        functional.set_step_mode(net, "m")
        return net

    steps = {"timesteps": T}
    return {
        "single-step": (lambda: of(neuron.LIFNode()), steps),
        "multi-step": (lambda: multi_step(neuron.LIFNode()), steps),
        "rate coded": (lambda: multi_step(neuron.DSRIFNode(T=T, v_threshold=2.0)), steps),
        "snntorch": (lambda: of(snntorch.Leaky(beta=0.9, init_hidden=True)), steps),
        "loop": (Loop, steps),
        "forward=": (Loop, {"forward": lambda model, batch: model(batch[0].expand(T, -1, -1))}),
        "own": (lambda: of(Own()), {**steps, "adapter": OwnNeurons(Own, time_dim=1)}),
    }


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    build, how = networks()[name]
    net = build()
    lively(next(m for m in net.modules() if isinstance(m, nn.Linear)))
    return net, how


@pytest.mark.parametrize("name", networks())
def test_the_penalty_is_the_mean_firing_rate_and_lowers_it(name: str) -> None:
    net, how = built(name)
    fired = [row.firing_rate for row in snncompress.profile(net, (X, Y), **how).layers if row.firing_rate is not None]
    history: list[Epoch] = []
    options: dict[str, Any] = {"loss": lambda output, y: 0 * output.mean(), "optimizer": SGD, "lr": 0.5, **how}
    snncompress.finetune(net, (X, Y), epochs=8, rate_penalty=2.0, on_epoch=lambda e: history.append(e[-1]), **options)
    assert history[0].firing_rate == pytest.approx(sum(fired) / len(fired))  # one population
    assert history[0].loss == pytest.approx(2 * sum(fired) / len(fired))
    assert 0 < history[0].firing_rate > 1.2 * history[-1].firing_rate  # spikes alone were trained on
    assert not any(module._forward_hooks for module in net.modules())


def test_the_gradient_of_the_penalty_by_hand() -> None:
    net = plain()
    start, slope = weights(net), gradient(net)
    adapter, spikes = find_adapter(net), list[Tensor]()
    stops = [net[i].register_forward_hook(lambda m, args, s: spikes.append(s)) for i in (1, 4)]
    adapter.reset(net)
    for _ in range(T):
        net(X)
    [stop.remove() for stop in stops]
    rate = sum(s.sum() for s in spikes) / sum(s.numel() for s in spikes)
    found = torch.autograd.grad(rate, list(net.parameters()), allow_unused=True)
    pull = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(net.parameters(), found, strict=True)])  # fmt: skip
    assert float(pull.abs().sum()) > 0
    adapter.reset(net)
    trained(net, optimizer=SGD, lr=1.0, rate_penalty=3.0)
    torch.testing.assert_close(weights(net), start - slope - 3 * pull)


def scores(net: nn.Module) -> Tensor:
    adapter = find_adapter(net)
    adapter.reset(net)
    found = torch.stack([net(X) for _ in range(T)]).mean(0)
    adapter.reset(net)
    return found


def test_distillation_by_hand() -> None:
    net, (teacher, _) = plain(), built("single-step")
    before = snapshot(teacher)
    history: list[Epoch] = []
    asked = Distillation(teacher, weight=0.75, temperature=3.0)
    trained(net, lr=0.0, teacher=asked, on_epoch=history.extend)
    student, taught = scores(plain()).detach(), scores(teacher).detach()
    p, q = torch.softmax(taught / 3, 1), torch.softmax(student / 3, 1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.25 * F.cross_entropy(student, Y) + 0.75 * 9 * divergence
    assert history[0].loss == pytest.approx(float(expected), rel=1e-5)
    assert same(before, {**snapshot(teacher), "rng": before["rng"]})


@pytest.mark.parametrize("teacher", ["snntorch", "an ordinary network"])
def test_a_teacher_of_another_kind_without_labels(teacher: str) -> None:
    net = plain()
    wise = built("snntorch")[0] if teacher == "snntorch" else nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    history: list[Epoch] = []
    asked = Distillation(wise, weight=1.0)
    trained(net, X, epochs=12, lr=0.02, teacher=asked, on_epoch=lambda e: history.append(e[-1]))
    assert history[-1].loss < 0.9 * history[0].loss
    assert history[0].accuracy is None


def test_the_networks_own_channels_are_matched() -> None:
    dense = plain()
    lively(dense[0], dense[3])
    dense[3].weight.data.mul_(8)
    options: dict[str, Any] = {"data": (X, Y), "timesteps": T, "skip": [], "repair": None}
    small = snncompress.apply(dense, "random", 0.5, None, **options)
    gone = snncompress.plan_of(small).removed_channels("neuron")
    kept = {name: [c for c in range(width) if c not in gone[name]] for name, width in (("1", 12), ("4", 8))}
    fired: list[dict[str, Tensor]] = []
    for net in (small, dense):
        adapter = find_adapter(net)
        with torch.no_grad(), watched(net, adapter) as firing:
            scores(net)
            fired.append(firing.rates())
    apart = [F.mse_loss(fired[0][name], fired[1][name][:, kept[name]]) for name in kept]
    history: list[Epoch] = []
    asked = Distillation(dense, weight=0.0, rates=5.0)
    nothing: dict[str, Any] = {"loss": lambda output, y: 0 * output.mean(), "on_epoch": lambda e: history.append(e[-1])}
    trained(small, epochs=10, lr=0.01, teacher=asked, **nothing)
    assert float(sum(apart)) > 0
    assert history[0].loss == pytest.approx(5 * float(sum(apart)) / 2, rel=1e-5)
    assert history[-1].loss < 0.9 * history[0].loss


class Detaching(type(find_adapter(plain()))):  # type: ignore[misc]
    """An adapter that hands spikes on without their gradient."""

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        return super().observe(neuron, lambda s, u: observer(s.detach(), u), membrane=membrane)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"teacher": nn.Linear(16, 3)}, OptionError, r"scores are \[12, 3\], the network's \[12, 4\]"),
        ({"teacher": nn.Linear(15, 4)}, DataError, "Linear failed on a batch"),
        ({"teacher": Distillation(nn.Linear(16, 4), rates=1.0)}, OptionError, "matches neurons of the same name"),
        ({"rate_penalty": 1.0, "adapter": Detaching()}, ModelError, "have no gradient"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    net = plain()
    before = weights(net)
    with pytest.raises(kind, match=said):
        trained(net, **options)
    assert torch.equal(weights(net), before)


def test_an_ordinary_network_fires_nothing() -> None:
    with pytest.raises(OptionError, match="no spiking neurons"):
        snncompress.finetune(nn.Linear(16, 4), (X, Y), rate_penalty=1.0)


@pytest.mark.parametrize(
    "options", [{"weight": 1.5}, {"weight": True}, {"temperature": 0}, {"rates": -1}, {"temperature": float("inf")}]
)
def test_numbers_of_a_distillation(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"Distillation: {next(iter(options))} must be a number"):
        Distillation(plain(), **options)
