"""What freezing gives: floats and integers against the plain frozen form, side by side in one process, on one thread.

    python benchmarks/inference.py [--data FOLDER] [--repeats 9] [--batch-size 8]

The network is QP-SNN's spiking VGG-16 for CIFAR shapes, T = 4, in SpikingJelly's multi-step mode, with random weights
and batch norms settled on the data; dense, and with 0.6 of its channels removed; 4 bits. "Plain" is the network with
its weights baked and batch norms folded, its neurons and layers being the framework's own. Processor time counts, in
turn, A B A B …, and of the ratios the median. Then, for VGG-16 and for networks trained on MNIST (left out where the
data folder is missing), how many spikes of the integer network the float one decides otherwise, every layer fed the
same, and how many images both classify differently. Writes benchmarks/results/inference.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import add_data_option
from mnist import loader, read, some
from mnist_models import NETS
from torch import Tensor, nn
from vgg16 import vgg16

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.export.freezing import folded
from snncompress.export.integer_layers import instructions
from snncompress.model.copying import private_copy
from snncompress.model.spikes import in_float
from snncompress.running.data import Feed

HERE = Path(__file__).resolve().parent
T = 4
Row = tuple[str, tuple[float, float, float], str]


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
    adapter.reset(model)
    with torch.no_grad():
        adapter.run(model.train(), x, T)
    adapter.reset(model)
    return model.eval()


def compressed(x: Tensor, ratio: float) -> nn.Module:
    torch.manual_seed(0)
    dense = settled(vgg16(), x)
    criterion = "magnitude" if ratio else None
    small = snncompress.apply(dense, criterion, ratio, 4, data=x[:1], timesteps=T, repair=None, progress=False)
    return settled(small, x)


def plain(model: nn.Module, x: Tensor) -> nn.Module:
    """Frozen without being made fast."""
    adapter = find_adapter(model)
    with torch.no_grad():
        return folded(private_copy(model, adapter).eval(), adapter, Feed(adapter, x[:1], T).example())


def forward(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    adapter = find_adapter(model)

    def run() -> Any:
        with torch.no_grad():
            adapter.reset(model)
            return adapter.run(model, x, T)

    return run


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of time(a) / time(b) over alternating runs, with the smallest and the largest."""
    a(), b()
    ratios = [seconds(a) / seconds(b) for _ in range(repeats)]
    return statistics.median(ratios), min(ratios), max(ratios)


def rows(x: Tensor, repeats: int) -> Iterator[Row | str]:
    """(what, ratio, aim), and a line on spikes that differ, for each network."""
    dense = None
    for name, share, aim in (("dense", 0.0, "≥ 4.5 with AMX"), ("0.6 of the channels removed", 0.6, "≥ 4")):
        small = compressed(x, share)
        before = plain(small, x)
        quick = snncompress.freeze(small, x, timesteps=T)
        whole = snncompress.freeze(small, x, timesteps=T, integer=True)
        yield (
            f"VGG-16, {name}: plain / float",
            ratio(forward(before, x), forward(quick, x), repeats),
            ("≥ 1.5" if share else ""),
        )
        yield f"VGG-16, {name}, 4 bits: plain / integer", ratio(forward(before, x), forward(whole, x), repeats), aim
        if dense is None:
            dense = before, _dense_macs(before, x)
        else:
            fewer = dense[1] / _dense_macs(before, x)
            for kind, model in (("float", quick), ("integer", whole)):
                speed = ratio(forward(dense[0], x), forward(model, x), repeats)
                share_of = tuple(value / fewer for value in speed)
                yield (
                    f"speed-up over plain dense / {fewer:.1f} times fewer multiply-accumulates, {kind}",
                    (share_of[0], share_of[1], share_of[2]),
                    "≥ 0.9",
                )
        memory = [snncompress.frozen_layers(model).n_bytes / 1e6 for model in (quick, whole)]
        yield f"| VGG-16, {name} | {_differences(whole, quick, x)} | {memory[0]:.2f} | {memory[1]:.2f} |"


def _dense_macs(model: nn.Module, x: Tensor) -> float:
    total = 0.0

    def count(module: Any, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel() / len(x)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    forward(model, x)()
    for handle in handles:
        handle.remove()
    return total


def differing(whole: nn.Module, quick: nn.Module, x: Tensor) -> tuple[int, int]:
    """Spikes of ``whole`` that the layers of ``quick``, fed the same, decide otherwise; and all."""
    adapter, twins = find_adapter(whole), dict(quick.named_modules())
    given: dict[int, tuple[Tensor, Tensor]] = {}
    counts = [0, 0]

    def computed(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            given[id(output)] = output, twins[name].forward(in_float(args[0]))

        return hook

    def fired(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            _, current = given[id(args[0])]
            counts[0] += int((in_float(twins[name](current)) != in_float(output)).sum())
            counts[1] += output.numel()

        return hook

    adapter.reset(quick)
    handles = []
    for name, module in whole.named_modules():
        if adapter.is_neuron(module):
            handles.append(module.register_forward_hook(fired(name)))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(computed(name)))
    forward(whole, x)()
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


def _differences(whole: nn.Module, quick: nn.Module, x: Tensor) -> str:
    differ, spikes = differing(whole, quick, x)
    classes = [forward(model, x)().mean(0).argmax(1) for model in (whole, quick)]
    return f"{differ} of {spikes:,} | {int((classes[0] != classes[1]).sum())} of {len(x):,}"


def trained(folder: Path) -> Iterator[str]:
    """Networks of both frameworks, trained on MNIST for an epoch, compressed, trained for another, and frozen."""
    train, (x, y) = some(read(folder, "train"), 4_000, seed=0), some(read(folder, "test"), 2_000, seed=0)
    for name, build in NETS.items():
        torch.manual_seed(0)
        dense = build()
        batches = loader(*train)
        snncompress.finetune(dense, batches, epochs=1, timesteps=T, lr=2e-3, progress=False)
        small = snncompress.apply(dense, "svs", 0.4, 4, data=batches, timesteps=T, finetune=1, progress=False).eval()
        quick = snncompress.freeze(small, x[:8], timesteps=T)
        whole = snncompress.freeze(small, x[:8], timesteps=T, integer=True)
        shares = [float((forward(m, x)().mean(0).argmax(1) == y).float().mean()) for m in (quick, whole)]
        memory = [snncompress.frozen_layers(model).n_bytes / 1e6 for model in (quick, whole)]
        yield (
            f"| MNIST, {name} ({100 * shares[0]:.2f} % right in float, {100 * shares[1]:.2f} % in integers) "
            f"| {_differences(whole, quick, x)} | {memory[0]:.3f} | {memory[1]:.3f} |"
        )


def machine_load() -> str:
    """What else the machine does: the caches are shared with it."""
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    measured, counted = [], []
    for row in rows(images(options.batch_size), options.repeats):
        if isinstance(row, str):
            counted.append(row)
        else:
            what, (middle, low, high), aim = row
            measured.append(f"| {what} | {middle:.2f}× | {low:.2f} – {high:.2f} | {aim} |")
        print((counted if isinstance(row, str) else measured)[-1], flush=True)
    if (options.data / "mnist").exists():
        counted += trained(options.data)
    text = [
        "# Inference of frozen networks",
        "",
        f"VGG-16 (13 convolutions) for 3×32×32, batches of {options.batch_size}, T = {T}, SpikingJelly multi-step; "
        f"seed 0; one thread, instructions {instructions()} ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}; {machine_load()}.",
        "",
        "| what | median | range | aim |",
        "| --- | ---: | ---: | ---: |",
        *measured,
        "",
        "Integers against floats:",
        "",
        "| network | spikes that differ, given the same inputs | images classified differently | weights, float (MB) "
        "| integer (MB) |",
        "| --- | ---: | ---: | ---: | ---: |",
        *counted,
    ]
    target = HERE / "results" / "inference.md"
    target.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
