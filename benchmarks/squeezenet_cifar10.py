"""CIFAR-10 study: does a spiking SqueezeNet lose anything when half of its fire modules go?

    python benchmarks/squeezenet_cifar10.py [--budget small|full] [--epochs 6 12] [--seeds 2] [--device cpu]
                                            [--data FOLDER]

The nine schedules of SNN SqueezeNet-P and their CNN twins (a ReLU for each neuron), all trained from scratch under one
budget, once for each number of epochs; the set that ``ablation`` chooses, trained the same way. Of the fewest epochs
besides: the three repairs; sets of fire modules, untrained after removal. The image is the same at every timestep, so
the first layer is charged for it once. One process of one thread for each seed; six epochs of six schedules took two
CPU cores an hour and a half, so that nine schedules, six and twelve epochs are about six hours. What is done is kept in
benchmarks/.cache, so that a run that was stopped goes on. Writes squeezenet_cifar10.md and .png to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import snncompress_fire
import torch
from snncompress_schedules import Iterative
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snncompress

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from examples.networks.squeezenet import squeezenet  # noqa: E402

T = 4
LR = 3e-3
SCHEDULES = tuple(snncompress_fire.SCHEDULES)
CONVENTIONS = snncompress.Conventions(direct_encoding="once")


@dataclass(frozen=True)
class Budget:
    """What every network gets: training images, epochs, images per batch."""

    images: int
    epochs: int
    batch: int


BUDGETS = {"small": [Budget(10_000, epochs, 50) for epochs in (6, 12)], "full": [Budget(50_000, 60, 128)]}


class Images:
    """Batches of normalized images [N, 3, 32, 32] and labels; shuffled and randomly flipped for training."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, train: bool) -> None:
        self.x, self.y, self.batch, self.train = x, y, batch, train

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.train else torch.arange(len(self.y))
        for part in order.to(self.x.device).split(self.batch):
            x = self.x[part]
            if self.train:
                flip = torch.rand(len(part)).lt(0.5).to(x.device)
                x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            yield x, self.y[part]

    def some(self, count: int) -> Images:
        """``count`` images at random, always the same ones."""
        picked = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(0))[:count].to(self.y.device)
        return Images(self.x[picked], self.y[picked], self.batch, train=False)


def images(folder: Path, budget: Budget, device: str) -> tuple[Images, Images]:
    """For training, and the 10,000 for testing."""

    def read(split: str, count: int, batch: int, train: bool) -> Images:
        x, y = datasets.cifar10(folder, split)
        x = torch.from_numpy(x[:count]).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return Images(x.to(device), torch.from_numpy(y[:count]).long().to(device), batch, train)

    return read("train", budget.images, budget.batch, True), read("test", 10_000, 200, False)


MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def network(schedule: str | snncompress_fire.Keep, seed: int, norm: bool = True) -> nn.Module:
    """A spiking SqueezeNet with the fire modules of a schedule, untrained.

    Batch norm before the neurons, none of which the paper has; no neuron behind the last convolution, whose map is 1×1
    here, so that a class could have T + 1 scores only.
    """
    torch.manual_seed(seed)
    net = squeezenet(norm=norm)
    net.after_conv10 = nn.Identity()
    functional.set_step_mode(net, "m")
    chosen = snncompress_fire.Keep.named(schedule) if isinstance(schedule, str) else schedule
    options = {"bits": None, "data": torch.rand(1, 3, 32, 32), "timesteps": 1, "seed": seed}
    return snncompress.apply(net, chosen, repair="reinit", **options)


def twin(net: nn.Module) -> nn.Module:
    """The CNN of the same layers and weights: a ReLU for every neuron."""
    for name, module in list(net.named_modules()):
        if isinstance(module, neuron.BaseNode):
            net.set_submodule(name, nn.ReLU())
    functional.set_step_mode(net, "s")
    return net


def trained(name: str, net: nn.Module, train: Images, budget: Budget, timesteps: int | None, seed: int, cache: Path):
    """The network after the budget's epochs; read from the cache where it was trained before."""
    path = cache / f"{name}-s{seed}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    torch.manual_seed(seed)
    snncompress.finetune(net, train, epochs=budget.epochs, lr=LR, timesteps=timesteps, progress=False)
    torch.save(net.state_dict(), path)
    return net


def kept_by_ablation(net: nn.Module, calibration: Images, seed: int) -> list[int]:
    """Numbers of the four fire modules that greedy ablation keeps, scoring anew after each one that goes."""
    options = {"data": calibration, "timesteps": T, "bits": None, "seed": seed, "progress": False}
    small = snncompress.apply(net, "fire", 0.5, scheduler=Iterative(steps=4), repair="membrane", **options)
    gone = {edit.name for edit in snncompress.plan_of(small).edits}
    return [number for number in range(2, 10) if f"fire{number}" not in gone]


def measured(net: nn.Module, test: Images) -> dict[str, float]:
    """Accuracy and F1 on all test images, operations and energy on a thousand of them."""
    found = snncompress.evaluate(net, test, timesteps=T)
    cost = snncompress.profile(net, test.some(1000), timesteps=T, conventions=CONVENTIONS)
    return {
        "accuracy": 100 * found.accuracy, "f1": found.f1, "parameters": cost.n_params, "AC": cost.n_ac / 1e6,
        "MAC": cost.n_mac / 1e6, "energy": cost.energy_pj / 1e6,
    }  # fmt: skip


def repaired(
    full: nn.Module, keep: snncompress_fire.Keep, repair: str | None, train: Images, test: Images, seed: int
) -> dict[str, float]:
    """Accuracy of the trained network straight after removal, and after one epoch."""
    options = {"data": train.some(500), "timesteps": T, "bits": None, "seed": seed, "progress": False}
    small = snncompress.apply(full, keep, repair=repair, **options)
    straight = snncompress.evaluate(small, test, timesteps=T).accuracy
    torch.manual_seed(seed)
    snncompress.finetune(small, train, epochs=1, lr=1e-3, timesteps=T, progress=False)
    return {"straight": 100 * straight, "one epoch": 100 * snncompress.evaluate(small, test, timesteps=T).accuracy}


def cache_of(options: argparse.Namespace, budget: Budget) -> Path:
    return HERE / ".cache" / f"squeezenet-{options.budget}-{budget.epochs}-once"


def study(seed: int, options: argparse.Namespace, budget: Budget, repairs: bool) -> dict[str, Any]:
    """Everything for one seed and number of epochs; the repairs of the trained network on demand."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    cache = cache_of(options, budget)
    cache.mkdir(parents=True, exist_ok=True)
    train, test = images(options.data, budget, options.device)
    kept = cache / f"results-s{seed}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def note(key: str, measure: Callable[[], Any]) -> None:
        if key not in found:
            found[key] = measure()
            kept.write_text(json.dumps(found))
            print(f"{budget.epochs} epochs, seed {seed}: {key}: {found[key]}", flush=True)

    def snn(name: str, keep: str | snncompress_fire.Keep | None = None) -> nn.Module:
        net = network(name if keep is None else keep, seed).to(options.device)
        return trained(name, net, train, budget, T, seed, cache)

    def cnn(name: str) -> nn.Module:
        net = twin(network(name, seed).to(options.device))
        return trained(f"cnn-{name}", net, train, budget, None, seed, cache)

    full = snn("full")
    note("kept by ablation", lambda: kept_by_ablation(full, train.some(500), seed))
    by_ablation = snncompress_fire.Keep(tuple(n - 2 for n in found["kept by ablation"]))
    for name in SCHEDULES:
        note(name, lambda name=name: measured(snn(name), test))
    note("ablation", lambda: measured(snn("ablation", by_ablation), test))
    for repair in ("membrane", None, "reinit") if repairs else ():
        keep = snncompress_fire.Keep.named("ref_1")
        note(f"ref_1, {repair}", lambda keep=keep, repair=repair: repaired(full, keep, repair, train, test, seed))
    for repair in ("membrane", None, "reinit") if repairs else ():
        keep, some = snncompress_fire.Keep(tuple(n for n in range(8) if n != 4)), test.some(2000)
        note(
            f"all but fire6, {repair}",
            lambda keep=keep, repair=repair, some=some: repaired(full, keep, repair, train, some, seed),
        )
    for name in SCHEDULES:
        note(f"CNN {name}", lambda name=name: measured(cnn(name), test))
    return found


def pictures(options: argparse.Namespace, budget: Budget) -> snncompress.BlockSearch:
    """All sets of fire modules of the trained network of seed 0, and its gradients before and after training."""
    from matplotlib import pyplot

    cache = cache_of(options, budget)
    train, test = images(options.data, budget, options.device)
    full = trained("full", network("full", 0).to(options.device), train, budget, T, 0, cache)
    result = snncompress.block_search(
        full, train.some(100), "fire", remove=(0, 1, 2, 4), test=test.some(500), timesteps=T, repair="membrane"
    )
    _, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    result.plot(left).set_title("SqueezeNet without 0, 1, 2 or 4 fire modules, no fine-tuning")
    for name in ("full", "ref_1"):
        net = network(name, 0).to(options.device)
        for when in ("untrained", "trained"):
            flow = snncompress.gradient_flow(net, train.some(500), timesteps=T)
            flow.plot(right, label=f"{name}, {when}")
            net = trained(name, net, train, budget, T, 0, cache)
    right.set_title("Gradient flow")
    pyplot.savefig(HERE / "results" / "squeezenet_cifar10.png", dpi=110)
    return result


def table(title: str, columns: dict[str, str], rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """One line per row; mean ± half the range over seeds for what is no count."""

    def cell(values: list[float], form: str) -> str:
        spread = (max(values) - min(values)) / 2
        return f"{mean(values):{form}}" + (f" ± {spread:{form}}" if spread and form != ",.0f" else "")

    lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, found in rows.items():
        cells = [cell([one[c] for one in found], form) for c, form in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def networks(found: list[dict[str, Any]]) -> list[str]:
    """The table of all networks, and what ablation kept."""
    names = (*SCHEDULES, "ablation", *(f"CNN {s}" for s in SCHEDULES))
    columns = {"accuracy": ".1f", "f1": ".3f", "parameters": ",.0f", "AC": ".2f", "MAC": ".2f", "energy": ".2f"}
    kept = "; ".join(f"seed {n}: {one['kept by ablation']}" for n, one in enumerate(found))
    rows = table("network", columns, {name: [one[name] for one in found] for name in names})
    return [*rows, "", f"Kept by `ablation`: {kept}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--epochs", type=int, nargs="+", help="other numbers of epochs than the budget's")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    datasets.add_data_option(parser)
    options = parser.parse_args()
    budgets = BUDGETS[options.budget]
    if options.epochs:
        budgets = [replace(budgets[0], epochs=epochs) for epochs in sorted(set(options.epochs))]
    jobs = os.cpu_count() if options.device == "cpu" else 1
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {
            budget: [pool.submit(study, seed, options, budget, budget == budgets[0]) for seed in range(options.seeds)]
            for budget in budgets
        }
        found = {budget: [future.result() for future in some] for budget, some in futures.items()}
    first, shortest = found[budgets[0]], budgets[0]
    search = pictures(options, shortest)
    repairs = {k: [one[k] for one in first] for k in first[0] if "straight" in first[0][k]}
    fours = sorted((c for c in search.candidates if len(c.removed) == 4), key=lambda c: -c.accuracy)
    ref_1 = next(n for n, c in enumerate(fours, 1) if set(c.removed) == {"fire2", "fire3", "fire5", "fire7"})
    text = [
        f"Spiking SqueezeNet on CIFAR-10: {shortest.images:,} training images in batches of {shortest.batch}, Adam at "
        f"{LR:g} with a cosine schedule, random flips, T = {T}, batch norms, no neuron behind the last convolution; "
        f"{options.seeds} seeds, mean ± half the range. Accuracy in % and macro F1 on the 10,000 test images, "
        f"operations in millions and energy in µJ per image on 1,000 of them; the first layer multiplies once. "
        f"{options.device} ({platform.machine()}), one thread per seed, torch {torch.__version__}, "
        f"{datetime.date.today()}.",
        *(line for budget in budgets for line in ("", f"{budget.epochs} epochs:", "", *networks(found[budget]))),
        "",
        f"The full network, trained for {shortest.epochs} epochs, with four fire modules gone, or one: accuracy "
        f"straight after removal, and after an epoch (without fire6: on 2,000 test images).",
        "",
        *table("removed, repair", {"straight": ".1f", "one epoch": ".1f"}, repairs),
        "",
        f"{len(search.candidates)} networks: all sets of 0, 1, 2 and 4 fire modules out of that network (seed 0, "
        f"500 test images), repaired on the membrane, no fine-tuning. Of the {len(fours)} sets of four, ref_1 is "
        f"number {ref_1} by accuracy.",
        "",
        "```",
        str(search),
        "```",
        "",
        "![accuracy against energy, and gradient flow](squeezenet_cifar10.png)",
    ]
    (HERE / "results" / "squeezenet_cifar10.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
