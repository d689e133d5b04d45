"""N-MNIST study: single weights of a convolutional SpikingJelly network on the events of a camera.

    python benchmarks/nmnist.py [--data FOLDER] [--folds 3]

The first 100 recordings of each digit in the training set and the first 10 in the test set. A test set of 100 would
move by a point with every sample, so the 1,100 are split into folds: each is tested once, by a network trained on the
others. Every criterion gets the same fine-tuning. Writes benchmarks/results/nmnist.md; everything runs in one thread.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path
from statistics import mean, stdev

import datasets
import torch
from rich.progress import track
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snncompress

HERE = Path(__file__).resolve().parent
T = 10
BATCH = 50
TRAIN_EPOCHS, TRAIN_LR = 12, 3e-3
STEPS, STEP_EPOCHS, TUNE_LR = 3, 1, 2e-3
CRITERIA = ("cqp", "weight_magnitude", "weight_gradient", "weight_random")
SPARSITIES = (0.8, 0.9, 0.95)


def network() -> nn.Module:
    """Conv(2, 16) - Conv(16, 32) - Linear(128) - Linear(10), batch norm, LIF neurons, max pooling; multi-step."""

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    net = nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), lif(), layer.MaxPool2d(2),
        layer.Conv2d(16, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), lif(), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(32 * 8 * 8, 128), lif(), layer.Linear(128, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Event counts [T, 1100, 2, 34, 34], and labels."""
    parts = [datasets.nmnist(folder, split, T, count) for split, count in (("train", 100), ("test", 10))]
    x = torch.cat([torch.tensor(events) for events, _ in parts]).transpose(0, 1)
    return x, torch.cat([torch.tensor(labels).long() for _, labels in parts])


class Batches:
    """Shuffled batches ([T, N, ...], [N]) of some samples."""

    def __init__(self, x: Tensor, y: Tensor, samples: Tensor, shuffle: bool = True) -> None:
        self.x, self.y, self.samples, self.shuffle = x, y, samples, shuffle

    def __len__(self) -> int:
        return -(-len(self.samples) // BATCH)

    def __iter__(self):
        order = self.samples[torch.randperm(len(self.samples))] if self.shuffle else self.samples
        for part in order.split(BATCH):
            yield self.x[:, part], self.y[part]


def study(x: Tensor, y: Tensor, folds: int) -> dict[tuple[str, float, str], list[float]]:
    """(criterion, sparsity, "pruned" or "fine-tuned") → accuracy in % of each fold; sparsity 0 is the dense network."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    found: dict[tuple[str, float, str], list[float]] = {}
    energy: list[float] = []
    for fold, held in enumerate(track(order.chunk(folds), description="folds")):
        rest = order[~torch.isin(order, held)]
        train, test = Batches(x, y, rest), Batches(x, y, held, shuffle=False)
        torch.manual_seed(fold)
        dense = network()
        snncompress.finetune(dense, train, epochs=TRAIN_EPOCHS, lr=TRAIN_LR, progress=False)

        def note(criterion: str, sparsity: float, how: str, model: nn.Module, test: Batches = test) -> None:
            share = 100 * snncompress.evaluate(model, test).accuracy
            found.setdefault((criterion, sparsity, how), []).append(share)

        def tune(model: nn.Module, train: Batches = train) -> None:
            snncompress.finetune(model, train, epochs=STEP_EPOCHS, lr=TUNE_LR, progress=False)

        note("dense", 0.0, "pruned", dense)
        same_tuning = snncompress.apply(dense, None, bits=None, data=train)
        for _ in range(STEPS):
            tune(same_tuning)
        note("dense", 0.0, "fine-tuned", same_tuning)
        before = snncompress.profile(dense, test).energy_pj
        for criterion in CRITERIA:
            for sparsity in SPARSITIES:
                options = {"bits": None, "data": train, "seed": fold, "repair": None, "progress": False}
                note(criterion, sparsity, "pruned", snncompress.apply(dense, criterion, sparsity, **options))
                tuned = snncompress.apply(dense, criterion, sparsity, scheduler="iterative", finetune=tune, **options)
                note(criterion, sparsity, "fine-tuned", tuned)
                if (criterion, sparsity) == ("cqp", 0.9):
                    energy.append(snncompress.profile(tuned, test).energy_pj / before)
    print(f"energy at 90 % (cqp, fine-tuned) / dense: {mean(energy):.3f} ± {stdev(energy):.3f}")
    found["energy", 0.9, "fine-tuned"] = energy
    return found


def table(found: dict[tuple[str, float, str], list[float]]) -> list[str]:
    def cell(values: list[float]) -> str:
        return f"{mean(values):.1f} ± {stdev(values):.1f}"

    lines = [
        "| criterion | " + " | ".join(f"{s:.0%}: {how}" for how in ("pruned", "fine-tuned") for s in SPARSITIES) + " |",
        "| --- |" + " ---: |" * 2 * len(SPARSITIES),
    ]
    for criterion in CRITERIA:
        cells = [cell(found[criterion, s, how]) for how in ("pruned", "fine-tuned") for s in SPARSITIES]
        lines.append(f"| {criterion} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    datasets.add_data_option(parser)
    parser.add_argument("--folds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = study(*read(options.data), options.folds)
    dense, again = found["dense", 0.0, "pruned"], found["dense", 0.0, "fine-tuned"]
    energy = found["energy", 0.9, "fine-tuned"]
    text = [
        f"N-MNIST, 1,100 recordings in {options.folds} folds, T = {T}; test accuracy in %, mean ± standard deviation "
        f"over folds. Dense: {mean(dense):.1f} ± {stdev(dense):.1f}, with the fine-tuning that the pruned ones got "
        f"({STEPS} steps of {STEP_EPOCHS} epoch at {TUNE_LR}) {mean(again):.1f} ± {stdev(again):.1f}. Energy of cqp at "
        f"90 %, fine-tuned: × {mean(energy):.3f}. One thread ({platform.machine()}), torch {torch.__version__}, "
        f"{(time.perf_counter() - began) / 60:.0f} minutes, {datetime.date.today()}.",
        "",
        *table(found),
    ]
    (HERE / "results" / "nmnist.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
