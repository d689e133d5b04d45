"""prune_regrow against gradual at equal budgets, on MNIST: the same steps, each with the same epoch of fine-tuning.

    python benchmarks/prune_regrow.py [--data FOLDER] [--seeds 0 1 2]

The network is that of mnist_models.py, SpikingJelly's. The data folder holds MNIST as published. So that it takes some
ten minutes of one core, it is trained on a part of MNIST and tested on another. Jobs run one after the other, in one
thread; what they found is kept in benchmarks/.cache as it comes, so a run that was stopped goes on. The report is in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import add_data_option
from jobs import known, note
from mnist import CACHE, Split, T, accuracy, loader, read, some, tune
from mnist_models import spikingjelly_net
from rich.progress import track
from snncompress_baselines import BNScaleGradient
from snncompress_schedules import Gradual, PruneRegrow
from torch import nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.extend import Layer
from snncompress.model.network import by_layer
from snncompress.pruning.recording import record
from snncompress.running.data import Feed
from snncompress.structure.tracing import trace

RESULT, STORE = Path(__file__).resolve().parent / "results" / "prune_regrow.md", CACHE / "prune_regrow.jsonl"
TRAIN, EPOCHS = 6_000, 3  # images and epochs of the dense network
TUNE, LR = 1_000, 2e-3  # images in an epoch of fine-tuning, and its learning rate
CALIBRATION = 512  # of these
TEST = 2_000
STEPS = 4
SCHEDULES = {"gradual": Gradual(STEPS), "prune_regrow": PruneRegrow(STEPS)}
CASES = [
    *((criterion, ratio, "membrane") for criterion, ratios in
      (("sca", (0.6, 0.8)), ("weight_magnitude", (0.95, 0.98))) for ratio in ratios),
    ("sca", 0.8, None),
]  # fmt: skip
"""Criterion, ratio, repair."""
Job = tuple[int, str, float, str | None, str]


def dense(seed: int, train: Split) -> nn.Module:
    """The trained network, from the cache if it is there."""
    torch.manual_seed(seed)
    model, path = spikingjelly_net(), CACHE / f"prune_regrow-s{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        tune(model, some(train, TRAIN, seed), EPOCHS, seed)
        torch.save(model.state_dict(), path)
    return model


def run(job: Job, train: Split, test: Split) -> dict[str, float]:
    seed, criterion, ratio, repair, schedule = job
    model = dense(seed, train)
    part = some(train, TUNE, seed)
    began = time.process_time()
    small = snncompress.apply(
        model, criterion, ratio, None, data=loader(*some(part, CALIBRATION, seed), shuffle=False), timesteps=T,
        scheduler=SCHEDULES[schedule], finetune=partial(tune, split=part, epochs=1, seed=seed, lr=LR),
        skip=[], seed=seed, repair=repair, progress=False,
    )  # fmt: skip
    seconds = time.process_time() - began
    found = {"accuracy": accuracy(small, some(test, TEST, 0)), "seconds": seconds}
    if (criterion, ratio, repair, schedule) == (*CASES[0], "gradual"):
        found["dense"] = accuracy(model, some(test, TEST, 0))
        for _ in range(STEPS):
            tune(model, part, 1, seed, LR)
        found["dense, fine-tuned"] = accuracy(model, some(test, TEST, 0))
    return found


def jobs(seeds: Sequence[int]) -> Iterator[Job]:
    """All seeds of a case, then the next case, should time run out."""
    for case in CASES:
        for seed in seeds:
            yield from ((seed, *case, schedule) for schedule in SCHEDULES)


class StandIn(BNScaleGradient):
    """What ``bn_scale_gradient`` says where there is no batch norm."""

    def end_batch(self, layer: Layer, state: Any) -> Any:
        return super().end_batch(replace(layer, norm=None), state)


def agreement(seed: int, train: Split) -> dict[str, float]:
    """{layer: rank correlation of its channels by |∂L/∂γ| and by what stands in for it}, of the dense network."""
    model = dense(seed, train).eval()
    feed = Feed(find_adapter(model), loader(*some(train, 256, seed), shuffle=False), T)
    network = trace(model, feed.adapter, feed.example())
    layers = by_layer(network.groups, network.norms)
    both = [record(model, network, feed, by, layers, seed) for by in (BNScaleGradient(), StandIn())]
    ranks = {name: torch.stack([scores[name].argsort().argsort().double() for scores in both]) for name in layers}
    return {name: float(torch.corrcoef(pair)[0, 1]) for name, pair in ranks.items()}


def spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def report(rows: dict[str, dict[str, Any]], seeds: Sequence[int]) -> None:
    found = {key: row["figures"] for key, row in rows.items()}

    def of(key: str, *case: Any) -> list[float]:
        results = (found.get(json.dumps((seed, *case)), {}) for seed in seeds)
        return [result[key] for result in results if key in result]

    options = SCHEDULES["prune_regrow"].options()
    first = (*CASES[0], "gradual")
    lines = [
        "# prune_regrow against gradual",
        "",
        f"Test accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; the difference is "
        f"taken seed by seed. Written by benchmarks/prune_regrow.py.",
        "",
        f"MNIST, Conv(1, 16) - Conv(16, 32) - Linear(128) - Linear(10), batch norm, LIF, spikingjelly, T = {T}, "
        f"trained for {EPOCHS} epochs on {TRAIN:,} images, float weights. Both schedules take {STEPS} steps, each "
        f"followed by one epoch of fine-tuning on the same {TUNE:,} images (Adam, {LR:g}), {CALIBRATION} of which are "
        f"for calibration; {TEST:,} test images. Channels go from all layers but the classifier (skip=[]), single "
        f"weights from all, compared across layers. "
        f"prune_regrow({', '.join(f'{k}={v!r}' for k, v in options.items())}). "
        f"A part of MNIST and few epochs: it shows directions, not what the networks can reach.",
        "",
        f"Dense: {spread(of('dense', *first))}; with as much fine-tuning: {spread(of('dense, fine-tuned', *first))}.",
        "",
        "| what goes | repair | gradual | prune_regrow | difference | seconds of CPU, gradual | prune_regrow |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in CASES:
        criterion, ratio, repair = case
        plain, regrown = (of("accuracy", *case, name) for name in SCHEDULES)
        what = f"{ratio:.0%} of the {'channels' if criterion == 'sca' else 'weights'}, `{criterion}`"
        differences = [b - a for a, b in zip(plain, regrown, strict=False)]
        seconds = [f"{mean(times):.0f}" if (times := of("seconds", *case, name)) else "–" for name in SCHEDULES]
        row = [what, repair or "none", spread(plain), spread(regrown), spread(differences, "+"), *seconds]
        lines.append(f"| {' | '.join(row)} |")
    stands_in = [found[key] for seed in seeds if (key := json.dumps(("agreement", seed))) in found]
    if stands_in:
        names = {"0": "first", "4": "second"}
        correlations = (f"{spread([r[k] for r in stands_in])} in the {names[k]} convolution" for k in stands_in[0])
        lines += [
            "",
            f"Where no batch norm stands behind a layer, the gradient of a scale of 1 on what its weights make "
            f"stands in for that of γ. Where one does, the ranks of the dense networks' channels by the two correlate "
            f"by {', '.join(correlations)}.",
        ]
    lines += [
        "",
        f"({'; '.join(sorted({row['where'] for row in rows.values()}))}.)",
        "",
    ]
    RESULT.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    train, test = read(options.data, "train"), read(options.data, "test")
    todo = [job for job in jobs(options.seeds) if json.dumps(job) not in known(STORE)]
    for job in track(todo, "jobs"):
        note(STORE, json.dumps(job), run(job, train, test), "cpu")
        report(known(STORE), options.seeds)
    for seed in options.seeds:
        note(STORE, json.dumps(("agreement", seed)), agreement(seed, train), "cpu")
    report(known(STORE), options.seeds)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
