"""Where a linear layer that lost most of its weights, or whole columns of them, is faster without them.

    python benchmarks/sparse_linear.py [--seconds 0.06]

Square layers of 128 to 4,096 inputs, and 784 × 256; 1 to 256 rows (samples × timesteps) of spikes, 15 % of them 1.
With 80 to 98 % of the weights 0 the dense layer, the one row by row (CSR) and the integer one (codes of 4 bits) take
turns on one thread; with 10 to 70 % of the columns 0 the dense layer and the one without them. Of each the least
processor time of many calls counts. Then, how many spikes of a network differ. Writes
benchmarks/results/sparse_linear.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inference import differing
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress.export.integer_layers import Codes, instructions, make_integer
from snncompress.export.sparse_layers import Columns, make_dense, make_sparse
from snncompress.model.spikes import Spikes

SIZES = ((128, 128), (784, 256), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096))
ZEROS = (0.80, 0.85, 0.90, 0.95, 0.98)
EMPTY = (0.1, 0.2, 0.3, 0.5, 0.7)
ROWS = (1, 4, 16, 64, 256)


def layers(inputs: int, outputs: int, zeros: float) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same layer dense, sparse and in integers."""
    numbers = torch.randint(1, 8, (outputs, inputs)) * torch.randint(0, 2, (outputs, inputs)).mul(2).sub(1)
    numbers[torch.rand(outputs, inputs) < zeros] = 0
    dense = nn.Linear(inputs, outputs).requires_grad_(False)
    dense.weight.data = numbers * 0.05
    sparse, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    make_sparse(sparse)
    assert not make_integer(whole, Codes(numbers.to(torch.int8), bits=4))
    return dense, sparse, whole


def without_columns(inputs: int, outputs: int, share: float) -> tuple[nn.Module, nn.Module]:
    """A layer with empty columns, and the same without them."""
    dense = nn.Linear(inputs, outputs).requires_grad_(False)
    dense.weight[:, torch.randperm(inputs)[: round(share * inputs)]] = 0
    sparse = copy.deepcopy(dense)
    make_sparse(sparse, Columns)
    return dense, sparse


def spikes_alike() -> str:
    """How many spikes of a frozen MLP the same network with dense layers, fed the same, decides otherwise."""
    net = nn.Sequential()
    for inputs, outputs in ((784, 1024), (1024, 512), (512, 512)):
        linear = layers(inputs, outputs, 0.9)[0]
        linear.weight.data = torch.randn(outputs, inputs) * (linear.weight != 0) * (60 / inputs) ** 0.5
        net.extend((linear, neuron.LIFNode(step_mode="m")))
    x = torch.rand(1_000, 784)
    sparse = snncompress.freeze(net.eval(), x, timesteps=4)
    dense = copy.deepcopy(sparse)
    for module in dense.modules():
        make_dense(module)
    forms = "; ".join(row.computes_in for row in snncompress.frozen_layers(sparse).layers)
    rate = snncompress.profile(sparse, x, timesteps=4).firing_rate
    differ, spikes = differing(sparse, dense, x)
    return (
        f"MLP 784-1024-512-512 of LIF neurons, 90 % zeros, T = 4, 1,000 samples ({forms}; firing rate {rate:.2f}): "
        f"{differ} of {spikes:,} decisions differ from those of dense layers that are fed the same."
    )


def fastest(seconds: float, *actions: Callable[[], object]) -> list[float]:
    """Processor time of a call of each, the least of many, taken in turn."""
    best, calls = [float("inf")] * len(actions), [1] * len(actions)
    end, rounds = time.perf_counter() + seconds * len(actions), 0
    while rounds < 9 or time.perf_counter() < end:
        for at, action in enumerate(actions):
            began = time.process_time()
            for _ in range(calls[at]):
                action()
            taken = (time.process_time() - began) / calls[at]
            if rounds:
                best[at] = min(best[at], taken)
            else:
                action()
                calls[at] = max(1, int(3e-4 / taken))  # so many that the clock doesn't matter
        rounds += 1
    return best


def calls(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.06, help="for each layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines, columns = [], []
    alike = spikes_alike()
    print(alike, flush=True)
    with torch.no_grad():
        for inputs, outputs in SIZES:
            for zeros in ZEROS:
                cells = []
                dense, sparse, whole = layers(inputs, outputs, zeros)
                for rows in ROWS:
                    spikes = (torch.rand(rows, inputs) < 0.15).to(torch.uint8)
                    x, counts = spikes.float(), Spikes(spikes)
                    a, b, c = fastest(options.seconds, calls(dense, x), calls(sparse, x), calls(whole, counts))
                    cells.append(f"{a / b:.2f} ({c / b:.2f})")
                lines.append(f"| {inputs} × {outputs} | {100 * zeros:.0f} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
            for share in EMPTY:
                cells = []
                dense, sparse = without_columns(inputs, outputs, share)
                for rows in ROWS:
                    x = (torch.rand(rows, inputs) < 0.15).float()
                    a, b = fastest(options.seconds, calls(dense, x), calls(sparse, x))
                    cells.append(f"{a / b:.2f}")
                columns.append(f"| {inputs} × {outputs} | {100 * share:.0f} | {' | '.join(cells)} |")
                print(columns[-1], flush=True)
    head = f"{' | '.join(f'{rows} rows' if rows > 1 else '1 row' for rows in ROWS)} |"
    rule = f"| --- | ---: | {' | '.join(['---:'] * len(ROWS))} |"
    text = [
        "# Sparse linear layers",
        "",
        "How many times as fast a linear layer is that holds what is left of its weights row by row (CSR) as the dense "
        "one, and in brackets as the one of integers. float32; spikes, 15 % of them 1; the least processor time of "
        f"many calls, in turn; one thread, instructions {instructions()} ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}.",
        "",
        f"| inputs × outputs | zeros (%) | {head}",
        rule,
        *lines,
        "",
        "How many times as fast a layer is without its empty columns:",
        "",
        f"| inputs × outputs | empty columns (%) | {head}",
        rule,
        *columns,
        "",
        alike,
    ]
    (Path(__file__).parent / "results" / "sparse_linear.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
