"""What weight layers read and give in every timestep, integrated as the neurons behind them integrate.

u[t] = (1 − leak) · u[t−1] + x[t]        what a leaky neuron makes of its input, without reset
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, summed
from snncompress.errors import ModelError
from snncompress.interfaces import Inputs
from snncompress.measuring.timestep_counting import Rehearsal, Timeline
from snncompress.model.network import Network
from snncompress.model.parametrizations import stored_weight
from snncompress.model.patches import as_matrix, patches, positions, samples_first
from snncompress.running.data import Feed

POSITIONS = 64
"""Of an output map, in a sample: more add little, since neighbours say the same."""
MOST_READS = 8192
"""Of one output: the Gram matrix of a layer that reads more would take over half a gigabyte."""


def timelines(model: nn.Module, feed: Feed) -> dict[str, Timeline | None]:
    """The weight layers in order of execution, each with the timesteps of its calls; None where those can't be told."""
    with ExitStack() as stack:
        rehearsal = Rehearsal(model, feed.adapter, stack)
        feed.example()(model)
    feed.adapter.reset(model)
    neurons = feed.adapter.neurons(model)
    steps, samples = rehearsal.extent()
    lines: dict[str, Timeline | None] = {}
    for name in rehearsal.called():
        if name in neurons:
            continue
        try:
            lines[name] = rehearsal.timelines(steps, samples, only=name)[name]
        except ModelError:
            lines[name] = None
    return lines


def decay(model: nn.Module, name: str, line: Timeline | None, network: Network, feed: Feed) -> float:
    """1 − leak: what a timestep leaves of the potential of the neurons that a layer drives; 0 where none is known."""
    if line is None or line.per_step > 1:
        return 0.0
    neurons = feed.adapter.neurons(model)
    inside = [neuron for neuron in neurons if name.startswith(f"{neuron}.")]
    for neuron in (*inside, *network.drives.get(name, ())):
        try:
            leak = feed.adapter.leak(neurons[neuron])
        except ModelError:
            continue
        return float(1 - leak.double().mean().clamp(0, 1))
    return 0.0


def reads(layer: nn.Module) -> int:
    """How many inputs one output reads."""
    return int(as_matrix(layer, stored_weight(layer)).shape[2])


def input_of(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The input of a layer among the arguments of its call."""
    return next(v for v in (*args, *named.values()) if isinstance(v, Tensor))


def timesteps_of(layer: nn.Module, line: Timeline | None, x: Tensor, output: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and outputs [N, C, ...] of each timestep of a call, in order."""
    if line is None:
        yield samples_first(layer, x), samples_first(layer, output)
        return
    outs = output.chunk(line.steps, line.axis) if line.axis is not None else [output]
    for (_, piece), out in zip(line.pieces(x), outs, strict=True):
        yield samples_first(layer, piece), samples_first(layer, out)


class InputRecorder:
    """Adds up what a layer reads: ``begin_batch``, then ``add`` with every call of the layer; ``inputs`` at the end."""

    def __init__(self, layer: nn.Module, line: Timeline | None, decay: float) -> None:
        self._layer, self._line, self._decay = layer, line, decay
        self.restart()

    def restart(self) -> None:
        """Forget the data."""
        self._batches = 0
        self._count = 0.0
        self._total: Any = 0.0
        self._square: Any = 0.0
        self._gram: Any = 0.0

    def begin_batch(self) -> None:
        """The next call is of the first timestep."""
        self._line = None if self._line is None else self._line.fresh()
        self._generator = torch.Generator().manual_seed(self._batches)
        self._where: dict[tuple[int, ...], Tensor] = {}  # by the map's shape
        self._u: Any = 0.0
        self._one = 0.0
        self._batches += 1

    def add(self, x: Tensor, output: Tensor) -> None:
        """One call of the layer."""
        for piece, out in timesteps_of(self._layer, self._line, x.detach(), output):
            shape = tuple(out.shape[2:])
            if shape not in self._where:
                self._where[shape] = positions(self._layer, out, POSITIONS, self._generator)
            self._u = self._decay * self._u + piece if self._decay else piece
            self._one = self._decay * self._one + 1
            read = patches(self._layer, self._u, self._where[shape])
            read = read.to(torch.promote_types(read.dtype, torch.float32)).transpose(0, 1)  # [G, n, D]
            self._count += self._one**2 * read.shape[1]
            self._total += self._one * read.sum(1).double()
            if read.shape[2] <= MOST_READS:
                self._gram += (read.transpose(1, 2) @ read).double()
            else:
                self._square += read.double().square_().sum(1)

    def reduce(self) -> None:
        """Add up what all processes have."""
        weight = as_matrix(self._layer, stored_weight(self._layer))
        (groups, _, reads), shape = weight.shape, (weight.shape[0], weight.shape[2])
        self._count = sum(gathered(self._count))
        if not self._count:
            return
        if not isinstance(self._total, Tensor):  # called in other processes only
            empty = torch.zeros(shape, dtype=torch.float64, device=weight.device)
            self._total, self._square = empty, empty.clone()
            self._gram = empty.new_zeros(groups, reads, reads)
        summed([self._total, self._gram if reads <= MOST_READS else self._square])

    def inputs(self) -> Inputs | None:
        """What has come together; None where the layer was never called."""
        if not isinstance(self._total, Tensor):
            return None
        gram = self._gram if isinstance(self._gram, Tensor) else None
        square = self._square if gram is None else gram.diagonal(dim1=1, dim2=2)
        return Inputs(square, self._total, self._count, gram)
