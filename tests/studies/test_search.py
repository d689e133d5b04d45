"""Searches: what is tried and kept, against direct calls of apply; stopped and resumed; refused at the door."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import snncompress
from snncompress import DataError, ModelError, OptionError, Search, StorageError, Trial, UnknownNameError
from snncompress.studies.search.queue import ASKED
from snncompress.studies.search.space import Space
from tests.equivalence import same, snapshot

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")

SPACE = {"criterion": ["magnitude", "random"], "ratio": (0.2, 0.8), "bits": [2, 4, None]}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), neuron.LIFNode(), nn.Linear(10, 8), neuron.LIFNode(), nn.Linear(8, 2))


def batch(seed: int = 1, count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.rand(count, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 2


def search(space: Any = SPACE, objectives: Any = ("accuracy", "size_kb"), **options: Any) -> Search:
    usual = {"trials": 3, "timesteps": 2, "skip": [], "validation": batch(2), "progress": False}
    return snncompress.search(options.pop("net", network()), batch(), space, objectives, **usual | options)


def facts(found: Search) -> list[tuple[Any, ...]]:
    """All but the time that it took."""
    return [(t.number, t.state, t.values, dict(t.settings), t.plan_json) for t in found.trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Path]:
    """Three trials and the journal that keeps them."""
    journal = tmp_path_factory.mktemp("search") / "search.journal"
    return search(storage=journal), journal


def test_a_trial_is_what_apply_makes(whole: tuple[Search, Path]) -> None:
    found, _ = whole
    trial = found.trials[1]
    asked = trial.settings
    small = snncompress.apply(
        network(), asked["criterion"], asked["ratio"], asked["bits"], data=batch(), timesteps=2, skip=[], progress=False
    )
    assert trial.plan == snncompress.plan_of(small)
    profile = snncompress.profile(small, batch(2), timesteps=2)
    right = snncompress.evaluate(small, batch(2), timesteps=2).accuracy
    assert trial.values == pytest.approx((right, 1000 * profile.size_mb))
    assert trial.figures["energy_pj"] == pytest.approx(profile.energy_pj)
    assert same(found.model(trial).state_dict(), small.state_dict())
    assert trial.plan.apply(network())[0].weight.shape == small[0].weight.shape
    json.dumps(found.to_dict())


def test_the_model_and_the_random_state_stay() -> None:
    net, before = network(), torch.get_rng_state()
    kept = snapshot(net)
    snncompress.search(net, batch(), {"ratio": [0.5, 0.2]}, "accuracy", trials=1, timesteps=2, skip=[])
    assert same(snapshot(net), kept)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_whose_process_died_is_run_again_and_no_other(whole: tuple[Search, Path], tmp_path: Path) -> None:
    found, journal = whole
    ended = subprocess.Popen(["true"])  # a zombie: nobody waits for it yet
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    copy = tmp_path / "killed.journal"
    lines = journal.read_text().splitlines(keepends=True)
    # The journal as it stood when the last trial had drawn its parameters, and its process was killed.
    at = next(n for n, line in enumerate(lines) if '"trial_id":2' in line and '"figures"' in line)
    copy.write_text("".join(lines[:at]).replace(f",{os.getpid()},", f",{ended.pid},"))
    again = search(storage=copy)
    ended.wait()
    assert facts(again) == facts(found)
    assert [trial.seconds for trial in again.trials[:2]] == [trial.seconds for trial in found.trials[:2]]  # not rerun
    assert again.trials[2].seconds != found.trials[2].seconds


def test_what_is_stopped_goes_on_and_more_trials_are_more(whole: tuple[Search, Path], tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(storage=tmp_path / "stopped", trials=3, progress=stop)
    assert facts(search(storage=tmp_path / "stopped", trials=3)) == facts(whole[0])


def at_random(seed: int) -> Any:
    return optuna.samplers.RandomSampler(seed=seed)


def test_what_cannot_be_is_kept_with_its_reason(tmp_path: Path) -> None:
    space = {"ratio": 0.3, "budget": {"params": [0.1, 0.9]}}
    found = search(space, storage=f"sqlite:///{tmp_path / 'search.db'}", sampler=at_random, trials=3)
    states = {trial.settings["budget[params]"]: trial for trial in found.trials}
    assert (states[0.1].state, states[0.9].state) == ("failed", "complete")
    assert "can't be met" in states[0.1].reason
    assert found.best.settings == states[0.9].settings
    assert "× The budget can't be met" in str(found)
    with pytest.raises(OptionError, match="no plan"):
        _ = states[0.1].plan


def test_a_trial_that_falls_behind_is_stopped() -> None:
    space = {"ratio": (0.2, 0.5), "bits": None, "epochs": 1}
    found = search(space, "accuracy", trials=1, pruner=optuna.pruners.ThresholdPruner(lower=1.1))
    assert [trial.state for trial in found.trials] == ["pruned"]
    with pytest.raises(OptionError, match="No trial is complete"):
        _ = found.best


def test_epochs_are_those_of_finetune_and_timesteps_those_of_the_result() -> None:
    space = {"criterion": "magnitude", "ratio": [0.5], "bits": None, "timesteps": [1], "epochs": 1, "lr": (1e-3, 1e-2)}
    found = search(space, "accuracy", trials=1)
    (trial,) = found.trials
    small = found.model()
    bare = snncompress.apply(
        network(), "magnitude", 0.5, None, data=batch(), timesteps=2, skip=[], truncate=1, progress=False
    )
    assert trial.plan.edits == snncompress.plan_of(bare).edits
    assert not torch.equal(small[4].bias, bare[4].bias)
    assert snncompress.evaluate(small, batch(2), timesteps=2).accuracy == trial.values[0]


def test_the_front_by_hand() -> None:
    # (accuracy up, energy down): 1 beats 0; 3 is 1 over again; 2 is cheaper; 4 costs more than 1 for less.
    values = [(0.9, 5.0), (0.9, 4.0), (0.5, 1.0), (0.9, 4.0), (0.6, 4.5)]
    trials = tuple(Trial(number, "complete", pair) for number, pair in enumerate(values))
    found = Search(trials, ("accuracy", "energy"), (True, False))
    assert [trial.number for trial in found.front] == [2, 1]
    assert found.best.number == 1
    turned = tuple(Trial(number, "complete", pair[::-1]) for number, pair in enumerate(values))
    assert [t.number for t in Search(turned, ("energy", "accuracy"), (False, True)).front] == [1, 2]


@pytest.mark.parametrize("objectives", [("accuracy",), ("accuracy", "energy"), ("accuracy", "energy", "size")])
def test_the_picture(objectives: tuple[str, ...]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    values = [(0.5, 1.0, 3.0), (0.9, 4.0, 2.0)]
    trials = tuple(Trial(n, "complete", v[: len(objectives)]) for n, v in enumerate(values))
    ax = Search(trials, objectives, (True, False, False)[: len(objectives)]).plot()
    line = ax.get_lines()[-1]
    if len(objectives) == 1:
        assert list(line.get_ydata()) == [50, 90]  # the best so far
    else:
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1, 50), (4, 90)]
    pyplot.close(ax.figure)


def test_what_trials_were_warned_of_is_told() -> None:
    found = search({"ratio": (0.2, 0.8)}, "params", net=network()[:3], trials=2, skip=None)
    assert "warned: 2 × Nothing was compressed" in str(found)


def test_chips_are_chosen_like_the_rest() -> None:
    found = search({"target": ["loihi2", None], "bits": None}, "size_kb", trials=2, sampler=at_random)
    for trial in found.complete:
        assert max(trial.plan.bits.values(), default=32) == (7 if trial.settings["target"] else 32)


def test_options_by_hand() -> None:
    space = Space.of({"ratio": {"0": (0.2, 0.8), "2": 0.5}, "criterion": "svs", "bits": [4, {"0": 8}]})
    assert [parameter.name for parameter in space.parameters] == ["ratio[0]", "bits"]
    chosen = {"ratio[0]": 0.25, "bits": '{"0": 8}'}
    assert space.options(chosen) == {"ratio": {"0": 0.25, "2": 0.5}, "criterion": "svs", "bits": {"0": 8}}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"space": {}}, OptionError, "must be a mapping"),
        ({"space": {"ratio": 0.5}}, OptionError, "Nothing in space varies"),
        ({"space": {"ratoi": (0.1, 0.2)}}, OptionError, "names 'ratoi'"),
        ({"space": {"truncate": [1, 2]}}, OptionError, "searched as 'timesteps'"),
        ({"space": {"lr": (1e-3, 1e-2)}}, OptionError, "'lr' without 'epochs'"),
        ({"space": {"ratio": (0.5, 1.0)}}, OptionError, "below 1"),
        ({"space": {"ratio": (0.5, 0.1)}}, OptionError, "range"),
        ({"space": {"bits": (2.0, 4.0)}}, OptionError, "whole numbers"),
        ({"space": {"bits": [4, 17]}}, OptionError, "1 to 16"),
        ({"space": {"bits": []}}, OptionError, "empty list"),
        ({"space": {"bits": [4, 4]}}, OptionError, "twice"),
        ({"space": {"repair": (0, 1)}}, OptionError, "no range"),
        ({"space": {"repair": {"a": ["membrane"]}}}, OptionError, "can't be a mapping"),
        ({"space": {"criterion": ["svs", "swvs"]}}, UnknownNameError, "swvs"),
        ({"space": {"budget": {"energie": (0.1, 0.5)}}}, OptionError, "energie"),
        ({"objectives": ("accuracy", "beauty")}, OptionError, "no objective 'beauty'"),
        ({"objectives": ()}, OptionError, "objectives must be"),
        ({"objectives": ("energy", "energy")}, OptionError, "twice"),
        ({"trials": 0}, OptionError, "trials must be"),
        ({"n_jobs": True}, OptionError, "n_jobs must be"),
        ({"on": "dask"}, OptionError, "'processes' or 'ray'"),
        ({"on": "ray"}, OptionError, "all machines reach"),
        ({"n_jobs": 2, "storage": optuna.storages.InMemoryStorage()}, OptionError, "can't reach"),
        ({"space": {"ratio": {"0": 1.5, "2": (0.1, 0.2)}}}, OptionError, "below 1"),
        ({"space": {"ratio": {"conv": (0.1, 0.2)}}}, OptionError, "'conv' matches no weight layer"),
        ({"space": {"bits": [4, {"conv": 4}]}}, OptionError, "'conv' matches no weight layer"),
        ({"seed": -1}, OptionError, "seed must be"),
        ({"validation": torch.rand(4, 6)}, DataError, "no labels"),
        ({"storage": "/no/such/folder/file"}, StorageError, "can't be used"),
        ({"storage": "nosuchdb://x"}, StorageError, "can't be used"),
        ({"n_jobs": 2, "forward": lambda model, batch: model(batch[0]), "timesteps": None}, ModelError, "n_jobs=1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_at_the_door(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        search(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"space": {"ratio": (0.1, 0.2)}}, "space"),
        ({"seed": 1}, "seed"),
        ({"net": nn.Sequential(*network(), nn.Identity())}, "model"),
    ],
    ids=["space", "seed", "model"],
)
def test_another_search_is_refused(whole: tuple[Search, Path], options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=f"another search, which differs in .*{match}"):
        search(**options, storage=whole[1])


def test_a_study_of_others_is_refused() -> None:
    theirs = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=theirs, study_name="theirs", directions=["maximize", "minimize"])
    study.enqueue_trial({})
    with pytest.raises(OptionError, match=r"isn't of snncompress\.search"):
        search(storage=theirs, name="theirs")
    assert ASKED not in study.user_attrs


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OptionError, match=r"snncompress\[search\]"):
        search()


# ------------------------------------------------------------------------------------------
# Processes and a cluster: slow.


def script(journal: Path, **options: Any) -> subprocess.Popen[bytes]:
    code = (
        "from tests.studies.test_search import search\n"
        f"if __name__ == '__main__':\n    search(storage={os.fspath(journal)!r}, **{options!r})\n"
    )
    path = journal.with_suffix(".py")
    path.write_text(code)
    return subprocess.Popen([sys.executable, path], start_new_session=True)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    running = script(journal, trials=12, n_jobs=2)
    while not journal.exists() or journal.read_text().count('"figures"') < 4:
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal))),
    ).trials
    done = {t.number: t.user_attrs["seconds"] for t in before if t.state.name == "COMPLETE"}
    begun = {t.number: t.params for t in before if t.state.name == "RUNNING"}
    assert 0 < len(done) < 12
    found = search(storage=journal, trials=12, n_jobs=2)
    assert [trial.number for trial in found.trials] == list(range(12))
    assert len(found.complete) == 12
    assert {n: found.trials[n].seconds for n in done} == done
    assert all(params.items() <= dict(found.trials[n].settings).items() for n, params in begun.items())


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        found = search(storage=tmp_path / "search.journal", trials=6, on="ray", n_jobs=None)
    finally:
        ray.shutdown()
    assert [trial.number for trial in found.complete] == list(range(6))
    # Settings make the network, wherever they are tried.
    assert same(found.model().state_dict(), found.model().state_dict())
