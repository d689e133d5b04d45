"""Fine-tuning after repair: plain, with the dense network as a teacher, with a penalty on spikes, at equal epochs.

    python benchmarks/distillation.py [--data FOLDER] [--seeds 0 1 2]

The MNIST network of benchmarks/repair.py, pruned by svs at ratio 0.8 and quantized to 4 bits, is repaired, then trained
for two epochs on 10,000 images. Figures are kept in benchmarks/.cache, so a run that was stopped goes on. One thread;
a few minutes of one core for each seed. Writes benchmarks/results/distillation.md.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

import torch
from datasets import add_data_option
from jobs import known, note
from repair_tasks import CACHE, HERE, TASKS, Task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import Distillation

RESULT, FIGURES = HERE / "results" / "distillation.md", CACHE / "distillation.jsonl"
TASK = TASKS["mnist-spikingjelly"]
RATIO, BITS, EPOCHS, LR = 0.8, 4, 2, 1e-3
COUNTED = 500
"""Test images for energy and firing rate."""
WAYS: dict[str, dict[str, Any]] = {
    "straight after repair": {},
    "plain": {},
    "teacher": {"weight": 0.5},
    "teacher alone (w = 1)": {"weight": 1.0},
    "teacher, τ = 4, w = 0.9": {"weight": 0.9, "temperature": 4.0},
    "teacher, firing rates matched (ρ = 1)": {"weight": 0.5, "rates": 1.0},
    "rate_penalty = 0.3": {"rate_penalty": 0.3},
    "rate_penalty = 1": {"rate_penalty": 1.0},
    "rate_penalty = 3": {"rate_penalty": 3.0},
    "teacher, rate_penalty = 1": {"weight": 0.5, "rate_penalty": 1.0},
}


def pruned(task: Task, seed: int) -> tuple[nn.Module, nn.Module]:
    """The dense network, and what is to be trained."""
    dense = task.dense(seed)
    small = snncompress.apply(
        dense, "svs", RATIO, BITS, data=task.calibration(task.images, seed), timesteps=task.timesteps, seed=seed,
        progress=False,
    )  # fmt: skip
    return dense, small


def job(task: Task, seed: int, way: str, dense: nn.Module, small: nn.Module) -> dict[str, float]:
    """Test accuracy in %, energy in nJ and spikes per neuron and timestep."""
    net, asked = copy.deepcopy(small), dict(WAYS[way])
    penalty = asked.pop("rate_penalty", 0.0)
    if way != "straight after repair":
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(*task.some("train", task.epoch, 0)), 64, shuffle=True)
        snncompress.finetune(
            net, loader, epochs=EPOCHS, lr=LR, timesteps=task.timesteps, rate_penalty=penalty, progress=False,
            teacher=Distillation(dense, **asked) if asked else None,
        )  # fmt: skip
    return measured(task, net, seed)


def measured(task: Task, net: nn.Module, seed: int) -> dict[str, float]:
    x, _ = task.some("test", COUNTED, 0)
    found = snncompress.profile(net, x, timesteps=task.timesteps)
    energy, rate = found.energy_pj / 1e3, found.firing_rate
    return {"accuracy": task.accuracy(net, seed), "energy": energy, "rate": rate}


def report(rows: Mapping[str, Mapping[str, Any]], seeds: list[int]) -> str:
    """The table, of the seeds that are known."""
    lines = [
        "# Distillation, and a penalty on spikes",
        "",
        f"Written by benchmarks/distillation.py. {TASK.title} Pruned by svs at ratio {RATIO}, {BITS} bits, repaired; "
        f"then {EPOCHS} epochs on {TASK.epoch:,} images, Adam, lr {LR:g}. Energy and firing rate: mean of {COUNTED} "
        f"test images. Mean over seeds, ± standard deviation where there are several.",
        "",
        "| fine-tuning | seeds | test accuracy (%) | energy (nJ) | spikes / neuron / step |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way in ("dense", *WAYS):
        found = [rows[f"{way}, {seed}"]["figures"] for seed in seeds if f"{way}, {seed}" in rows]
        if found:
            cells = [
                spread([row[name] for row in found], form)
                for name, form in (("accuracy", ".2f"), ("energy", ".1f"), ("rate", ".4f"))
            ]
            lines.append(f"| {way} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"({'; '.join(sorted({row['where'] for row in rows.values()}))}.)", ""])


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(exist_ok=True)
    TASK.folder = options.data
    for seed in options.seeds:
        todo = [way for way in ("dense", *WAYS) if f"{way}, {seed}" not in known(FIGURES)]
        if todo and not TASK.weights(seed).exists():
            TASK.train(seed)
        dense, small = pruned(TASK, seed) if todo else (nn.Identity(), nn.Identity())
        for way in todo:
            figures = measured(TASK, dense, seed) if way == "dense" else job(TASK, seed, way, dense, small)
            note(FIGURES, f"{way}, {seed}", figures, "cpu")
            print(way, seed, figures, flush=True)
            RESULT.write_text(report(known(FIGURES), options.seeds))


if __name__ == "__main__":
    main()
