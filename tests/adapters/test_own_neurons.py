"""Spiking neurons of the user's own: named in the call, and told where they aren't."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, OwnNeurons, SNNCompressError, UnknownNeuronsWarning
from snncompress.testing import check_adapter
from tests.equivalence import same as unchanged
from tests.equivalence import snapshot


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.gt(0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0].abs() < 0.5).float()


class Direct(nn.Module):
    """[N, T, C]; compares itself."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x.select(self.axis, 0)), []
        for current in x.unbind(self.axis):
            v = v * 0.5 + current
            s = (v > 0.3).float() + (v - v.detach())
            v = (1 - s.detach()) * v
            out.append(s)
        return torch.stack(out, self.axis)


class Surrogate(Direct):
    """[T, N, C, ...]; a threshold and a decay per channel, a surrogate gradient."""

    axis = 0

    def __init__(self, channels: int, dims: int = 0) -> None:
        super().__init__()
        shape = (channels, *[1] * dims)
        self.decay = nn.Parameter(torch.linspace(0.2, 0.8, channels).view(shape))
        self.theta = torch.linspace(0.2, 0.4, channels).view(shape)

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[0]), []
        for current in x:
            v = v * self.decay + current
            s = Step.apply(v - self.theta)
            v = (1 - s.detach()) * v
            out.append(s)
        return torch.stack(out)


class Stateful(nn.Module):
    """One timestep [N, C]; keeps its potential; returns (spikes, potential)."""

    def __init__(self) -> None:
        super().__init__()
        self.mem: Any = 0.0

    def reset_mem(self) -> None:
        self.mem = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = self.mem * 0.5 + x
        s = Step.apply(self.mem - 0.3)
        self.mem = self.mem * (1 - s.detach())
        return s, self.mem


class Line(nn.Module):
    """Linear, neuron, linear, neuron, linear."""

    def __init__(self, fire: Callable[[int], nn.Module], *, mean: int | None = None, looped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f1, self.a, self.f2, self.b = nn.Linear(8, 16), fire(16), nn.Linear(16, 12), fire(12)
        self.f3 = nn.Linear(12, 4)
        with torch.no_grad():
            self.f1.weight *= 3
            self.f2.weight *= 3
        self.mean, self.looped = mean, looped

    def forward(self, x: Tensor) -> Tensor:
        out = torch.stack([self.step(s) for s in x]) if self.looped else self.step(x)
        return out if self.mean is None else out.mean(self.mean)

    def step(self, x: Tensor) -> Tensor:
        for part in (self.f1, self.a, self.f2, self.b, self.f3):
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Case:
    def __init__(self, build: Callable[[], nn.Module], own: type[nn.Module], axis: int | None, x: Tensor) -> None:
        self.build, self.x = build, x
        self.named: dict[str, Any] = {"neurons": own, "time_dim": axis}
        self.adapter = OwnNeurons(own, axis)


CASES = {
    "[N, T, C]": Case(lambda: Line(lambda c: Direct(), mean=1), Direct, 1, torch.rand(5, 6, 8)),
    "[T, N, C]": Case(lambda: Line(Surrogate), Surrogate, 0, torch.rand(6, 5, 8)),
    "stepwise": Case(lambda: Line(lambda c: Stateful(), looped=True), Stateful, None, torch.rand(6, 5, 8)),
}
Y = torch.arange(5) % 4


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def run(model: nn.Module, case: Case) -> Tensor:
    case.adapter.reset(model)
    with torch.no_grad():
        out = model(case.x)
    case.adapter.reset(model)
    return out


@pytest.mark.parametrize("criterion", ["firing_rate", "svs", "sca", "taylor", "magnitude", "random"])
def test_pruned_equals_silenced(case: Case, criterion: str) -> None:
    model = case.build().eval()
    data = (case.x, Y)
    before = snapshot(model)
    small = snncompress.apply(model, criterion, 0.5, None, data=data, skip=[], repair=None, **case.named)
    assert [len(small.get_submodule(n).weight) for n in ("f1", "f2", "f3")] == [8, 6, 4]
    gone = snncompress.plan_of(small).removed_channels()
    silenced = case.build().eval()
    with torch.no_grad():
        silenced.f2.weight[:, gone["f1"]] = 0
        silenced.f3.weight[:, gone["f2"]] = 0
    assert torch.allclose(run(small, case), run(silenced, case), atol=1e-5)
    assert unchanged(before, snapshot(model))


def test_everything_else_takes_them(case: Case, tmp_path: Path) -> None:
    model, data = case.build().eval(), (case.x, Y)
    spikes = []
    handle = model.f2.register_forward_pre_hook(lambda m, args: spikes.append(float(args[0].sum())))
    run(model, case)
    handle.remove()
    table = snncompress.profile(model, data, **case.named)
    row = next(r for r in table.layers if r.name == "f2")
    assert (row.n_mac, row.n_ac) == (0, pytest.approx(sum(spikes) * 12 / 5))
    assert (table.n_samples, table.is_spiking) == (5, True)
    small = snncompress.apply(model, "cqp", 0.5, 4, data=data, skip=[], finetune=1, **case.named)
    snncompress.finetune(small, data, **case.named)
    snncompress.evaluate(small, data, **case.named)
    small = snncompress.apply(model, "firing_rate", 0.5, 4, data=data, skip=[], repair=None, **case.named)
    snncompress.save(small, tmp_path / "a.safetensors")
    again = snncompress.load(tmp_path / "a.safetensors", into=case.build().eval(), adapter=case.adapter)
    assert torch.equal(run(again, case), run(small, case))
    assert snncompress.plan_of(small).apply(case.build(), case.adapter).f1.weight.shape == (8, 8)
    frozen = snncompress.freeze(small, data, adapter=case.adapter)
    assert torch.allclose(run(frozen, case), run(small, case), atol=1e-5)


def test_potentials_are_what_is_compared(case: Case) -> None:
    """Pre-reset, with the threshold in it."""
    model, seen = case.build().eval(), []
    adapter = case.adapter.beside(model, [])
    stop = adapter.observe(model.a, lambda s, u: seen.append((s, u)), membrane=True)
    first = run(model, case)
    stop()
    spikes, potential = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert spikes.shape == potential.shape == (6, 5, 16)
    theta = getattr(model.a, "theta", torch.tensor(0.3))
    assert torch.equal(spikes != 0, potential > theta)
    v = torch.zeros(5, 16)
    currents = model.f1(case.x).detach()
    for t, current in enumerate(currents.unbind(1 if case.named["time_dim"] == 1 else 0)):
        v = v * getattr(model.a, "decay", torch.tensor(0.5)).detach() + current
        assert torch.allclose(v, potential[t], atol=1e-6)
        v = v * (1 - spikes[t])
    assert torch.equal(first, run(model, case))


class Odd(nn.Module):
    """Fires by rounding: no comparison."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1).round()


def test_a_potential_that_cannot_be_read() -> None:
    model = Line(lambda c: Odd())
    snncompress.apply(
        model, "firing_rate", 0.5, None, data=CASES["[T, N, C]"].x, neurons=Odd, time_dim=0, skip=[], repair=None
    )
    with pytest.raises(ModelError, match=r"potential of a Odd can't be read: its spikes aren't the result of"):
        snncompress.apply(
            model, "sca", 0.5, None, data=CASES["[T, N, C]"].x, neurons=Odd, time_dim=0, skip=[], repair=None
        )


class Named(Direct):
    """Spikes by name."""

    def forward(self, x: Tensor) -> Any:
        return {"spikes": super().forward(x)}


@pytest.mark.parametrize(
    ("own", "axis", "why"),
    [(Named, 1, "Named returned a dict. What neurons= names"), (Direct, 3, r"time_dim=3 is no axis of .*\[5, 6, 16\]")],
)
def test_what_neurons_return_is_told_at_the_door(own: type[nn.Module], axis: int, why: str) -> None:
    with pytest.raises(SNNCompressError, match=why):
        snncompress.profile(Line(lambda c: own()), torch.rand(5, 6, 8), neurons=own, time_dim=axis)


@pytest.mark.parametrize("name", ["[T, N, C]", "stepwise"])
def test_they_make_an_adapter_that_keeps_the_contract(name: str) -> None:
    case = CASES[name]
    check_adapter(case.adapter, case.build(), case.x)


class Mixed(nn.Module):
    """Layers and a neuron of SpikingJelly's in multi-step mode, beside one's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            layer.Conv2d(1, 8, 3, padding=1), layer.BatchNorm2d(8), Surrogate(8, 2), layer.Conv2d(8, 8, 3, padding=1),
            neuron.LIFNode(v_threshold=0.2), layer.Flatten(), layer.Linear(8 * 36, 4),
        )  # fmt: skip
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("jelly", [True, False])
def test_beside_layers_and_neurons_of_a_framework(jelly: bool) -> None:
    model = Mixed()
    if not jelly:
        model.body[4] = Surrogate(8, 2)
    x = torch.rand(5, 3, 1, 6, 6)
    small = snncompress.apply(
        model.eval(), "firing_rate", 0.5, None, data=x, neurons=Surrogate, time_dim=0, skip=[], repair=None
    )
    assert [len(small.body[i].weight) for i in (0, 3)] == [4, 4]
    assert small.body[2].decay.shape == (4, 1, 1)
    static = snncompress.apply(
        model, "firing_rate", 0.5, None, data=x[0], timesteps=4, neurons=Surrogate, time_dim=0, skip=[]
    )
    assert [len(static.body[i].weight) for i in (0, 3)] == [4, 4]
    assert snncompress.profile(static, x, neurons=Surrogate, time_dim=0).n_samples == 3


# -- where they aren't named --


@pytest.mark.filterwarnings("ignore::snncompress.KeptStateWarning")  # which is so, as long as it isn't named
def test_profile_names_what_fires(case: Case) -> None:
    model = case.build()
    kind = case.named["neurons"].__name__
    with pytest.warns(UnknownNeuronsWarning, match=rf"'a', 'b' \({kind}\).*no adapter knows.*neurons=LIFSpike") as told:
        snncompress.profile(model, case.x)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snncompress.profile(model, case.x, **case.named)


def test_apply_names_them_too(case: Case) -> None:
    with pytest.raises(ModelError, match=r"no spiking neuron of a known framework.*neurons=LIFSpike names"):
        snncompress.apply(case.build(), "magnitude", 0.5, None, data=case.x)
    model = Mixed()
    x = torch.rand(5, 3, 1, 6, 6)
    with pytest.warns(UnknownNeuronsWarning, match=r"'body\.2' \(Surrogate\).*is known in part") as told:
        snncompress.apply(model, "magnitude", 0.5, None, data=x, skip=[], repair=None)
    assert told[0].filename == __file__


class MyLIFNeuron(Odd):
    pass


def test_by_their_name_where_nothing_is_run() -> None:
    with pytest.raises(ModelError, match=r"'a', 'b' \(MyLIFNeuron\) may be some of your own"):
        snncompress.apply(Line(lambda c: MyLIFNeuron()), data=torch.rand(3, 8))


def test_a_line_of_code_that_fires_is_told_by_what_it_feeds() -> None:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f1, self.f2 = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.f2((self.f1(x) > 0).float())

    with pytest.warns(UnknownNeuronsWarning, match="'the input of f2'"):
        snncompress.profile(Code(), torch.rand(4, 8))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(4, 8)),
        (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(4, 8).round()),
        (nn.Sequential(nn.Linear(8, 6), neuron.IFNode(), nn.Linear(6, 3)), torch.rand(4, 8)),
        (Mixed().body[:2], torch.rand(4, 3, 1, 6, 6)),
    ],
)
def test_no_false_alarm(model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snncompress.profile(model, x)


def test_blocks_that_hold_known_neurons_are_no_neurons() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.n = nn.Linear(8, 8), neuron.IFNode(v_threshold=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.f(x))

    class Pass(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    model = nn.Sequential(Block(), Pass(), Block(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snncompress.profile(model, torch.rand(4, 8), timesteps=3)
        snncompress.apply(model, "magnitude", 0.5, None, data=torch.rand(4, 8), timesteps=3, skip=[], repair=None)


# -- what can't be named --


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"neurons": "LIFSpike"}, "must be a class of modules"),
        ({"neurons": []}, "must be a class of modules"),
        ({"neurons": int}, "must be a class of modules"),
        ({"neurons": Direct, "time_dim": 1.0}, "time_dim must be the number of an axis"),
        ({"time_dim": 1}, "Name their class"),
        ({"neurons": Direct, "adapter": "snntorch"}, "not both"),
    ],
)
def test_wrong_names(named: dict[str, Any], message: str) -> None:
    for call in (snncompress.apply, snncompress.profile, snncompress.evaluate, snncompress.finetune):
        with pytest.raises(OptionError, match=message):
            call(CASES["[N, T, C]"].build(), data=CASES["[N, T, C]"].x, **named)


def test_a_class_of_which_there_is_none() -> None:
    for call in (snncompress.apply, snncompress.profile):
        with pytest.raises(ModelError, match="none of its modules is a Stateful, which neurons= names"):
            call(CASES["[N, T, C]"].build(), data=CASES["[N, T, C]"].x, neurons=Stateful)
