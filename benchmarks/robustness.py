"""How much criteria depend on the batch: AvgCosS (QP-SNN, Eq. 15) of trained networks, and what would go.

    python benchmarks/robustness.py [--data FOLDER] [--only mnist-spikingjelly cifar …]

The networks are those of benchmarks/repair.py, seed 0, from benchmarks/.cache; one that isn't there is trained (MNIST
in minutes, CIFAR-10 in 40). Ten batches of each size, all of other training images. One thread; the measuring takes
two minutes. Writes benchmarks/results/robustness.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Mapping

import torch
from datasets import add_data_option
from repair_tasks import CACHE, HERE, TASKS, Task

import snncompress

RESULT = HERE / "results" / "robustness.md"
NETWORKS = ("mnist-spikingjelly", "mnist-snntorch", "cifar")
CRITERIA = ("svs", "sca", "firing_rate", "taylor")
BATCHES, SIZES = 10, (8, 32, 128)
RATIO, SEED = 0.6, 0


def measured(task: Task) -> dict[int, snncompress.Robustness]:
    """Size of the batches → what came of them."""
    net = task.dense(SEED)
    found = {}
    for size in SIZES:
        x, y = task.some("train", BATCHES * size, SEED)
        batches = list(zip(x.split(size), y.split(size), strict=True))
        found[size] = snncompress.robustness(net, CRITERIA, batches, ratio=RATIO, timesteps=task.timesteps)
    return found


def row(name: str, figures: Mapping[str, float | None], digits: int, scale: int = 1) -> str:
    cells = [f"{scale * value:.{digits}f}" for value in figures.values() if value is not None]
    least = min(value for value in figures.values() if value is not None)
    return f"| {name} | {scale * least:.{digits}f} | {' | '.join(cells)} |"


def part(task: Task, found: Mapping[int, snncompress.Robustness]) -> str:
    layers = list(found[SIZES[0]].cosine[CRITERIA[0]])
    head = f"| images in a batch | minimum | {' | '.join(f'layer {name}' for name in layers)} |"
    head += "\n| --- " + "| ---: " * (len(layers) + 1) + "|"
    text = [f"## {task.name}", f"{task.title.rpartition(';')[0]}."]
    tables = ("AvgCosS", 4, 1), (f"In common of what would go at ratio {RATIO} (%)", 1, 100)
    for (what, digits, scale), field in zip(tables, ("cosine", "agreement"), strict=True):
        rows = [
            row(f"{name}, {size}", getattr(result, field)[name], digits, scale)
            for name in CRITERIA
            for size, result in found.items()
        ]
        text.append("\n".join([f"{what}:", "", head, *rows]))
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, help="these networks alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    began, found = time.perf_counter(), {}
    for name in options.only:
        task = TASKS[name]
        task.folder = options.data
        if not task.weights(SEED).exists():
            print(f"Training {name}")
            task.train(SEED)
        found[name] = measured(task)
        print("\n\n".join(map(str, found[name].values())), flush=True)
    short = [
        f"| {name} | {size} | " + " | ".join(f"{result.minimum[c]:.4f}" for c in CRITERIA) + " |"
        for name, sizes in found.items()
        for size, result in sizes.items()
    ]
    minutes = (time.perf_counter() - began) / 60
    RESULT.write_text(
        f"""# Robustness of criteria to the calibration batch

AvgCosS (QP-SNN, Eq. 15): cosine similarity of a layer's score vectors, mean over all pairs of {BATCHES} batches of
other training images; the paper reports the minimum over layers, 0.87 to 0.95 for SCA and 0.993 to 1.000 for SVS.
Beside it the share of the channels removed at ratio {RATIO} that two batches have in common, about {100 * RATIO:g} %
by chance. All layers but the classifier. Written by `benchmarks/robustness.py`: snncompress
{snncompress.__version__}, torch {torch.__version__}, {platform.machine()}, one thread, seed {SEED},
{datetime.date.today()}, {minutes:.1f} minutes.

## Minimum over layers

| network | images in a batch | {" | ".join(CRITERIA)} |
| --- | ---: {"| ---: " * len(CRITERIA)}|
"""
        + "\n".join([*short, "", *(f"{part(TASKS[name], sizes)}\n" for name, sizes in found.items())])
    )
    print(f"Written to {RESULT.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
