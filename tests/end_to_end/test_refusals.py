"""What can't work is refused in words, in bounded time: broken weights, plugins, plans and paths."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, Plan, PlanError, PluginError, StorageError
from snncompress.extend import Criterion, EnergyModel, Layer, OperationCounts, Scheduler, Stage, Target

X = torch.rand(2, 1, 6, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(1, 8, 3), layer.BatchNorm2d(8), neuron.IFNode(v_threshold=0.3), layer.Conv2d(8, 8, 3),
        neuron.IFNode(v_threshold=0.3), layer.Flatten(), layer.Linear(32, 5),
    )  # fmt: skip


def apply(model: nn.Module, criterion: Any = "magnitude", **options: Any) -> nn.Module:
    return snncompress.apply(model, criterion, 0.5, None, data=X, timesteps=2, **options)


# -- weights --


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "3.bias", "1.weight"])
def test_broken_parameters(name: str, value: float) -> None:
    model = net()
    model.get_parameter(name).data.view(-1)[0] = value
    for criterion in (*snncompress.criteria(), None):
        with pytest.raises(ModelError, match=rf"{name} of this Sequential holds 1 NaN or infinite .*diverged"):
            apply(model, criterion and criterion.name)
    for call in (snncompress.profile, snncompress.temporal_analysis, snncompress.evaluate):
        with pytest.raises(ModelError, match=name):
            call(model, X, timesteps=2)


def test_broken_buffers() -> None:
    """NaN is never meant, statistics are finite; infinity may be meant, as in a mask of an attention."""
    for value in (float("nan"), float("inf")):
        model = net()
        model[1].running_var[0] = value
        with pytest.raises(ModelError, match=r"1\.running_var"):
            apply(model)
    model = net()
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    apply(model)


def test_broken_thresholds() -> None:
    """A number, not a tensor: nothing fires. An infinite one is meant, as of a readout."""
    model = net()
    model[2].v_threshold = float("nan")
    for call in (apply, lambda m: snncompress.finetune(m, (X, torch.arange(len(X))), epochs=1, timesteps=2)):
        with pytest.raises(ModelError, match=r"2\.v_threshold of this Sequential is NaN"):
            call(model)
    model[2].v_threshold = float("inf")
    snncompress.profile(model, X, timesteps=2)


# -- plugins --


class Scores(Criterion):
    name: ClassVar[str] = "scores"

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def score(self, layer: Layer, state: Any) -> Any:
        return self.make(layer.channels)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.ones(n, dtype=torch.cfloat), lambda n: torch.ones(n).to_sparse(), lambda n: None,
        lambda n: torch.full((n,), float("nan")), lambda n: torch.ones(n, 1), lambda n: torch.tensor(1.0),
        lambda n: [1.0] * n,
    ],
)  # fmt: skip
def test_scores_that_are_none(make: Callable[[int], Any]) -> None:
    with pytest.raises(PluginError, match=r"Criterion 'scores'"):
        apply(net(), Scores(make))


class Steps(Scheduler):
    name: ClassVar[str] = "steps"

    def __init__(self, ratio: Callable[[float, int, int], Any], steps: Any = 3) -> None:
        self._ratio, self.steps = ratio, steps

    def ratio(self, target: float, step: int, steps: int) -> float:
        return self._ratio(target, step, steps)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (lambda t, i, n: float("nan"), "says nan for step 1 of 3"),
        (lambda t, i, n: None, "says None"),
        (lambda t, i, n: "0.5", "says '0.5'"),
        (lambda t, i, n: [0.3, 0.2, 0.5][i - 1], "says 0.2 for step 2.*don't decrease"),
        (lambda t, i, n: t * i / (n + 1), r"ends at 0\.375 instead of the target 0\.5"),
        (lambda t, i, n: 1.5, "says 1.5"),
        (lambda t, i, n: -0.5, "says -0.5"),
        (lambda t, i, n: 1 / 0, "failed at step 1 of 3: ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("criterion", ["magnitude", "weight_magnitude"])
def test_schedules_that_break_their_contract(ratio: Any, message: str, criterion: str) -> None:
    with pytest.raises(PluginError, match=message):
        apply(net(), criterion, scheduler=Steps(ratio))


@pytest.mark.parametrize("steps", [0, -1, 10**12, "three", float("nan")])
def test_numbers_of_steps_that_cannot_be(steps: Any) -> None:
    start = time.monotonic()
    with pytest.raises(PluginError, match="Scheduler 'steps'"):
        apply(net(), scheduler=Steps(lambda t, i, n: t * i / n, steps))
    assert time.monotonic() - start < 10


class Energy(EnergyModel):
    name: ClassVar[str] = "energy"

    def __init__(self, value: Any) -> None:
        self.value = value

    def energy_pj(self, counts: OperationCounts) -> Any:
        return self.value(counts) if callable(self.value) else self.value


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1.0, "1", lambda counts: counts.nothing])
def test_energies_that_are_none(value: Any) -> None:
    for call in (snncompress.profile, snncompress.temporal_analysis):
        with pytest.raises(PluginError, match="Energy model 'energy'"):
            call(net(), X, timesteps=2, energy_model=Energy(value))


@pytest.mark.parametrize("told", [3, KeyError("x"), None])
def test_chips_that_cannot_tell(told: Any) -> None:
    @dataclass(frozen=True)
    class Chip(Target):
        name = "chip"

        def limits(self, stage: Stage) -> Iterator[Any]:
            if isinstance(told, KeyError):
                raise told
            yield from [] if told is None else [told]

        def place(self, stages: Sequence[Stage]) -> Any:
            return None

    for call in (snncompress.fits, lambda model, chip, **how: snncompress.apply(model, target=chip, **how)):
        with pytest.raises(PluginError, match=r"Target 'chip': (limits|place)"):
            call(net(), Chip(), data=X, timesteps=2)


# -- paths --


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_checkpoints_that_cannot_be(pipe: Path, tmp_path: Path) -> None:
    for folder in ("", pipe, pipe.parent):
        with pytest.raises(StorageError, match=r"checkpoint=.*can't be used as a folder|is a pipe"):
            apply(net(), checkpoint=folder)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_files_that_are_pipes_or_folders(pipe: Path) -> None:
    """Reading a pipe that nobody writes to would never end, writing would take it away."""
    small = apply(net())
    for path in (pipe, pipe.parent):
        with pytest.raises(StorageError):
            snncompress.save(small, path)
        with pytest.raises(StorageError):
            snncompress.load(path, into=net())
    assert pipe.is_fifo()
    for no_path in (3, b"small", ""):
        for call in (lambda path: snncompress.save(small, path), snncompress.load, snncompress.plan_of(small).to_csv):
            with pytest.raises(OptionError, match="named by a path"):
                call(no_path)
    assert snncompress.__name__ == "snncompress"


# -- plans --


def damaged(change: Callable[[dict[str, Any]], object], edit: str) -> str:
    model = apply(net(), "weight_magnitude") if edit == "mask_weights" else apply(net(), truncate=1)
    data = json.loads(snncompress.plan_of(model).to_json())
    change(next(e for e in data["edits"] if e["edit"] == edit))
    return json.dumps(data)


@pytest.mark.parametrize("huge", [10**12, 2**63, 10**30, -1, -(10**30)])
@pytest.mark.parametrize(
    ("edit", "change"),
    [
        ("remove_channels", lambda e, n: e["slices"][0].update(width=n)),
        ("remove_channels", lambda e, n: e["slices"][0].update(indices=[n])),
        ("remove_channels", lambda e, n: e.update(indices=[n])),
        ("remove_channels", lambda e, n: e["slices"][0].update(axis=n)),
        ("mask_weights", lambda e, n: e.update(shape=[n, 0])),
        ("mask_weights", lambda e, n: e.update(shape=[8] * 70)),
        ("truncate_timesteps", lambda e, n: e.update(timesteps=n)),
        ("truncate_timesteps", lambda e, n: e.update(axis=n)),
    ],
)
def test_absurd_numbers_in_a_plan(edit: str, change: Any, huge: int) -> None:
    text = damaged(lambda e: change(e, huge), edit)
    start = time.monotonic()
    with pytest.raises(PlanError):
        Plan.from_json(text)
    assert time.monotonic() - start < 2


def test_the_widest_layer_a_plan_may_name_costs_nothing() -> None:
    plan = Plan.from_json(damaged(lambda e: e["slices"][0].update(width=2**31), "remove_channels"))
    assert plan.removed_channels() == snncompress.plan_of(apply(net())).removed_channels()
    assert str(plan)
    with pytest.raises(PlanError):
        plan.apply(net())


def of(*edits: object, skipped: object = None, origin: object = None) -> str:
    return json.dumps({"format": 2, "edits": edits, "skipped": skipped or {}, "origin": origin or {}})


@pytest.mark.parametrize("inputs", [10**6, 10**9, 2**31])
def test_a_layer_behind_a_removed_block_does_not_grow_without_bound(inputs: int) -> None:
    plan = Plan.from_json(
        of(
            {
                "edit": "remove_block",
                "name": "1",
                "repair": "slice",
                "repairs": [{"layer": "6", "before": 32, "after": inputs}],
            }
        )
    )
    start = time.monotonic()
    with pytest.raises(PlanError, match="would grow from 32"):
        plan.apply(net())
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "1e999", '{"format": 2}', '{"format": NaN}', of(origin={"a": float("nan")}), of(5), of([]),
        of(skipped=7), of({"edit": ["mask_weights"]}),
        of({"edit": "remove_channels", "layer": "0", "indices": 1, "slices": 3}),
        of({"edit": "remove_block", "name": "0", "repairs": ["x"], "repair": "slice"}),
        of({"edit": "quantize_weights", "layer": "0", "quantizer": "rescaw", "bits": 4, "options": 3}),
        "9" * 5000, "[" * 100_000,
    ],
)  # fmt: skip
def test_texts_that_are_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_removed_channels_over_several_edits() -> None:
    """Original numbers, whatever went before: 1 and 4, then what was 0 and 5, then 7."""
    model = net()
    gone: list[int] = []
    for removed in ([1, 4], [0, 3], [3]):
        left = [c for c in range(8) if c not in gone]
        gone = sorted(gone + [left[i] for i in removed])
    plans = []
    for removed in ([1, 4], [0, 3], [3]):

        class These(Criterion):
            name: ClassVar[str] = "these"
            which: ClassVar[list[int]] = removed

            def score(self, layer: Layer, state: Any) -> Tensor:
                return torch.ones(layer.channels).index_fill(0, torch.tensor(self.which), 0.0)

        width = model[0].weight.shape[0]
        model = snncompress.apply(model, These(), {"0": len(removed) / width}, None, data=X, timesteps=2, skip=[])
        plans.append(snncompress.plan_of(model))
    assert plans[-1].removed_channels()["0"] == gone == [0, 1, 4, 5, 7]


# -- where a plan is --


def test_a_wrapped_model_says_where_its_plan_is() -> None:
    small = apply(net())
    for wrapped, name in ((nn.DataParallel(small), "module"), (torch.optim.swa_utils.AveragedModel(small), "module")):
        with pytest.raises(PlanError, match=rf"its part '{name}' does: plan_of\(model\.{name}\)"):
            snncompress.plan_of(wrapped)
        assert snncompress.plan_of(getattr(wrapped, name)) == snncompress.plan_of(small)
    with pytest.raises(PlanError, match="did not come from"):
        snncompress.plan_of(copy.deepcopy(net()))
