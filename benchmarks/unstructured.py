"""What pruning single weights costs in time, as ratios measured side by side in one process.

    python benchmarks/unstructured.py [--repeats 15] [--threads 1]

Three networks: CQP's MLP for MNIST (784-256-128-10, snnTorch, T = 10, batch 512), layer by layer; the same stepped
through time, which meets every weight ten times; QP-SNN's VGG-16 for CIFAR shapes (SpikingJelly, multi-step, T = 4,
batch 32). The things compared run in turn, A B A B …, and the median of ratios counts.
Writes benchmarks/results/unstructured.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

import snntorch
import torch
from mlp import TIMESTEPS, mlp
from performance import T, images, ratio, seconds, settled
from torch import Tensor, nn
from vgg16 import vgg16

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.contract.registry import registry
from snncompress.pruning.recording import record
from snncompress.running.data import Feed
from snncompress.running.scores import cross_entropy
from snncompress.structure.tracing import trace

ROOT = Path(__file__).resolve().parent.parent
SPARSITY = 0.9
WEIGHTS = 10_000_000


class Bench:
    """A network, two labelled batches, and what is done with them."""

    def __init__(self, name: str, model: nn.Module, x: Tensor, timesteps: int | None) -> None:
        self.name, self.model, self.timesteps = name, model, timesteps
        self.data = [(part, torch.randint(0, 10, (len(part),))) for part in x.chunk(2)]
        self.adapter = find_adapter(model)
        self.feed = Feed(self.adapter, self.data, timesteps)
        self.network = trace(model, self.adapter, self.feed.example())
        names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.layers = dict.fromkeys(names, ())
        self.dense, self.masked = copy.deepcopy(model), self.pruned()

    def pruned(self) -> nn.Module:
        return snncompress.apply(
            self.model, "weight_magnitude", SPARSITY, None, data=self.data, timesteps=self.timesteps, repair=None
        )

    def score(self) -> None:
        record(self.model, self.network, self.feed, registry().find("criterion", "cqp")(), self.layers, seed=0)

    def passes(self) -> None:
        """The forward and backward passes that gradients cost, in eval mode."""
        self.model.eval()
        for batch in self.feed:
            self.model.zero_grad()
            cross_entropy(self.feed(self.model, batch), batch.y).backward()

    def train_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        batch = self.feed.first()
        optimizer.zero_grad()
        cross_entropy(self.feed(model, batch), batch.y).backward()
        optimizer.step()

    def own_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The same in a user's own loop over timesteps, which computes each weight at every step."""
        batch = self.feed.first()
        self.adapter.reset(model)
        optimizer.zero_grad()
        cross_entropy(torch.stack([model(batch.x) for _ in range(self.timesteps)]), batch.y).backward()
        optimizer.step()

    def optimized(self) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
        for model in (self.dense, self.masked):
            yield model, torch.optim.Adam(model.train().parameters(), lr=1e-5)

    def own_loop_row(self, repeats: int) -> list[str]:
        dense, masked = self.optimized()
        what = f"{self.name}: training step with masks / without, the weight computed at every timestep"
        return row(what, ratio(lambda: self.own_step(*masked), lambda: self.own_step(*dense), repeats), "")

    def rows(self, repeats: int) -> list[list[str]]:
        """Scoring, and a training step with masks."""
        dense, masked = self.optimized()
        return [
            row(f"{self.name}: scoring with cqp / forward and backward passes",
                ratio(self.score, self.passes, repeats), "≤ 1.10"),
            row(f"{self.name}: training step with masks / without",
                ratio(lambda: self.train_step(*masked), lambda: self.train_step(*dense), repeats), "≤ 1.05"),
        ]  # fmt: skip


def stepped_mlp() -> nn.Module:
    def leaky() -> nn.Module:
        return snntorch.Leaky(beta=0.9, init_hidden=True)

    return nn.Sequential(nn.Linear(784, 256), leaky(), nn.Linear(256, 128), leaky(), nn.Linear(128, 10), leaky())


def row(what: str, measured: tuple[float, float, float], aim: str) -> list[str]:
    median, low, high = measured
    return [what, f"{median:.2f}×", f"{low:.2f} – {high:.2f}", aim]


def selection_rows(repeats: int) -> list[list[str]]:
    scores = torch.rand(WEIGHTS)
    count = int(SPARSITY * WEIGHTS)
    lowest = registry().find("criterion", "weight_magnitude")().select
    times = [seconds(lambda: lowest(scores, count)) for _ in range(repeats)]
    found = [f"{statistics.median(times):.2f} s", f"{min(times):.2f} – {max(times):.2f} s"]
    by_sort = ratio(lambda: lowest(scores, count), lambda: scores.argsort(stable=True), max(3, repeats // 3))
    return [
        [f"exact selection among {WEIGHTS:,} weights", *found, "< 1 s"],
        row("exact selection / a stable sort of the scores", by_sort, ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.rand(1024, 784)
    rows = Bench("MLP", mlp(), x, None).rows(options.repeats)
    bench = Bench("stepped MLP", stepped_mlp(), x, TIMESTEPS)
    rows += [*bench.rows(options.repeats), bench.own_loop_row(options.repeats)]
    x = images(64)
    rows += Bench("VGG-16", settled(vgg16(), x), x, T).rows(max(5, options.repeats // 3))
    rows += selection_rows(options.repeats)
    text = [
        f"MLPs 784-256-128-10 (snnTorch, T = {TIMESTEPS}, batch 512) and VGG-16 (SpikingJelly multi-step, T = {T}, "
        f"batch 32), {SPARSITY:.0%} of the weights masked; {options.threads} threads of {os.cpu_count()} "
        f"({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}, seed 0, "
        f"{datetime.date.today()}.",
        "",
        "| what | median | range | aim |",
        "|---|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]
    target = ROOT / "benchmarks" / "results" / "unstructured.md"
    target.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
