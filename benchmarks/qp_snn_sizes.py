"""QP-SNN's sizes of VGG-16 (ICLR 2025: 1.45 and 0.39 MB): its hand-made ratios against budgets of as many MB.

    python benchmarks/qp_snn_sizes.py [--data FOLDER] [--seeds 2]

VGG-16 at an eighth of its widths on CIFAR-10, 10,000 training images, T = 2. QP-SNN's ratios (0.49 of conv1 to conv7,
0.80 of conv8 to conv12) and one bit width for all layers, 8 or 2, make a network of so many MB; ``budget={"size_mb":
…}`` finds ratios of its own for as many, with the same bits or with ``bits="auto"``. Channels go by svs; first layer
and classifier stay at 32 bits, conv13 keeps its channels, as in the paper. Accuracy straight after, with repair, and
after as many epochs for all. It shows directions, not the paper's accuracies. Networks and figures are kept in
benchmarks/.cache, so a run that was stopped goes on. One thread, about half an hour. Writes
benchmarks/results/qp_snn_sizes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import add_data_option
from jobs import known, note
from qp_snn import BUDGETS, CALIBRATION, HERE, Ranks, T, Training, accuracy, images, train
from spikingjelly.activation_based import functional
from torch import nn

import snncompress

sys.path.append(str(HERE.parent))
from examples.networks.vgg16 import vgg16

CACHE, RESULT = HERE / ".cache" / "qp_snn_sizes", HERE / "results" / "qp_snn_sizes.md"
DATA = replace(BUDGETS["small"], images=10_000, test=5_000)
DENSE, TUNE = Training(12, 0.1), Training(5, 0.02)
WIDTH = 1 / 8
RATIOS = {f"conv{n}": 0.49 for n in range(1, 8)} | {f"conv{n}": 0.80 for n in range(8, 13)}
PAPER = {8: 1.45, 2: 0.39}
"""Bits → MB at full width."""
HOWS = ("hand-made ratios", "budget", "budget, bits='auto'")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = vgg16(width=WIDTH)
    functional.set_step_mode(net, "m")
    return net


def dense(folder: Path, seed: int) -> nn.Module:
    """Trained once, and kept."""
    net, kept = network(seed), CACHE / f"dense-{seed}.pt"
    if not kept.exists():
        train(net, *images(folder, DATA, "train", torch.device("cpu")), DENSE, False, seed, Ranks("cpu"))
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net.eval()


def compressed(net: nn.Module, bits: int, how: str, folder: Path, seed: int) -> nn.Module:
    """By the hand-made ratios, or to as many MB as those make of it."""
    x, y = images(folder, DATA, "train", torch.device("cpu"))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    data = list(zip(x[chosen].split(64), y[chosen].split(64), strict=True))
    options: dict[str, Any] = {"data": data, "timesteps": T, "seed": seed, "progress": False}
    if how == HOWS[0]:
        return snncompress.apply(net, "svs", RATIOS, bits, **options)
    target = megabytes(snncompress.apply(net, "magnitude", RATIOS, bits, **options | {"repair": None}))
    width = "auto" if how == HOWS[2] else bits
    return snncompress.apply(net, "svs", bits=width, budget={"size_mb": target}, **options)


def megabytes(net: nn.Module) -> float:
    return snncompress.profile(net, torch.zeros(1, 3, 32, 32), timesteps=1).size_mb


def job(bits: int, how: str, folder: Path, seed: int) -> dict[str, Any]:
    """Accuracy in % straight after and after training, MB, seconds of compressing, widths and bits of all conv."""
    cpu = torch.device("cpu")
    net = dense(folder, seed)
    began = time.process_time()
    small = compressed(net, bits, how, folder, seed)
    found: dict[str, Any] = {"seconds": time.process_time() - began, "megabytes": megabytes(small)}
    chosen = {e.layer: e.bits for e in snncompress.plan_of(small).edits if isinstance(e, snncompress.QuantizeWeights)}
    found["widths"] = [small.get_submodule(f"conv{n}").out_channels for n in range(1, 14)]
    found["bits"] = [chosen.get(f"conv{n}", 32) for n in range(1, 14)]
    found["straight"] = accuracy(small, folder, DATA, cpu)
    train(small, *images(folder, DATA, "train", cpu), TUNE, False, seed, Ranks("cpu"))
    return found | {"trained": accuracy(small, folder, DATA, cpu)}


def cases(seeds: range) -> Iterator[tuple[str, ...]]:
    for seed in seeds:
        yield "dense", "", str(seed)
        for bits in PAPER:
            for how in HOWS:
                yield str(bits), how, str(seed)


def report(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table, of what is known."""
    found = {tuple(json.loads(key)): row["figures"] for key, row in rows.items()}
    seeds = sorted({int(key[2]) for key in found})
    yield "# QP-SNN's VGG-16 sizes: hand-made ratios against budgets"
    yield ""
    yield (
        f"VGG-16 at an eighth of its widths, {DATA.images:,} images of CIFAR-10, T = {T}; {DENSE.epochs} epochs dense, "
        f"{TUNE.epochs} after compression (SGD, learning rates {DENSE.lr:g} and {TUNE.lr:g}, cosine). QP-SNN's ratios: "
        f"0.49 of conv1 to conv7, 0.80 of conv8 to conv12. Channels by svs, {CALIBRATION} images calibrate, repaired. "
        f"Accuracy in % on {DATA.test:,} test images, mean (each seed). It shows directions, not the paper's "
        f"accuracies. Written by benchmarks/qp_snn_sizes.py."
    )
    yield ""
    yield f"Dense: {told([found['dense', '', str(s)]['accuracy'] for s in seeds if ('dense', '', str(s)) in found])}."
    yield ""
    yield "| paper's MB | bits | how | MB here | straight after | trained | seconds of `apply` |"
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: |"
    for bits, size in PAPER.items():
        for how in HOWS:
            some = [found[key] for s in seeds if (key := (str(bits), how, str(s))) in found]
            if some:
                numbers = [f"{mean(f['megabytes'] for f in some):.4f}"]
                numbers += [told([f[column] for f in some]) for column in ("straight", "trained")]
                numbers += [f"{mean(f['seconds'] for f in some):.0f}"]
                kept = "2 to 8" if how == HOWS[2] else bits
                yield f"| {size} | {kept} | {how} | {' | '.join(numbers)} |"
    yield ""
    yield f"Widths and bits of conv1 to conv13, seed {seeds[0]}:"
    yield ""
    yield "| paper's MB | how | widths | bits |"
    yield "| ---: | --- | --- | --- |"
    for bits, size in PAPER.items():
        for how in HOWS:
            if figures := found.get((str(bits), how, str(seeds[0]))):
                widths, chosen = (", ".join(map(str, figures[what])) for what in ("widths", "bits"))
                yield f"| {size} | {how} | {widths} | {chosen} |"
    yield ""
    yield f"({'; '.join(sorted({row['where'] for row in rows.values()}))}.)"


def told(several: list[float]) -> str:
    """Mean, and each where there are several."""
    if not several:
        return "—"
    each = f" ({', '.join(f'{value:.1f}' for value in several)})" if len(several) > 1 else ""
    return f"{mean(several):.1f}{each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(parents=True, exist_ok=True)
    store = CACHE / "figures.jsonl"
    for case in cases(range(options.seeds)):
        if (key := json.dumps(case)) not in known(store):
            bits, how, seed = case
            if bits == "dense":
                found = {"accuracy": accuracy(dense(options.data, int(seed)), options.data, DATA, torch.device("cpu"))}
            else:
                found = job(int(bits), how, options.data, int(seed))
            note(store, key, found, "cpu")
            print(key, found, flush=True)
        RESULT.write_text("\n".join(report(known(store))) + "\n")


if __name__ == "__main__":
    main()
