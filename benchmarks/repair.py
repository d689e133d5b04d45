"""What repair gives back: accuracy straight after compression, without labels and without training.

    python benchmarks/repair.py [--data FOLDER] [--only mnist mlp nmnist cifar …] [--seeds 3] [--workers 2]
                                [--device cuda]

Networks are trained once per seed and kept in benchmarks/.cache, as is every figure, so a run that was stopped goes on.
Every job runs in one thread; the cost part runs alone. Writes benchmarks/results/repair.md; with --only the other parts
in it stay as they were. All parts take about five hours of one core, most of it evaluating.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from datasets import add_data_option
from jobs import here, known, note
from repair_studies import HOWS, PARTS, SEEDS, TITLES, Case, header
from repair_tasks import CACHE, HERE, TASKS, Task
from rich.progress import track
from snncompress_rescaw import ReScaW
from snncompress_schedules import Gradual, Iterative, OneShot
from torch import nn

import snncompress

RESULT, FIGURES = HERE / "results" / "repair.md", CACHE / "repair.jsonl"
QUANTIZERS = {
    "rescaw": ReScaW(),
    "max, channel": ReScaW("max", True),
    "max, layer": ReScaW("max", False),
    "mse, channel": ReScaW("mse", True),
    "mse, layer": ReScaW("mse", False),
    "l1_mean, layer": ReScaW("l1_mean", False),
}
SCHEDULERS = {"one_shot": OneShot(), "gradual 4": Gradual(4), "iterative 4": Iterative(4)}


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
        task.tune(small, case.lr, case.seed)
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


# -- what it costs, measured alone --


def job_cost(folder: Path) -> list[str]:
    """Seconds of one core, side by side in one process."""
    from vgg16 import vgg16

    start(folder, "cpu")
    x = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [x[i : i + 32] for i in range(0, 256, 32)]
    torch.manual_seed(0)
    model = vgg16().eval()
    lines = ["VGG-16 (13 convolutions), 256 images [3, 32, 32], T = 4, svs, ratio 0.6, 4 bits:", ""]
    lines += header("", ["seconds of one core", "forward passes over the 256 images", "peak memory (MB)"])
    began = time.process_time()
    snncompress.profile(model, data, timesteps=4)
    profile = time.process_time() - began
    with torch.no_grad():
        began = time.process_time()
        for part in data:
            snncompress.evaluate(model, (part, torch.zeros(len(part), dtype=torch.long)), timesteps=4)
        once = time.process_time() - began
    lines.append(f"| one forward pass | {once:.1f} | 1.0 | {peak():.0f} |")
    lines.append(f"| `profile` | {profile:.1f} | {profile / once:.1f} | {peak():.0f} |")
    for repair, rounding in HOWS:
        began = time.process_time()
        snncompress.apply(
            model, "svs", 0.6, 4, data=data, timesteps=4, repair=repair, rounding=rounding, progress=False
        )
        took = time.process_time() - began
        what = f"`apply`, repair={repair!r}" + (f", rounding={rounding!r}" if repair else "")
        lines.append(f"| {what} | {took:.1f} | {took / once:.1f} | {peak():.0f} |")
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part in data]
    began = time.process_time()
    snncompress.finetune(model, labelled, epochs=1, timesteps=4, progress=False)
    epoch = time.process_time() - began
    lines.append(f"| an epoch of `finetune` over the 256 images | {epoch:.1f} | {epoch / once:.1f} | {peak():.0f} |")
    return lines


def peak() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# -- running and writing --


def compute(cases: Sequence[Case], folder: Path, workers: int, device: str) -> None:
    """What isn't known yet goes to the file, as it comes."""
    todo = [case for case in dict.fromkeys(cases) if case.key() not in known(FIGURES)]
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start, (folder, device)) as pool:
        trainings = {(case.task, case.seed) for case in todo if not TASKS[case.task].weights(case.seed).exists()}
        for done in [pool.submit(job_train, *training) for training in sorted(trainings)]:
            done.result()
        futures = {pool.submit(job, case): case for case in sorted(todo, key=lambda case: case.seed)}
        for future in track(as_completed(futures), description="cases", total=len(futures)):
            note(FIGURES, futures[future].key(), future.result(), device)


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
    add_data_option(parser)
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
            rows = known(FIGURES)
            lines = list(PARTS[name].text(lambda case, rows=rows: rows[case.key()]["figures"]))
            places = sorted({rows[case.key()]["where"] for case in cases})
        lines += ["", f"({'; '.join(places)}.)"]
        write({name: "\n".join(lines)})
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
