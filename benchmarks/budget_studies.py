"""What benchmarks/budgets.py measures: one function for each part, and the jobs that they make."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from repair_tasks import HERE, TASKS, Task
from torch import nn

import snncompress
from snncompress.pruning import allocation

sys.path.insert(0, str(HERE.parent / "examples"))
from networks.resnet20 import resnet20
from networks.sew_resnet18 import sew_resnet18
from networks.spikingformer import spikingformer
from networks.vgg16 import vgg16

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
LRS = {"cifar": 1e-4}
SEEDED = {"mnist-spikingjelly": True, "mnist-snntorch": True, "nmnist": True, "cifar": False}
"""Trained networks, and whether there is one for every seed; of the other, seeds are of calibration and tuning."""
WIDTHS = (2, 3, 4, 6)
SIZES = (0.05, 0.025)
"""Shares of the original's size at which one width, and channels, are compared with bits per layer, and channels."""


def of_seed(task: Task, seed: int) -> int:
    """The seed of the trained network."""
    return seed if SEEDED[task.name] else 0


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
    net = task.dense(of_seed(task, seed))
    dense = cost(task, net, seed, kind)
    allocated = compressed(task, net, seed, budget={kind: share})
    left = cost(task, allocated, seed, kind)
    found = {"dense": task.accuracy(net, seed)}
    for name, small in (("allocated", allocated), ("one ratio", one_ratio(task, net, seed, kind, left))):
        found[f"{name}, cost"] = cost(task, small, seed, kind) / dense
        found[name] = task.accuracy(small, seed)
        torch.manual_seed(seed)
        task.tune(small, LRS.get(task.name, 1e-3), seed)
        found[f"{name}, tuned"] = task.accuracy(small, seed)
    return found


@dataclass(frozen=True)
class Bits:
    """A network of a size: of so many ``width`` bits for all layers, or 0 for bits per layer.

    With a criterion channels go too, until ``most`` of the original's size is left; without one it may be as large as
    ``most`` bits for all layers make it.
    """

    criterion: str | None
    most: float
    width: int


BITS = (
    *(Bits(None, width, found) for width in WIDTHS for found in (width, 0)),
    *(Bits("magnitude", share, width) for share in SIZES for width in (*WIDTHS, 0)),
)


def bits(task: Task, seed: int, case: Bits) -> dict[str, float]:
    """Accuracy in % straight after, and what of the original's size is left."""
    net = task.dense(seed)
    size = cost(task, net, seed, "size")
    budget: dict[str, float] | None = {"size": case.most}
    if case.criterion is None:
        budget = None if case.width else {"size_mb": uniform(task, net, seed, int(case.most))}
    small = snncompress.apply(
        net, case.criterion, None, case.width or "auto", budget=budget, data=task.calibration(task.images, seed),
        timesteps=task.timesteps, seed=seed, skip=[], progress=False,
    )  # fmt: skip
    return {"accuracy": task.accuracy(small, seed), "left": cost(task, small, seed, "size") / size}


def uniform(task: Task, net: nn.Module, seed: int, width: int) -> float:
    """MB with so many bits for all layers; no less, however the sum is rounded."""
    plain = snncompress.apply(net, None, None, width, data=task.calibration(8, seed), timesteps=task.timesteps,
                              repair=None, skip=[], progress=False)  # fmt: skip
    return cost(task, plain, seed, "size") * (1 + 1e-9)


Job = tuple[str, ...]
PARTS = ("met", "exponent", "equal", "bits")


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
            for name in SEEDED:
                for kind in ("energy", "params"):
                    for share in (0.5, 0.3, 0.2):
                        args = (TASKS[name], seed, kind, share)
                        yield ("equal", name, kind, str(share), str(seed)), lambda a=args: equal(*a)
    if "bits" in parts:
        for seed in seeds:
            for name in SEEDED:
                if name != "nmnist" and (SEEDED[name] or seed == 0):
                    for case in BITS:
                        key = ("bits", name, case.criterion or "", str(case.most), str(seed), str(case.width))
                        yield key, lambda a=(TASKS[name], seed, case): bits(*a)
