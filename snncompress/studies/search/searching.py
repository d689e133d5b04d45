"""search(): which settings of ``apply`` give the best networks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from snncompress.base.progress import Progress, tracked
from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, EnergyModel, Forward, Loss
from snncompress.model.network import weight_layers
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.plan import refuse_frozen
from snncompress.pruning.checkpoint import digest_of, fingerprint
from snncompress.running.bench import bench
from snncompress.running.data import Feed

from .queue import Queue, closed, opened, optuna
from .result import Search
from .space import Space
from .trying import OBJECTIVES, Work, Worker, again
from .workers import in_processes, on_ray, one_by_one


def search(
    model: nn.Module,
    data: Any,
    space: Mapping[str, Any],
    objectives: str | Sequence[str] = ("accuracy", "energy"),
    *,
    trials: int = 40,
    n_jobs: int | None = 1,
    storage: Any = None,
    name: str = "search",
    on: Literal["processes", "ray"] = "processes",
    resources: Mapping[str, Any] | None = None,
    validation: Any = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    skip: Any = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    energy_model: EnergyModel | str = "horowitz_45nm",
    sampler: Callable[[int], Any] | None = None,
    pruner: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Try settings of ``apply`` and keep what each came to: accuracy against cost, as a Pareto front.

    Optuna draws the settings (Akiba et al., KDD 2019). Each trial compresses, repairs and, where ``epochs`` is in the
    space, fine-tunes a copy of the model, and is measured on data that were held out. Settings that can't be, such as a
    budget that can't be met, are kept as failed trials with their reason.

    With ``storage`` a search that was stopped or killed goes on where it was: the same call runs the trials that are
    missing, those that were running included, each once and with the parameters that were drawn for it. Calls on other
    machines with the same storage share the trials.

    Args:
        model: the network; it stays bitwise as it is.
        data: labelled data, as for ``apply``: they calibrate and train.
        space: option → what it may be: a list of choices, a range (low, high), one of Optuna's distributions, or one
            value that all trials have. "criterion", "ratio", "bits", "repair", "budget", "target", "scheduler",
            "quantizer", "order", "rounding", "refresh", "round_to" and "finetune" are those of ``apply``; "ratio",
            "bits" and "budget" may be mappings with a list or range for each key. "timesteps" is how many the result
            runs (``truncate`` of ``apply``), "epochs" and "lr" are of ``finetune``, after compression. Ranges of
            "ratio", "budget" and "lr" (logarithmic) are of real numbers, the others of whole ones, both ends included.
        objectives: "accuracy" is to grow; "energy" (pJ per sample), "size" (MB), "params", "synops" and "macs" are to
            shrink; units as for a budget: "energy_nj", "size_kb" ….
        trials: how many there are to be in all.
        n_jobs: processes on this machine, each with a copy of model and data and its share of the threads; on Ray, how
            many tasks at a time, None for as many as the cluster has CPUs.
        storage: where trials are kept: a path (a journal file; also on a shared folder), a URL of a database such as
            "sqlite:///search.db", or one of Optuna's storages. None keeps nothing, and won't do on Ray.
        name: of the study in the storage.
        on: "processes", or "ray": trials are tasks of a Ray cluster, whose machines must all reach the storage.
        resources: what a task on Ray asks for, as ``{"num_cpus": 2, "num_gpus": 1}``.
        validation: labelled data to measure on; None: every fifth batch of ``data``, or the last fifth of each where
            there are fewer than five, held out.
        timesteps, forward, loss, skip, adapter, neurons, time_dim: as for ``apply``.
        energy_model: what turns counts into pJ.
        sampler: ``sampler(seed)`` makes one of Optuna's samplers; None: TPE. Those that go through a grid end a study
            by themselves, which only Optuna's own loop understands.
        pruner: one of Optuna's; None: the median rule. With "accuracy" as the only objective and "epochs" in the
            space, trials that fall behind are stopped after an epoch; Optuna has no such rule for several objectives.
        seed: each trial compresses and trains from it, and draws its settings from it and its number. With one
            process the whole search is repeatable; with several, which trials are known when another one is drawn
            isn't, but the same settings always give the same network.
        progress: a bar on a terminal, a callable, or False for nothing.

    Raises:
        OptionError: an option or objective that isn't there, a space in which nothing varies, a study that is of
            another search, or Optuna or Ray isn't installed.
        DataError: data without labels, or that don't fit the model.
        ModelError: no framework knows the model, or it can't be sent to other processes.
        StorageError: a storage that can't be used.
        SNNCompressError: a process died.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2))
        >>> batch = torch.rand(10, 4), torch.arange(10) % 2
        >>> space = {"criterion": "magnitude", "ratio": (0.2, 0.8), "bits": [2, 4, 8]}
        >>> found = search(net, batch, space, ("accuracy", "size_kb"), trials=3, timesteps=2, skip=[])
        >>> len(found.complete), sorted(found.best.settings), found.model()[0].weight.shape[1]
        (3, ['bits', 'ratio'], 4)
    """
    if on not in ("processes", "ray"):
        raise OptionError(f"on must be 'processes' or 'ray', not {on!r}.")
    _check_counts(trials, n_jobs, seed, on)
    module = optuna()
    asked = Space.of(space)
    wanted = _objectives(objectives)
    energy: EnergyModel = registry().resolve("energy model", energy_model, EnergyModel)
    refuse_frozen(model, "compressed")
    named = named_neurons(adapter, neurons, time_dim)
    with bench(
        model, data, timesteps, forward, loss, named, test=validation, labels="accuracy needs labels", seed=seed
    ) as table:
        asked.check_layers(weight_layers(table.model))
        if validation is None:
            feed, held = table.feed.parted()
            data, validation = _batches(feed), _batches(held)
        first = digest_of((table.feed.first().raw, table.test.first().raw))
    up = tuple(objective == "accuracy" for objective in wanted)
    with contextlib.ExitStack() as stack:
        if storage is None:
            if on == "ray":
                raise OptionError(
                    "on='ray' needs a storage= that all machines reach: a path in a shared folder, or a URL."
                )
            storage = module.storages.InMemoryStorage() if n_jobs == 1 else _journal(stack)
        elif isinstance(storage, module.storages.InMemoryStorage) and (n_jobs != 1 or on == "ray"):
            raise OptionError("Other processes can't reach an InMemoryStorage: give the path of a file as storage=.")
        if isinstance(storage, os.PathLike):
            storage = os.fspath(storage)
        if isinstance(storage, str) and "://" not in storage:
            storage = str(Path(storage).absolute())  # tasks on Ray run elsewhere
        share = (resources or {}).get("num_cpus", 1) if on == "ray" else torch.get_num_threads() // (n_jobs or 1)
        threads = max(1, int(share))
        work = Work(
            model, data, validation, asked, wanted, Queue(storage, name, up, trials, seed, sampler, pruner),
            timesteps, forward, loss, adapter, neurons, time_dim, skip, energy_model, threads,
        )  # fmt: skip
        own = opened(storage)
        stack.callback(closed, own, storage)
        work.queue.create(
            own,
            {
                "space": asked.described(), "objectives": list(wanted), "seed": seed, "model": fingerprint(model),
                "data": first, "timesteps": timesteps, "skip": repr(skip),
                "energy model": f"{energy.name} {energy.options()}",
            },
        )  # fmt: skip
        work.queue.put_back(own)
        worker = Worker(work, own)
        left = sum(trial.state in ("waiting", "running") for trial in worker.trials())
        if left:
            _shown(_carried_out(worker, on, n_jobs, resources or {}), left, progress)
        found = tuple(worker.trials())
    kept = dataclasses.replace(work, queue=dataclasses.replace(work.queue, storage=None))
    return Search(found, wanted, up, type(model).__name__, functools.partial(again, kept))


def _carried_out(worker: Worker, on: str, n_jobs: int | None, resources: Mapping[str, Any]) -> Iterator[int]:
    if on == "ray":
        return on_ray(worker.work, n_jobs, resources)
    return one_by_one(worker) if n_jobs == 1 else in_processes(worker.work, n_jobs or 1)


def _shown(done: Iterator[int], left: int, progress: Progress | None) -> None:
    ticks = tracked(range(left), progress, "trials")
    with contextlib.closing(ticks):  # type: ignore[type-var]
        next(ticks, None)
        for _ in done:
            next(ticks, None)


def _batches(feed: Feed) -> list[Any]:
    return [batch.raw for batch in feed]


def _journal(stack: contextlib.ExitStack) -> str:
    """A file that is gone afterwards."""
    return str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "search.journal")


def _objectives(asked: Any) -> tuple[str, ...]:
    wanted = (asked,) if isinstance(asked, str) else tuple(asked) if isinstance(asked, Sequence) else ()
    if not wanted:
        raise OptionError(f"objectives must be names such as ('accuracy', 'energy'), not {asked!r}.")
    for objective in wanted:
        if objective not in OBJECTIVES:
            raise OptionError(f"There is no objective {objective!r}. Objectives: {', '.join(OBJECTIVES)}.")
    if len(set(wanted)) < len(wanted):
        raise OptionError(f"An objective stands there twice: {wanted!r}.")
    return wanted


def _check_counts(trials: Any, n_jobs: Any, seed: Any, on: str) -> None:
    for what, value in (("trials", trials), ("n_jobs", n_jobs)):
        if what == "n_jobs" and value is None and on == "ray":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{what} must be a whole number of at least 1, not {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
