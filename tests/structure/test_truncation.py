"""Running fewer timesteps: found by trying, exact, and replayed from JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, Plan, PlanError, QuantizeWeights, TruncateTimesteps, profile
from snncompress.contract.detection import find_adapter
from snncompress.measuring.temporal import temporal_analysis
from snncompress.model.copying import private_copy
from snncompress.running.data import Feed
from snncompress.structure.truncation import truncation
from tests.networks import Case, liven, snntorch_cases, spikingjelly_cases

T, KEPT = 6, 4


@dataclass
class Setting:
    """A way to build a network, what it is fed, and the edit that must come out."""

    build: Callable[[], nn.Module]
    x: Tensor
    timesteps: int | None
    way: str
    where: tuple[str, str, int] = ("", "", 0)

    def model(self) -> nn.Module:
        """Equal at every call, and firing."""
        torch.manual_seed(1)
        return liven(Case(self.build(), self.x, self.timesteps)).model

    def feed(self, model: nn.Module) -> Feed:
        return Feed(find_adapter(model), self.x, self.timesteps)

    def edit(self, timesteps: int = KEPT) -> TruncateTimesteps | None:
        model = self.model()
        return truncation(model, find_adapter(model), self.feed(model), timesteps)

    def output(self, model: nn.Module) -> Tensor:
        feed = self.feed(model)
        with torch.no_grad():
            output = feed(model, feed.first())
        feed.adapter.reset(model)
        return output[0] if isinstance(output, tuple) else output


def spikingjelly_net(mode: str) -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(), layer.Flatten(),
        layer.Linear(256, 6), neuron.IFNode(), layer.Linear(6, 3), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(net, mode)
    return net


def snntorch_net(recurrent: bool) -> nn.Module:
    hidden = (
        snn.RLeaky(beta=0.8, linear_features=6, init_hidden=True) if recurrent else snn.Leaky(0.8, init_hidden=True)
    )
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), hidden, nn.Linear(6, 3), snn.Leaky(beta=0.8, init_hidden=True, output=True)
    )


class Loop(nn.Module):
    """A snnTorch class with explicit membranes that counts an attribute of its own."""

    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.num_steps, self.depth = T, T  # the second has nothing to do with time
        self.fc1, self.fc2 = nn.Linear(64, T), nn.Linear(T, 3)
        self.lif1: nn.Module = snn.RLeaky(beta=0.8, linear_features=T) if recurrent else snn.Leaky(beta=0.8)
        self.lif2 = snn.Leaky(beta=0.8)

    def steps(self, x: Tensor) -> list[Tensor]:
        return [x] * self.num_steps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        membrane, spikes, membranes = self.lif2.init_leaky(), [], []
        for current in self.steps(x):
            spike, *hidden = self.lif1(self.fc1(current.flatten(1)), *hidden)
            spike, membrane = self.lif2(self.fc2(spike), membrane)
            spikes.append(spike)
            membranes.append(membrane)
        return torch.stack(spikes), torch.stack(membranes)


class OverTime(Loop):
    """Iterates over the input [T, N, ...]."""

    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x)


class BatchFirst(Loop):
    """Iterates over an input [N, T, ...]."""

    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x.unbind(1))


class Encoder(nn.Module):
    """Repeats a static input."""

    def __init__(self) -> None:
        super().__init__()
        self.T = T

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0).repeat(self.T, *[1] * x.dim())


class Nested(Loop):
    """The number of steps is an encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.num_steps, self.encoder = 0, Encoder()

    def steps(self, x: Tensor) -> list[Tensor]:
        return list(self.encoder(x))


seeded = torch.Generator().manual_seed(0)
static, series = torch.rand(3, 1, 8, 8, generator=seeded), torch.rand(T, 3, 1, 8, 8, generator=seeded)
SETTINGS = {
    "spikingjelly single-step": Setting(lambda: spikingjelly_net("s"), static, T, "loop"),
    "spikingjelly multi-step, static": Setting(lambda: spikingjelly_net("m"), static, T, "input"),
    "spikingjelly multi-step, series": Setting(lambda: spikingjelly_net("m"), series, None, "input"),
    "snntorch sequential": Setting(lambda: snntorch_net(False), static, T, "loop"),
    "snntorch recurrent": Setting(lambda: snntorch_net(True), static, T, "loop"),
    "own loop": Setting(Loop, static, None, "attribute", ("", "num_steps", 0)),
    "own loop, recurrent": Setting(lambda: Loop(True), static, None, "attribute", ("", "num_steps", 0)),
    "own loop, nested": Setting(Nested, static, None, "attribute", ("encoder", "T", 0)),
    "over its input": Setting(OverTime, series, None, "input"),
    "over its input, static": Setting(OverTime, static, T, "input"),
    "over its second axis": Setting(BatchFirst, series.transpose(0, 1), None, "input", ("", "", 1)),
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@settings
def test_the_first_steps_exactly_and_after_replay(setting: Setting) -> None:
    edit = setting.edit()
    assert edit == TruncateTimesteps(KEPT, setting.way, *setting.where)
    whole = setting.output(setting.model())
    assert len(whole) == T
    assert whole.any()
    plan = Plan.from_json(Plan((edit,)).to_json())
    assert plan == Plan((edit,))
    for model in (plan.apply(setting.model()), copy.deepcopy(plan.apply(setting.model()))):
        assert torch.equal(setting.output(model), whole[:KEPT])
        assert snncompress.plan_of(model).timesteps == KEPT
        assert torch.equal(setting.output(private_copy(model, find_adapter(model))), whole[:KEPT])
        assert list(model.state_dict()) == list(setting.model().state_dict())


@settings
def test_again(setting: Setting) -> None:
    """A truncated model is truncated further; what it runs already is nothing to do."""
    once = Plan((setting.edit(),)).apply(setting.model())
    feed = setting.feed(once)
    assert truncation(once, feed.adapter, feed, KEPT) is None
    edit = truncation(once, feed.adapter, feed, 2)
    assert edit is not None
    twice = Plan((edit,)).apply(once)
    assert torch.equal(setting.output(twice), setting.output(setting.model())[:2])
    assert torch.equal(setting.output(Plan((setting.edit(), edit)).apply(setting.model())), setting.output(twice))
    with pytest.raises(OptionError, match=f"runs {KEPT} timesteps"):
        truncation(once, feed.adapter, feed, KEPT + 1)


@settings
def test_energy_is_what_the_analysis_said(setting: Setting) -> None:
    model = setting.model()
    result = temporal_analysis(model, setting.x, timesteps=setting.timesteps)
    truncated = Plan((setting.edit(),)).apply(model)
    found = profile(truncated, setting.x, timesteps=setting.timesteps)
    assert found.energy_pj == pytest.approx(result.energy_pj[KEPT - 1], rel=1e-9)
    assert temporal_analysis(truncated, setting.x, timesteps=setting.timesteps).timesteps == KEPT


@settings
def test_the_model_and_the_random_state_stay(setting: Setting) -> None:
    model = setting.model()
    names, rng = [(n, dict(vars(m))) for n, m in model.named_modules()], torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    feed = setting.feed(model)
    edit = truncation(model, feed.adapter, feed, KEPT)
    Plan((edit,)).apply(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for (_, attributes), module in zip(names, model.modules(), strict=True):
        assert {k: v for k, v in vars(module).items() if type(v) in (int, bool)} == {
            k: v for k, v in attributes.items() if type(v) in (int, bool)
        }
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("name", ["spikingjelly multi-step, series", "own loop", "snntorch sequential"])
def test_a_truncated_model_is_compressed_further(name: str) -> None:
    setting = SETTINGS[name]
    truncated = Plan((setting.edit(),)).apply(setting.model())
    options: dict[str, Any] = {"data": setting.x, "timesteps": setting.timesteps, "skip": []}
    small = snncompress.apply(truncated, "magnitude", 0.5, 4, **options)
    plan = snncompress.plan_of(small)
    assert plan.timesteps == KEPT
    assert [type(e) for e in plan.edits[:2]] == [TruncateTimesteps, QuantizeWeights]
    assert plan.removed_channels()
    assert len(setting.output(small)) == KEPT
    assert "repaired" in plan.origin
    again = Plan.from_json(plan.to_json()).apply(setting.model())
    assert not torch.equal(setting.output(again), setting.output(small))  # the plan doesn't hold what was fitted
    again.load_state_dict(small.state_dict())
    assert torch.equal(setting.output(again), setting.output(small))
    bare = snncompress.apply(truncated, "magnitude", 0.5, 4, repair=None, **options)
    again = Plan.from_json(snncompress.plan_of(bare).to_json()).apply(setting.model())
    assert torch.equal(setting.output(again), setting.output(bare))


@hypothesis.settings(max_examples=15)
@given(st.one_of(spikingjelly_cases(), snntorch_cases()))
def test_generated_networks(case: Case) -> None:
    """Every number of timesteps of every network: the first outputs, at the energy that the analysis gives."""
    feed, x = case.feed, case.x

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = feed(model, feed.first())
        return found[0] if isinstance(found, tuple) else found

    result, whole = temporal_analysis(case.model, x, timesteps=case.timesteps), output(case.model)
    for t in range(1, result.timesteps + 1):
        edit = truncation(case.model, feed.adapter, feed, t)
        assert (edit is None) == (t == result.timesteps)
        short = Plan(() if edit is None else (edit,)).apply(case.model)
        torch.testing.assert_close(output(short), whole[:t])  # a readout may differ in the last bit
        energy = profile(short, x, timesteps=case.timesteps).energy_pj
        assert energy == pytest.approx(result.energy_pj[t - 1], rel=1e-9)


def test_keyword_inputs_are_cut() -> None:
    setting = SETTINGS["over its input"]
    model = Plan((setting.edit(),)).apply(setting.model())
    wanted = setting.output(model)
    with torch.no_grad():
        assert torch.equal(model(x=series)[0], wanted)
        assert len(model(series[:2])[0]) == 2  # what is shorter stays as it is


def test_a_model_of_a_signature_of_its_own() -> None:
    setting = SETTINGS["over its input"]
    model, batches = setting.model(), [{"x": series}]
    feed = Feed(find_adapter(model), batches, forward=lambda m, batch: m(x=batch["x"])[0].mean(0))
    assert truncation(model, feed.adapter, feed, KEPT) == TruncateTimesteps(KEPT, "input")


# ------------------------------------------------------------------------------------------
# What can't be truncated.


class Constant(Loop):
    def steps(self, x: Tensor) -> list[Tensor]:
        return [x for _ in range(6)]


class Twice(OverTime):
    """The number of steps stands in the input and in an attribute."""

    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x.view(self.num_steps, -1, 64))


class Ramp(Loop):
    """An input that depends on how many steps there will be, as in latency coding."""

    def steps(self, x: Tensor) -> list[Tensor]:
        return [2 * x * (step + 1) / self.num_steps for step in range(self.num_steps)]


class FullLength(Loop):
    """Fills an output of constant length."""

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros(6, len(x), 3)
        for step, spikes in enumerate(super().forward(x)[0]):
            output[step] = spikes
        return output


@pytest.mark.parametrize(
    ("build", "x", "says"),
    [
        (Constant, static, r"num_steps = 4: neurons 'lif1' then make 6 steps \(6 in the whole run\)"),
        (
            Twice,
            series,
            r"Input cut on axis 0: neurons 'lif1' then make 6 .*num_steps = 4: it then fails with RuntimeError: shape",
        ),
        (Ramp, static, "num_steps = 4: neurons 'lif1' then fire otherwise than in the first steps"),
        (FullLength, static, "num_steps = 4: its output isn't then the first part"),
    ],
)
def test_what_can_not_be_done_is_said_plainly(build: type[Loop], x: Tensor, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        Setting(build, x, None, "").edit()
    assert "can't be made to run only 4 of its 6 timesteps" in str(caught.value)
    assert "self.num_steps = 6" in str(caught.value)


def test_neurons_parallel_in_time() -> None:
    net = nn.Sequential(layer.Linear(4, 3), neuron.PSN(T=T), layer.Linear(3, 2), neuron.IFNode())
    functional.set_step_mode(net, "m")
    feed = Feed(find_adapter(net), torch.rand(T, 2, 4))
    with pytest.raises(ModelError, match="Input cut on axis 0: it then fails"):
        truncation(net, feed.adapter, feed, KEPT)


def test_a_loop_in_forward_is_the_users_own() -> None:
    model = SETTINGS["snntorch sequential"].model()

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([net(x)[0] for _ in range(T)])

    feed = Feed(find_adapter(model), static, forward=forward)
    with pytest.raises(ModelError, match=r"Where forward= calls the model once per timestep, let it do so 4 times"):
        truncation(model, feed.adapter, feed, KEPT)


@pytest.mark.parametrize("timesteps", [0, -1, True, 2.0, "4", None])
def test_no_number_of_timesteps(timesteps: Any) -> None:
    with pytest.raises(OptionError, match="whole number of timesteps"):
        SETTINGS["own loop"].edit(timesteps)
    with pytest.raises(PlanError, match="whole number of timesteps"):
        TruncateTimesteps(timesteps)


def test_more_than_it_runs() -> None:
    with pytest.raises(OptionError, match="Loop runs 6 timesteps; it can't be truncated to 7"):
        SETTINGS["own loop"].edit(7)


# ------------------------------------------------------------------------------------------
# Plans.


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": 0},
        {"timesteps": True},
        {"timesteps": 2.5},
        {"timesteps": None},
        {"way": "magic"},
        {"axis": -1},
        {"axis": "0"},
        {"module": 3},
        {"attribute": None},
        {"surprise": 1},
    ],
)
def test_a_damaged_edit_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(Plan((TruncateTimesteps(4, "attribute", "", "num_steps"),)).to_json())
    data["edits"][0] |= change
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (TruncateTimesteps(4, "attribute", "nowhere", "T"), "no module 'nowhere'"),
        (TruncateTimesteps(4, "attribute", "", "nothing"), "no whole number 'nothing' of at least 4"),
        (TruncateTimesteps(4, "attribute", "fc1", "weight"), "fc1 has no whole number 'weight'"),
        (TruncateTimesteps(7, "attribute", "", "num_steps"), r"at least 7 .*\(num_steps = 6\)"),
        (TruncateTimesteps(1, "attribute", "", "training"), "no whole number 'training'"),
    ],
)
def test_a_plan_for_another_architecture(edit: TruncateTimesteps, says: str) -> None:
    model = Loop()
    with pytest.raises(PlanError, match=says):
        Plan((edit,)).apply(model)
    assert model.num_steps == T


def test_the_last_truncation_counts() -> None:
    quantize = QuantizeWeights("fc1", "uniform", 4, {})
    assert Plan((TruncateTimesteps(5), quantize, TruncateTimesteps(3), quantize)).timesteps == 3
    assert Plan((quantize,)).timesteps is None
    assert "timesteps=5" in str(Plan((TruncateTimesteps(5),)))


def test_another_step_mode_is_refused_rather_than_samples_cut() -> None:
    net = nn.Sequential(layer.Linear(3, 4), neuron.IFNode(), layer.Linear(4, 2), neuron.IFNode())
    functional.set_step_mode(net, "m")
    small = snncompress.apply(net, None, bits=None, data=torch.rand(T, 5, 3), truncate=KEPT)
    assert len(small(torch.rand(T, 5, 3))) == KEPT
    functional.reset_net(small)
    functional.set_step_mode(small, "s")
    with pytest.raises(ModelError, match=r"truncated to 4 timesteps for inputs of 3 dimensions, and got \[5, 3\]"):
        small(torch.rand(5, 3))


class Dense(Loop):
    """Maps of every step [T, N, C, H, W], scores beside them, and what has no time, in a mapping."""

    def forward(self, x: Tensor) -> Any:
        spikes, _ = super().forward(x)
        maps = spikes[..., None, None] * torch.arange(1.0, 5.0).view(2, 2)
        return {"maps": maps if self.depth == T else maps.flip(0), "all": (spikes.sum(0), [spikes.unsqueeze(2)])}


def test_outputs_of_any_form_are_held_against_the_first_steps() -> None:
    torch.manual_seed(1)
    x = torch.rand(3, 64)
    case = liven(Case(Dense(), x, None))
    model = case.model
    feed = Feed(find_adapter(model), x)
    edit = truncation(model, feed.adapter, feed, KEPT)
    assert edit == TruncateTimesteps(KEPT, "attribute", "", "num_steps")
    small = snncompress.apply(model, None, bits=None, data=x, truncate=KEPT)
    with torch.no_grad():
        before, after = model(x), small(x)
    assert torch.equal(after["maps"], before["maps"][:KEPT])
    assert after["maps"].shape == (KEPT, 3, 3, 2, 2)
    model.depth = 0  # the last step comes first
    with pytest.raises(ModelError, match="its output isn't then the first part of the whole run's"):
        truncation(model, feed.adapter, feed, KEPT)
