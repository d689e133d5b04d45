"""Files: how small, how fast to load, and how fast a frozen network is.

    python benchmarks/storage.py [--data FOLDER]

The four VGG-16 rows of QP-SNN at 8, 4 and 2 bits against Eq. 16; loading against building and ``load_state_dict`` of
the dense network; the frozen network against a dense one of its shape, and against the one that isn't frozen; networks
trained on MNIST: against Eq. 16, their codes in other codecs, compressed, saved, and loaded in a new process (left out
where MNIST is missing). One thread, ratios of processor times side by side in one process. Writes
benchmarks/results/storage.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import lzma
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import DataMissingError, add_data_option
from inference import images, machine_load, settled
from mnist import loader, read
from mnist_models import NETS
from snncompress_rescaw import ReScaW
from torch import Tensor, nn
from vgg16 import vgg16

import snncompress
from snncompress.base.packing import pack_codes
from snncompress.contract.detection import find_adapter
from snncompress.model.parametrizations import compression_of, gridded, stored_weight
from snncompress.running.data import Feed
from snncompress.saving.describing import describe

HERE = Path(__file__).resolve().parent
# classes, ratio of conv 1-7, of conv 8-12
ROWS = [(10, 0.45, 0.51), (10, 0.49, 0.80), (100, 0.45, 0.70), (100, 0.45, 0.78)]
T = 4


def compressed(classes: int, early: float, late: float, bits: int | None) -> nn.Module:
    torch.manual_seed(0)
    ratios = {f"conv{i}": early for i in range(1, 8)} | {f"conv{i}": late for i in range(8, 13)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", snncompress.SilentNeuronsWarning)
        return snncompress.apply(
            vgg16(classes), "magnitude", ratios, bits, data=torch.rand(1, 3, 32, 32), timesteps=1, repair=None,
            progress=False, quantizer=ReScaW(gamma="l1_mean", per_channel=False),
        )  # fmt: skip


def masked(net: nn.Module, ratio: float) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", snncompress.SilentNeuronsWarning)
        return snncompress.apply(
            net, "weight_magnitude", ratio, None, data=torch.rand(1, 3, 32, 32), timesteps=1, repair=None,
            progress=False,
        )  # fmt: skip


def megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def sizes(folder: Path) -> list[str]:
    """A line per row and bit width, and one with 90 % of the weights gone besides."""
    path, lines, noise = folder / "small.safetensors", [], torch.rand(1, 3, 32, 32)
    for classes, early, late in ROWS:
        torch.save(vgg16(classes).state_dict(), folder / "dense.pt")
        dense = megabytes(folder / "dense.pt")
        for bits, ratio in ((8, 0.0), (4, 0.0), (2, 0.0), (4, 0.9)):
            net = compressed(classes, early, late, bits)
            if ratio:
                net = masked(net, ratio)
            snncompress.save(net, path)
            found = snncompress.profile(net, noise, timesteps=1)
            size = megabytes(path)
            what = f"{classes} classes, {found.n_params / 1e6:.2f} M" + (", 90 % of weights gone" if ratio else "")
            lines.append(
                f"| {what} | {bits} | {dense:.2f} | {found.size_mb:.4f} | {plain(path) / 1e6:.4f} | {size:.4f} "
                f"| {size / found.size_mb:.3f} | {dense / size:.1f} |"
            )
    return lines


def plain(path: Path) -> int:
    """Bytes that the file would have with each code at its bit width, as ``snncompress info`` has them."""
    return int(re.findall(r"total +([\d,]+)", describe(path))[0].replace(",", ""))


def codecs(net: nn.Module) -> list[str]:
    """What the codes of a quantized network take, coded in one way or another, as a share of their bits."""
    taken: dict[str, float] = defaultdict(float)
    for layer in net.modules():
        if (compression := compression_of(layer)) is None or compression.bits is None:
            continue
        found = gridded(compression, stored_weight(layer))
        kept = slice(None) if compression.mask is None else compression.mask
        numbers = found[1][kept].reshape(-1).numpy().astype(np.uint8)
        share = np.bincount(numbers) / len(numbers)
        packed = (np.append(numbers, 0)[: len(numbers) // 2 * 2].reshape(-1, 2) @ [16, 1]).astype(np.uint8)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
        for name, size in {
            "bits": len(numbers) / 2,
            "entropy": -(share[share > 0] * np.log2(share[share > 0])).sum() * len(numbers) / 8,
            "zlib, one byte per code": len(zlib.compress(numbers, 9)),
            "zlib, two codes per byte": len(zlib.compress(packed, 9)),
            "lzma, one byte per code": len(lzma.compress(numbers, lzma.FORMAT_RAW, filters=filters)),
            "lzma, two codes per byte": len(lzma.compress(packed, lzma.FORMAT_RAW, filters=filters)),
            "snncompress.save": len(pack_codes(numbers, 4)[1]),
        }.items():
            taken[name] += size
    return [f"| {name} | {size / taken['bits']:.3f} |" for name, size in taken.items()]


def side_by_side(*actions: Callable[[], object], rounds: int = 15) -> list[list[float]]:
    """Processor seconds of each action, taken in turn."""
    taken: list[list[float]] = [[] for _ in actions]
    for number in range(rounds + 2):
        for action, times in zip(actions, taken, strict=True):
            began = time.process_time()
            action()
            if number >= 2:
                times.append(time.process_time() - began)
    return taken


def line(what: str, above: list[float], below: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    return f"| {what} | {median(ratios):.2f}× | {ratios[1]:.2f} – {ratios[-2]:.2f} |"


def speeds(folder: Path) -> list[str]:
    """Loading against building."""
    path = folder / "small.safetensors"
    torch.save(vgg16().state_dict(), folder / "dense.pt")

    def dense() -> nn.Module:
        net = vgg16()
        net.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
        return net

    lines = []
    for bits, ratio in ((None, 0.0), (4, 0.0), (4, 0.9)):
        net = compressed(*ROWS[0], bits)
        snncompress.save(masked(net, ratio) if ratio else net, path)
        loading, building = side_by_side(lambda: snncompress.load(path, into=vgg16()), dense)
        what = (f"{bits} bits" if bits else "32 bits") + (", 90 % of weights gone" if ratio else "")
        lines.append(
            line(f"load of the first row, {what} / build and load_state_dict of dense VGG-16", loading, building)
        )
    return lines


def frozen() -> list[str]:
    """What freezing gives where all populations fire: batch norms are settled on the images."""
    x = images(4)
    small = settled(compressed(*ROWS[0], 4), x)
    quick = snncompress.freeze(small, x, timesteps=T)
    plain = settled(vgg16(widths=[small.get_submodule(f"conv{i}").out_channels for i in range(1, 14)]), x)
    whole = settled(vgg16(), x)
    runs = [forward(net, x) for net in (quick, plain, small, whole)]
    a, b, c, d = side_by_side(*runs)
    macs = [snncompress.profile(twin(net), x).n_mac for net in (plain, whole)]
    return [
        line("forward of the frozen network / of a dense one of its shape", a, b),
        line("forward of the frozen network / of the quantized one", a, c),
        line(f"forward of the frozen network / of dense VGG-16 (MACs: {macs[0] / macs[1]:.2f}×)", a, d),
    ]


def forward(net: nn.Module, x: Tensor) -> Callable[[], object]:
    feed = Feed(find_adapter(net), x, T)

    def run() -> object:
        with torch.no_grad():
            return feed(net, feed.first())

    return run


def twin(net: nn.Module) -> nn.Module:
    """A ReLU for every neuron, so that all operations are MACs."""
    result = copy.deepcopy(net)
    for name in find_adapter(net).neurons(net):
        result.set_submodule(name, nn.ReLU())
    from spikingjelly.activation_based import functional

    functional.set_step_mode(result, "s")
    return result


def predictions(framework: str, path: Path, data: Path) -> Tensor:
    """What the network in a file answers to the test images: scores [10000, 10]."""
    net = snncompress.load(path, into=NETS[framework]()).eval()
    return answers(net, data)


def answers(net: nn.Module, data: Path) -> Tensor:
    feed = Feed(find_adapter(net), loader(*read(data, "test"), shuffle=False), T)
    with torch.no_grad():
        return torch.cat([feed(net, batch).mean(0) for batch in feed])


def mnist(framework: str, data: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Train, compress, save; then load in a new process, and compare the answers.

    A line of that, lines of sizes against Eq. 16, and lines of codecs.
    """
    torch.manual_seed(0)
    net, (x, y) = NETS[framework](), read(data, "train")
    batches = loader(x[:20_000], y[:20_000])
    snncompress.finetune(net, batches, epochs=1, lr=2e-3, timesteps=T, progress=False)
    options = {"data": (x[:500], y[:500]), "timesteps": T, "repair": None, "progress": False}
    path, lines = folder / "mnist.safetensors", []
    quantized = snncompress.apply(net, None, bits=4, **options)
    sparse = snncompress.apply(net, "weight_magnitude", 0.9, None, **options)
    for what, small in (
        ("4 bits", quantized), ("4 bits, 90 % of weights gone", snncompress.apply(sparse, None, bits=4, **options))
    ):  # fmt: skip
        snncompress.save(small, path)
        size = 1e3 * snncompress.profile(small, (x[:10], y[:10]), timesteps=T).size_mb
        found = 1e3 * megabytes(path)
        lines.append(
            f"| {framework}, {what} | {size:.1f} | {plain(path) / 1e3:.1f} | {found:.1f} | {found / size:.3f} |"
        )
    net = snncompress.apply(net, "svs", 0.4, 4, **options)
    net = snncompress.apply(net, "weight_magnitude", 0.5, None, **options)
    snncompress.finetune(net, batches, epochs=1, lr=2e-3, timesteps=T, progress=False)
    said = folder / "answers.pt"
    snncompress.save(net, path)
    here = answers(net.eval(), data)
    subprocess.run([sys.executable, __file__, "--answer", framework, path, said, "--data", data], check=True)
    there = torch.load(said, weights_only=True)
    labels = read(data, "test")[1]
    right = [100 * float((scores.argmax(1) == labels).double().mean()) for scores in (here, there)]
    same = "bitwise equal" if torch.equal(here, there) else "different"
    answer = f"| {framework} | {megabytes(path) * 1e3:.1f} | {right[0]:.2f} | {right[1]:.2f} | {same} |"
    return answer, lines, codecs(quantized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)  # the new process
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.answer:
        framework, path, said = options.answer
        torch.save(predictions(framework, Path(path), options.data), said)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, timed = sizes(folder), speeds(folder) + frozen()
        try:
            trained = [mnist(framework, options.data, folder) for framework in NETS]
        except DataMissingError as error:
            print(f"Without the trained networks: {error}")
            trained = []
    text = [
        "VGG-16 of QP-SNN, pruned and quantized; sizes in MB = 10⁶ bytes. Eq. 16 counts weights and parameters, "
        "removed weights too; a file also holds batch norm statistics (buffers) and the plan. Plain is a file with "
        "each code at its bit width and a bit for each weight of a mask; file is what is on the disk. The weights are "
        "random, even between two bounds, half of them clamped by γ = mean|W|.",
        "",
        "| parameters | bits | dense .pt | Eq. 16 | plain | file | file / Eq. 16 | dense / file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *table,
        "",
        "MNIST networks, trained for an epoch on 20,000 images (the default quantizer; sizes in kB):",
        "",
        "| network | Eq. 16 | plain | file | file / Eq. 16 |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(line for _, lines, _ in trained for line in lines),
        "",
        "Their 4-bit codes, coded in one way or another, as a share of their bits:",
        *(
            line
            for framework, (*_, lines) in zip(NETS, trained, strict=False)
            for line in ("", f"| {framework} | share |", "| --- | ---: |", *lines)
        ),
        "",
        "Processor times, as ratios measured side by side: median and range without the extremes; batch 4, "
        f"T = {T}, one thread ({platform.machine()}), torch {torch.__version__}, {datetime.date.today()}; "
        f"{machine_load()}.",
        "",
        "| what | median | range |",
        "| --- | ---: | ---: |",
        *timed,
        "",
        "MNIST networks, trained for an epoch on 20,000 images, compressed (`svs` 0.4, half of the weights, 4 bits), "
        f"trained for another, saved, and loaded in a new process; 10,000 test images, T = {T}, seed 0.",
        "",
        "| framework | file (kB) | accuracy before (%) | loaded (%) | scores |",
        "| --- | ---: | ---: | ---: | --- |",
        *(line for line, *_ in trained),
    ]
    (HERE / "results" / "storage.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
