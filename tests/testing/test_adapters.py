"""The checks of adapters: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from snncompress_snntorch import SNNTorchAdapter
from snncompress_spikingjelly import SpikingJellyAdapter
from torch import Tensor, nn

from snncompress.contract.registry import adapters
from snncompress.extend import Adapter, Dynamics, ModelError, Observer, StandIn, StateGrid
from snncompress.model.modules import patched
from snncompress.testing import (
    check_adapter,
)
from tests.networks import Case, liven
from tests.testing.common import broken
from tests.toy import BareAdapter, ToyAdapter, toy_layers

snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")


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
        return snn.Leaky(**{"beta": 0.8, "init_hidden": True, **options})

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
    "snntorch, no leak": (SNNTorchAdapter, lambda: snntorch_layers(beta=1.0)),
    "snntorch, a loop of its own": (SNNTorchAdapter, lambda: lively(Loop(), torch.rand(5, 4), 3)),
}


@pytest.mark.parametrize(("adapter", "make"), MODELS.values(), ids=MODELS)
def test_our_adapters(adapter: type, make: Callable[[], tuple[nn.Module, Tensor, int | None]]) -> None:
    model, x, timesteps = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    report = check_adapter(adapter(), model, x, timesteps)
    assert report.checked[:6] == ("is_neuron", "run", "reset", "observe", "identities", "remove_channels")
    assert {"conversion", "states"} <= set(report.checked)
    known = "equations of", "inference of", "fixed point of", "export: lif", "books: right"
    assert all(any(part in what for part in known) for what in report.missing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_report_names_what_is_missing() -> None:
    report = check_adapter(SNNTorchAdapter(), *lively(Loop(), torch.rand(5, 4), 3))
    assert str(report).splitlines()[0] == f"checked: {', '.join(report.checked)}"
    assert [line for line in str(report).splitlines()[1:]] == [f"missing: {what}" for what in report.missing]
    assert "export" not in report.checked
    export, inference = report.missing
    assert export.startswith("export: lif (Synaptic) gets its state from Loop.forward")
    assert inference == "inference of lif (Synaptic): of snnTorch's neurons Leaky and Lapicque have a fast form"


@pytest.mark.parametrize("options", [{"reset_delay": False}, {"beta": 1.0, "reset_delay": False}], ids=str)
def test_snntorch_subtracts_the_threshold_in_its_own_way(options: dict[str, Any]) -> None:
    report = check_adapter(SNNTorchAdapter(), *snntorch_layers(**options))
    assert "equations" not in report.checked
    assert "subtracts the threshold twice where the potential is above twice as much" in report.missing[0]


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"reset_mechanism": "zero"}], ids=str)
def test_snntorchs_equations(options: dict[str, Any]) -> None:
    report = check_adapter(SNNTorchAdapter(), *snntorch_layers(**options))
    assert "equations" in report.checked
    assert report.missing == ()


class Detaching(ToyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        return super().observe(neuron, lambda s, u: observer(s.detach(), u), membrane=membrane)


def test_spikes_without_their_gradient_are_missing() -> None:
    model, x = toy_layers()
    missing = [check_adapter(adapter(), model, x, 3).missing for adapter in (ToyAdapter, Detaching)]
    assert [what.partition(":")[0] for what in missing[1] if what not in missing[0]] == [
        "gradients of 1",
        "gradients of 3",
    ]


def test_an_adapter_that_does_only_what_it_must() -> None:
    model, x = toy_layers()
    report = check_adapter(BareAdapter(), model, x, 3)
    assert report.checked == ("is_neuron", "run", "reset", "observe", "identities", "remove_channels")
    assert [what.partition(" ")[0].rstrip(":") for what in report.missing] == [
        "books", "conversion", "export", *["states"] * 2, *["equations"] * 2, *["inference"] * 2, *["fixed"] * 2,
    ]  # fmt: skip
    assert not any(BareAdapter().offers().values())


def test_samples_first() -> None:
    model, x = toy_layers()
    report = check_adapter(ToyAdapter(), model, x, 3)
    assert report.checked[6:] == ("states", "equations")
    assert ToyAdapter().offers() == {
        "books": False, "conversion": False, "export": False, "states": True, "equations": True, "inference": False,
        "fixed point": False,
    }  # fmt: skip


class ShowsOtherSamples(ToyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        return super().observe(neuron, lambda s, u: observer(s.flip(1), u), membrane=membrane)


class ShowsTimeAsSamples(ToyAdapter):
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        steps: list[Tensor] = []

        def collect(spikes: Tensor, potential: Tensor | None) -> None:
            steps.append(spikes)
            if len(steps) == 3:
                observer(torch.cat(steps).transpose(0, 1), None)
                steps.clear()

        return super().observe(neuron, collect, membrane=membrane)


@pytest.mark.parametrize(
    ("cls", "said"),
    [(ShowsOtherSamples, "the spikes observed aren't those"), (ShowsTimeAsSamples, "5 timesteps observed, not 3")],
)
def test_samples_first_and_wrong(cls: type[ToyAdapter], said: str) -> None:
    model, x = toy_layers()
    assert said in broken(check_adapter, cls(), model, x, 3)


def test_every_method_is_required_or_optional_or_given() -> None:
    optional = [method for methods in Adapter.OPTIONAL.values() for method in methods]
    assert len(optional) == len(set(optional))
    methods = {name for name, value in vars(Adapter).items() if callable(value) and not name.startswith("_")}
    assert methods == {
        *Adapter.__abstractmethods__,
        *optional,
        "neurons",
        "stateful",
        "time_axis",
        "reset_memories",
        "offers",
        "leak",
        "reset_rule",
        "state_bits",
        "beside",
        "differentiable",
        "refusal",
    }


def test_a_neuron_that_cant_be_shrunk_is_named() -> None:
    report = check_adapter(StaysWide(), *spikingjelly_layers("m"))
    assert "remove_channels" not in report.checked
    assert "remove_channels of 1 (LIFNode): its channels stay" in report.missing


def test_the_books_are_left_as_they_were() -> None:
    model, x, timesteps = snntorch_layers()
    before = list(snn.SpikingNeuron.instances)
    check_adapter(SNNTorchAdapter(), model, x, timesteps)
    made = [neuron for neuron in snn.SpikingNeuron.instances if all(neuron is not known for known in before)]
    assert not any(neuron in made for neuron in model.modules())
    assert len(made) == 2  # by make_neuron()


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
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        yield


class FailsToTrace(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        raise RuntimeError("no tracing")
        yield


class TracesAllSteps(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for neuron in self.neurons(model).values():
                stack.enter_context(patched(neuron, "forward", lambda x, n=neuron: stand_in(n, x)))
            yield


class CutsTheGraph(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        with super().identities(model, lambda neuron, x: stand_in(neuron, x).detach()):
            yield


class LeavesAPatch(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        with super().identities(model, stand_in):
            yield
        neuron = next(iter(self.neurons(model).values()))
        neuron.forward = neuron.forward


class LeavesAHook(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        model.register_forward_hook(lambda module, args, output: output)
        with super().identities(model, stand_in):
            yield


class ChangesAWeight(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        with super().identities(model, stand_in):
            yield
        next(model.parameters()).data.mul_(0.1)


class TrainsOnException(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        model.train()
        with super().identities(model, stand_in):
            yield
        model.eval()


class Swallows(SpikingJellyAdapter):
    @contextlib.contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        with contextlib.suppress(BaseException), super().identities(model, stand_in):
            yield


class ForgetsMemories(SpikingJellyAdapter):
    def reset_memories(self, model: nn.Module) -> None: ...


class FailsAlone(SpikingJellyAdapter):
    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        raise ModelError("no books")
        yield


class SwallowsAlone(SpikingJellyAdapter):
    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        with contextlib.suppress(Exception):
            yield


class RenamesAlone(SpikingJellyAdapter):
    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ValueError("another") from error


class DisturbsAlone(SpikingJellyAdapter):
    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        with patched(model[1], "v_threshold", 100.0):
            yield


class FailsToAdopt(SpikingJellyAdapter):
    def adopt(self, model: nn.Module) -> None:
        raise ModelError("no list")


class DisturbsWhatItAdopts(SpikingJellyAdapter):
    def adopt(self, model: nn.Module) -> None:
        next(model.parameters()).data.zero_()


class StaysWide(SpikingJellyAdapter):
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        raise ModelError("its channels stay")


class FailsToShrink(SpikingJellyAdapter):
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        raise RuntimeError("no removal")


class StaysWideInside(SpikingJellyAdapter):
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        neuron.v_threshold = torch.ones(width)


class PutsOutWhatItLost(SpikingJellyAdapter):
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        neuron.register_forward_hook(lambda module, args, spikes: torch.cat([spikes, spikes], axis))


class ChangesWhatIsLeft(SpikingJellyAdapter):
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        neuron.v_threshold = 0.1


class MakesALayer(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        return nn.ReLU()


class FailsToMake(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        raise RuntimeError("no neuron")


class MakesADoubleOne(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        made = super().make_neuron(kind)
        made.register_forward_hook(lambda module, args, spikes: spikes.double())
        return made


class MakesOneWithoutGradient(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        made = super().make_neuron(kind)
        made.register_forward_hook(lambda module, args, spikes: spikes.detach())
        return made


class MakesAnEagerOne(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        made = super().make_neuron(kind)
        made.v_threshold = 0.5
        return made


class MakesOneKind(SpikingJellyAdapter):
    def make_neuron(self, kind: str) -> nn.Module:
        return super().make_neuron("lif")


class FailsToExport(SpikingJellyAdapter):
    def make_traceable(self, model: nn.Module) -> None:
        raise RuntimeError("no export")


class ExportsOthers(SpikingJellyAdapter):
    def make_traceable(self, model: nn.Module) -> None:
        super().make_traceable(model)
        model[1].v_threshold = 0.1


class StepsOtherwise(SpikingJellyAdapter):
    def single_step(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Tensor:
        return 0.5 * super().single_step(model, x, timesteps)


class ListsStates(SpikingJellyAdapter):
    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        return list(super().states(neuron).values())


class HidesStates(SpikingJellyAdapter):
    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        return {}


class CountsRuns(SpikingJellyAdapter):
    runs = 0

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        self.runs += 1
        return {**super().states(neuron), "runs": torch.tensor(self.runs)}

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        super().set_states(neuron, {"v": states["v"]})


class StartsWithAShape(SpikingJellyAdapter):
    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        return {name: state.reshape(1) if state.dim() == 0 else state for name, state in super().states(neuron).items()}


class ForgetsANeuron(SpikingJellyAdapter):
    def stateful(self, model: nn.Module) -> dict[str, nn.Module]:
        return dict(list(self.neurons(model).items())[1:])


class SetsLess(SpikingJellyAdapter):
    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        super().set_states(neuron, {name: state - 1 for name, state in states.items()})


class FailsToSet(SpikingJellyAdapter):
    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        raise RuntimeError("no setting")


class NeverLeaks(SpikingJellyAdapter):
    def dynamics(self, neuron: nn.Module) -> Dynamics:
        return dataclasses.replace(super().dynamics(neuron), leak=torch.zeros(()))


class ResetsBySubtraction(SpikingJellyAdapter):
    def dynamics(self, neuron: nn.Module) -> Dynamics:
        return dataclasses.replace(super().dynamics(neuron), reset=None)


class WritesItsEquation(SpikingJellyAdapter):
    def dynamics(self, neuron: nn.Module) -> Dynamics:
        return "v + x"


class FailsToExplain(SpikingJellyAdapter):
    def dynamics(self, neuron: nn.Module) -> Dynamics:
        raise RuntimeError("no equation")


class StaysInFloat(SpikingJellyAdapter):
    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        neuron.state_grid = grid


class StepsLower(SpikingJellyAdapter):
    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        super().step_on(neuron, grid)
        neuron.v_threshold = 0.5


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
    KeepsFiring: "something else than stand_in() returns",
    FailsToTrace: "identities() failed: RuntimeError: no tracing",
    TracesAllSteps: "stand_in() must get one timestep, [5, C, ...], not [3, 5, 8]",
    CutsTheGraph: "the output must be differentiable",
    LeavesAPatch: "after identities(), 1 isn't as it was before",
    LeavesAHook: "after identities(), the model isn't as it was before",
    ChangesAWeight: "after identities(), the output isn't what it was before",
    TrainsOnException: "after an exception inside identities()",
    Swallows: "identities() swallows exceptions",
    ForgetsMemories: "reset() leaves the library's own memories as they are",
    FailsAlone: "alone() failed: ModelError: no books",
    SwallowsAlone: "alone() swallows exceptions",
    RenamesAlone: "alone() turns an exception into a ValueError",
    DisturbsAlone: "alone() changes the output",
    FailsToAdopt: "adopt() failed: ModelError: no list",
    DisturbsWhatItAdopts: "adopt() changes the output",
    FailsToShrink: "remove_channels of 1 (LIFNode) failed: RuntimeError: no removal",
    StaysWideInside: "a LIFNode after remove_channels(), on 4 channels, failed: RuntimeError",
    PutsOutWhatItLost: "after remove_channels(), 1 puts out [3, 5, 8]",
    ChangesWhatIsLeft: "after remove_channels(), the channels left of 1 put out something else",
    MakesALayer: "make_neuron('lif') makes a ReLU",
    FailsToMake: "conversion failed: RuntimeError: no neuron",
    MakesADoubleOne: "make_neuron('lif') must put out spikes of its input's shape and dtype",
    MakesOneWithoutGradient: "make_neuron('lif') has no surrogate gradient",
    MakesAnEagerOne: "make_neuron('lif') isn't what was asked for: threshold 1, τ = 2",
    MakesOneKind: "make_neuron('if') isn't what was asked for: threshold 1, no leak",
    FailsToExport: "export failed: RuntimeError: no export",
    ExportsOthers: "make_traceable() changes the spikes",
    StepsOtherwise: "after single_step(), 1 spikes differently",
    ListsStates: "states() of 1 must return tensors by name",
    HidesStates: "states() doesn't hold all that 1 remembers",
    CountsRuns: "after reset(), states() of 1 aren't those of a fresh neuron",
    StartsWithAShape: "before the first step, 'v' of 1 must have the shape []",
    ForgetsANeuron: "stateful() leaves out the neuron 1",
    SetsLess: "set_states(states()) changes what 1 does next",
    FailsToSet: "states of 1 (LIFNode) failed: RuntimeError: no setting",
    NeverLeaks: "dynamics() of 1 predicts other spikes",
    ResetsBySubtraction: "dynamics() of 1 predicts other spikes",
    WritesItsEquation: "dynamics() must return a Dynamics, not a str",
    FailsToExplain: "equations of 1 (LIFNode) failed: RuntimeError: no equation",
    StaysInFloat: "after step_on(), 'v' of 1 isn't on the grid",
    StepsLower: "step_on() changes what 1 puts out, on a fine grid",
}


@pytest.mark.parametrize(("cls", "said"), ADAPTERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_adapter(cls: type[SpikingJellyAdapter], said: str) -> None:
    model, x, timesteps = spikingjelly_layers("m")
    assert said in broken(check_adapter, cls(), model, x, timesteps)
