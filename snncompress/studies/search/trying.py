"""One trial: compress, repair, train, measure; and the process that does one after another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snncompress.contract.registry import registry
from snncompress.errors import PlanError, SNNCompressError
from snncompress.interfaces import Adapter, EnergyModel, Forward, Loss
from snncompress.measuring.judging import judge
from snncompress.model.chance import seeded
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.plan import plan_of
from snncompress.pruning.apply import apply
from snncompress.pruning.budgets import KINDS, UNITS
from snncompress.pruning.epochs import Epoch
from snncompress.pruning.training import finetune
from snncompress.running.bench import bench

from .queue import Queue, alive, give_back, optuna
from .result import Trial, from_optuna
from .space import Space


@dataclass(frozen=True)
class Work:
    """All that a process needs to run trials."""

    model: nn.Module
    data: Any
    validation: Any
    space: Space
    objectives: tuple[str, ...]
    queue: Queue
    timesteps: int | None
    forward: Forward | None
    loss: Loss | None
    adapter: Adapter | str | None
    neurons: Neurons | None
    time_dim: int | None
    skip: Any
    energy_model: EnergyModel | str
    threads: int

    @property
    def how(self) -> dict[str, Any]:
        """How the model is run, as apply and finetune take it."""
        return {
            "timesteps": self.timesteps, "forward": self.forward, "loss": self.loss, "adapter": self.adapter,
            "neurons": self.neurons, "time_dim": self.time_dim, "progress": False,
        }  # fmt: skip


@dataclass
class Outcome:
    """What came of a trial."""

    model: nn.Module
    figures: dict[str, float]
    warned: list[str]


class Worker:
    """Runs trials one after another, as long as there are any in line."""

    def __init__(self, work: Work, storage: Any) -> None:
        self.work, self._storage, self._study = work, storage, work.queue.study(storage)

    def next(self) -> int | None:
        """Run the next trial in line, and return its number; None where none is left.

        A trial that can't be is kept as failed, with the reason. Whatever else goes wrong is raised, and the trial is
        back in line.
        """
        taken = self.work.queue.take(self._study, self._storage)
        if taken is None:
            return None
        trial, trial_id = taken
        states = optuna().trial.TrialState
        try:
            with alive(self._storage, trial_id):
                began = time.perf_counter()
                values, state = None, states.COMPLETE
                try:
                    outcome = perform(self.work, _drawn(self.work.space, trial), trial)
                    figures, plan = outcome.figures, plan_of(outcome.model).to_json()
                    self._note(trial_id, figures=figures, plan=plan, warned=outcome.warned)
                    values = [figure(figures, objective) for objective in self.work.objectives]
                except optuna().TrialPruned:
                    state = states.PRUNED
                except SNNCompressError as error:
                    state = states.FAIL
                    self._note(trial_id, reason=str(error))
                self._note(trial_id, seconds=time.perf_counter() - began)
            if self._storage.get_trial(trial_id).state == states.RUNNING:
                self._study.tell(trial, values, state, skip_if_finished=True)
        except optuna().exceptions.UpdateFinishedTrialError:
            pass  # this process was taken for dead, and another one was faster: with the same result
        except BaseException:
            give_back(self._storage, trial_id)
            raise
        return int(trial.number)

    def _note(self, trial_id: int, **facts: Any) -> None:
        for name, value in facts.items():
            self._storage.set_trial_user_attr(trial_id, name, value)

    def trials(self) -> list[Trial]:
        """All that there are, as they stand."""
        found = [from_optuna(frozen) for frozen in self._study.get_trials(deepcopy=False)]
        # where two machines put them in line at once, there are some that nobody takes
        return [trial for trial in found if trial.number < self.work.queue.trials or trial.state != "waiting"]


def perform(work: Work, chosen: Mapping[str, Any], trial: Any = None) -> Outcome:
    """The network that these parameters make, measured; ``trial``, Optuna's, is told of accuracies on the way.

    The user's random state stays, and each begins at the same seed.
    """
    options = work.space.options(chosen)
    epochs, lr = options.pop("epochs", 0), options.pop("lr", None)
    truncate = options.pop("timesteps", None)
    early = trial if len(work.objectives) == 1 and work.objectives[0] == "accuracy" and epochs else None
    seed, before = work.queue.seed, torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        with warnings.catch_warnings(record=True) as warned, seeded(work.model, seed):
            warnings.simplefilter("always")
            small = apply(
                work.model, data=work.data, truncate=truncate, skip=work.skip, seed=seed, **options, **work.how
            )
            if early is not None:
                _tell(early, 0, _measured(work, small)["accuracy"])
            if epochs:
                _train(work, small, epochs, lr, early)
            figures = _measured(work, small)
    finally:
        torch.set_num_threads(before)
    return Outcome(small, figures, list(dict.fromkeys(str(warning.message) for warning in warned)))


def again(work: Work, trial: Trial) -> nn.Module:
    """The network of a trial, made once more; raises PlanError where another one comes out."""
    plan = trial.plan
    made = perform(work, trial.settings).model
    if plan_of(made).edits != plan.edits:
        raise PlanError(
            f"Trial {trial.number} comes out otherwise than it did. Likely cause: it ran on another machine, with "
            f"other versions, or with data that are drawn anew. Its plan still gives its structure: "
            f"trial.plan.apply(model)."
        )
    return made


def figure(figures: Mapping[str, float], objective: str) -> float:
    """An objective, of what was measured."""
    kind, unit = UNITS.get(objective, (objective, 1.0))
    return figures[_FIGURES[kind]] / unit


def _train(work: Work, model: nn.Module, epochs: int, lr: float | None, early: Any) -> None:
    stopped = False

    def on_epoch(done: Sequence[Epoch]) -> bool:
        nonlocal stopped
        if early is not None:
            stopped = _says_stop(early, done[-1].epoch, done[-1].validation_accuracy or 0.0)
        return stopped

    finetune(model, work.data, epochs=epochs, lr=lr, validation=work.validation, on_epoch=on_epoch, **work.how)
    if stopped:
        raise optuna().TrialPruned


def _tell(trial: Any, step: int, accuracy: float) -> None:
    if _says_stop(trial, step, accuracy):
        raise optuna().TrialPruned


def _says_stop(trial: Any, step: int, accuracy: float) -> bool:
    if step not in trial.storage.get_trial(trial._trial_id).intermediate_values:  # of a process that died
        trial.report(accuracy, step)
    return bool(trial.should_prune())


def _measured(work: Work, model: nn.Module) -> dict[str, float]:
    energy: EnergyModel = registry().resolve("energy model", work.energy_model, EnergyModel)
    named = named_neurons(work.adapter, work.neurons, work.time_dim)
    with bench(model, work.validation, work.timesteps, work.forward, adapter=named, seed=work.queue.seed) as table:
        profile, accuracy = judge(table.model, table.feed, energy)
    return {
        "accuracy": accuracy,
        **{name: float(getattr(profile, name)) for name in _FIGURES.values() if name != "accuracy"},
    }


_FIGURES = {
    "accuracy": "accuracy", "energy": "energy_pj", "size": "size_mb", "params": "n_params", "synops": "n_ac",
    "macs": "n_mac",
}  # fmt: skip
"""Objective → what a trial's figures call it."""
OBJECTIVES = (*_FIGURES, *UNITS)
assert set(_FIGURES) == {"accuracy", *KINDS}


def _drawn(space: Space, trial: Any) -> dict[str, Any]:
    """Each parameter's value, drawn or, where the trial was begun before, as it was drawn."""
    drawn = {}
    for parameter in space.parameters:
        name, how = parameter.name, parameter.distribution
        if hasattr(how, "choices"):
            drawn[name] = trial.suggest_categorical(name, how.choices)
        else:
            suggest = trial.suggest_int if isinstance(how.low, int) else trial.suggest_float
            drawn[name] = suggest(name, how.low, how.high, step=how.step, log=how.log)
    return drawn
