"""What benchmarks/repair.py measures: cases, and the tables that their figures make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from repair_tasks import TASKS

SEEDS = [0, 1, 2]
CHANNELS = ("reconstruction", "svs", "sca", "firing_rate", "taylor", "magnitude", "bn_scale", "random")
WEIGHTS = ("obs", "lamp", "cqp", "weight_magnitude")
REPAIRS = (None, "current", "membrane")


@dataclass(frozen=True)
class Case:
    """One network, compressed one way. ``images`` calibrate; ``tune``: one epoch of fine-tuning follows, at ``lr``."""

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
    lr: float = 1e-3
    seed: int = 0

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


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


CHOSEN = ("reconstruction", "svs", "magnitude")
CIFAR: tuple[tuple[str, dict[str, Any], bool], ...] = (
    *((f"{bits} bits", {"bits": bits}, bits == 2) for bits in (8, 4, 2)),
    *(
        (
            f"{criterion} {ratio}",
            {"criterion": criterion, "ratio": ratio},
            criterion in ("reconstruction", "svs", "magnitude"),
        )
        for criterion in CHANNELS
        for ratio in (0.3, 0.5)
    ),
    *(
        (f"{criterion} {ratio}, {bits} bits", {"criterion": criterion, "ratio": ratio, "bits": bits}, False)
        for criterion in CHOSEN
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
        for seed in gamma_seeds(task):
            yield Case(task, seed=seed)
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


RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("MNIST, svs 0.8", {"task": "mnist-spikingjelly", "criterion": "svs", "ratio": 0.8}),
    ("MNIST, magnitude 0.8", {"task": "mnist-spikingjelly", "criterion": "magnitude", "ratio": 0.8}),
    ("MNIST, random 0.8", {"task": "mnist-spikingjelly", "criterion": "random", "ratio": 0.8}),
    ("CIFAR-10, svs 0.3", {"task": "cifar", "criterion": "svs", "ratio": 0.3}),
    ("CIFAR-10, svs 0.5", {"task": "cifar", "criterion": "svs", "ratio": 0.5}),
    ("CIFAR-10, 2 bits", {"task": "cifar", "bits": 2}),
)


def rates_cases() -> Iterator[Case]:
    for _, how in STARTS:
        for repair in (None, "membrane"):
            yield Case(repair=repair, **how)
            for lr in RATES:
                yield Case(repair=repair, tune=True, lr=lr, **how)


def rates_text(figure: Figures) -> Iterator[str]:
    mnist, cifar = (TASKS[task].epoch for task in ("mnist-spikingjelly", "cifar"))
    yield f"One epoch, on {mnist:,} images of MNIST, {cifar:,} of CIFAR-10; seed 0."
    yield ""
    yield from header("repair", ["straight after", *(f"lr {lr:g}" for lr in RATES)])
    for title, how in STARTS:
        for repair in (None, "membrane"):
            cases = [Case(repair=repair, **how), *(Case(repair=repair, tune=True, lr=lr, **how) for lr in RATES)]
            yield f"| {title}, {repair or 'none'} | " + " | ".join(cell(figure, case, (0,)) for case in cases) + " |"


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
    *(
        (
            f"MNIST, {framework}, channels gone by `{criterion}`, 4 bits, three seeds",
            f"mnist-{framework.lower()}",
            tuple((str(ratio), {"criterion": criterion, "ratio": ratio, "bits": 4}) for ratio in (0.4, 0.6, 0.8)),
            True,
        )
        for framework in ("SpikingJelly", "snnTorch")
        for criterion in ("svs", "reconstruction")
    ),
    ("CIFAR-10, bits", "cifar", tuple((str(bits), {"bits": bits}) for bits in (8, 4, 2)), False),
    *(
        (
            f"CIFAR-10, {ratio} of the channels gone by `{criterion}`; bits",
            "cifar",
            tuple((str(b or "float"), {"criterion": criterion, "ratio": ratio, "bits": b}) for b in (None, 4, 2)),
            False,
        )
        for criterion in ("svs", "reconstruction")
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
    "rates": Part(rates_cases, rates_text),
}
TITLES = {
    "summary": "In short",
    "mnist": "MNIST, channels and bits",
    "mlp": "MNIST, single weights of a fully connected network",
    "nmnist": "N-MNIST, single weights and bits",
    "cifar": "CIFAR-10",
    "gamma": "The range of the quantizer, and rounding",
    "images": "How many calibration images",
    "rates": "Fine-tuning from both starts, by learning rate",
    "cost": "Cost",
}
