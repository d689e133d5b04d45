"""What benchmarks/qp_snn.py measures: networks and the steps that they go through, and the tables of their figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple


class Quantize(NamedTuple):
    quantizer: str
    bits: int


class Prune(NamedTuple):
    criterion: str


Step = Quantize | Prune


@dataclass(frozen=True)
class Case:
    """A network that was trained dense, and goes through steps; each is repaired, or not, and followed by training."""

    steps: tuple[Step, ...] = ()
    repair: str | None = None
    seed: int = 0
    first_bare: bool = False  # only the last step is repaired

    def before(self) -> Case:
        """The network that the last step starts from; the dense one is the same for all."""
        steps = self.steps[:-1]
        return Case(steps, self.repair if steps and not self.first_bare else None, self.seed)

    def key(self) -> str:
        return json.dumps([self.steps, self.repair, self.seed, *["last"] * self.first_bare])

    def stem(self) -> str:
        """Of the file that keeps the network."""
        repaired = [(self.repair or "bare") + "-last" * self.first_bare] if self.steps else []
        return "-".join([f"s{self.seed}", *repaired, *("".join(map(str, step)) for step in self.steps)])


Figures = Callable[[Case], Mapping[str, float]]

REPAIRS = (None, "membrane")
GAMMAS = ("max", "percentile", "l1_mean", "mse")
CRITERIA = ("sca", "svs")
ABLATION = {  # quantizer, criterion → the paper's accuracy of ResNet20 on CIFAR-100
    ("vanilla", None): 78.53,
    ("l1_mean", None): 79.16,
    ("vanilla", "sca"): 69.16,
    ("l1_mean", "sca"): 73.40,
    ("vanilla", "svs"): 73.32,
    ("l1_mean", "svs"): 73.89,
}
ORDERS = {"quantize, then prune": "qp", "prune, then quantize": "pq"}
NAMES = {"vanilla": "vanilla uniform", "l1_mean": "ReScaW"}


def steps(quantizer: str, bits: int, criterion: str | None, order: str = "qp") -> tuple[Step, ...]:
    one, other = Quantize(quantizer, bits), Prune(criterion or "")
    if criterion is None:
        return (one,)
    return (one, other) if order == "qp" else (other, one)


def ablation(bits: int) -> list[tuple[Step, ...]]:
    return [steps(quantizer, bits, criterion) for quantizer, criterion in ABLATION]


def orders(bits: int) -> list[tuple[Step, ...]]:
    return [steps("l1_mean", bits, "svs", order) for order in ORDERS.values()]


def gammas(bits: int) -> list[tuple[Step, ...]]:
    return [steps(gamma, bits, None) for gamma in GAMMAS]


def pruned(bits: int) -> list[tuple[Step, ...]]:
    return [steps("l1_mean", bits, criterion) for criterion in CRITERIA]


PARTS = {"ablation": ablation, "order": orders, "gamma": gammas, "last": pruned}
WHERE = {
    "bare": (None, False),
    "after both steps": ("membrane", False),
    "after the last step alone": ("membrane", True),
}


def cases(parts: Sequence[str], bits: Sequence[int], seeds: Sequence[int]) -> list[Case]:
    """Every case that the tables of these parts show, once; all of a seed, then the next one."""
    found = [
        Case(chain, repair, seed, first_bare)
        for seed in seeds
        for part in parts
        for width in bits
        for chain in PARTS[part](width)
        for repair, first_bare in list(WHERE.values())[: 3 if part == "last" else 2]
    ]
    return list(dict.fromkeys(found))


class Tables:
    """Text from figures: ``straight`` after the last step, and ``accuracy`` after the training behind it, in %."""

    def __init__(self, figure: Figures, bits: Sequence[int], seeds: Sequence[int]) -> None:
        self.figure, self.seeds = figure, seeds
        self.columns = [(width, repair) for width in bits for repair in REPAIRS]

    def text(self, part: str) -> list[str]:
        made: Mapping[str, Callable[[], Iterator[str]]] = {
            "ablation": self.ablation, "order": self.order, "gamma": self.gamma, "last": self.last
        }  # fmt: skip
        return list(made[part]())

    def ablation(self) -> Iterator[str]:
        yield from self.header("quantizer, criterion", "paper")
        for (quantizer, criterion), paper in ABLATION.items():
            name = f"{NAMES[quantizer]}, {criterion or 'not pruned'}"
            yield self.row(name, f"{paper:.2f}", lambda bits, q=quantizer, c=criterion: steps(q, bits, c))
        yield ""
        yield "Differences after training, in points:"
        yield ""
        yield from self.header("", "paper")
        for criterion in CRITERIA:
            pair = ("l1_mean", criterion), ("vanilla", criterion)
            yield self.difference(f"ReScaW − vanilla, {criterion}", *pair)
        for quantizer in ("vanilla", "l1_mean"):
            yield self.difference(f"svs − sca, {NAMES[quantizer]}", (quantizer, "svs"), (quantizer, "sca"))

    def order(self) -> Iterator[str]:
        yield from self.header("order (ReScaW, svs)", "paper")
        for name, order in ORDERS.items():
            paper = "+1.39 over the other" if order == "qp" else ""
            yield self.row(name, paper, lambda bits, order=order: steps("l1_mean", bits, "svs", order))
        yield self.differences(
            "difference after training", "1.39", lambda bits: steps("l1_mean", bits, "svs"),
            lambda bits: steps("l1_mean", bits, "svs", "pq"),
        )  # fmt: skip

    def gamma(self) -> Iterator[str]:
        yield from self.header("γ of the layer", "paper")
        papers = {"max": "77.85 or 77.80", "percentile": "77.85 or 77.80", "l1_mean": "79.16", "mse": "–"}
        for gamma in GAMMAS:
            yield self.row(gamma, papers[gamma], lambda bits, gamma=gamma: steps(gamma, bits, None))

    def last(self) -> Iterator[str]:
        columns = [(bits, criterion) for bits in dict.fromkeys(b for b, _ in self.columns) for criterion in CRITERIA]
        yield f"| repaired | {' | '.join(f'{bits} bits, {criterion}' for bits, criterion in columns)} |"
        yield "| --- |" + " ---: |" * len(columns)
        for name, (repair, first_bare) in WHERE.items():
            chains = [steps("l1_mean", bits, criterion) for bits, criterion in columns]
            yield f"| {name} | {' | '.join(self.cell(chain, repair, first_bare) for chain in chains)} |"

    def header(self, first: str, second: str) -> Iterator[str]:
        names = [f"{width} bits, {'repaired' if repair else 'bare'}" for width, repair in self.columns]
        yield f"| {first} | {second} | {' | '.join(names)} |"
        yield "| --- | ---: |" + " ---: |" * len(names)

    def row(self, name: str, paper: str, chain: Callable[[int], tuple[Step, ...]]) -> str:
        cells = [self.cell(chain(width), repair) for width, repair in self.columns]
        return f"| {name} | {paper} | {' | '.join(cells)} |"

    def cell(self, chain: tuple[Step, ...], repair: str | None, first_bare: bool = False) -> str:
        found = [self.figure(Case(chain, repair, seed, first_bare)) for seed in self.seeds]
        straight = mean(one["straight"] for one in found)
        return f"{straight:.1f} → **{spread([one['accuracy'] for one in found])}**"

    def difference(self, name: str, one: tuple[str, str], other: tuple[str, str]) -> str:
        paper = f"{ABLATION[one] - ABLATION[other]:+.2f}"
        return self.differences(
            name, paper, lambda bits: steps(one[0], bits, one[1]), lambda bits: steps(other[0], bits, other[1])
        )

    def differences(
        self, name: str, paper: str, one: Callable[[int], tuple[Step, ...]], other: Callable[[int], tuple[Step, ...]]
    ) -> str:
        cells = []
        for width, repair in self.columns:
            pairs = [(Case(one(width), repair, seed), Case(other(width), repair, seed)) for seed in self.seeds]
            cells.append(spread([self.figure(a)["accuracy"] - self.figure(b)["accuracy"] for a, b in pairs], "+"))
        return f"| {name} | {paper} | {' | '.join(cells)} |"

    def sizes(self) -> str:
        """Parameters and MB, dense and compressed; needs ``ablation`` or ``order``."""
        dense = self.figure(Case(seed=self.seeds[0]))
        found = [f"dense {dense['parameters']:,.0f} parameters, {dense['megabytes']:.4f} MB"]
        for width in dict.fromkeys(width for width, _ in self.columns):
            one = self.figure(Case(steps("l1_mean", width, "svs"), None, self.seeds[0]))
            found.append(f"pruned, {width} bits: {one['parameters']:,.0f}, {one['megabytes']:.4f} MB")
        return "; ".join(found)

    def dense(self) -> str:
        return spread([self.figure(Case(seed=seed))["accuracy"] for seed in self.seeds])


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± half the range."""
    return f"{mean(values):{sign}.1f}" + (f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else "")
