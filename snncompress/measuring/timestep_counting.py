"""Operation counts of every timestep, from one pass over the data.

Which steps a call of a layer belongs to is learnt from a rehearsal with a sample: a layer that sees [T, N, ...] or
[T·N, ...] sees all steps at once; one that is called n times makes n/T calls per step, in order; one that is called
once, on [N, ...], encodes a static input and belongs to the first step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import added, gathered
from snncompress.errors import DataError, ModelError
from snncompress.interfaces import Adapter, EnergyModel, MemoryUse, OperationCounts
from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.cells import cell_weights, home, layer_at, made_by, met_by
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import weight_bits

from .averaged_spikes import AveragedSpikes
from .conventions import Conventions
from .counting import FLOAT_BITS, WeightCounter, energy_of, spike_sum
from .direct_encoding import Clock
from .products import Product
from .watching import Watch, watched

_Seen = Callable[[str, Tensor, tuple[int, ...], "Tensor | None"], None]
"""Called with a layer's name, input, output shape and, where the input is an average of spikes, of how many; or with a
neuron's name, spikes [T', N, ...] and their shape."""


class Timeline:
    """The timesteps that one module's calls belong to: in order, or all of them along ``axis`` of every call."""

    def __init__(self, name: str, steps: int, per_step: int, axis: int | None) -> None:
        self.name, self.steps, self.per_step, self.axis = name, steps, per_step, axis
        self.calls = 0

    def fresh(self) -> Timeline:
        """The same, before the first call."""
        return Timeline(self.name, self.steps, self.per_step, self.axis)

    def pieces(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(step from 0, its part of ``x``) of the next call."""
        if self.axis is not None:
            if x.shape[self.axis] % self.steps:
                raise DataError(
                    f"{self.name!r} got an input of shape {list(x.shape)}, which isn't one of {self.steps} timesteps "
                    f"as in the first batch. Give all batches the same number of timesteps."
                )
            yield from enumerate(x.chunk(self.steps, self.axis))
            return
        step = self.calls // self.per_step
        self.calls += 1
        if step >= self.steps:
            raise ModelError(
                f"{self.name!r} is called more often on this batch than on the first sample, so its calls can't be "
                f"assigned to {self.steps} timesteps. Likely cause: batches of different length, or a loop whose "
                f"length depends on the data. Analyse batches of one length."
            )
        yield step, x


class Rehearsal:
    """Notes how often every weight layer and neuron of ``model`` is called, and on how many rows.

    With ``products``, products of tensors outside layers too, by the module and torch's function.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, stack: ExitStack, *, products: bool = False) -> None:
        self._model = model
        self._neurons = set(adapter.neurons(model))
        self._leading: dict[str, list[tuple[int, ...]]] = {}
        watch(model, adapter, self._note, stack)
        if products:
            stack.enter_context(watched(model, _layers(model, adapter), self._neurons, self._note_product))

    def _note_product(self, where: str, name: str, product: Product | None) -> None:
        if product is not None:
            self._leading.setdefault(_row(where, name), []).append(product.lead)

    def _note(self, name: str, x: Tensor, shape: tuple[int, ...], sums: Tensor | None) -> None:
        module: Any = layer_at(self._model, name)
        rows = 2 if name in self._neurons else x.dim() - module.weight.dim() + 1
        self._leading.setdefault(name, []).append(tuple(x.shape[:rows]))

    def called(self) -> list[str]:
        """Weight layers and neurons in the order of their first calls."""
        return list(self._leading)

    def extent(self) -> tuple[int, int]:
        """T and N of the rehearsal, as the neuron that was called first saw them."""
        calls = next((self._leading[name] for name in self._leading if name in self._neurons), [(1, 1)])
        return sum(lead[0] for lead in calls), calls[0][1]

    def timelines(self, steps: int, samples: int, only: str | None = None) -> dict[str, Timeline]:
        """How further batches run, given T and N of the rehearsal; raises ModelError where that can't be told.

        Of all weight layers and neurons, or of ``only`` one.
        """
        multi_step = any(lead[0] > 1 for name in self._neurons for lead in self._leading.get(name, ()))
        result = {}
        for name, calls in self._leading.items():
            if only not in (None, name):
                continue
            lead, ordered, axis = calls[0], len(calls) % steps == 0, None
            if not ordered or multi_step:
                if lead[:2] == (steps, samples) or lead[:1] == (steps * samples,):
                    axis = 0
                elif not ordered and lead[:2] == (samples, steps):
                    axis = 1
                elif not ordered and len(calls) > 1:
                    raise ModelError(
                        f"{name!r} is called {len(calls)} times in {steps} timesteps, so its operations can't be "
                        f"assigned to steps. Let the model call it equally often in every timestep."
                    )
            result[name] = Timeline(name, steps, max(1, len(calls) // steps), axis)
        return result


class StepMeter:
    """Counts what every weight layer and neuron of a private copy does in each timestep.

    What is counted is what :func:`snncompress.profile` counts by default.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, lines: dict[str, Timeline], stack: ExitStack) -> None:
        self._lines = lines
        self._updates: dict[str, list[int]] = {}
        self._layers: dict[str, list[_StepCounter]] = {}
        self._constant: dict[str, int] = {}
        """For how many timesteps from the first on a layer was given the same, in every batch."""
        self._first: dict[str, Tensor] = {}
        self._products: dict[str, list[list[float]]] = {}
        self._spikes: dict[str, list[float]] = {}
        self._held: dict[str, int] = {}
        self._rows = 0
        self._averages = AveragedSpikes(model)
        neurons, layers = adapter.neurons(model), set(_layers(model, adapter))
        for name, line in lines.items():
            if name in neurons:
                self._updates[name], self._spikes[name] = [0] * line.steps, [0.0] * line.steps
            elif name not in layers:
                self._products[name] = [[0.0, 0.0] for _ in range(line.steps)]
            else:
                maps: dict[tuple[int, ...], Tensor] = {}
                layer = layer_at(model, name)
                bits = weight_bits(layer) or brevitas_bits(layer) or FLOAT_BITS
                self._layers[name] = [_StepCounter(layer, maps, bits) for _ in range(line.steps)]
                self._constant[name] = line.steps
        beside = stack.enter_context(watched(model, layers, neurons, self._multiply, self._averages))
        watch(model, adapter, self._count, stack, beside, self._averages)

    def begin_batch(self) -> None:
        """The next call of every module belongs to the first timestep again."""
        self._first.clear()
        for line in self._lines.values():
            line.calls = 0

    def reduce(self) -> None:
        """Add up what all processes have; a layer was given the same for as long as it was in all of them."""
        own = {name: [counter.sums() for counter in counters] for name, counters in self._layers.items()}
        parts = gathered(((own, self._updates, self._spikes, self._products), self._constant))
        layers, self._updates, self._spikes, self._products = functools.reduce(added, (part for part, _ in parts))
        self._constant = {name: min(constant[name] for _, constant in parts) for name in self._constant}
        for name, counters in self._layers.items():
            for counter, found in zip(counters, layers[name], strict=True):
                counter.take(found)

    def energy_pj(self, energy: EnergyModel, samples: int, steps: int) -> list[float]:
        """Energy of the first t timesteps in pJ per sample, for t = 1 … T."""
        result = []
        for t in range(1, steps + 1):
            counts = [
                _total(counters[:t], samples, t <= self._constant[name], Clock(1, self._rows))
                for name, counters in self._layers.items()
            ]
            counts += [
                OperationCounts(*(sum(kind) / samples for kind in zip(*made[:t], strict=True)))
                for made in self._products.values()
            ]
            for name, updates in self._updates.items():
                made, spikes = sum(updates[:t]) / samples, sum(self._spikes[name][:t]) / samples
                held = MemoryUse(output_size=self._held[name], n_outputs=made, n_spikes_out=spikes)
                counts.append(OperationCounts(0, 0, made, held))
            result.append(sum(energy_of(energy, c) for c in counts))
        return result

    def _line(self, name: str) -> Timeline:
        if name not in self._lines:
            raise ModelError(f"{name!r} runs on this batch, and didn't on the first sample: what runs depends on data.")
        return self._lines[name]

    def _multiply(self, where: str, name: str, product: Product | None) -> None:
        if product is None:
            return
        row = _row(where, name)
        line = self._line(row)
        for step, _ in line.pieces(max(product.a, product.b, key=Tensor.dim)):
            part = product if line.axis is None else product.piece(line.steps, step, line.axis)
            for i, count in enumerate(part.operations(Conventions())):
                self._products[row][step][i] += count

    def _count(self, name: str, x: Tensor, shape: tuple[int, ...], sums: Tensor | None) -> None:
        line = self._line(name)
        if line.axis is not None:
            self._first.pop(name, None)  # each call is compared with its own first step
        if line.axis is not None and name in self._layers:
            shape = tuple(size // line.steps if axis == line.axis else size for axis, size in enumerate(shape))
        parts = None if sums is None or line.axis is None else sums.chunk(line.steps, line.axis)
        for step, piece in line.pieces(x):
            if name in self._layers:
                self._layers[name][step].add(piece, shape, sums if parts is None else parts[step])
                self._compare(name, step, piece)
            else:
                self._updates[name][step] += piece.numel()
                self._spikes[name][step] += float(spike_sum(piece))
                self._held[name], self._rows = piece.shape[2:].numel(), piece.shape[1]

    def _compare(self, name: str, step: int, piece: Tensor) -> None:
        """With what the layer was given in the first step, as long as it may be constant."""
        if name not in self._first:
            if self._constant[name] > 1:
                self._first[name] = piece.clone()
        elif step < self._constant[name] and not torch.equal(self._first[name], piece):
            self._constant[name] = max(step, 1)
            if step <= 1:
                del self._first[name]


class _StepCounter(WeightCounter):
    """Counts of one layer in one timestep; ``maps`` of fan-outs are the same in all steps."""

    def __init__(self, layer: nn.Module, maps: dict[tuple[int, ...], Tensor], bits: int) -> None:
        super().__init__(layer, Conventions())
        self._maps, self.bits = maps, bits

    def either(self) -> tuple[float, float]:
        """Accumulates if the layer's input is spikes, multiply-accumulates if it isn't."""
        return self._ac, self._mac

    def moved(self) -> tuple[float, int, int]:
        """Spikes and values read, and outputs."""
        return self.input_sum, self._values, self._outputs

    def held(self, clock: Clock) -> MemoryUse:
        """What the layer has in memory; the counter has seen single timesteps."""
        self.end_batch(clock)
        return self.memory(1, self.bits)


def _total(counters: list[_StepCounter], samples: int, constant: bool, clock: Clock) -> OperationCounts:
    """One fraction anywhere makes a layer analog in all steps, and a constant one multiplies once, as in a profile."""
    spiking = all(c.spiking for c in counters)
    if constant and not spiking:
        counters = counters[:1]
    n_ac, n_mac = (sum(counts) / samples for counts in zip(*(c.either() for c in counters), strict=True))
    spikes, values, outputs = (sum(counts) / samples for counts in zip(*(c.moved() for c in counters), strict=True))
    memory = dataclasses.replace(
        counters[0].held(clock),
        n_spikes_in=spikes if spiking else 0.0,
        n_values_in=0.0 if spiking else values,
        n_outputs=outputs,
    )
    return OperationCounts(n_ac if spiking else 0, 0 if spiking else n_mac, memory=memory)


def watch(
    model: nn.Module,
    adapter: Adapter,
    seen: _Seen,
    stack: ExitStack,
    beside: Watch | None = None,
    averages: AveragedSpikes | None = None,
) -> None:
    """Until ``stack`` is closed, ``seen`` is called at every call of a weight layer or neuron.

    ``beside`` looks away meanwhile; ``averages`` knows which inputs are averages of spikes.
    """
    quiet = beside.aside if beside else nullcontext
    for name, module in adapter.neurons(model).items():
        stack.callback(adapter.observe(module, _observer(name, seen, quiet), membrane=False))
    for name in _layers(model, adapter):
        layer = layer_at(model, name)
        hook = _hook(name, layer, seen, quiet, averages)
        stack.callback(home(layer)[0].register_forward_hook(hook, with_kwargs=True).remove)


def _layers(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the layers whose operations are counted, in module order."""
    neurons, names = adapter.neurons(model), list[str]()
    for name, module in model.named_modules():
        if name not in neurons:
            names += [name] if isinstance(module, WEIGHT_LAYERS) else cell_weights(name, module)
    return names


def _row(where: str, function: str) -> str:
    return f"{where}.{function}".lstrip(".")


def _observer(
    name: str, seen: _Seen, quiet: Callable[[], AbstractContextManager[None]]
) -> Callable[[Tensor, Tensor | None], None]:
    def observe(spikes: Tensor, _: Tensor | None) -> None:
        with quiet():
            seen(name, spikes, tuple(spikes.shape), None)

    return observe


def _hook(
    name: str,
    layer: nn.Module,
    seen: _Seen,
    quiet: Callable[[], AbstractContextManager[None]],
    averages: AveragedSpikes | None,
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        with quiet():
            x = met_by(layer, args, named)
            seen(name, x, made_by(layer, x, output), averages.of(x) if averages else None)

    return hook
