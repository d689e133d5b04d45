"""Counters on every layer and neuron of a network, read off as a profile's rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from snncompress.base.distributed import added, gathered
from snncompress.errors import DataError
from snncompress.interfaces import Adapter, EnergyModel, MemoryUse, OperationCounts
from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.cells import cell_weights, home, layer_at, made_by, met_by
from snncompress.model.network import NORMS, POOLS, WEIGHT_LAYERS
from snncompress.model.parametrizations import PACKED, weight_bits
from snncompress.model.weights_in_use import Within, has_its_own_forward, weight_in_use
from snncompress.running.data import Batch, time_as_samples

from .averaged_spikes import AveragedSpikes
from .conventions import Conventions
from .counting import FLOAT_BITS, PlainCounter, WeightCounter, energy_of, spike_sum
from .direct_encoding import clock_of
from .products import Product
from .reporting import Kind, LayerProfile
from .uncounted import unknown_weights
from .watching import Watch, watched

_STORED = re.compile(r"\.?\bparametrizations\.(\w+)\.original$")


class _NeuronCounter:
    """Spikes and updates of one neuron population."""

    def __init__(self) -> None:
        self.spikes, self.updates, self.size, self.rows = 0.0, 0, 0, 0
        self.calls: list[tuple[int, int]] = []
        """(T', N) of the calls of this batch."""

    def __call__(self, spikes: Tensor, membrane: Tensor | None) -> None:
        """Add spikes [T', N, C, ...]."""
        self.spikes += float(spike_sum(spikes))
        self.updates += spikes.numel()
        self.rows, self.size = spikes.shape[1], spikes.shape[2:].numel()
        self.calls.append((spikes.shape[0], spikes.shape[1]))


class Meter:
    """Counters on every layer of a private copy."""

    def __init__(self, model: nn.Module, adapter: Adapter, conventions: Conventions) -> None:
        self.model, self.adapter, self.conventions = model, adapter, conventions
        self.n_samples = self.n_batches = 0
        self.neurons = {name: _NeuronCounter() for name in adapter.neurons(model)}
        self.weights: dict[str, WeightCounter] = {}
        self.plain: dict[str, PlainCounter] = {}
        self.products: dict[str, dict[str, list[float]]] = {}
        """Module → torch's function → accumulates and multiply-accumulates of its products."""
        averages = self.neurons and conventions.averaged_spikes == "additions"
        self.averages = AveragedSpikes(model, conventions.spike_values) if averages else None
        self._unknown: list[str] = []
        self._shapes: set[Any] = set()
        self._watch: Watch | None = None
        self.analog = analog = not self.neurons
        for name, module in model.named_modules():
            if name in self.neurons:
                continue
            for weight in cell_weights(name, module):
                self.weights[weight] = WeightCounter(layer_at(model, weight), conventions, analog)
            if isinstance(module, WEIGHT_LAYERS):
                self.weights[name] = WeightCounter(module, conventions, analog)
            elif isinstance(module, NORMS) or (conventions.pooling and isinstance(module, POOLS)):
                self.plain[name] = PlainCounter(module, conventions, analog)

    def check_rows(self, timesteps: int) -> None:
        """Neurons that saw T rows, and not one for each sample, took time for samples."""
        if self.rows_seen() == {timesteps}:
            raise DataError(time_as_samples(timesteps))

    def end_batch(self, timesteps: int | None) -> None:
        """All calls of a batch were made; ``timesteps`` where it was fed that often."""
        clock = clock_of([neuron.calls for neuron in self.neurons.values()], timesteps)
        for counter in self.weights.values():
            counter.end_batch(clock)
        for neuron in self.neurons.values():
            neuron.calls = []

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Inside, the model is run on a batch.

        What happens outside layers is watched on batches of a new shape, and on others where it was found to count.
        """
        shape = batch.x.shape if isinstance(batch.x, Tensor) else None
        found = self.products or (self.averages is not None and self.averages.met)
        if shape in self._shapes and not found:
            yield
            return
        if shape is not None:
            self._shapes.add(shape)
        with watched(self.model, self.weights, self.neurons, self._multiplied, self.averages) as self._watch:
            yield
        self._watch = None

    def _multiplied(self, where: str, name: str, product: Product | None) -> None:
        if product is not None and self.conventions.attention == "counted":
            total = self.products.setdefault(where, {}).setdefault(name, [0.0, 0.0])
            for i, count in enumerate(product.operations(self.conventions, self.analog)):
                total[i] += count
        elif (note := f"{name} in {where or type(self.model).__name__}") not in self._unknown:
            self._unknown.append(note)

    def uncounted(self) -> list[str]:
        """What costs something and isn't counted."""
        return [*self._unknown, *unknown_weights(self.model, self.weights)]

    def _count(
        self, counter: WeightCounter | PlainCounter, layer: nn.Module, within: Within | None
    ) -> Callable[..., None]:
        """A hook for one layer, of which ``within`` saw what its own forward multiplied."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with self._watch.aside() if self._watch else nullcontext():
                x = met_by(layer, args, kwargs)
                if not isinstance(counter, WeightCounter):
                    counter.add(x)
                    return
                for met, made in within.products(x, output) if within else [(x, made_by(layer, x, output))]:
                    counter.add(met, made, None if self.averages is None else self.averages.of(met))

        return count

    def reduce(self) -> None:
        """Put together what all processes have counted."""
        own: dict[str, Any] = {
            "samples": (self.n_samples, self.n_batches),
            "weights": {name: counter.sums() for name, counter in self.weights.items()},
            "neurons": {name: (neuron.spikes, neuron.updates) for name, neuron in self.neurons.items()},
            "plain": {name: (plain.n_ac, plain.n_mac) for name, plain in self.plain.items()},
            "products": self.products,
            "unknown": dict.fromkeys(self._unknown, 1),
        }
        found = functools.reduce(added, gathered(own))
        self.n_samples, self.n_batches = found["samples"]
        self.products, self._unknown = found["products"], list(found["unknown"])
        for name, counter in self.weights.items():
            counter.take(found["weights"][name])
        for name, neuron in self.neurons.items():
            neuron.spikes, neuron.updates = found["neurons"][name]
        for name, plain in self.plain.items():
            plain.n_ac, plain.n_mac = found["plain"][name]

    def rows_seen(self) -> set[int]:
        """For how many samples at a time neurons fired last."""
        return {neuron.rows for neuron in self.neurons.values() if neuron.updates}

    def recording(self) -> ExitStack:
        """A context in which the model's calls are counted; all hooks are gone after it, also on error."""
        counters: dict[str, WeightCounter | PlainCounter] = {**self.weights, **self.plain}
        with ExitStack() as stack:
            for name, counter in counters.items():
                layer = layer_at(self.model, name)
                within = Within(layer) if has_its_own_forward(layer) else None
                if within is not None:
                    stack.callback(layer.register_forward_pre_hook(within.begin).remove)
                    stack.callback(layer.register_forward_hook(within.end, always_call=True).remove)
                handle = home(layer)[0].register_forward_hook(self._count(counter, layer, within), with_kwargs=True)
                stack.callback(handle.remove)
            for name, observer in self.neurons.items():
                neuron = self.model.get_submodule(name)
                stack.callback(self.adapter.observe(neuron, observer, membrane=False))
            return stack.pop_all()

    def rows(self, energy: EnergyModel) -> Iterator[LayerProfile]:
        """One row per layer in module order; every parameter is in exactly one of them."""
        divisor = self.n_samples if self.conventions.per == "sample" else self.n_batches
        owned = self._parameters()
        for name in self._rows():
            for function, counts in self.products.get(name, {}).items():
                n_ac, n_mac = (count / divisor for count in counts)
                yield LayerProfile(
                    name=f"{name}.{function}".lstrip("."), kind="product", n_params=0, size_mb=0.0, n_mac=n_mac,
                    n_ac=n_ac, energy_pj=energy_of(energy, OperationCounts(n_ac, n_mac)),
                )  # fmt: skip
            if name not in owned:
                continue
            module: Any = layer_at(self.model, name)
            kind: Kind = "other"
            n_ac = n_mac = updates = 0.0
            firing_rate = input_rate = sparsity = bits = None
            n_weights, state_mb, memory = 0, 0.0, None
            if name in self.weights:
                kind, counter = "weight", self.weights[name]
                n_ac, n_mac = (count / divisor for count in counter.totals())
                used = weight_in_use(module)
                weight = module.weight if used is None else used
                n_weights, input_rate = weight.numel(), counter.input_rate
                sparsity = (n_weights - int(weight.count_nonzero())) / n_weights if n_weights else 0.0
                bits = weight_bits(module) or brevitas_bits(module) or FLOAT_BITS
                memory = counter.memory(divisor, bits)
            elif name in self.neurons:
                kind, neuron = "neuron", self.neurons[name]
                bits = self.adapter.state_bits(module)
                updates, state_mb = neuron.updates / divisor, neuron.size * (bits or FLOAT_BITS) / 8e6
                firing_rate = neuron.spikes / neuron.updates if neuron.updates else None
                n_ac = updates if self.conventions.neuron_updates == "in_totals" else 0.0
                memory = MemoryUse(output_size=neuron.size, n_outputs=updates, n_spikes_out=neuron.spikes / divisor)
            elif name in self.plain:
                plain = self.plain[name]
                kind = "pool" if plain.is_pool else "norm"
                n_ac, n_mac = plain.n_ac / divisor, plain.n_mac / divisor
            # An update that was already counted as an AC isn't charged twice.
            apart = updates if self.conventions.neuron_updates == "apart" else 0.0
            n_params, n_quantized = owned[name]
            if PACKED in vars(module):
                n_params, n_quantized = n_params + n_weights, n_weights
            size_bits = n_quantized * (bits or FLOAT_BITS) + (n_params - n_quantized) * FLOAT_BITS
            yield LayerProfile(
                name=name, kind=kind, n_params=n_params, size_mb=size_bits / 8e6, n_mac=n_mac, n_ac=n_ac,
                energy_pj=energy_of(energy, OperationCounts(n_ac, n_mac, apart, memory)),
                firing_rate=firing_rate, bits=bits, sparsity=sparsity, input_rate=input_rate,
                n_neuron_updates=updates, state_mb=state_mb, n_weights=n_weights,
            )  # fmt: skip

    def _rows(self) -> Iterator[str]:
        """Names of all modules, and of the weights of cells."""
        for name, module in self.model.named_modules():
            yield name
            yield from cell_weights(name, module)

    def _parameters(self) -> dict[str, tuple[int, int]]:
        """Row → (parameters, those of them that have the row's bit width)."""
        listed = {*self.weights, *self.neurons, *self.plain}
        owned = dict.fromkeys(listed, (0, 0))
        for parameter_name, parameter in self.model.named_parameters():  # a shared one comes once
            plain = _STORED.sub(r".\1", parameter_name).lstrip(".")  # as it is called in an uncompressed network
            owner = plain.rpartition(".")[0]
            row = next((name for name in (plain, *_ancestors(owner)) if name in listed), owner)
            total, quantized = owned.get(row, (0, 0))
            is_weight = row in self.weights and plain in (row, f"{row}.weight".lstrip("."))
            owned[row] = total + parameter.numel(), quantized + is_weight * parameter.numel()
        return owned


def _ancestors(name: str) -> Iterator[str]:
    """The module and what contains it, from the inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
