"""What repair gives back: accuracy straight after compression, without labels and without training.

    python benchmarks/repair.py [--data ../shared/data] [--only mnist mlp nmnist cifar …] [--seeds 3] [--workers 2]
                                [--device cuda]

Networks are trained once per seed and kept in benchmarks/.cache, as is every figure, so a run that was stopped goes on.
Every job runs in one thread; the cost part runs alone. Writes benchmarks/results/repair.md; with --only the other parts
in it stay as they were. All parts take about five hours of one core, most of it evaluating.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from repair_tasks import CACHE, HERE, TASKS, Task
from rich.progress import track
from snncompress_rescaw import ReScaW
from snncompress_schedules import Gradual, Iterative, OneShot
from torch import nn

import snncompress

RESULT, FIGURES = HERE / "results" / "repair.md", CACHE / "repair.jsonl"
SEEDS = [0, 1, 2]
CHANNELS = ("svs", "sca", "firing_rate", "taylor", "magnitude", "bn_scale", "random")
WEIGHTS = ("obs", "lamp", "cqp", "weight_magnitude")
REPAIRS = (None, "current", "membrane")
QUANTIZERS = {
    "rescaw": ReScaW(),
    "max, channel": ReScaW("max", True),
    "max, layer": ReScaW("max", False),
    "mse, channel": ReScaW("mse", True),
    "mse, layer": ReScaW("mse", False),
    "l1_mean, layer": ReScaW("l1_mean", False),
}
SCHEDULERS = {"one_shot": OneShot(), "gradual 4": Gradual(4), "iterative 4": Iterative(4)}


@dataclass(frozen=True)
class Case:
    """One network, compressed one way. ``images`` calibrate; ``tune``: one epoch of fine-tuning follows."""

    task: str
    criterion: str | None = None
    ratio: float = 0.0
    bits: int | None = None
    repair: str | None = "membrane"
    rounding: str = "gptq"
    quantizer: str = "rescaw"
    scheduler: str = "one_shot"
    images: int = 0
    tune: bool = False
    seed: int = 0

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


# -- one job: in a process of its own, in one thread --


def start(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")
    for task in TASKS.values():
        task.folder, task.device = folder, device


def job_train(name: str, seed: int) -> None:
    TASKS[name].train(seed)


def job(case: Case) -> dict[str, float]:
    """Accuracy in % straight after, or after one epoch; seconds that apply() took."""
    task = TASKS[case.task]
    dense = task.dense(case.seed)
    small, seconds = compressed(task, dense, case)
    if case.tune:
        torch.manual_seed(case.seed)
        task.tune(small)
    return {"accuracy": task.accuracy(small, case.seed), "seconds": seconds}


def compressed(task: Task, dense: nn.Module, case: Case) -> tuple[nn.Module, float]:
    if case.criterion is None and case.bits is None:
        return dense, 0.0
    images = case.images or task.images
    began = time.perf_counter()
    small = snncompress.apply(
        dense, case.criterion, case.ratio, case.bits, data=task.calibration(images, case.seed),
        timesteps=task.timesteps, repair=case.repair, rounding=case.rounding, quantizer=QUANTIZERS[case.quantizer],
        scheduler=SCHEDULERS[case.scheduler], seed=case.seed, progress=False,
    )  # fmt: skip
    return small, time.perf_counter() - began


# -- parts: each says which cases it needs, and makes a text of their figures --

Figures = Callable[[Case], dict[str, float]]


class Part:
    """Cases, and the text that they make."""

    def __init__(self, cases: Callable[[], Iterator[Case]], text: Callable[[Figures], Iterator[str]]) -> None:
        self.cases, self.text = cases, text


def cell(figure: Figures, case: Case, seeds: Sequence[int]) -> str:
    values = [figure(replace(case, seed=seed))["accuracy"] for seed in seeds]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def header(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]


def dense_line(figure: Figures, task: str, seeds: Sequence[int]) -> str:
    return f"{TASKS[task].title} Dense: {cell(figure, Case(task), seeds)}."


MNIST_TASKS = ("mnist-spikingjelly", "mnist-snntorch")
TUNED = ("svs", "magnitude", "random")


def mnist_cases() -> Iterator[Case]:
    for task in MNIST_TASKS:
        for seed in SEEDS:
            yield Case(task, seed=seed)
            for criterion in CHANNELS:
                for ratio in (0.4, 0.6, 0.8):
                    for bits in (None, 4, 2):
                        for repair in REPAIRS:
                            yield Case(task, criterion, ratio, bits, repair, seed=seed)
    for criterion in TUNED:
        for ratio in (0.4, 0.6, 0.8):
            for bits in (None, 4, 2):
                for repair in (None, "membrane"):
                    yield Case(MNIST_TASKS[0], criterion, ratio, bits, repair, tune=True)


def mnist_text(figure: Figures) -> Iterator[str]:
    columns = [f"{ratio}: {repair or 'none'}" for ratio in (0.4, 0.6, 0.8) for repair in REPAIRS]
    for task in MNIST_TASKS:
        yield dense_line(figure, task, SEEDS)
        for bits in (None, 4, 2):
            yield ""
            yield from header(f"{bits} bits" if bits else "float", columns)
            for criterion in CHANNELS:
                cases = [Case(task, criterion, ratio, bits, repair) for ratio in (0.4, 0.6, 0.8) for repair in REPAIRS]
                yield f"| {criterion} | " + " | ".join(cell(figure, case, SEEDS) for case in cases) + " |"
        yield ""
    epoch = f"{TASKS[MNIST_TASKS[0]].epoch:,} images"
    yield f"After one epoch on {epoch}, from both starts (SpikingJelly, seed 0):"
    yield ""
    tuned = [f"{ratio}: {repair or 'none'}" for ratio in (0.4, 0.6, 0.8) for repair in (None, "membrane")]
    yield from header("criterion, bits", tuned)
    for criterion in TUNED:
        for bits in (None, 4, 2):
            cases = [
                Case(MNIST_TASKS[0], criterion, ratio, bits, repair, tune=True)
                for ratio in (0.4, 0.6, 0.8)
                for repair in (None, "membrane")
            ]
            row = " | ".join(cell(figure, case, (0,)) for case in cases)
            yield f"| {criterion}, {bits or 'float'} | {row} |"


SPARSITIES = (0.7, 0.8, 0.9, 0.95, 0.98)
GRADUALLY = ("obs", "gradual 4")


def mlp_cases() -> Iterator[Case]:
    for seed in SEEDS:
        yield Case("mlp", seed=seed)
        for ratio in SPARSITIES:
            for criterion in WEIGHTS:
                for repair in REPAIRS:
                    yield Case("mlp", criterion, ratio, repair=repair, seed=seed)
            yield Case("mlp", "obs", ratio, scheduler="gradual 4", seed=seed)
    for ratio in SPARSITIES:
        for criterion in WEIGHTS:
            for repair in (None, "membrane"):
                yield Case("mlp", criterion, ratio, repair=repair, tune=True)


def mlp_text(figure: Figures) -> Iterator[str]:
    yield dense_line(figure, "mlp", SEEDS)
    yield ""
    yield from header("criterion, repair", [f"{ratio:.0%}" for ratio in SPARSITIES])
    for criterion in WEIGHTS:
        for repair in REPAIRS:
            cases = [Case("mlp", criterion, ratio, repair=repair) for ratio in SPARSITIES]
            yield f"| {criterion}, {repair or 'none'} | " + " | ".join(cell(figure, c, SEEDS) for c in cases) + " |"
    cases = [Case("mlp", "obs", ratio, scheduler="gradual 4") for ratio in SPARSITIES]
    yield "| obs, membrane, in four steps (`gradual`) | " + " | ".join(cell(figure, c, SEEDS) for c in cases) + " |"
    yield ""
    yield f"After one epoch on {TASKS['mlp'].epoch:,} images, from both starts (seed 0):"
    yield ""
    yield from header("criterion, repair", [f"{ratio:.0%}" for ratio in SPARSITIES])
    for criterion in WEIGHTS:
        for repair in (None, "membrane"):
            cases = [Case("mlp", criterion, ratio, repair=repair, tune=True) for ratio in SPARSITIES]
            yield f"| {criterion}, {repair or 'none'} | " + " | ".join(cell(figure, c, (0,)) for c in cases) + " |"


NMNIST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("90 % of the weights", {"criterion": "obs", "ratio": 0.9}),
    ("95 %", {"criterion": "obs", "ratio": 0.95}),
    ("97 %", {"criterion": "obs", "ratio": 0.97}),
    ("97 %, in four steps (`gradual`)", {"criterion": "obs", "ratio": 0.97, "scheduler": "gradual 4"}),
    ("97 %, lamp", {"criterion": "lamp", "ratio": 0.97}),
    ("4 bits", {"bits": 4}),
    ("2 bits", {"bits": 2}),
    ("90 % and 4 bits", {"criterion": "obs", "ratio": 0.9, "bits": 4}),
)


def nmnist_cases() -> Iterator[Case]:
    for seed in SEEDS:
        yield Case("nmnist", seed=seed)
        for _, how in NMNIST:
            for repair in (None, "membrane"):
                yield Case("nmnist", repair=repair, seed=seed, **how)


def nmnist_text(figure: Figures) -> Iterator[str]:
    yield dense_line(figure, "nmnist", SEEDS)
    yield ""
    yield from header("", ["repair: none", "membrane", "membrane − dense, per fold"])
    for title, how in NMNIST:
        cells = [cell(figure, Case("nmnist", repair=repair, **how), SEEDS) for repair in (None, "membrane")]
        losses = [
            figure(Case("nmnist", seed=seed, **how))["accuracy"] - figure(Case("nmnist", seed=seed))["accuracy"]
            for seed in SEEDS
        ]
        cells.append(f"{mean(losses):+.2f} ± {stdev(losses):.2f}")
        yield f"| {title} | " + " | ".join(cells) + " |"


CIFAR: tuple[tuple[str, dict[str, Any], bool], ...] = (
    *((f"{bits} bits", {"bits": bits}, bits == 2) for bits in (8, 4, 2)),
    *(
        (f"{criterion} {ratio}", {"criterion": criterion, "ratio": ratio}, criterion in ("svs", "magnitude"))
        for criterion in CHANNELS
        for ratio in (0.3, 0.5)
    ),
    *(
        (f"{criterion} {ratio}, {bits} bits", {"criterion": criterion, "ratio": ratio, "bits": bits}, False)
        for criterion in ("svs", "magnitude")
        for ratio in (0.3, 0.5)
        for bits in (8, 4, 2)
    ),
    *((f"{c} 90 % of the weights", {"criterion": c, "ratio": 0.9}, c == "obs") for c in ("obs", "lamp", "cqp")),
)
CIFAR_MORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude 0.3, in four steps (`iterative`)", {"criterion": "magnitude", "ratio": 0.3}),
    ("magnitude 0.5, in four steps", {"criterion": "magnitude", "ratio": 0.5}),
    ("svs 0.5, in four steps", {"criterion": "svs", "ratio": 0.5}),
    ("obs 90 % of the weights, in four steps", {"criterion": "obs", "ratio": 0.9}),
)


def cifar_cases() -> Iterator[Case]:
    yield Case("cifar")
    for _, how, tune in CIFAR:
        for repair in (None, "membrane"):
            yield Case("cifar", repair=repair, **how)
            if tune:
                yield Case("cifar", repair=repair, tune=True, **how)
    for _, how in CIFAR_MORE:
        yield Case("cifar", scheduler="iterative 4", **how)


def cifar_text(figure: Figures) -> Iterator[str]:
    yield dense_line(figure, "cifar", (0,))
    yield ""
    columns = ["none", "membrane", "none, one epoch", "membrane, one epoch"]
    yield from header(f"one epoch: {TASKS['cifar'].epoch:,} images", columns)
    for title, how, tune in CIFAR:
        cases = [Case("cifar", repair=repair, tune=t, **how) for t in (False, True) for repair in (None, "membrane")]
        cells = [cell(figure, case, (0,)) if tune or not case.tune else "" for case in cases]
        yield f"| {title} | " + " | ".join(cells) + " |"
    for title, how in CIFAR_MORE:
        yield f"| {title} | | {cell(figure, Case('cifar', scheduler='iterative 4', **how), (0,))} | | |"


GAMMA_TASKS = ("mnist-spikingjelly", "mlp", "cifar")
GAMMAS = ("max, channel", "max, layer", "mse, channel", "mse, layer", "l1_mean, layer")
HOWS = ((None, "nearest"), ("membrane", "nearest"), ("membrane", "gptq"))


def gamma_seeds(task: str) -> Sequence[int]:
    return (0,) if task == "cifar" else SEEDS


def gamma_cases() -> Iterator[Case]:
    for task in GAMMA_TASKS:
        for bits in (8, 4, 3, 2):
            for quantizer in GAMMAS:
                for repair, rounding in HOWS:
                    if task == "cifar" and (bits == 8 or "l1" in quantizer) and rounding == "nearest" and repair:
                        continue
                    for seed in gamma_seeds(task):
                        yield Case(task, bits=bits, repair=repair, rounding=rounding, quantizer=quantizer, seed=seed)
    for bits in (4, 2):
        for quantizer in GAMMAS:
            yield Case("mnist-spikingjelly", bits=bits, quantizer=quantizer, repair=None, tune=True)
            yield Case("mnist-spikingjelly", bits=bits, quantizer=quantizer, tune=True)


def gamma_text(figure: Figures) -> Iterator[str]:
    asked = set(gamma_cases())
    names = ["none", "membrane, nearest", "membrane, gptq"]
    for task in GAMMA_TASKS:
        yield dense_line(figure, task, gamma_seeds(task))
        yield ""
        yield from header("γ", [f"{bits} bits: {name}" for bits in (8, 4, 3, 2) for name in names])
        for quantizer in GAMMAS:
            cells = []
            for bits in (8, 4, 3, 2):
                for repair, rounding in HOWS:
                    case = Case(task, bits=bits, repair=repair, rounding=rounding, quantizer=quantizer)
                    cells.append(cell(figure, case, gamma_seeds(task)) if case in asked else "")
            yield f"| {quantizer} | " + " | ".join(cells) + " |"
        yield ""
    yield f"After one epoch on {TASKS['mnist-spikingjelly'].epoch:,} images (MNIST, SpikingJelly, seed 0):"
    yield ""
    yield from header("γ", [f"{bits} bits: {name}" for bits in (4, 2) for name in ("none", "membrane, gptq")])
    for quantizer in GAMMAS:
        cases = [
            Case("mnist-spikingjelly", bits=bits, quantizer=quantizer, repair=repair, tune=True)
            for bits in (4, 2)
            for repair in (None, "membrane")
        ]
        yield f"| {quantizer} | " + " | ".join(cell(figure, case, (0,)) for case in cases) + " |"


COUNTS = (8, 32, 128, 512, 2048)
BY_IMAGES: tuple[tuple[str, dict[str, Any], Sequence[int]], ...] = (
    ("MNIST, svs 0.6, 4 bits", {"task": "mnist-spikingjelly", "criterion": "svs", "ratio": 0.6, "bits": 4}, SEEDS),
    ("MLP, obs 95 %", {"task": "mlp", "criterion": "obs", "ratio": 0.95}, SEEDS),
    ("CIFAR-10, svs 0.3, 4 bits", {"task": "cifar", "criterion": "svs", "ratio": 0.3, "bits": 4}, (0,)),
)


def images_cases() -> Iterator[Case]:
    for _, how, seeds in BY_IMAGES:
        for count in COUNTS:
            for seed in seeds:
                yield Case(images=count, seed=seed, **how)


def images_text(figure: Figures) -> Iterator[str]:
    yield from header("images", [str(count) for count in COUNTS])
    for title, how, seeds in BY_IMAGES:
        cells = [cell(figure, Case(images=count, **how), seeds) for count in COUNTS]
        yield f"| {title} | " + " | ".join(cells) + " |"


Pair = tuple[str, dict[str, Any]]
SUMMARY: tuple[tuple[str, str, tuple[Pair, ...], bool], ...] = (
    (
        "N-MNIST, weights gone by `obs`, three folds",
        "nmnist",
        tuple((f"{ratio:.0%}", {"criterion": "obs", "ratio": ratio}) for ratio in (0.9, 0.95, 0.97)),
        True,
    ),
    (
        "N-MNIST, bits, three folds",
        "nmnist",
        (("4", {"bits": 4}), ("2", {"bits": 2}), ("4, and 90%", {"criterion": "obs", "ratio": 0.9, "bits": 4})),
        True,
    ),
    (
        "MNIST, fully connected, weights gone by `obs`, three seeds",
        "mlp",
        tuple((f"{ratio:.0%}", {"criterion": "obs", "ratio": ratio}) for ratio in (0.9, 0.95, 0.98)),
        True,
    ),
    ("CIFAR-10, bits", "cifar", tuple((str(bits), {"bits": bits}) for bits in (8, 4, 2)), False),
    *(
        (
            f"CIFAR-10, {ratio} of the channels gone by `svs`; bits",
            "cifar",
            tuple((str(b or "float"), {"criterion": "svs", "ratio": ratio, "bits": b}) for b in (None, 4, 2)),
            False,
        )
        for ratio in (0.3, 0.5)
    ),
)


def summary_cases() -> Iterator[Case]:
    for _, task, hows, seeded in SUMMARY:
        for seed in SEEDS if seeded else (0,):
            yield Case(task, seed=seed)
            for _, how in hows:
                for repair in (None, "membrane"):
                    yield Case(task, repair=repair, seed=seed, **how)


def summary_text(figure: Figures) -> Iterator[str]:
    yield from header("repair=None → the default", ["dense", "", "", ""])
    for title, task, hows, seeded in SUMMARY:
        seeds = SEEDS if seeded else (0,)
        cells = []
        for name, how in hows:
            bare, fitted = (
                mean(figure(Case(task, repair=repair, seed=seed, **how))["accuracy"] for seed in seeds)
                for repair in (None, "membrane")
            )
            cells.append(f"{name}: {bare:.1f} → **{fitted:.1f}**")
        yield f"| {title} | {cell(figure, Case(task), seeds)} | {' | '.join(cells)} |"


PARTS = {
    "summary": Part(summary_cases, summary_text),
    "mnist": Part(mnist_cases, mnist_text),
    "mlp": Part(mlp_cases, mlp_text),
    "nmnist": Part(nmnist_cases, nmnist_text),
    "cifar": Part(cifar_cases, cifar_text),
    "gamma": Part(gamma_cases, gamma_text),
    "images": Part(images_cases, images_text),
}
TITLES = {
    "summary": "In short",
    "mnist": "MNIST, channels and bits",
    "mlp": "MNIST, single weights of a fully connected network",
    "nmnist": "N-MNIST, single weights and bits",
    "cifar": "CIFAR-10",
    "gamma": "The range of the quantizer, and rounding",
    "images": "How many calibration images",
    "cost": "Cost",
}


# -- what it costs, measured alone --


def job_cost(folder: Path) -> list[str]:
    """Seconds side by side in one process, on VGG-16 and the MNIST network."""
    from vgg16 import vgg16

    start(folder, "cpu")
    x = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [x[i : i + 32] for i in range(0, 256, 32)]
    torch.manual_seed(0)
    model = vgg16().eval()
    lines = ["VGG-16 (13 convolutions), 256 images [3, 32, 32], T = 4, svs, ratio 0.6, 4 bits:", ""]
    lines += header("", ["seconds", "forward passes over the 256 images", "peak memory (MB)"])
    began = time.perf_counter()
    snncompress.profile(model, data, timesteps=4)
    profile = time.perf_counter() - began
    with torch.no_grad():
        began = time.perf_counter()
        for part in data:
            snncompress.evaluate(model, (part, torch.zeros(len(part), dtype=torch.long)), timesteps=4)
        once = time.perf_counter() - began
    lines.append(f"| one forward pass | {once:.1f} | 1.0 | {peak():.0f} |")
    lines.append(f"| `profile` | {profile:.1f} | {profile / once:.1f} | {peak():.0f} |")
    for repair, rounding in HOWS:
        began = time.perf_counter()
        snncompress.apply(
            model, "svs", 0.6, 4, data=data, timesteps=4, repair=repair, rounding=rounding, progress=False
        )
        took = time.perf_counter() - began
        what = f"`apply`, repair={repair!r}" + (f", rounding={rounding!r}" if repair else "")
        lines.append(f"| {what} | {took:.1f} | {took / once:.1f} | {peak():.0f} |")
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part in data]
    began = time.perf_counter()
    snncompress.finetune(model, labelled, epochs=1, timesteps=4, progress=False)
    epoch = time.perf_counter() - began
    lines.append(f"| an epoch of `finetune` over the 256 images | {epoch:.1f} | {epoch / once:.1f} | {peak():.0f} |")
    return lines


def peak() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# -- running and writing --


def known() -> dict[str, dict[str, Any]]:
    """Rows by their cases: the figures, and where they were measured."""
    if not FIGURES.exists():
        return {}
    return {row["case"]: row for row in map(json.loads, FIGURES.read_text().splitlines())}


def here(device: str) -> str:
    machine = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{machine}, one thread per job, torch {torch.__version__}, {datetime.date.today()}"


def compute(cases: Sequence[Case], folder: Path, workers: int, device: str) -> None:
    """What isn't known yet goes to the file, as it comes."""
    todo = [case for case in dict.fromkeys(cases) if case.key() not in known()]
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start, (folder, device)) as pool:
        trainings = {(case.task, case.seed) for case in todo if not TASKS[case.task].weights(case.seed).exists()}
        for done in [pool.submit(job_train, *training) for training in sorted(trainings)]:
            done.result()
        futures = {pool.submit(job, case): case for case in sorted(todo, key=lambda case: case.seed)}
        for future in track(as_completed(futures), description="cases", total=len(futures)):
            row = {"case": futures[future].key(), "figures": future.result(), "where": here(device)}
            with FIGURES.open("a") as file:
                file.write(json.dumps(row) + "\n")


def write(texts: dict[str, str]) -> None:
    """Sections in order; those of earlier runs stay."""
    old = RESULT.read_text() if RESULT.exists() else ""
    pieces = re.split(r"^## ", old, flags=re.M)[1:]
    sections = {piece.split("\n", 1)[0]: piece.split("\n", 1)[1].strip() for piece in pieces}
    sections |= {TITLES[name]: text for name, text in texts.items()}
    body = "\n\n".join(f"## {title}\n\n{sections[title]}" for title in TITLES.values() if title in sections)
    intro = (
        "Test accuracy in %, without labels and without training unless an epoch is named; mean ± standard deviation "
        "over seeds. Written by benchmarks/repair.py."
    )
    RESULT.write_text(f"# Repair\n\n{intro}\n\n{body}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of all parts but the cost, which is that of a CPU")
    options = parser.parse_args()
    SEEDS[:] = range(options.seeds)
    CACHE.mkdir(exist_ok=True)
    for name in options.only:
        if name == "cost":
            places = [here("cpu")]
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                lines = pool.submit(job_cost, options.data).result()
        else:
            cases = list(PARTS[name].cases())
            compute(cases, options.data, options.workers, options.device)
            rows = known()
            lines = list(PARTS[name].text(lambda case, rows=rows: rows[case.key()]["figures"]))
            places = sorted({rows[case.key()]["where"] for case in cases})
        lines += ["", f"({'; '.join(places)}.)"]
        write({name: "\n".join(lines)})
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
