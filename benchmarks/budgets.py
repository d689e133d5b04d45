"""Budgets: are they met, and is allocation over layers better than one ratio for all?

    python benchmarks/budgets.py [--data FOLDER] [--only met exponent equal] [--seeds 0 1 2]

"met": what was asked for and what came out, on the networks of benchmarks/repair.py and on untrained ones of
examples/networks. "exponent": how much savings should count against losses in the allocation, on training images of
CIFAR-10 that don't calibrate, seed 0. "equal": at the same energy, or the same parameters, straight after compression
with repair and after one epoch: channels allocated by the budget against one ratio for all layers. Figures are kept in
benchmarks/.cache, so a run that was stopped goes on. One thread. Writes benchmarks/results/budgets.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from datasets import add_data_option
from jobs import known, note
from repair_tasks import CACHE, HERE, TASKS, Task
from torch import nn

import snncompress
from snncompress.pruning import allocation

sys.path.insert(0, str(HERE.parent / "examples"))
from networks.resnet20 import resnet20
from networks.sew_resnet18 import sew_resnet18
from networks.spikingformer import spikingformer
from networks.vgg16 import vgg16

RESULT, STORE = HERE / "results" / "budgets.md", CACHE / "budgets.jsonl"
HELD = 2_000
allocation_weight = allocation._WEIGHT
KINDS = {"energy": "energy_pj", "size": "size_mb", "params": "n_params", "synops": "n_ac"}
SHARES = (0.7, 0.5, 0.3, 0.1)
UNTRAINED: dict[str, Callable[[], nn.Module]] = {
    "VGG-16": vgg16,
    "SEW-ResNet18": lambda: sew_resnet18(10),
    "ResNet20, a quarter of its widths": lambda: resnet20(10, widths=(16, 32, 64, 128)),
    "Spikingformer-2-96": lambda: spikingformer(10, depth=2, dim=96),
}
EXPONENTS = (0.0, 0.25, 0.5, 1.0)
EQUAL = ("mnist-spikingjelly", "mnist-snntorch", "cifar")


def firing(net: nn.Module, data: Any, steps: int) -> nn.Module:
    """An untrained network whose batch norms have the data's statistics, so that spikes come through to its end."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.weight, 1.5)
    return snncompress.refresh(net, data, timesteps=steps, progress=False)


def met(task: Task | None, build: Callable[[], nn.Module], kind: str, share: float) -> dict[str, float]:
    """What of the budget was used, by networks without and with repair (where the budget is about spikes)."""
    torch.manual_seed(0)
    net = build()
    if task is None:
        x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        data, steps = [x[:4], x[4:]], 2
        net = firing(net, data, steps)
    else:
        data, steps = task.calibration(128, 0), task.timesteps
    before = getattr(snncompress.profile(net, data, timesteps=steps), KINDS[kind])
    began = time.process_time()
    try:
        small = snncompress.apply(
            net, "magnitude", None, None, budget={kind: share}, data=data, timesteps=steps, skip=[], progress=False
        )
    except snncompress.OptionError:
        return {"used": float("nan"), "seconds": time.process_time() - began}
    took = time.process_time() - began
    return {"used": getattr(snncompress.profile(small, data, timesteps=steps), KINDS[kind]) / before, "seconds": took}


def compressed(task: Task, net: nn.Module, seed: int, **how: Any) -> nn.Module:
    return snncompress.apply(
        net, "magnitude", how.pop("ratio", None), None, data=task.calibration(task.images, seed),
        timesteps=task.timesteps, seed=seed, progress=False, skip=[], **how,
    )  # fmt: skip


def exponent(task: Task, kind: str, share: float, weight: float) -> dict[str, float]:
    """Accuracy in % straight after, and what of the cost is left."""
    allocation._WEIGHT = weight
    net = task.dense(0)
    small = compressed(task, net, 0, budget={kind: share})
    x, y = task.data["train"]
    apart = torch.ones(len(x), dtype=torch.bool)
    apart[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: task.images]] = False
    held = apart.nonzero().flatten()[::20][:HELD]
    right = snncompress.evaluate(small, list(zip(x[held].split(250), y[held].split(250), strict=True)), timesteps=2)
    allocation._WEIGHT = allocation_weight
    return {"accuracy": 100 * right.accuracy, "left": cost(task, small, 0, kind) / cost(task, net, 0, kind)}


def one_ratio(task: Task, net: nn.Module, seed: int, kind: str, most: float) -> nn.Module:
    """The smallest ratio, in hundredths, with which the same share goes from every layer and the cost is kept to."""
    low, high = 0, 95
    while high - low > 1:
        middle = (low + high) // 2
        small = compressed(task, net, seed, ratio=middle / 100, repair="membrane" if kind == "energy" else None)
        low, high = (low, middle) if cost(task, small, seed, kind) <= most else (middle, high)
    return compressed(task, net, seed, ratio=high / 100)


def cost(task: Task, net: nn.Module, seed: int, kind: str) -> float:
    found = snncompress.profile(net, task.calibration(task.images, seed), timesteps=task.timesteps)
    return float(getattr(found, KINDS[kind]))


def equal(task: Task, seed: int, kind: str, share: float) -> dict[str, float]:
    """Accuracies in %, straight after and after an epoch, and what of the original's cost is left."""
    net = task.dense(seed)
    dense = cost(task, net, seed, kind)
    allocated = compressed(task, net, seed, budget={kind: share})
    left = cost(task, allocated, seed, kind)
    found = {"dense": task.accuracy(net, seed)}
    for name, small in (("allocated", allocated), ("one ratio", one_ratio(task, net, seed, kind, left))):
        found[f"{name}, cost"] = cost(task, small, seed, kind) / dense
        found[name] = task.accuracy(small, seed)
        torch.manual_seed(seed)
        task.tune(small, 1e-3 if task.name != "cifar" else 1e-4)
        found[f"{name}, tuned"] = task.accuracy(small, seed)
    return found


Job = tuple[str, ...]
PARTS = ("met", "exponent", "equal")


def jobs(parts: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Job, Callable[[], dict[str, float]]]]:
    if "met" in parts:
        for name in ("mnist-spikingjelly", "mnist-snntorch", *UNTRAINED):
            task = TASKS.get(name)
            build = UNTRAINED[name] if task is None else (lambda task=task: task.dense(0))
            for kind in KINDS:
                for share in SHARES:
                    yield ("met", name, kind, str(share)), lambda a=(task, build, kind, share): met(*a)
    if "exponent" in parts:
        for kind in ("params", "energy"):
            for share in (0.5, 0.3):
                for weight in EXPONENTS:
                    args = (TASKS["cifar"], kind, share, weight)
                    yield ("exponent", "cifar", kind, str(share), str(weight)), lambda a=args: exponent(*a)
    if "equal" in parts:
        for seed in seeds:
            for name in EQUAL if seed == 0 else EQUAL[:2]:
                for kind in ("energy", "params"):
                    for share in (0.5, 0.3, 0.2):
                        args = (TASKS[name], seed, kind, share)
                        yield ("equal", name, kind, str(share), str(seed)), lambda a=args: equal(*a)


def told(several: Sequence[dict[str, float]], column: str) -> str:
    """Mean over seeds, with the share of the cost where it is known."""
    right, left = mean(f[column] for f in several), [f[f"{column}, cost"] for f in several if f"{column}, cost" in f]
    return f"{right:.1f} ({mean(left):.3f})" if left else f"{right:.1f}"


def report(rows_known: dict[str, dict[str, Any]]) -> str:
    """The tables, of what is known."""
    found = {key: row["figures"] for key, row in rows_known.items()}
    text = ["# Budgets", "", "Written by benchmarks/budgets.py; criterion magnitude, skip=[]."]
    rows: dict[str, list[str]] = {}
    for key, figures in found.items():
        part, name, kind, share, *_ = json.loads(key)
        if part == "met":
            row = rows.setdefault(f"| {name} | {kind} |", ["—"] * len(SHARES))
            used = "can't be" if figures["used"] != figures["used"] else f"{figures['used']:.3f}"
            row[SHARES.index(float(share))] = f"{used} ({figures['seconds']:.0f} s)"
    if rows:
        text += ["", "## Asked for, and what is left of the original's cost (seconds of one core)", ""]
        text += [f"| network | budget | {' | '.join(map(str, SHARES))} |", "| --- | --- |" + " ---: |" * len(SHARES)]
        text += [f"{head} {' | '.join(cells)} |" for head, cells in rows.items()]
    tried: dict[str, list[str]] = {}
    for key, figures in found.items():
        part, name, kind, share, *weight = json.loads(key)
        if part == "exponent":
            row = tried.setdefault(f"| {name} | {kind} {share} |", ["—"] * len(EXPONENTS))
            row[EXPONENTS.index(float(weight[0]))] = f"{figures['accuracy']:.1f}"
    if tried:
        text += ["", f"## The exponent of savings: accuracy (%) on {HELD:,} training images", ""]
        text += [
            f"| network | budget | {' | '.join(map(str, EXPONENTS))} |",
            "| --- | --- |" + " ---: |" * len(EXPONENTS),
        ]
        text += [f"{head} {' | '.join(cells)} |" for head, cells in tried.items()]
    groups: dict[str, list[dict[str, float]]] = {}
    for key, figures in found.items():
        part, name, kind, share, *_ = json.loads(key)
        if part == "equal":
            groups.setdefault(f"| {name} | {kind} {share}", []).append(figures)
    if groups:
        columns = ("dense", "one ratio", "allocated", "one ratio, tuned", "allocated, tuned")
        text += [
            "", "## One ratio for all layers, or allocated: test accuracy (%), and the share of the cost", "",
            "One ratio is the smallest, in hundredths, that costs no more than what was allocated; where layers have "
            "few channels, that is less.", "",
        ]  # fmt: skip
        text += [f"| network | budget | seeds | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * 6]
        for head, several in groups.items():
            cells = [told(several, column) for column in columns]
            text.append(f"{head} | {len(several)} | {' | '.join(cells)} |")
    places = "; ".join(sorted({row["where"] for row in rows_known.values()}))
    return "\n".join([*text, "", f"({places}.)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(exist_ok=True)
    for task in TASKS.values():
        task.folder = options.data
    for job, compute in jobs(options.only, options.seeds):
        key = json.dumps(job)
        if key in known(STORE):
            continue
        if job[1] in TASKS and not TASKS[job[1]].weights(int(job[4]) if job[0] == "equal" else 0).exists():
            TASKS[job[1]].train(int(job[4]) if job[0] == "equal" else 0)
        note(STORE, key, compute(), "cpu")
        print(key, known(STORE)[key]["figures"], flush=True)
        RESULT.write_text(report(known(STORE)))


if __name__ == "__main__":
    main()
