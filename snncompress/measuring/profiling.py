"""``profile`` and ``compare``: size, operations, energy and firing rates of spiking networks on data."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from snncompress.base.distributed import added, gathered, together
from snncompress.contract.registry import registry
from snncompress.errors import DataError, OptionError
from snncompress.interfaces import Adapter, EnergyModel, Forward, MemoryUse, OperationCounts
from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.cells import cell_weights, home, layer_at, made_by, met_by
from snncompress.model.computed_once import evaluating
from snncompress.model.network import NORMS, POOLS, WEIGHT_LAYERS
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.parametrizations import PACKED, weight_bits
from snncompress.model.weights_in_use import Within, has_its_own_forward, weight_in_use
from snncompress.running.bench import bench
from snncompress.running.data import Batch, Feed, time_as_samples
from snncompress.running.scores import count_samples

from .averaged_spikes import AveragedSpikes
from .conventions import Conventions, resolve_conventions
from .counting import FLOAT_BITS, PlainCounter, WeightCounter, energy_of, spike_sum
from .direct_encoding import clock_of
from .products import Product
from .reporting import Comparison, Kind, LayerProfile, Profile
from .uncounted import unknown_weights
from .watching import Watch, watched

__all__ = ["Comparison", "LayerProfile", "Profile", "compare", "profile"]

_STORED = re.compile(r"\.?\bparametrizations\.(\w+)\.original$")


def profile(
    model: nn.Module,
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    energy_model: EnergyModel | str = "horowitz_45nm",
    conventions: Conventions | str | None = None,
) -> Profile:
    """Measure a network on data: parameters, megabytes, operations, energy, firing rates.

    A network without spiking neurons is an ordinary one: each sample goes through once, whatever ``timesteps``, and all
    that it does is multiply-accumulates.

    Size is Eq. 16 of QP-SNN (ICLR 2025), Σ P_q·B_q + Σ P_fp·32 bits, in MB = 10⁶ bytes: a quantized weight
    counts its bit width, every other parameter (biases, normalization, learnable decays) 32 bits, also where
    it is stored in half precision; a shared parameter counts once, buffers never. Pruned weights that are
    still stored count.

    Operations are counted exactly, spike by spike (:mod:`snncompress.measuring.counting`), in every convolution,
    transposed convolution and linear layer, also the recurrent ones inside neurons, with the weight that the layer
    multiplies with: a layer of Brevitas' counts its bits and the zeros of its quantized weight. Products of tensors
    outside such layers (attention) have rows of their own; what isn't counted (``F.conv2d`` with a parameter, attention
    that torch computes in one piece) is named. The model runs as a
    private copy in eval mode without gradients, and stays bitwise as it is, as does torch's random state.
    Of several processes (torchrun) each runs its own data, and all get the profile of all data.
    Memory doesn't grow with the number of batches.

    Args:
        model: the network, of a framework that an adapter knows.
        data: a tensor, an (x, y) batch, a DataLoader, or an iterable of either.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        neurons: the class of spiking neurons of your own, or several (:class:`snncompress.OwnNeurons`).
        time_dim: the axis of time in what they take, None where they take one timestep.
        energy_model: name or instance of the :class:`EnergyModel` that turns counts into pJ: ``"horowitz_45nm"``,
            arithmetic alone, ``"lemaire_45nm"``, memory too, or ``"loihi"``, synapses and neurons of that chip.
        conventions: what is counted: a preset (``"snncompress"``, ``"qp_snn"``, ``"neurobench"``, ``"spikingjelly"``,
            ``"syops"``) or :class:`Conventions`. The number of samples is that of the labels where they
            are one each, else the number that neurons saw at a time, else it is taken from the output.

    Raises:
        ModelError: neurons of two frameworks, or an uninitialised layer.
        DataError: the data don't fit the model, or don't tell how many samples they hold.
        UnknownNameError: no energy model, adapter or conventions of that name.
        OptionError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> first, last = layer.Linear(4, 3, bias=False), layer.Linear(3, 2, bias=False)
        >>> _ = nn.init.ones_(first.weight)
        >>> net = nn.Sequential(first, neuron.IFNode(), last)
        >>> result = profile(net, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), timesteps=2)
        >>> result.n_params, result.size_mb                  # 4·3 + 3·2 weights of 4 bytes
        (18, 7.2e-05)
        >>> [row.n_ac for row in result.layers]              # 2 steps · 2 spikes · 3, and 2 · 3 · 2
        [12.0, 0.0, 12.0]
        >>> round(result.energy_pj, 9), result.firing_rate   # 24 AC · 0.9 pJ
        (21.6, 1.0)
    """
    rules = resolve_conventions(conventions)
    energy: EnergyModel = registry().resolve("energy model", energy_model, EnergyModel)
    named = named_neurons(adapter, neurons, time_dim)
    with bench(model, data, timesteps, forward, adapter=named, plain=True, unknown=True, mixed=True) as table:
        return measure(table.model, table.feed, energy, rules)


def measure(
    model: nn.Module,
    feed: Feed,
    energy: EnergyModel,
    rules: Conventions,
    watch: Callable[[Any, Batch], None] | None = None,
) -> Profile:
    """What :func:`profile` does on its bench; ``watch`` is handed every output and its batch on the way."""
    meter = _Meter(model, feed.adapter, rules)
    with together(), evaluating(model), feed.adapter.alone(model), meter.recording():
        for batch in feed:
            with meter.watching(batch):
                output = feed(model, batch)
            if feed.timesteps is not None and feed.timesteps != len(batch.x):
                meter.check_rows(feed.timesteps)
            meter.end_batch(feed.steps(model))
            meter.n_samples += count_samples(feed, output, batch, meter.rows_seen())
            meter.n_batches += 1
            if watch:
                watch(output, batch)
    feed.adapter.reset(model)
    meter.reduce()
    return Profile(
        layers=tuple(meter.rows(energy)),
        conventions=rules,
        energy_model=_described(energy),
        n_samples=meter.n_samples,
        n_batches=meter.n_batches,
        title=type(model).__name__,
        uncounted=tuple(meter.uncounted()),
    )


def compare(
    models: Mapping[str, nn.Module | Profile],
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    energy_model: EnergyModel | str = "horowitz_45nm",
    conventions: Conventions | str | None = None,
) -> Comparison:
    """Profile several networks on the same data and set them side by side, with ratios to the first.

    ``models`` maps names to networks, or to profiles made before: one that needs other arguments than the
    rest (fewer timesteps, say) is profiled on its own and handed in. Other arguments and errors:
    :func:`profile`.

    A CNN and the spiking network that it became go in together; the ratio of energies is then
    ``compare({"cnn": cnn, "snn": snn}, data, timesteps=T).ratios["snn"]["energy_pj"]``.

    Raises:
        OptionError: ``models`` is empty or no mapping, or the profiles were made under different conventions
            or energy models.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> wide, slim = (nn.Sequential(layer.Linear(4, n), neuron.IFNode()) for n in (8, 2))
        >>> compare({"wide": wide, "slim": slim}, torch.ones(1, 4)).ratios["slim"]["n_params"]
        0.25
    """
    networks = by_name("compare", models, Profile)
    if isinstance(data, Iterator):  # every model must see the same batches
        data = list(data)
    profiles = {
        name: entry
        if isinstance(entry, Profile)
        else profile(
            entry, data, timesteps=timesteps, forward=forward, adapter=adapter,
            energy_model=energy_model, conventions=conventions,
        )
        for name, entry in networks.items()
    }  # fmt: skip
    return Comparison(profiles)


def by_name(what: str, models: Any, *others: type) -> dict[str, Any]:
    """Name → network, or what else may stand there; raises OptionError where ``what`` was handed something else."""
    kinds = (nn.Module, *others)
    example = "takes a mapping of names to networks, such as {'dense': model}"
    if not isinstance(models, Mapping) or not models:
        given = "an empty one" if isinstance(models, Mapping) else f"a {type(models).__name__}"
        raise OptionError(f"{what} {example}, not {given}.")
    for name, model in models.items():
        if not isinstance(model, kinds):
            raise OptionError(f"{what} {example}; {name!r} is a {type(model).__name__}.")
    found = {str(name): model for name, model in models.items()}
    if len(found) < len(models):
        raise OptionError(f"{what} got two networks of one name: {', '.join(map(repr, models))}.")
    return found


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


class _Meter:
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
        self.averages = AveragedSpikes(conventions.spike_values) if averages else None
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
        found = self.products or (self.averages is not None and self.averages.any)
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


def _described(energy: EnergyModel) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in energy.options().items())
    return f"{energy.name}({options}): {energy.covers}" if options else f"{energy.name}: {energy.covers}"
