"""Conversion study: how much of a CNN's accuracy is left in the spiking network that it becomes.

    python benchmarks/conversion.py [--data FOLDER]

MNIST: trained on all 60,000 images, converted with thresholds calibrated on 500 of them, tested on all 10,000, in both
frameworks, for several numbers of timesteps; energies against the CNN's. Two threads, four minutes or so. Writes
benchmarks/results/conversion.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from pathlib import Path

import torch
from datasets import add_data_option
from mnist import read
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress

HERE = Path(__file__).resolve().parent
EPOCHS, CALIBRATION = 3, 500
TIMESTEPS = (8, 16, 32, 64)


def cnn() -> nn.Sequential:
    """Two convolutions with batch norm, average and max pooling, two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    options = parser.parse_args()
    (x, y), (xt, yt) = (read(options.data, split) for split in ("train", "test"))
    test = DataLoader(TensorDataset(xt, yt), batch_size=250)
    net = cnn()
    torch.manual_seed(0)
    snncompress.finetune(net, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True), epochs=EPOCHS)
    before = snncompress.evaluate(net, test)
    rows = []
    for framework in ("spikingjelly", "snntorch"):
        for steps in TIMESTEPS:
            snn = snncompress.convert(net, framework, neuron="if", data=x[:CALIBRATION], timesteps=steps)
            after = snncompress.evaluate(snn, test, timesteps=steps)
            both = snncompress.compare({"cnn": net, "snn": snn}, xt[:1000], timesteps=steps)
            change = 100 * (after.accuracy - before.accuracy)
            rows.append(
                f"| {framework} | {steps} | {100 * after.accuracy:.2f} | {change:+.2f} "
                f"| {after.f1:.4f} | × {both.ratios['snn']['energy_pj']:.2f} |"
            )
            print(rows[-1], flush=True)
    text = [
        f"A CNN of two convolutions and two linear layers, trained on MNIST for {EPOCHS} epochs (test accuracy "
        f"{100 * before.accuracy:.2f} %, F1 {before.f1:.4f}), converted with integrate-and-fire neurons and thresholds "
        f"calibrated on {CALIBRATION} training images; no training after that. Whole test set; energy against the CNN "
        f"on 1,000 images. {torch.get_num_threads()} threads ({platform.machine()}), torch {torch.__version__}, seed "
        f"0, {datetime.date.today()}.",
        "",
        "| framework | T | accuracy (%) | change | F1 | energy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    (HERE / "results" / "conversion.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
