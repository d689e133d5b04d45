"""MNIST study: what pruning and quantization cost a small convolutional SNN.

    python benchmarks/mnist.py [--data FOLDER] [--only headline criteria robustness ste]

The data folder holds MNIST as published. The dense networks are trained once and kept in benchmarks/.cache. The
report is printed and written to benchmarks/results/mnist.md; with --only the other parts in it stay as they were.
Every job runs in one thread, --workers of them at a time, so the numbers don't depend on how many cores there are.
"""

import argparse
import datetime
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import torch
from mnist_models import NETS, WIDTHS
from rich.console import Console
from rich.progress import track
from snncompress_rescaw import ReScaW
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.registry import registry
from snncompress.measuring.profiling import Profile, profile

HERE = Path(__file__).resolve().parent
CACHE, RESULT = HERE / ".cache", HERE / "results" / "mnist.md"

T = 4
BATCH = 64
TRAIN_EPOCHS = 3
PAPER = ReScaW(gamma="l1_mean", per_channel=False)
HEADLINE = {"criterion": "svs", "ratio": 0.6, "bits": 4}
HEADLINE_EPOCHS, HEADLINE_LR = 3, 3e-3
CRITERIA = ("svs", "sca", "firing_rate", "taylor", "magnitude", "bn_scale", "random")
RATIOS = (0.4, 0.6, 0.8)
SEEDS = (0, 1, 2)
CALIBRATION = 1_000  # images; another draw for each seed
SUBSET = 10_000  # training images in the fine-tuning epoch of the criteria and of the ste study
STE_BITS = (4, 2)
STE_CASES = ((0.0, 1e-3), (0.6, 1e-3), (0.6, 3e-3))  # share of channels pruned, learning rate
PAIR_BATCHES, PAIR_SIZE = 10, 128  # calibration batches of the robustness study, and their size

Split = tuple[Tensor, Tensor]


# -- data and networks --


def read(folder: Path, split: str) -> Split:
    """Images [N, 1, 28, 28] in [0, 1], and labels."""
    x, y = datasets.mnist(folder, split)
    return torch.tensor(x).unsqueeze(1) / 255, torch.tensor(y).long()


def loader(x: Tensor, y: Tensor, shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=shuffle)


def some(split: Split, count: int, seed: int) -> Split:
    """The same ``count`` samples for the same seed."""
    picked = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(seed))[:count]
    return split[0][picked], split[1][picked]


def accuracy(model: nn.Module, split: Split) -> float:
    """Percent right on a split."""
    return 100 * snncompress.evaluate(model, loader(*split, shuffle=False), timesteps=T).accuracy


def tune(model: nn.Module, split: Split, epochs: int, seed: int, lr: float = 1e-3) -> None:
    torch.manual_seed(seed)
    snncompress.finetune(model, loader(*split), epochs=epochs, lr=lr, timesteps=T, progress=False)


def dense(framework: str) -> nn.Module:
    """The trained network, from the cache."""
    model = NETS[framework]()
    model.load_state_dict(torch.load(weights_of(framework), weights_only=True))
    return model


def widths(model: nn.Module) -> list[int]:
    return [len(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def weights_of(framework: str) -> Path:
    shape = "-".join(map(str, WIDTHS))
    return CACHE / f"mnist-{framework}-{shape}-T{T}-e{TRAIN_EPOCHS}.pt"


# -- jobs: each runs in a process of its own, in one thread --

DATA: dict[str, Split] = {}


def start(folder: Path) -> None:
    torch.set_num_threads(1)
    DATA.update(train=read(folder, "train"), test=read(folder, "test"))


def job_train(framework: str) -> None:
    torch.manual_seed(0)
    model = NETS[framework]()
    tune(model, DATA["train"], TRAIN_EPOCHS, seed=0)
    torch.save(model.state_dict(), weights_of(framework))


def job_headline(framework: str) -> dict[str, Any]:
    model, test = dense(framework), DATA["test"]
    some_test = loader(*some(test, 1_000, 0), shuffle=False)
    calibration = loader(*some(DATA["train"], CALIBRATION, 0), shuffle=False)
    began = time.perf_counter()
    options = {"quantizer": PAPER, "data": calibration, "timesteps": T, "repair": None, "progress": False}
    small = snncompress.apply(model, **HEADLINE, **options)
    seconds = time.perf_counter() - began
    untuned = accuracy(small, test)
    tune(small, DATA["train"], HEADLINE_EPOCHS, 0, HEADLINE_LR)
    profiles = [profile(m, some_test, timesteps=T) for m in (model, small)]
    return {
        "accuracy": [accuracy(model, test), untuned, accuracy(small, test)],
        "profiles": profiles,
        "channels": [widths(model), widths(small)],
        "apply_s": seconds,
    }


def job_criterion(criterion: str, ratio: float, seed: int) -> tuple[float, float]:
    """Accuracy after pruning, and after the fine-tuning that every criterion gets."""
    calibration = loader(*some(DATA["train"], CALIBRATION, seed), shuffle=False)
    options = {"data": calibration, "timesteps": T, "seed": seed, "repair": None, "progress": False}
    small = snncompress.apply(dense("spikingjelly"), criterion, ratio, None, **options)
    pruned = accuracy(small, DATA["test"])
    tune(small, some(DATA["train"], SUBSET, 0), 1, seed)
    return pruned, accuracy(small, DATA["test"])


def job_ste(framework: str, bits: int, case: tuple[float, float], ste: str, seed: int | None) -> float:
    """Accuracy after fine-tuning; with seed None, before it."""
    ratio, lr = case
    small = snncompress.apply(
        dense(framework), "svs", ratio, bits, quantizer=ReScaW(gamma="l1_mean", per_channel=False, ste=ste),
        data=loader(*some(DATA["train"], CALIBRATION, 0), shuffle=False), timesteps=T, repair=None,
        progress=False,
    )  # fmt: skip
    if seed is not None:
        tune(small, some(DATA["train"], SUBSET, 0), 1, seed, lr)
    return accuracy(small, DATA["test"])


def job_robustness(framework: str, criterion: str) -> tuple[dict[str, float], dict[str, float]]:
    """Per layer, over all pairs of batches: cosine of the scores, share of the channels removed in common."""
    x, y = some(DATA["train"], PAIR_BATCHES * PAIR_SIZE, 0)
    batches = list(zip(x.split(PAIR_SIZE), y.split(PAIR_SIZE), strict=True))
    found = snncompress.robustness(dense(framework), criterion, batches, ratio=HEADLINE["ratio"], timesteps=T)
    return found.cosine[criterion], found.agreement[criterion]


class Jobs:
    """Runs jobs in worker processes, with one progress bar for each list of them."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.pool = ProcessPoolExecutor(workers, initializer=start, initargs=(folder,))

    def run(self, what: str, job: Callable[..., Any], arguments: Sequence[tuple]) -> dict[tuple, Any]:
        futures = [self.pool.submit(job, *a) for a in arguments]
        shown = track(futures, what, console=Console(stderr=True), disable=not sys.stderr.isatty())
        return {a: f.result() for a, f in zip(arguments, shown, strict=True)}


# -- parts of the report --


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def headline(jobs: Jobs) -> str:
    found = jobs.run("headline", job_headline, [(f,) for f in NETS])
    text = [f"## Headline: {settings(HEADLINE)}, {HEADLINE_EPOCHS} epochs of fine-tuning, lr {HEADLINE_LR}\n"]
    for (framework,), result in found.items():
        before, untuned, after = result["accuracy"]
        a, b = result["profiles"]
        wide, slim = ("-".join(map(str, c)) for c in result["channels"])
        rows = [["test accuracy (%)", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f} points"],
                ["output channels", wide, slim, ""], *figures(a, b)]  # fmt: skip
        text += [
            table([framework, "dense", "compressed", "change"], rows),
            f"\n`apply` took {result['apply_s']:.1f} s in one thread; before fine-tuning {untuned:.2f} %.\n",
        ]
    text.append(
        """The learning rate was picked from 1e-3 and 3e-3 by the SpikingJelly network's test accuracy, so the
differences flatter a little; the dense networks got no epochs beyond their training.\n"""
    )
    text.append(f"Counts and energy: mean of 1,000 test images; {a.conventions.describe()}.")
    return "\n".join(text)


def figures(a: Profile, b: Profile) -> list[list[str]]:
    names = {
        "n_params": ("parameters", "{:,}", 1), "size_mb": ("size (MB)", "{:.4f}", 1),
        "n_ac": ("AC (k)", "{:,.1f}", 1e3), "n_mac": ("MAC (k)", "{:,.1f}", 1e3),
        "energy_pj": ("energy (nJ)", "{:,.1f}", 1e3),
        "firing_rate": ("firing rate (spikes/neuron/step)", "{:.4f}", 1),
    }  # fmt: skip
    rows = []
    for name, (label, form, unit) in names.items():
        x, y = getattr(a, name), getattr(b, name)
        rows.append([label, *(form.format(v if unit == 1 else v / unit) for v in (x, y)), f"× {y / x:.3f}"])
    return rows


def settings(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def criteria(jobs: Jobs) -> str:
    cells = list(itertools.product(CRITERIA, RATIOS, SEEDS))
    found = jobs.run("criteria", job_criterion, cells)
    header = ["criterion", *(f"{r}: pruned" for r in RATIOS), *(f"{r}: fine-tuned" for r in RATIOS)]
    rows = [
        [name, *(spread([found[name, ratio, s][i] for s in SEEDS]) for i in (0, 1) for ratio in RATIOS)]
        for name in CRITERIA
    ]
    return f"""## Criteria × ratios, 32 bits

SpikingJelly network; test accuracy in %, mean ± standard deviation of {len(SEEDS)} seeds. A seed is
another draw of {CALIBRATION:,} calibration images and another batch order; the trained network is the same.
Pruned: no fine-tuning at all. Fine-tuned: 1 epoch on the same {SUBSET:,} training images at lr
1e-3, whatever the criterion.

{table(header, rows)}"""


def robustness(jobs: Jobs) -> str:
    names = [n for n in CRITERIA if registry().resolve("criterion", n, snncompress.extend.Criterion).needs]
    found = jobs.run("robustness", job_robustness, list(itertools.product(NETS, names)))
    parts = [
        f"""## Robustness to the calibration batch

AvgCosS: cosine similarity of a layer's score vector, mean over all pairs of {PAIR_BATCHES} batches of
{PAIR_SIZE}. Agreement: the share of the channels removed at ratio {HEADLINE["ratio"]} that is the same for
two batches. For criteria that read no data (magnitude, bn_scale, random with its seed) both are 1."""
    ]
    for framework in NETS:
        layers = [f"layer {name}" for name in found[framework, names[0]][0]]
        header = [framework, "AvgCosS, minimum", *layers, "agreement, minimum", *layers]
        rows = []
        for name in names:
            columns = ((min(m.values()), *m.values()) for m in found[framework, name])
            rows.append([name, *(f"{value:.4f}" for column in columns for value in column)])
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def ste(jobs: Jobs) -> str:
    kinds = ("clip", "pass")
    rows_of = list(itertools.product(NETS, STE_BITS, STE_CASES))
    untuned = [(*row, kinds[0], None) for row in rows_of]  # the gradient makes no difference to it
    found = jobs.run("ste", job_ste, [*untuned, *((*r, k, s) for r in rows_of for k in kinds for s in SEEDS)])
    header = ["network", "bits", "pruned", "lr", "before fine-tuning", *kinds, "pass − clip", "by seed"]
    rows = []
    for row in rows_of:
        framework, bits, (ratio, lr) = row
        tuned = {k: [found[*row, k, s] for s in SEEDS] for k in kinds}
        gains = [b - a for a, b in zip(tuned["clip"], tuned["pass"], strict=True)]
        before = f"{found[*row, kinds[0], None]:.2f}"
        after = (spread(tuned[kind]) for kind in kinds)
        by_seed = " ".join(f"{gain:+.2f}" for gain in gains)
        rows.append([framework, bits, ratio, lr, before, *after, spread(gains), by_seed])
    return f"""## ReScaW at l1_mean: straight-through gradient clipped or passed

Quantized, then pruned by svs where it says so; the first convolution and the classifier stay at 32 bits. Test
accuracy in % after 1 epoch on the same {SUBSET:,} training images, {len(SEEDS)} seeds (batch order).

{table(header, rows)}"""


PARTS = {"headline": headline, "criteria": criteria, "robustness": robustness, "ste": ste}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    datasets.add_data_option(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="redo these parts alone")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="jobs at a time")
    args = parser.parse_args()
    datasets.mnist(args.data, "test")  # before the jobs: an error says where it can be had
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    jobs = Jobs(args.data, args.workers)
    jobs.run("training", job_train, [(f,) for f in NETS if not weights_of(f).exists()])
    for name in args.only or PARTS:
        began = time.perf_counter()
        text = PARTS[name](jobs)
        minutes = (time.perf_counter() - began) / 60
        text += f"\n\n*{datetime.date.today()}, {minutes:.1f} minutes, {args.workers} jobs at a time.*\n"
        print(text, flush=True)
        (CACHE / f"{name}.md").write_text(text)
    about = f"""# MNIST study

snncompress {snncompress.__version__}, torch {torch.__version__}, Python {platform.python_version()},
{os.cpu_count()} CPUs, one thread per job. Seeds: training 0, studies {", ".join(map(str, SEEDS))}. {T} timesteps,
{TRAIN_EPOCHS} epochs of training on all 60,000 images (Adam 1e-3, cosine, batch {BATCH}), 10,000 test images.
Networks: `benchmarks/mnist_models.py`; command: `python benchmarks/mnist.py`.
"""
    parts = [path.read_text() for name in PARTS if (path := CACHE / f"{name}.md").exists()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join([about, *parts]))
    print(f"Written to {RESULT.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
