"""What calibration and pruning cost, as ratios measured side by side in one process.

    python benchmarks/performance.py [--batches 2] [--batch-size 16] [--repeats 9] [--threads 2]

The network is QP-SNN's spiking VGG-16 for CIFAR shapes, T = 4, in SpikingJelly's multi-step mode. Its weights are
random, its batch norms settled on the data, so that every population fires (the rates are printed); the pruned one has
the widths of the paper's 4.25 M row. The things compared run in turn, A B A B …, and the median of ratios counts, so
that a machine whose speed drifts does little harm. Writes benchmarks/results/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vgg16 import vgg16

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.contract.registry import registry
from snncompress.extend import Layer
from snncompress.pruning.recording import record
from snncompress.pruning.selection import resolve_skip, targets
from snncompress.pruning.steps import ChannelPruning
from snncompress.running.data import Feed
from snncompress.structure.tracing import trace

ROOT = Path(__file__).resolve().parent.parent
T = 4
RATIOS = {f"conv{i}": 0.45 for i in range(1, 8)} | {f"conv{i}": 0.51 for i in range(8, 13)}


class PlainSVS(snncompress.extend.Criterion):
    """SVS as one would write it first: a batched float64 SVD of the time-averaged maps, for comparison."""

    name = "plain svs"
    needs = frozenset({"spikes"})

    def begin(self, layer: Layer) -> list[Any]:
        return [0.0, torch.zeros(layer.channels, dtype=torch.float64), 0]

    def observe(self, layer: Layer, state: list[Any], spikes: Tensor, membrane: Tensor | None) -> list[Any]:
        return [state[0] + spikes.double().sum(0), state[1], state[2] + len(spikes)]

    def end_batch(self, layer: Layer, state: list[Any]) -> list[Any]:
        sigma = torch.linalg.svdvals(state[0] / state[2])
        return [0.0, state[1] + (sigma > 1e-6).sum(-1).double().sum(0) + 1e-6 * sigma.sum((0, 2)), 0]

    def score(self, layer: Layer, state: list[Any]) -> Tensor:
        return state[1]


def images(count: int) -> Tensor:
    """Smooth random images [N, 3, 32, 32]."""
    return nn.functional.interpolate(torch.rand(count, 3, 8, 8), size=(32, 32), mode="bilinear")


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms at the statistics of ``x``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.constant_(module.weight, 1.5)
    adapter = find_adapter(model)
    with torch.no_grad():
        model.train()(x.unsqueeze(0).expand(T, *x.shape))
    adapter.reset(model)
    return model.eval()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of time(a) / time(b) over alternating runs, with the smallest and the largest."""
    a(), b()
    ratios = [seconds(a) / seconds(b) for _ in range(repeats)]
    return statistics.median(ratios), min(ratios), max(ratios)


class Bench:
    """The dense network, its batches, and what is done with them."""

    def __init__(self, batches: int, batch_size: int, *, traced: bool = True) -> None:
        torch.manual_seed(0)
        self.data = [images(batch_size) for _ in range(batches)]
        self.model = settled(vgg16(), self.data[0])
        self.adapter = find_adapter(self.model)
        self.feed = Feed(self.adapter, self.data, T)
        if not traced:
            return
        self.network = trace(self.model, self.adapter, self.feed.example())
        skips = resolve_skip(None, self.network, self.network.layers, "channel")
        todo, _ = targets(self.network, RATIOS, skips)
        criterion = registry().find("criterion", "svs")()
        self.layers = ChannelPruning(self.model, self.adapter, criterion, self.network, todo).scored()

    def forward(self) -> None:
        with torch.no_grad():
            for batch in self.feed:
                self.feed(self.model, batch)

    def calibrate(self, name: str) -> None:
        criterion = PlainSVS() if name == PlainSVS.name else registry().find("criterion", name)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record(self.model, self.network, self.feed, criterion, self.layers, seed=0, progress=False)


def peak_mb(what: str, batches: int, batch_size: int, threads: int) -> float:
    """Memory that a fresh process needs at its peak for one pass, tracing included, above what its imports take."""
    command = [sys.executable, __file__, "--peak", what, "--batches", str(batches), "--batch-size", str(batch_size)]
    done = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def run_peak(what: str, batches: int, batch_size: int) -> None:
    before = _peak_kb()
    bench = Bench(batches, batch_size, traced=what != "forward")
    bench.forward() if what == "forward" else bench.calibrate(what)
    print((_peak_kb() - before) / 1e3)


def _peak_kb() -> float:
    """Linux's own mark; getrusage would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def split(model: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds per forward pass in convolutions, batch norms, neurons and the rest."""
    kinds = {"Conv2d": "convolutions", "BatchNorm2d": "batch norms", "LIFNode": "neurons"}
    spent: dict[str, float] = defaultdict(float)
    started: dict[nn.Module, float] = {}
    handles = []
    for module in model.modules():
        if not list(module.children()) or type(module).__name__ in kinds:
            kind = kinds.get(type(module).__name__, "pooling and linear")
            if kind == "pooling and linear" and "surrogate" in type(module).__module__:
                continue

            def before(m: nn.Module, _: object) -> None:
                started[m] = time.perf_counter()

            def after(m: nn.Module, _: object, __: object, kind: str = kind) -> None:
                spent[kind] += time.perf_counter() - started[m]

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    adapter = find_adapter(model)
    with torch.no_grad():
        for _ in range(repeats):
            adapter.reset(model)
            adapter.run(model, x, T)
    for handle in handles:
        handle.remove()
    return {kind: value / repeats for kind, value in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        run_peak(options.peak, options.batches, options.batch_size)
        return

    repeats = options.repeats
    bench = Bench(options.batches, options.batch_size)
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, result: tuple[float, float, float], aim: str) -> None:
        rows.append((what, f"{result[0]:.2f}×", f"{result[1]:.2f} – {result[2]:.2f}", aim))
        print(*rows[-1], flush=True)

    rates = snncompress.profile(bench.model, bench.data[0], timesteps=T)
    fire = [row.firing_rate for row in rates.layers if row.kind == "neuron"]
    for name, aim in (("svs", "≤ 1.25"), (PlainSVS.name, ""), ("sca", "≤ 1.15"), ("firing_rate", "")):
        add(
            f"calibrating with {name} / plain forward passes",
            ratio(lambda n=name: bench.calibrate(n), bench.forward, repeats),
            aim,
        )

    plain = peak_mb("forward", options.batches, options.batch_size, options.threads)
    for name in ("svs", "sca"):
        few = peak_mb(name, options.batches, options.batch_size, options.threads)
        many = peak_mb(name, 4 * options.batches, options.batch_size, options.threads)
        aim = "≤ 1.25"
        rows.append((f"peak memory with {name} / plain forward passes", f"{few / plain:.2f}×", "one run", aim))
        rows.append(
            (f"peak memory with {name}: 4 times the batches / as above", f"{many / few:.2f}×", "one run", "1.00 (flat)")
        )
        print(*rows[-2:], sep="\n", flush=True)

    x = bench.data[0]

    def tracing(steps: int) -> Callable[[], object]:
        feed = Feed(bench.adapter, x.unsqueeze(0).repeat(steps, 1, 1, 1, 1)[:, :1], None)
        return lambda: trace(bench.model, bench.adapter, feed.example())

    add("tracing at T = 16 / T = 1", ratio(tracing(16), tracing(1), repeats), "≤ 1.10")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = snncompress.apply(bench.model, "magnitude", RATIOS, None, data=x, timesteps=T, repair=None).eval()
    widths = [pruned.get_submodule(f"conv{i}").out_channels for i in range(1, 14)]
    scratch = settled(vgg16(widths=widths), x)
    scratch.load_state_dict(pruned.state_dict())

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                bench.adapter.reset(model)
                bench.adapter.run(model, x, T)

        return run

    add(
        "forward of the pruned network / built from scratch at its widths",
        ratio(forward(pruned), forward(scratch), 3 * repeats),
        "≤ 1.03",
    )
    add("forward of the dense network / pruned", ratio(forward(bench.model), forward(pruned), 3 * repeats), "")
    before, after = (
        snncompress.profile(m, x, timesteps=T, conventions=snncompress.Conventions()) for m in (bench.model, pruned)
    )
    dense_macs = [macs(m, x) for m in (bench.model, pruned)]
    rows.append(("dense multiply-accumulates, dense / pruned", f"{dense_macs[0] / dense_macs[1]:.2f}×", "exact", ""))
    rows.append(("AC actually caused by spikes, dense / pruned", f"{before.n_ac / after.n_ac:.2f}×", "exact", ""))

    parts = [split(m, x, repeats) for m in (bench.model, pruned)]
    text = [
        "# Performance",
        "",
        f"VGG-16 (13 convolutions) for 3×32×32, T = {T}, SpikingJelly multi-step, {options.batches} batches of "
        f"{options.batch_size}; firing rates {min(fire):.3f} – {max(fire):.3f}; seed 0; {options.threads} threads of "
        f"{os.cpu_count()} ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}, "
        f"{datetime.date.today()}.",
        "",
        "| what | median | range | aim |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Where a forward pass spends its time:",
        "",
        "| part | dense (ms) | pruned (ms) | ratio |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {dense * 1e3:.1f} | {parts[1][kind] * 1e3:.1f} | {dense / parts[1][kind]:.2f}× |"
            for kind, dense in parts[0].items()
        ),
    ]
    target = ROOT / "benchmarks" / "results" / "performance.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(text) + "\n")
    print("\n".join(text))


def macs(model: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates of one sample if every input were dense."""
    total = 0.0
    handles = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel() / len(x)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(count))
    adapter = find_adapter(model)
    with torch.no_grad():
        adapter.reset(model)
        adapter.run(model, x, T)
    for handle in handles:
        handle.remove()
    return total


if __name__ == "__main__":
    main()
