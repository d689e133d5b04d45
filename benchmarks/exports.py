"""Exported networks on MNIST: do other programs compute the same spikes?

    python benchmarks/exports.py [--data FOLDER]

In both frameworks: a network with batch norms and average pooling, trained for an epoch on 20,000 images, compressed
(`svs` 0.4, 4 bits) and trained for another; exported as NIR, read back by nir and run in numpy, float64; exported as
ONNX and run in onnxruntime. Counted is how many spikes differ, of every neuron at every timestep, on 500 test images.
One thread. Writes benchmarks/results/exports.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
from pathlib import Path

import nir
import numpy as np
import torch
from datasets import add_data_option
from mnist import loader, read
from torch import Tensor, nn

import snncompress

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.export.test_export_nir import simulate, spikes  # noqa: E402
from tests.export.test_export_onnx import run  # noqa: E402
from tests.networks import Case  # noqa: E402

T, IMAGES = 8, 500


def network(framework: str) -> nn.Module:
    """Conv(1, 16) - pool - Conv(16, 32) - pool - Linear(128) - Linear(10), a neuron behind each."""
    if framework == "snntorch":
        import snntorch
        from snntorch import surrogate

        def fire() -> nn.Module:  # NIR can't express the default, a reset by subtraction
            return snntorch.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True, reset_mechanism="zero")

        parts = nn
    else:
        from spikingjelly.activation_based import layer as parts
        from spikingjelly.activation_based import neuron, surrogate

        def fire() -> nn.Module:
            return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    return nn.Sequential(
        parts.Conv2d(1, 16, 3, padding=1, bias=False), parts.BatchNorm2d(16), fire(), parts.AvgPool2d(2),
        parts.Conv2d(16, 32, 3, padding=1, bias=False), parts.BatchNorm2d(32), fire(), parts.AvgPool2d(2),
        parts.Flatten(), parts.Linear(32 * 7 * 7, 128), fire(), parts.Linear(128, 10), fire(),
    )  # fmt: skip


def trained(framework: str, data: Path) -> nn.Module:
    torch.manual_seed(0)
    net, (x, y) = network(framework), read(data, "train")
    batches = loader(x[:20_000], y[:20_000])
    snncompress.finetune(net, batches, epochs=1, lr=2e-3, timesteps=T, progress=False)
    options = {"data": (x[:500], y[:500]), "timesteps": T, "repair": None, "progress": False}
    net = snncompress.apply(net, "svs", 0.4, 4, **options)
    return snncompress.finetune(net, batches, epochs=1, lr=2e-3, timesteps=T, progress=False).eval()


def compared(net: nn.Module, x: Tensor, folder: Path) -> list[str]:
    """Spikes that differ, in words: in the NIR graph, then in the ONNX model."""
    case = Case(net, x, T)
    ours, xs = spikes(case), x.expand(T, *x.shape)
    snncompress.export(net, folder / "net.nir", data=x[:2], timesteps=T)
    graph = nir.read(folder / "net.nir")
    differ = sum(int((simulate(graph, xs, name) != found).sum()) for name, found in ours.items())
    total, size = sum(int(found.sum()) for found in ours.values()), sum(found.size for found in ours.values())
    snncompress.export(net, folder / "net.onnx", data=x[:2], timesteps=T)
    outputs, _ = run(folder / "net.onnx", xs)
    last = list(ours.values())[-1]
    theirs = outputs["output"]
    return [
        f"{differ} of {size:,} ({total:,} spikes)",
        f"{int((theirs != last).sum())} of {last.size:,} ({int(last.sum()):,} spikes)",
        f"{np.abs(theirs.mean(0) - last.mean(0)).max():.3g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    x, y = read(data, "test")
    rows = []
    for framework in ("spikingjelly", "snntorch"):
        net = trained(framework, data)
        accuracy = 100 * snncompress.evaluate(net, loader(x, y, shuffle=False), timesteps=T).accuracy
        with tempfile.TemporaryDirectory() as folder:
            cells = compared(net, x[:IMAGES], Path(folder))
        rows.append(f"| {framework} | {accuracy:.2f} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    text = [
        f"Networks compressed on MNIST and exported, on {IMAGES} test images over T = {T} steps: NIR, every neuron, "
        f"read by nir {nir.version} and run in numpy (float64); ONNX, the output neurons, run in onnxruntime. "
        f"{platform.machine()}, torch {torch.__version__}, seed 0, {datetime.date.today()}.",
        "",
        "| framework | test accuracy (%) | NIR: spikes that differ | ONNX: spikes that differ | ONNX: rate off by |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    (HERE / "results" / "exports.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
