"""CIFAR-10 study: does a spiking SqueezeNet lose anything when half of its fire modules go?

    python benchmarks/squeezenet_cifar10.py [--budget small|full] [--epochs 6 12] [--seeds 2] [--workers 2]
                                            [--device cpu] [--data FOLDER]

The nine schedules of SNN SqueezeNet-P and their CNN twins (a ReLU for each neuron), all trained from scratch under one
budget, once for each number of epochs; the set that ``ablation`` chooses, trained the same way. Of the fewest epochs
besides: the three repairs; sets of fire modules, untrained after removal. The image is the same at every timestep, so
the first layer is charged for it once. A job is one network, in a process of one thread: the small budget takes six
minutes of an H200 (--device cuda --workers 10, which share it through MPS), or some six hours of two cores. Figures and
networks are kept in benchmarks/.cache as they come, so that a run that was stopped goes on. Writes
squeezenet_cifar10.md and .png to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import jobs
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


REMOVALS = {  # from the trained network: what is left, and the test images that accuracy is of
    "ref_1": (snncompress_fire.Keep.named("ref_1"), 10_000),
    "all but fire6": (snncompress_fire.Keep(tuple(n for n in range(8) if n != 4)), 2_000),
}
REPAIRS = ("membrane", None, "reinit")
WITHOUT = {f"{name}, {repair}": (name, repair) for name in REMOVALS for repair in REPAIRS}


@dataclass(frozen=True)
class Budget:
    """What every network gets: training images, epochs, images per batch."""

    images: int
    epochs: int
    batch: int


BUDGETS = {"small": [Budget(10_000, epochs, 50) for epochs in (6, 12)], "full": [Budget(50_000, 60, 128)]}


@dataclass(frozen=True)
class Case:
    """A row of a table: a schedule, its CNN twin, ``ablation``; or a removal from the trained network, and a repair."""

    name: str
    budget: Budget
    seed: int

    def key(self) -> str:
        return json.dumps([self.name, self.budget.images, self.budget.epochs, self.seed])

    def of(self, name: str) -> Case:
        """Another one under the same budget."""
        return replace(self, name=name)


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


@cache
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
    if schedule == "full":
        return net
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


def of_schedule(case: Case, keep: snncompress_fire.Keep | None, device: str) -> tuple[nn.Module, int | None]:
    """The untrained network of a row, and its timesteps: a CNN has none."""
    name = case.name.removeprefix("CNN ")
    net = network(keep or name, case.seed).to(device)
    return (net, T) if name == case.name else (twin(net), None)


def file(case: Case, folder: Path) -> Path:
    return folder / f"{case.name}-{case.budget.epochs}-s{case.seed}.pt"


def trained(case: Case, folder: Path, device: str) -> nn.Module:
    """A network of a job before."""
    net, _ = of_schedule(case, None, device)
    net.load_state_dict(torch.load(file(case, folder), map_location=device, weights_only=True))
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


def job(case: Case, data: Path, folder: Path, device: str) -> dict[str, Any]:
    """The figures of a row."""
    train, test = images(data, case.budget, device)
    if case.name in WITHOUT:
        (name, repair), full = WITHOUT[case.name], trained(case.of("full"), folder, device)
        keep, count = REMOVALS[name]
        return repaired(full, keep, repair, train, test.some(count), case.seed)
    keep, found = None, {}
    if case.name == "ablation":
        kept = kept_by_ablation(trained(case.of("full"), folder, device), train.some(500), case.seed)
        keep, found = snncompress_fire.Keep(tuple(n - 2 for n in kept)), {"kept": kept}
    net, timesteps = of_schedule(case, keep, device)
    torch.manual_seed(case.seed)
    snncompress.finetune(net, train, epochs=case.budget.epochs, lr=LR, timesteps=timesteps, progress=False)
    if case.name in ("full", "ref_1"):  # others start from it; the picture's
        torch.save(net.state_dict(), file(case, folder))
    return found | measured(net, test)


def pictures(case: Case, data: Path, folder: Path, device: str) -> snncompress.BlockSearch:
    """All sets of fire modules of the trained network, and its gradients before and after training."""
    from matplotlib import pyplot

    train, test = images(data, case.budget, device)
    full = trained(case, folder, device)
    result = snncompress.block_search(
        full, train.some(100), "fire", remove=(0, 1, 2, 4), test=test.some(500), timesteps=T, repair="membrane"
    )
    _, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    result.plot(left).set_title("SqueezeNet without 0, 1, 2 or 4 fire modules, no fine-tuning")
    for name in ("full", "ref_1"):
        untrained, _ = of_schedule(case.of(name), None, device)
        for when, net in (("untrained", untrained), ("trained", trained(case.of(name), folder, device))):
            snncompress.gradient_flow(net, train.some(500), timesteps=T).plot(right, label=f"{name}, {when}")
    right.set_title("Gradient flow")
    pyplot.savefig(HERE / "results" / "squeezenet_cifar10.png", dpi=110)
    return result


def table(title: str, columns: Mapping[str, str], rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """One line per row; mean ± half the range over seeds for what is no count."""

    def cell(values: list[float], form: str) -> str:
        spread = (max(values) - min(values)) / 2
        return f"{mean(values):{form}}" + (f" ± {spread:{form}}" if spread and form != ",.0f" else "")

    lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, found in rows.items():
        cells = [cell([one[c] for one in found], form) for c, form in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


NETWORKS = (*SCHEDULES, "ablation", *(f"CNN {name}" for name in SCHEDULES))
COLUMNS = {"accuracy": ".1f", "f1": ".3f", "parameters": ",.0f", "AC": ".2f", "MAC": ".2f", "energy": ".2f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--epochs", type=int, nargs="+", help="other numbers of epochs than the budget's")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--device", default="cpu")
    datasets.add_data_option(parser)
    options = parser.parse_args()
    budgets, seeds = BUDGETS[options.budget], range(options.seeds)
    if options.epochs:
        budgets = [replace(budgets[0], epochs=epochs) for epochs in sorted(set(options.epochs))]
    folder = HERE / ".cache" / f"squeezenet-{options.budget}"
    folder.mkdir(parents=True, exist_ok=True)

    def cases(names: Sequence[str], budgets: Sequence[Budget]) -> list[Case]:
        """The longest first."""
        return [Case(name, budget, seed) for budget in reversed(budgets) for name in names for seed in seeds]

    work = partial(job, data=options.data, folder=folder, device=options.device)
    independent = [name for name in NETWORKS if name != "ablation"]
    for some in (
        cases(independent, budgets), [*cases(["ablation"], budgets), *cases([*WITHOUT], budgets[:1])]
    ):  # fmt: skip
        done = jobs.known(folder / "figures.jsonl")
        todo = [case for case in some if case.key() not in done]
        jobs.compute(todo, work, folder / "figures.jsonl", options.workers, options.device)
    search = pictures(Case("full", budgets[0], 0), options.data, folder, options.device)
    rows = jobs.known(folder / "figures.jsonl")

    def found(name: str, budget: Budget) -> list[Mapping[str, Any]]:
        return [rows[Case(name, budget, seed).key()]["figures"] for seed in seeds]

    shortest = budgets[0]
    fours = sorted((c for c in search.candidates if len(c.removed) == 4), key=lambda c: -c.accuracy)
    ref_1 = next(n for n, c in enumerate(fours, 1) if set(c.removed) == {"fire2", "fire3", "fire5", "fire7"})
    text = [
        f"Spiking SqueezeNet on CIFAR-10: {shortest.images:,} training images in batches of {shortest.batch}, Adam at "
        f"{LR:g} with a cosine schedule, random flips, T = {T}, batch norms, no neuron behind the last convolution; "
        f"{options.seeds} seeds, mean ± half the range. Accuracy in % and macro F1 on the 10,000 test images, "
        f"operations in millions and energy in µJ per image on 1,000 of them; the first layer multiplies once. "
        f"{'; '.join(sorted({row['where'] for row in rows.values()}))}.",
    ]
    for budget in budgets:
        kept = "; ".join(
            f"seed {seed}: {one['kept']}" for seed, one in zip(seeds, found("ablation", budget), strict=True)
        )
        figures = {name: found(name, budget) for name in NETWORKS}
        text += ["", f"{budget.epochs} epochs:", "", *table("network", COLUMNS, figures)]
        text += ["", f"Kept by `ablation`: {kept}."]
    repairs = {name: found(name, shortest) for name in WITHOUT}
    text += [
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
