"""``profile`` and ``compare``: size, operations, energy and firing rates of spiking networks on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from snncompress.base.distributed import together
from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, EnergyModel, Forward
from snncompress.model.computed_once import evaluating
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.running.bench import bench
from snncompress.running.data import Batch, Feed
from snncompress.running.scores import count_samples

from .conventions import Conventions, resolve_conventions
from .meter import Meter
from .reporting import Comparison, LayerProfile, Profile

__all__ = ["Comparison", "LayerProfile", "Profile", "compare", "profile"]


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
    meter = Meter(model, feed.adapter, rules)
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


def _described(energy: EnergyModel) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in energy.options().items())
    return f"{energy.name}({options}): {energy.covers}" if options else f"{energy.name}: {energy.covers}"
