"""A search of 40 trials: on two processes and on a local Ray cluster of two workers, each killed midway and resumed.

    python benchmarks/search.py [--data FOLDER] [--on processes ray] [--trials 40]

The MNIST network of benchmarks/repair.py; which criterion, how much of each layer, bits, timesteps, repair and epochs,
for accuracy, energy and size. The process that searches, with all that it started, is killed (SIGKILL) once half of the
trials are done, and started anew. Then some networks of the front are made again and tested. Journals are kept in
benchmarks/.cache, so a run that was stopped goes on. One thread per process; a few minutes of two cores each. Writes
search.md and .png to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import add_data_option
from jobs import known, note
from repair_tasks import CACHE, HERE, TASKS
from torch.utils.data import DataLoader, TensorDataset

import snncompress

RESULT, PICTURE, STORE = HERE / "results" / "search.md", HERE / "results" / "search.png", CACHE / "search.jsonl"
TASK, SEED, IMAGES, HELD = TASKS["mnist-spikingjelly"], 0, 1_000, 500
SPACE: dict[str, Any] = {
    "criterion": ["svs", "sca", "magnitude", "taylor"],
    "ratio": {"0": (0.0, 0.8), "4": (0.3, 0.95), "9": (0.3, 0.95)},
    "bits": [2, 3, 4, 6, 8],
    "timesteps": (1, 4),
    "repair": ["membrane", None],
    "epochs": (0, 2),
}
OBJECTIVES = ("accuracy", "energy_nj", "size_kb")
ON = ("processes", "ray")
MOST_SHOWN = 10


def journal(on: str) -> Path:
    return CACHE / f"search-{on}.journal"


def search(on: str, trials: int, seed: int = SEED) -> snncompress.Search:
    x, y = TASK.some("train", IMAGES + HELD, seed)
    data = DataLoader(TensorDataset(x[:IMAGES], y[:IMAGES]), 50)
    held = DataLoader(TensorDataset(x[IMAGES:], y[IMAGES:]), 250)
    return snncompress.search(
        TASK.dense(seed), data, SPACE, OBJECTIVES, trials=trials, n_jobs=2, on=on, storage=journal(on), skip=[],
        timesteps=TASK.timesteps, validation=held, seed=seed, progress=False,
    )  # fmt: skip


def started(on: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The search in a process of its own."""
    command = [sys.executable, __file__, "--data", options.data, "--trials", str(options.trials), "--search", on]
    return subprocess.Popen(command, start_new_session=True)


def states(on: str) -> dict[int, tuple[str, dict[str, Any], float]]:
    """Number → state, parameters and seconds of the trials as they stand in the journal."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(journal(on)))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return {t.number: (t.state.name, t.params, t.user_attrs.get("seconds", 0.0)) for t in study.trials}


def ended(on: str) -> int:
    return sum(state in ("COMPLETE", "FAIL") for state, *_ in states(on).values()) if journal(on).exists() else 0


def killed_and_resumed(on: str, options: argparse.Namespace) -> dict[str, float]:
    """What stood in the journal when half of the trials were done and all was killed, and what became of it."""
    began = time.time()
    running = started(on, options)
    while True:
        time.sleep(0.5)
        if running.poll() is not None:
            raise RuntimeError(f"The search ended before it could be killed: {running.returncode}.")
        try:
            if ended(on) >= options.trials // 2:
                break
        except KeyError:  # not made yet
            continue
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = states(on)
    done = {n: s for n, s in before.items() if s[0] in ("COMPLETE", "FAIL")}
    begun = {n: s for n, s in before.items() if s[0] == "RUNNING"}
    killed = time.time()
    if started(on, options).wait():
        raise RuntimeError("The search that goes on failed.")
    after = states(on)
    assert sorted(after) == list(range(options.trials))
    return {
        "done": len(done), "running": len(begun), "before": killed - began, "after": time.time() - killed,
        "kept": sum(after[n] == done[n] for n in done),
        "same parameters": sum(begun[n][1].items() <= after[n][1].items() for n in begun),
        "complete": sum(state == "COMPLETE" for state, *_ in after.values()),
        "failed": sum(state == "FAIL" for state, *_ in after.values()),
        "trials": len(after),
    }  # fmt: skip


@contextmanager
def cluster(on: str) -> Iterator[None]:
    """Two nodes of Ray's on this machine, each with a worker, or nothing."""
    if on != "ray":
        yield
        return
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        yield
    finally:
        nodes.shutdown()


def good(result: snncompress.Search) -> tuple[list[snncompress.Trial], list[snncompress.Trial]]:
    """Those of the front with at least 80 %, and of these the ones that are tested and shown."""
    front = [trial for trial in result.front if trial.values[0] >= 0.8]
    return front, front[:: max(1, -(-len(front) // MOST_SHOWN))]


def report(found: dict[str, snncompress.Search], rows: dict[str, dict[str, Any]]) -> str:
    text = [
        "# A search, killed and resumed", "",
        f"Written by benchmarks/search.py. {TASK.title} Seed {SEED}; {IMAGES:,} images calibrate and train, accuracy "
        f"and cost are those of {HELD} others. Two at a time: processes of one machine, or two nodes of a local Ray "
        f"cluster with a worker each. Killed (SIGKILL) with all that it had started once half of the trials were done, "
        f"and called again.", "",
        "| on | done when killed | running then | kept as they were | run again with the same parameters | in the end "
        "| complete | failed |",
        "| --- |" + " ---: |" * 7,
    ]  # fmt: skip
    for on in found:
        f = rows[on]["figures"]
        counts = [f"{f[name]:.0f}" for name in (
            "done", "running", "kept", "same parameters", "trials", "complete", "failed"
        )]  # fmt: skip
        text.append(f"| {on} | {' | '.join(counts)} |")
    names = [*SPACE, *(f"ratio[{layer}]" for layer in SPACE["ratio"])]
    for on, result in found.items():
        front, shown = good(result)
        varied = [name for name in names if name in front[0].settings]
        text += [
            "", f"## The front, {on}", "",
            f"{len(result.front)} of {len(result.complete)} trials; below {len(shown)} of the {len(front)} with at "
            f"least 80 %. Dense: {rows['dense']['figures']['test']:.1f} % of the test images, "
            f"{rows['dense']['figures']['energy']:.0f} nJ, {rows['dense']['figures']['size']:.0f} kB.", "",
            f"| trial | accuracy (%) | test (%) | energy (nJ) | size (kB) | {' | '.join(varied)} |",
            "| ---: |" + " ---: |" * (4 + len(varied)),
        ]  # fmt: skip
        for trial in shown:
            right = rows[json.dumps((on, trial.number))]["figures"]["test"]
            chosen = " | ".join(f"{v:.2f}" if isinstance(v := trial.settings[n], float) else str(v) for n in varied)
            accuracy, energy, size = trial.values
            text.append(
                f"| {trial.number} | {100 * accuracy:.1f} | {right:.1f} | {energy:.1f} | {size:.1f} | {chosen} |"
            )
    places = "; ".join(sorted({row["where"] for row in rows.values()}))
    picture = "![accuracy against energy, with the size as colour](search.png)"
    return "\n".join([*text, "", picture, "", f"({places}.)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--on", nargs="+", choices=ON, default=list(ON))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--search", choices=ON, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(exist_ok=True)
    TASK.folder = options.data
    if options.search:
        search(options.search, options.trials)
        return
    if not TASK.weights(SEED).exists():
        TASK.train(SEED)
    found = {}
    for on in ON:
        if on in options.on and on not in known(STORE):
            journal(on).unlink(missing_ok=True)
            with cluster(on):
                note(STORE, on, killed_and_resumed(on, options), "cpu")
            print(on, known(STORE)[on]["figures"], flush=True)
        if on in known(STORE):
            found[on] = search(on, options.trials)  # reads the journal
    dense = TASK.dense(SEED)
    if "dense" not in known(STORE):
        x, _ = TASK.some("train", IMAGES + HELD, SEED)
        p = snncompress.profile(dense, x[IMAGES:], timesteps=TASK.timesteps)
        figures = {"test": TASK.accuracy(dense, SEED), "energy": p.energy_pj / 1e3, "size": 1e3 * p.size_mb}
        note(STORE, "dense", figures, "cpu")
    for on, result in found.items():
        for trial in good(result)[1]:
            if json.dumps((on, trial.number)) not in known(STORE):
                small = result.model(trial)
                note(STORE, json.dumps((on, trial.number)), {"test": TASK.accuracy(small, SEED)}, "cpu")
    draw(found)
    RESULT.write_text(report(found, known(STORE)))
    print(RESULT.read_text())


def draw(found: dict[str, snncompress.Search]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(6.5 * len(found), 4.2), squeeze=False, layout="constrained")
    for ax, (on, result) in zip(axes[0], found.items(), strict=True):
        result.plot(ax)
        ax.set_title(f"{on}: {len(result.trials)} trials")
        ax.set_xscale("log")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
