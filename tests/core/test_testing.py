"""The checks for plugin authors: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from snncompress_snntorch import SNNTorchAdapter
from snncompress_spikingjelly import SpikingJellyAdapter
from torch import Tensor, nn

import snncompress
from snncompress import Criterion, EnergyModel, Observer, OptionError, PluginError, Quantizer, Scheduler
from snncompress.interfaces import Fire
from snncompress.registry import Entry, adapters, registry
from snncompress.surgery import patched
from snncompress.testing import (
    check_adapter,
    check_criterion,
    check_energy_model,
    check_quantizer,
    check_scheduler,
)
from tests.networks import Case, liven

snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")


def named(entry: Entry) -> str:
    return entry.name


def broken(check: Callable[..., None], *arguments: object) -> str:
    """What the check says of a plugin that must fail it; the global random state must be as before."""
    state = torch.get_rng_state()
    with pytest.raises(PluginError) as raised:
        check(*arguments)
    assert torch.equal(state, torch.get_rng_state())
    return str(raised.value)


# ---- criteria


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
    ByWeight: "granularity must be 'channel', not 'weight'",
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


# ---- quantizers


@pytest.mark.parametrize("entry", snncompress.quantizers(), ids=named)
def test_our_quantizers(entry: Entry) -> None:
    check_quantizer(entry.cls())


@pytest.mark.parametrize("options", [{"per_channel": True}, {"gamma": "percentile"}, {"ste": "pass"}], ids=str)
def test_our_quantizers_with_other_options(options: dict[str, Any]) -> None:
    check_quantizer(registry().find("quantizer", "rescaw")(**options))


class Grid(nn.Module):
    """2^bits values from -max|W| to max|W|; subclasses spoil one thing each."""

    def __init__(self, bits: int, stretch: float = 1.0) -> None:
        super().__init__()
        self.bits, self.levels, self.stretch = bits, 2**bits, stretch

    def scale(self, weight: Tensor) -> Tensor:
        return self.stretch * 2 * weight.detach().abs().max().clamp_min(1e-30) / (2**self.bits - 1)

    def number(self, x: Tensor) -> Tensor:
        return x + (x.round().clamp(0, self.levels - 1) - x).detach()

    def forward(self, weight: Tensor) -> Any:
        scale, zero = self.scale(weight), torch.tensor((2**self.bits - 1) / 2)
        return (self.number(weight / scale + zero) - zero) * scale, scale, zero, torch.tensor(float(self.bits))


class Plain(Quantizer):
    name: ClassVar[str] = "plain"
    module: ClassVar[Callable[..., Any]] = Grid

    def tensor_quant(self, bits: int) -> nn.Module:
        return type(self).module(bits)


def test_a_right_quantizer_passes() -> None:
    check_quantizer(Plain())


def altered(change: Callable[[tuple[Tensor, ...], Tensor], Any]) -> type[Grid]:
    """A grid whose result is changed: ``change((value, scale, zero_point, bits), weight)``."""

    class Altered(Grid):
        def forward(self, weight: Tensor) -> Any:
            return change(super().forward(weight), weight)

    return Altered


class TooManyLevels(Grid):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.levels += 1
        self.stretch = 0.8


class NoGradient(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x).round()


class Detached(Grid):
    def forward(self, weight: Tensor) -> Any:
        return super().forward(weight.detach())


class WildGradient(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x) + 0 * (x - x.detach()).sqrt()


class DividesByMax(Grid):
    def scale(self, weight: Tensor) -> Tensor:
        return 2 * weight.detach().abs().max() / (2**self.bits - 1)


class DividesByTooLittle(Grid):
    def forward(self, weight: Tensor) -> Any:
        value, *rest = super().forward(weight)
        return value * (weight.abs().max() / weight.abs().max()).detach(), *rest


class Scales(Grid):
    def forward(self, weight: Tensor) -> Any:
        result = super().forward(weight)
        weight.data.mul_(0.5)
        return result


class Stochastic(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x + (torch.rand_like(x) - 0.5))


class Uncopyable(Grid):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.lock = threading.Lock()


class NaNAtOneBit(Grid):
    def forward(self, weight: Tensor) -> Any:
        value, *rest = super().forward(weight)
        return value / (self.bits - 1) * (self.bits - 1) if self.bits == 1 else value, *rest


class FailsAt16(Grid):
    def __init__(self, bits: int) -> None:
        if bits > 8:
            raise ValueError("at most 8 bits")
        super().__init__(bits)


class FailsForward(Grid):
    def forward(self, weight: Tensor) -> Any:
        raise RuntimeError("no forward")


MODULES: dict[str, tuple[Callable[..., Any], str]] = {
    "not a module": (lambda bits: abs, "tensor_quant() must return a module, not builtin"),
    "value alone": (altered(lambda r, w: r[0]), "must return tensors (value, scale, zero_point, bit_width)"),
    "a float among them": (altered(lambda r, w: (*r[:3], 4.0)), "must return tensors (value, scale"),
    "other shape": (altered(lambda r, w: (r[0].flatten(), *r[1:])), "keep the weight's shape and dtype"),
    "other dtype": (altered(lambda r, w: (r[0].float(), *r[1:])), "is [32, 4, 3, 3] torch.float32 at 1 bits"),
    "NaN at one bit": (NaNAtOneBit, "values must be finite, scales finite and positive at 1 bits"),
    "scale 0": (altered(lambda r, w: (r[0], 0 * r[1], *r[2:])), "scales finite and positive"),
    "infinite scale": (altered(lambda r, w: (r[0], r[1] / 0, *r[2:])), "scales finite and positive"),
    "wrong width": (altered(lambda r, w: (*r[:3], r[3] + 1)), "the bit width that it returns is 2.0"),
    "wrong zero point": (altered(lambda r, w: (r[0], r[1], r[2] + 0.5, r[3])), "aren't on the grid"),
    "shifted by one": (altered(lambda r, w: (r[0], r[1], r[2] + 1, r[3])), "aren't on the grid"),
    "not rounded": (altered(lambda r, w: (w, *r[1:])), "aren't on the grid"),
    "2^bits + 1 levels": (TooManyLevels, "aren't on the grid scale * (n - zero_point), n = 0 … 1"),
    "jitter": (altered(lambda r, w: (r[0] + 1e-5 * w.detach(), *r[1:])), "more than 2 distinct values"),
    "no gradient": (NoGradient, "not zero everywhere"),
    "detached": (Detached, "the backward pass at 1 bits"),
    "gradient of another weight": (
        altered(lambda r, w: (r[0].detach() + torch.zeros(1, requires_grad=True), *r[1:])),
        "the gradient must be finite",
    ),
    "infinite gradient": (WildGradient, "the gradient must be finite"),
    "changes the weight": (Scales, "changes the weight in place"),
    "stochastic": (Stochastic, "other values the second time"),
    "can't be copied": (Uncopyable, "a deep copy of the module for 1 bits failed"),
    "all zero, scale": (DividesByMax, "an all-zero weight becomes NaN"),
    "all zero, value": (DividesByTooLittle, "an all-zero weight becomes NaN"),
    "8 bits at most": (FailsAt16, "tensor_quant(16) failed: ValueError: at most 8 bits"),
    "raises": (FailsForward, "the module for 1 bits failed: RuntimeError: no forward"),
}


@pytest.mark.parametrize(("module", "said"), MODULES.values(), ids=MODULES)
def test_a_broken_tensor_quantizer(module: Callable[..., Any], said: str) -> None:
    cls = type("Broken", (Plain,), {"module": staticmethod(module)})
    assert said in broken(check_quantizer, cls())


class HidesAnOption(Plain):
    def __init__(self, stretch: float = 1.0) -> None:
        self.stretch = stretch

    def tensor_quant(self, bits: int) -> nn.Module:
        return Grid(bits, self.stretch)


class DropsAnOption(HidesAnOption):
    def options(self) -> dict[str, Any]:
        return {"stretch": self.stretch}

    def __init__(self, stretch: float = 1.0) -> None:
        super().__init__(stretch * 2)


class CannotBeRebuilt(Plain):
    def options(self) -> dict[str, Any]:
        return {"stretch": 1.0}


def test_a_quantizer_that_its_options_dont_describe() -> None:
    assert "it gives others" in broken(check_quantizer, HidesAnOption(stretch=0.5))
    assert "it has others: {'stretch': 4.0}" in broken(check_quantizer, DropsAnOption())
    assert "being rebuilt from its options" in broken(check_quantizer, CannotBeRebuilt())


# ---- schedulers


@pytest.mark.parametrize("entry", snncompress.schedulers(), ids=named)
def test_our_schedulers(entry: Entry) -> None:
    check_scheduler(entry.cls())
    if "steps" in entry.cls().options():
        check_scheduler(entry.cls(steps=5))


def scheduler(ratio: Callable[[float, int, int], Any], **attributes: Any) -> Scheduler:
    body = {"name": "made", "ratio": staticmethod(ratio), **attributes}
    return type("Made", (Scheduler,), body)()


def test_a_right_scheduler_passes() -> None:
    check_scheduler(scheduler(lambda target, step, steps: target * (step / steps)))


_calls = iter(range(1, 10**9))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (scheduler(lambda target, step, steps: target, name=None), "'name' must be"),
        (scheduler(lambda target, step, steps: target, options=lambda self: {"f": min}), "as JSON"),
        (scheduler(lambda target, step, steps: target, steps=0), "n_steps must be"),
        (scheduler(lambda target, step, steps: target, n_steps=2.0), "n_steps must be"),
        (scheduler(lambda target, step, steps: target, n_steps=property(lambda s: 1 / 0)), "n_steps failed"),
        (scheduler(lambda target, step, steps: target / (steps - step)), "ratio() for target 0.0, steps 1"),
        (scheduler(lambda target, step, steps: None), "finite numbers"),
        (scheduler(lambda target, step, steps: float("nan")), "finite numbers"),
        (scheduler(lambda target, step, steps: target * step / steps + next(_calls)), "arguments alone"),
        (scheduler(lambda target, step, steps: 2 * target - target * step / steps), "between 0 and the target"),
        (scheduler(lambda target, step, steps: target - (steps - step)), "between 0 and the target"),
        (scheduler(lambda target, step, steps: target * (1 - 0.5 * ((steps - step) % 2))), "decrease"),
        (scheduler(lambda target, step, steps: target * step / (steps + 1)), "must give exactly the target"),
        (scheduler(lambda target, step, steps: target * sum([1 / steps] * step)), "must give exactly the target"),
    ],
)  # fmt: skip
def test_a_broken_scheduler(made: Scheduler, said: str) -> None:
    assert said in broken(check_scheduler, made)


# ---- energy models


@pytest.mark.parametrize("entry", snncompress.energy_models(), ids=named)
def test_our_energy_models(entry: Entry) -> None:
    check_energy_model(entry.cls())


def energy(energy_pj: Callable[[Any], Any], **attributes: Any) -> EnergyModel:
    body = {"name": "made", "energy_pj": lambda self, counts: energy_pj(counts), **attributes}
    return type("Made", (EnergyModel,), body)()


def test_a_right_energy_model_passes() -> None:
    check_energy_model(energy(lambda c: 1.0 * c.n_ac + 3.0 * c.n_mac + 0.1 * c.n_neuron_updates))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (energy(lambda c: c.n_ac, name=""), "'name' must be"),
        (energy(lambda c: c.n_ac, options=lambda self: {1: 2}), "come back from JSON"),
        (energy(lambda c: c.n_ac, options=lambda self: 1 / 0), "options() failed"),
        (energy(lambda c: c.no_such_count), "energy_pj() of (0.0, 0.0, 0.0) failed"),
        (energy(lambda c: torch.tensor(c.n_ac)), "must return a finite number"),
        (energy(lambda c: c.n_ac * float("inf")), "must return a finite number"),
        (energy(lambda c: c.n_ac - 1), "must return a finite number"),
        (energy(lambda c: c.n_ac + 1), "no operations must cost nothing, not 1.0 pJ"),
        (energy(lambda c: 0.0), "cost nothing"),
        (energy(lambda c: c.n_ac / (1 + c.n_mac)), "cost less than"),
        (energy(lambda c: c.n_ac + c.n_mac + 9 * (c.n_neuron_updates == 1.0)), "cost less than"),
    ],
)
def test_a_broken_energy_model(made: EnergyModel, said: str) -> None:
    assert said in broken(check_energy_model, made)


# ---- adapters


def lively(model: nn.Module, x: Tensor, timesteps: int | None) -> tuple[nn.Module, Tensor, int | None]:
    """A model with weights that make every population fire, and its input."""
    case = liven(Case(model, x, timesteps))
    return case.model, case.x, case.timesteps


def spikingjelly_layers(step_mode: str = "s", **options: Any) -> tuple[nn.Module, Tensor, int | None]:
    def node() -> nn.Module:
        return sj.LIFNode(step_mode=step_mode, **options)

    return lively(nn.Sequential(nn.Linear(4, 8), node(), nn.Linear(8, 6), node()), torch.rand(5, 4), 3)


def spikingjelly_convolutions() -> tuple[nn.Module, Tensor, int | None]:
    from spikingjelly.activation_based import layer

    node = sj.ParametricLIFNode(step_mode="m", v_reset=None)
    model = nn.Sequential(layer.Conv2d(2, 4, 3, step_mode="m"), node, layer.Flatten(step_mode="m"))
    return lively(model, torch.rand(5, 2, 6, 6), 3)


def snntorch_layers(**options: Any) -> tuple[nn.Module, Tensor, int | None]:
    def node() -> nn.Module:
        return snn.Leaky(beta=0.8, init_hidden=True, **options)

    return lively(nn.Sequential(nn.Linear(4, 8), node(), nn.Linear(8, 6), node()), torch.rand(5, 4), 3)


class Loop(nn.Module):
    """snnTorch's usual class: it loops over the steps and hands the states around."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 8), snn.Synaptic(alpha=0.7, beta=0.8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        syn, mem = self.lif.reset_mem()
        spikes = []
        for step in x:
            spike, syn, mem = self.lif(self.fc(step), syn, mem)
            spikes.append(spike)
        return torch.stack(spikes), mem


MODELS: dict[str, tuple[type, Callable[[], tuple[nn.Module, Tensor, int | None]]]] = {
    "spikingjelly, single step": (SpikingJellyAdapter, spikingjelly_layers),
    "spikingjelly, multi-step": (SpikingJellyAdapter, lambda: spikingjelly_layers("m")),
    "spikingjelly, soft reset": (SpikingJellyAdapter, lambda: spikingjelly_layers("m", v_reset=None)),
    "spikingjelly, convolutions": (SpikingJellyAdapter, spikingjelly_convolutions),
    "snntorch, hidden states": (SNNTorchAdapter, snntorch_layers),
    "snntorch, reset to zero": (SNNTorchAdapter, lambda: snntorch_layers(reset_mechanism="zero")),
    "snntorch, reset in the same step": (SNNTorchAdapter, lambda: snntorch_layers(reset_delay=False)),
    "snntorch, a loop of its own": (SNNTorchAdapter, lambda: lively(Loop(), torch.rand(5, 4), 3)),
}


@pytest.mark.parametrize(("adapter", "make"), MODELS.values(), ids=MODELS)
def test_our_adapters(adapter: type, make: Callable[[], tuple[nn.Module, Tensor, int | None]]) -> None:
    model, x, timesteps = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    check_adapter(adapter(), model, x, timesteps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_every_adapter_of_ours_is_checked() -> None:
    assert {type(adapter) for adapter in adapters()} == {adapter for adapter, _ in MODELS.values()}


class Unnamed(SpikingJellyAdapter):
    framework = ""


class TakesAnything(SpikingJellyAdapter):
    def is_neuron(self, module: nn.Module) -> bool:
        return True


class FindsNothing(SpikingJellyAdapter):
    def is_neuron(self, module: nn.Module) -> bool:
        return False


class FailsToLook(SpikingJellyAdapter):
    def is_neuron(self, module: nn.Module) -> bool:
        return module.is_a_neuron


class NeverResets(SpikingJellyAdapter):
    def reset(self, model: nn.Module) -> None: ...


class FailsToReset(SpikingJellyAdapter):
    def reset(self, model: nn.Module) -> None:
        raise RuntimeError("no reset")


class ResetsOnOff(SpikingJellyAdapter):
    def reset(self, model: nn.Module) -> None:
        for neuron in self.neurons(model).values():
            neuron.v = 0.9 if isinstance(neuron.v, float) and neuron.v == 0.0 else 0.0


class StaysInTheGraph(SpikingJellyAdapter):
    def reset(self, model: nn.Module) -> None:
        for neuron in self.neurons(model).values():
            neuron.v = neuron.v * 0.0


class ReturnsNothing(SpikingJellyAdapter):
    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        super().run(model, x, timesteps)


class FailsToRun(SpikingJellyAdapter):
    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        raise RuntimeError("no run")


class GoesAround(SpikingJellyAdapter):
    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        return x


class NeverShows(SpikingJellyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        return lambda: None


class FailsToObserve(SpikingJellyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        raise RuntimeError("no observer")


class _Bent(SpikingJellyAdapter):
    """Shows something else than it sees."""

    def bend(self, spikes: Tensor, membrane: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return spikes, membrane

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        return super().observe(neuron, lambda s, u: observer(*self.bend(s, u)), membrane=membrane)


class ForgetsTime(_Bent):
    def bend(self, spikes, membrane):
        return spikes[0], membrane


class JoinsTimeAndSamples(_Bent):
    def bend(self, spikes, membrane):
        return spikes.flatten(0, 1).unsqueeze(0), membrane


class Inverts(_Bent):
    def bend(self, spikes, membrane):
        return 1 - spikes, membrane


class Sorts(_Bent):
    def bend(self, spikes, membrane):
        return spikes.flip(1), membrane


class GivesMembraneUnasked(_Bent):
    def bend(self, spikes, membrane):
        return spikes, spikes


class KeepsMembrane(_Bent):
    def bend(self, spikes, membrane):
        return spikes, None


class OneMembranePerChannel(_Bent):
    def bend(self, spikes, membrane):
        return spikes, None if membrane is None else membrane.mean(1)


class InfiniteMembrane(_Bent):
    def bend(self, spikes, membrane):
        return spikes, None if membrane is None else membrane / 0


class ReadsAfterReset(_Bent):
    def bend(self, spikes, membrane):
        return spikes, None if membrane is None else membrane * (1 - spikes)


class Disturbs(SpikingJellyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        stop = super().observe(neuron, observer, membrane=membrane)
        handle = neuron.register_forward_hook(lambda module, args, output: output * 0.9)
        return lambda: (handle.remove(), stop())


class NeverStops(SpikingJellyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        super().observe(neuron, observer, membrane=membrane)
        return lambda: None


class LeavesATrace(SpikingJellyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        stop = super().observe(neuron, observer, membrane=membrane)
        return lambda: (stop(), setattr(neuron, "v_threshold", 0.1))


class KeepsFiring(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        yield


class FailsToTrace(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        raise RuntimeError("no tracing")
        yield


class TracesAllSteps(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for neuron in self.neurons(model).values():
                stack.enter_context(patched(neuron, "forward", lambda x, n=neuron: fire(n, x)))
            yield


class CutsTheGraph(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        with super().identities(model, lambda neuron, x: fire(neuron, x).detach()):
            yield


class LeavesAPatch(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        with super().identities(model, fire):
            yield
        neuron = next(iter(self.neurons(model).values()))
        neuron.forward = neuron.forward


class LeavesAHook(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        model.register_forward_hook(lambda module, args, output: output)
        with super().identities(model, fire):
            yield


class ChangesAWeight(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        with super().identities(model, fire):
            yield
        next(model.parameters()).data.mul_(0.1)


class TrainsOnException(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        model.train()
        with super().identities(model, fire):
            yield
        model.eval()


class Swallows(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, fire: Fire) -> Iterator[None]:
        with contextlib.suppress(BaseException), super().identities(model, fire):
            yield


ADAPTERS = {
    Unnamed: "'framework' must be",
    TakesAnything: "is_neuron() takes torch's Linear for a neuron",
    FindsNothing: "is_neuron() finds no neuron in Sequential",
    FailsToLook: "is_neuron() failed: AttributeError",
    NeverResets: "a run after reset() doesn't repeat",
    FailsToReset: "reset() failed: RuntimeError: no reset",
    ResetsOnOff: "reset() twice",
    StaysInTheGraph: "reset() leaves 1 in the autograd graph",
    ReturnsNothing: "run() must return a tensor",
    FailsToRun: "reset() or run() failed: RuntimeError: no run",
    GoesAround: "run() reaches no neuron",
    NeverShows: "1 (membrane=False): the neuron ran, but its observer wasn't called",
    FailsToObserve: "observe() of 1 failed: RuntimeError: no observer",
    ForgetsTime: "spikes must be [T', N, C, ...], not [5, 8]",
    JoinsTimeAndSamples: "1 timesteps observed, not 3",
    Inverts: "the spikes observed aren't those",
    Sorts: "the spikes observed aren't those",
    GivesMembraneUnasked: "wasn't asked for",
    KeepsMembrane: "must be finite and have the spikes' shape",
    OneMembranePerChannel: "must be finite and have the spikes' shape",
    InfiniteMembrane: "must be finite and have the spikes' shape",
    ReadsAfterReset: "read after the reset",
    Disturbs: "observing changes the output (membrane=False)",
    NeverStops: "doesn't stop the observer (membrane=False)",
    LeavesATrace: "after observing, the output isn't what it was",
    KeepsFiring: "something else than fire() returns",
    FailsToTrace: "identities() failed: RuntimeError: no tracing",
    TracesAllSteps: "fire() must get one timestep, [5, C, ...], not [3, 5, 8]",
    CutsTheGraph: "the output must be differentiable",
    LeavesAPatch: "after identities(), 1 isn't as it was before",
    LeavesAHook: "after identities(), the model isn't as it was before",
    ChangesAWeight: "after identities(), the output isn't what it was before",
    TrainsOnException: "after an exception inside identities()",
    Swallows: "identities() swallows exceptions",
}


@pytest.mark.parametrize(("cls", "said"), ADAPTERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_adapter(cls: type[SpikingJellyAdapter], said: str) -> None:
    model, x, timesteps = spikingjelly_layers("m")
    assert said in broken(check_adapter, cls(), model, x, timesteps)
