"""Membrane potentials in fixed point, and networks in whole numbers: accuracy, and spikes that differ.

    python benchmarks/states.py [--data FOLDER] [--only grid tuned integer] [--workers 1]

The networks of benchmarks/repair.py, trained as there once per seed and kept in benchmarks/.cache, as is every figure,
so a run that was stopped goes on. Every job runs in one thread. Writes benchmarks/results/states.md. About an hour of
one core, nearly all of it evaluating.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import datasets
import torch
from jobs import here, known, note
from repair_tasks import CACHE, HERE, TASKS, Task
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.export.integer_network import heard, in_double

RESULT, FIGURES = HERE / "results" / "states.md", CACHE / "states.jsonl"
NAMES = {"mnist-spikingjelly": [0], "mnist-snntorch": [0], "nmnist": [0]}
"""Seeds. One fold of N-MNIST has 367 recordings: one more or less is 0.27 points."""
WEIGHTS, STATES = (32, 8, 4, 2), (0, 32, 16, 12, 8, 6, 4)
WAYS = {"": {}, " wrapping": {"state_overflow": "wrap"}, " by shifts": {"state_leak": "shift"}}
IN_NUMPY = 1_000  # images; numpy has no fast products of whole numbers
TUNED = [(weights, states) for weights in (4, 2) for states in (0, 8, 4)]


def start(folder: Path) -> None:
    torch.set_num_threads(1)
    for task in TASKS.values():
        task.folder = folder


def tested(task: Task) -> Any:
    """All test images."""
    x, y = datasets.mnist(task.folder, "test")
    return DataLoader(TensorDataset(torch.tensor(x).unsqueeze(1) / 255, torch.tensor(y).long()), 250)


def quantized(task: Task, seed: int, weights: int) -> nn.Module:
    dense = task.dense(seed)
    if weights == 32:
        return dense
    data = task.calibration(task.images, seed)
    return snncompress.apply(dense, None, bits=weights, data=data, timesteps=task.timesteps, progress=False)


def fixed(task: Task, net: nn.Module, seed: int, states: int, **options: Any) -> nn.Module:
    if not states:
        return net
    data = task.calibration(task.images, seed)
    return snncompress.apply(
        net, None, bits=None, data=data, timesteps=task.timesteps, state_bits=states, progress=False, **options
    )


# -- jobs: each runs in a process of its own, in one thread, and gives figures by case --


def job_grid(name: str, seed: int, weights: int) -> Iterator[tuple[str, dict[str, float]]]:
    task, done = TASKS[name], known(FIGURES)
    small = quantized(task, seed, weights)
    for way, options in WAYS.items():
        for states in STATES if not way else (8, 6, 4):
            case = f"{name} {seed} {weights} {states}{way}"
            if (way and weights != 4) or case in done:
                continue
            net = fixed(task, small, seed, states, **options)
            yield case, {"accuracy": task.accuracy(net, seed)}


def job_tuned(name: str, seed: int, weights: int) -> Iterator[tuple[str, dict[str, float]]]:
    """After one epoch on 10,000 images, which trains through both grids."""
    task = TASKS[name]
    small = quantized(task, seed, weights)
    for states in (states for bits, states in TUNED if bits == weights):
        torch.manual_seed(seed)
        net = copy.deepcopy(fixed(task, small, seed, states))
        task.tune(net, 1e-3, seed)
        yield f"{name} {seed} {weights} {states} tuned", {"accuracy": task.accuracy(net, seed)}


def job_integer(name: str, seed: int, weights: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Spikes of the network in whole numbers that differ: from floats of 32 and 64 bits, and from the file in numpy."""
    task = TASKS[name]
    small = fixed(task, quantized(task, seed, weights), seed, 8)
    example = task.calibration(8, seed)
    whole = snncompress.freeze(small, example, timesteps=task.timesteps, integer="full")
    twin = snncompress.freeze(small, example, timesteps=task.timesteps)
    exact = in_double(snncompress.freeze(small, example, timesteps=task.timesteps))
    adapter = find_adapter(whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        snncompress.export(small, path, data=example, timesteps=task.timesteps)
        page = (HERE.parent / "docs" / "integer.md").read_text()
        found: dict[str, Any] = {}
        exec(next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "class" in block), found)
        numpy_net = found["Interpreter"](path)
    sums = dict.fromkeys(("spikes", "fired", "float32", "float64", "numpy", "right", "n"), 0)
    for x, y in tested(task):

        def run(net: nn.Module, x: Tensor = x) -> Tensor:
            adapter.reset(net)
            return adapter.run(net, x, task.timesteps)

        mine = heard(whole, adapter, run)
        for other, net in (("float32", twin), ("float64", exact)):
            theirs = heard(net, adapter, run)
            sums[other] += sum(int((theirs[key] ^ spikes).sum()) for key, spikes in mine.items())
        numpy_net.reset()
        for t in range(task.timesteps if sums["n"] < IN_NUMPY else 0):
            numpy_net.step(x.numpy())
            sums["numpy"] += sum(
                int((torch.tensor(numpy_net.spikes[key]) != spikes[t]).sum()) for key, spikes in mine.items()
            )
        sums["spikes"] += sum(spikes.numel() for spikes in mine.values())
        sums["fired"] += sum(int(spikes.sum()) for spikes in mine.values())
        with torch.no_grad():
            sums["right"] += int((run(whole).mean(0).argmax(1) == y).sum())
        sums["n"] += len(y)
    yield f"{name} {seed} {weights} 8 integer", {key: float(value) for key, value in sums.items()}


JOBS = {
    "grid": (job_grid, [(name, seed, w) for w in (4, 8, 2, 32) for name, seeds in NAMES.items() for seed in seeds]),
    "tuned": (job_tuned, [(name, 0, w) for w in (4, 2) for name in ("mnist-spikingjelly", "mnist-snntorch")]),
    "integer": (job_integer, [(name, 0, w) for w in (4, 8) for name in ("mnist-spikingjelly", "mnist-snntorch")]),
}


def last(part: str, job: tuple[str, int, int]) -> str:
    """The case that a job ends with."""
    ends = {"grid": "4 by shifts" if job[2] == 4 else "4", "tuned": "4 tuned", "integer": "8 integer"}
    return " ".join(map(str, (*job, ends[part])))


def work(part: str, arguments: tuple[str, int, int]) -> None:
    began = time.perf_counter()
    for case, figures in JOBS[part][0](*arguments):
        note(FIGURES, case, {**figures, "seconds": time.perf_counter() - began}, "cpu")
        began = time.perf_counter()


# -- the report --


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(rows: dict[str, Any], name: str, *rest: Any) -> str:
    """Mean over the seeds."""
    seeds = NAMES[name] if "tuned" not in str(rest[-1]) else [0]
    found = [rows.get(" ".join(map(str, (name, seed, *rest)))) for seed in seeds]
    figures = [row["figures"]["accuracy"] for row in found if row]
    return f"{sum(figures) / len(figures):.2f}" if len(figures) == len(seeds) else "–"


def report(rows: dict[str, Any]) -> str:
    text = [
        """# States in fixed point, networks in whole numbers

"–" wasn't measured. Test accuracy in %, straight after: no labels, no training, 512 (N-MNIST: 256) samples for
calibration. The first layer and the readout are left at 32 bits, as is the default. The column "float" has states in
float, with weights of these bits.
"""
    ]
    for name in NAMES:
        grid = [
            [f"{w} bits" if w < 32 else "float", *(cell(rows, name, w, s) for s in STATES)] for w in WEIGHTS
        ]  # fmt: skip
        text.append(f"\n## {name}\n\n{TASKS[name].title}\n")
        text.append(table(["weights \\ states", *(f"{s} bits" if s else "float" for s in STATES)], grid))
        ways = [
            [way.strip() or "saturating, exact", *(cell(rows, name, 4, f"{s}{way}") for s in (8, 6, 4))] for way in WAYS
        ]
        text.append("\nWeights of 4 bits:\n\n" + table(["states", "8 bits", "6 bits", "4 bits"], ways) + "\n")
    tuned = [
        [f"{name}, {w}-bit weights"]
        + [f"{cell(rows, name, w, s)} → {cell(rows, name, w, s, 'tuned')}" for s in (0, 8, 4)]
        for name in ("mnist-spikingjelly", "mnist-snntorch") for w in (4, 2)
    ]  # fmt: skip
    text.append("\n## After one epoch\n\nOn 10,000 training images at lr 1e-3, through both grids: before → after.\n")
    text.append(table(["", "float", "8 bits", "4 bits"], tuned))
    integer = []
    for name in ("mnist-spikingjelly", "mnist-snntorch"):
        for w in (4, 8):
            row = rows.get(f"{name} 0 {w} 8 integer")
            if row:
                f = row["figures"]
                numbers = [f"{f[key]:,.0f}" for key in ("spikes", "fired", "float32", "float64", "numpy")]
                integer.append([f"{name}, {w}-bit weights", *numbers, f"{100 * f['right'] / f['n']:.2f}"])
    text.append(f"""
## In whole numbers

`freeze(…, integer="full")` on the 10,000 test images of MNIST, states of 8 bits: neurons × timesteps, those that fire,
and in how many of all it differs from its twin in fake-quantized floats of 32 and of 64 bits; and, on the first
{IN_NUMPY:,} images, from the file that `export(…, format="integer")` writes, run by the interpreter in numpy of
`docs/integer.md`.

{table(["", "neuron steps", "spikes", "differ from float32", "from float64", "from numpy", "accuracy (%)"], integer)}
""")
    places = sorted({row["where"] for row in rows.values()})
    text.append(f"*{'; '.join(places)}. Command: `python benchmarks/states.py`.*\n")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    datasets.add_data_option(parser)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time")
    args = parser.parse_args()
    datasets.mnist(args.data, "test")  # before the jobs: an error says where it can be had
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with ProcessPoolExecutor(args.workers, initializer=start, initargs=(args.data,)) as pool:
        missing = [(n, s) for n, seeds in NAMES.items() for s in seeds if not TASKS[n].weights(s).exists()]
        for future in [pool.submit(train, *task) for task in missing]:
            future.result()
        done = known(FIGURES)
        todo = [(part, job) for part in args.only for job in JOBS[part][1] if last(part, job) not in done]
        futures = [pool.submit(work, *task) for task in todo]
        for future in track(as_completed(futures), "states", total=len(futures)):
            future.result()
            RESULT.write_text(report(known(FIGURES)))
    RESULT.write_text(report(known(FIGURES)))
    print(f"Written to {RESULT.relative_to(HERE.parent)} ({here('cpu')})")


def train(name: str, seed: int) -> None:
    TASKS[name].train(seed)


if __name__ == "__main__":
    main()
