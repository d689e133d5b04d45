"""Budgets: are they met, and is allocation over layers better than one ratio, and one bit width, for all?

    python benchmarks/budgets.py [--data FOLDER] [--only met exponent equal bits] [--seeds 0 1 2]

"met": what was asked for and what came out, on the networks of benchmarks/repair.py and on untrained ones of
examples/networks. "exponent": how much savings should count against losses in the allocation, on training images of
CIFAR-10 that don't calibrate, seed 0. "equal": at the same energy, or the same parameters, straight after compression
with repair and after one epoch: channels allocated by the budget against one ratio for all layers. "bits": at the same
size, straight after: bits per layer (``bits="auto"``) against one width for all. Figures are kept in benchmarks/.cache,
so a run that was stopped goes on, and tables are of all that are there. One thread. Writes
benchmarks/results/budgets.md.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from budget_studies import EXPONENTS, HELD, PARTS, SHARES, SIZES, WIDTHS, jobs, of_seed
from datasets import add_data_option
from jobs import known, note
from repair_tasks import CACHE, HERE, TASKS

RESULT, STORE = HERE / "results" / "budgets.md", CACHE / "budgets.jsonl"
Found = Mapping[tuple[str, ...], Mapping[str, float]]
"""Figures of a part's cases, without its name."""


def told(several: Sequence[Mapping[str, float]], column: str) -> str:
    """Mean over seeds, with the share of the cost where it is known."""
    right, left = mean(f[column] for f in several), [f[f"{column}, cost"] for f in several if f"{column}, cost" in f]
    return f"{right:.1f} ({mean(left):.3f})" if left else f"{right:.1f}"


def table(first: Sequence[str], columns: Sequence[Any], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(first)} | {' | '.join(map(str, columns))} |"
    yield "|" + " --- |" * len(first) + " ---: |" * len(columns)
    yield from (f"{head} {' | '.join(cells)} |" for head, cells in rows.items())


def met(found: Found) -> Iterator[str]:
    yield from ["## Asked for, and what is left of the original's cost (seconds of one core)", ""]
    yield from ["Each by one call of `apply`.", ""]
    rows: dict[str, list[str]] = {}
    for (name, kind, share), figures in found.items():
        row = rows.setdefault(f"| {name} | {kind} |", ["—"] * len(SHARES))
        used = "can't be" if figures["used"] != figures["used"] else f"{figures['used']:.3f}"
        row[SHARES.index(float(share))] = f"{used} ({figures['seconds']:.0f} s)"
    yield from table(("network", "budget"), SHARES, rows)


def exponent(found: Found) -> Iterator[str]:
    yield from [f"## The exponent of savings: accuracy (%) on {HELD:,} training images", ""]
    rows: dict[str, list[str]] = {}
    for (name, kind, share, weight), figures in found.items():
        row = rows.setdefault(f"| {name} | {kind} {share} |", ["—"] * len(EXPONENTS))
        row[EXPONENTS.index(float(weight))] = f"{figures['accuracy']:.1f}"
    yield from table(("network", "budget"), EXPONENTS, rows)


def equal(found: Found) -> Iterator[str]:
    yield from ["## One ratio for all layers, or allocated: test accuracy (%), and the share of the cost", ""]
    yield (
        "One ratio is the smallest, in hundredths, that costs no more than what was allocated; where layers have few "
        "channels, that is less. Of cifar there is one trained network: its seeds are of calibration and tuning."
    )
    yield ""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for (name, kind, share, _), figures in found.items():
        groups.setdefault(f"| {name} | {kind} {share} |", []).append(figures)
    columns = ("dense", "one ratio", "allocated", "one ratio, tuned", "allocated, tuned")
    rows = {head: [str(len(some)), *(told(some, column) for column in columns)] for head, some in groups.items()}
    yield from table(("network", "budget"), ("seeds", *columns), rows)


def bits(found: Found) -> Iterator[str]:
    yield from [
        "## One bit width for all layers, or bits per layer: test accuracy (%) straight after, at equal size",
        "",
    ]
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for (name, criterion, most, _, width), figures in found.items():
        groups.setdefault((name, criterion, most, width), []).append(figures)

    def cell(*case: str) -> str:
        some = groups.get(case, [])
        return f"{mean(f['accuracy'] for f in some):.1f} ({mean(f['left'] for f in some):.3f})" if some else "—"

    names = dict.fromkeys(name for name, *_ in groups)
    yield "All channels stay; bits per layer take up no more than the one width. In brackets what is left of the size."
    yield ""
    plain = {
        f"| {name} | {what} |": [cell(name, "", str(width), "0" if each else str(width)) for width in WIDTHS]
        for name in names
        for what, each in (("one width", False), ("bits per layer", True))
    }
    yield from table(("network", "bits"), [f"{width} bits, or as large" for width in WIDTHS], plain)
    yield from ["", "Channels go too, by magnitude, until the share of the size is left that the budget names.", ""]
    cut = {
        f"| {name} | size {share} |": [cell(name, "magnitude", str(share), str(width)) for width in (*WIDTHS, 0)]
        for name in names
        for share in SIZES
    }
    yield from table(("network", "budget"), [*(f"{width} bits" for width in WIDTHS), "bits per layer"], cut)


TABLES = {"met": met, "exponent": exponent, "equal": equal, "bits": bits}


def report(rows_known: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables, of what is known."""
    text = ["# Budgets", "", "Written by benchmarks/budgets.py; criterion magnitude, skip=[]."]
    for part, write in TABLES.items():
        cases = {tuple(json.loads(key)): row["figures"] for key, row in rows_known.items()}
        if found := {case[1:]: figures for case, figures in cases.items() if case[0] == part}:
            text += ["", *write(found)]
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
        if (key := json.dumps(job)) not in known(STORE):
            task = TASKS.get(job[1])
            if task is not None:
                seed = of_seed(task, int(job[4]) if job[0] in ("equal", "bits") else 0)
                if not task.weights(seed).exists():
                    task.train(seed)
            note(STORE, key, compute(), "cpu")
            print(key, known(STORE)[key]["figures"], flush=True)
        RESULT.write_text(report(known(STORE)))


if __name__ == "__main__":
    main()
