"""Finds a network's structure: one forward pass with every neuron an identity, read by torch-pruning.

What torch-pruning concludes is not believed but tested: see :mod:`snncompress.structure.verifying`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.errors import DataError, ModelError, SNNCompressError
from snncompress.interfaces import Adapter
from snncompress.model.cells import cell_weights, drivers, input_weights, layer_at
from snncompress.model.channel_map import ChannelMap
from snncompress.model.copying import discard, plain_copy
from snncompress.model.modules import tensors_in
from snncompress.model.network import (
    WEIGHT_LAYERS,
    ChannelGroup,
    Network,
    channel_axis,
    computed_or_shared,
    depthwise,
    multiplier,
    weight_layers,
)
from snncompress.model.parametrizations import computed_before, stored_weight
from snncompress.running.data import Run, time_as_samples
from snncompress.running.precision import full_precision

from .calls import Calls, leaves, upstream
from .graphs import LOST, Graph, MapPruner, NeuronPruner, Site
from .grouping import add_groups, add_lost_groups
from .recurrent import CellPruner, in_one_node
from .shared_neurons import functions, several_widths
from .verifying import leave_out_what_breaks

_IDLE = "the model never calls it on this input"
_READ = "its weight is read without the layer being called, as nn.MultiheadAttention reads out_proj's"


def trace(
    model: nn.Module, adapter: Adapter, run: Run, *, timesteps: int | None = None, groups: bool = True
) -> Network:
    """The network's structure; the model itself is not touched.

    ``run(copy)`` must run an example; with ``timesteps``, one sample as constant current. Raises DataError where the
    neurons took those steps for samples; ModelError where no weight layer drives a neuron. Without ``groups``
    nothing is found out, and tried, about channels that go together.
    """
    with torch.inference_mode(False), torch.enable_grad(), full_precision():
        return _trace(model, adapter, run, timesteps, groups)


def _trace(
    model: nn.Module, adapter: Adapter, run: Run, timesteps: int | None, groups: bool, shared: tuple[str, ...] = ()
) -> Network:
    copy = plain_copy(model, adapter)
    try:
        found = _structure(copy, adapter, run, timesteps, groups, shared)
        if isinstance(found, Network):
            leave_out_what_breaks(found, copy, adapter, run)
            told = _firing(found.layers, adapter.neurons(copy))
            found.skipped |= {n: told[n] for n in found.skipped.keys() & told.keys() - {*found.classifiers}}
            return found
    finally:
        discard(copy)
    return _trace(model, adapter, run, timesteps, groups, found)


def _structure(
    copy: nn.Module, adapter: Adapter, run: Run, timesteps: int | None, groups: bool, shared: tuple[str, ...]
) -> Network | tuple[str, ...]:
    """The network with the groups that were found and not tried yet; the activations are gone when it returns.

    Or the neurons that are to be looked through, as functions that several layers share.
    """
    modules = dict(copy.named_modules())
    everyone = adapter.neurons(copy)
    neurons = {n: m for n, m in everyone.items() if n not in shared}
    inside = {f"{n}.{sub}" for n, neuron in everyone.items() for sub, _ in neuron.named_modules() if sub}
    weights = {n: m for n, m in modules.items() if isinstance(m, WEIGHT_LAYERS) and n not in inside}
    norms: dict[str, nn.Module] = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm) and n not in inside}

    calls = Calls({name: channel_axis(layer) for name, layer in weights.items()})
    graph = Graph(calls.axes, ignored=[everyone[name] for name in shared])
    held = drivers(neurons)
    cells = {n: m for n, m in modules.items() if (n not in inside or n in held) and input_weights(m)}
    maps = {n: m for n, m in modules.items() if isinstance(m, ChannelMap)}
    watched = {**weights, **neurons, **norms, **cells, **maps}
    currents: dict[nn.Module, Tensor] = {}
    places: dict[nn.Module, set[tuple[int, int]]] = {}

    def wire(neuron: nn.Module, x: Tensor) -> Tensor:
        currents[neuron] = x
        site = Site.of(x, calls.axes)
        places.setdefault(neuron, set()).add((site.width, site.axis))
        return x * 1.0  # out of place: the input keeps its own node in the graph

    with in_one_node(copy), adapter.identities(copy, wire), calls.watching(watched), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's remarks are about its own internals
        outputs, readable = _build(graph, copy, adapter, run, neurons)

    if groups and not shared:
        found = functions(copy, adapter, run, {n: places[m] for n, m in neurons.items() if m in places})
        if found:
            graph.forget()
            return found
    if timesteps not in (None, 1) and {len(x) for x in currents.values()} == {timesteps}:
        raise DataError(time_as_samples(timesteps))
    held = {n: neuron for n, neuron in held.items() if groups and neurons[neuron] in currents}
    as_layers = {n: f"{n}.weight_ih_l0" for n in held}
    layers = tuple(as_layers.get(name, name) for name in calls.inputs if name in weights or name in held)
    takers = {n: n for n in layers if n in weights}
    takers |= {weight: n for n, cell in cells.items() if n in calls.inputs for weight in cell_weights(n, cell)}
    fed_by = {
        name: {as_layers.get(p, p) for p in upstream(calls.inputs[module], calls.named([*weights, *held]))}
        for name, module in takers.items()
    }
    visible = upstream([o.grad_fn for o in outputs], calls.named({**weights, **cells}))
    consumed = set().union(*fed_by.values()) if fed_by else set()
    last = [n for n in layers if n in visible and n not in consumed] or [n for n in layers if n in visible][-1:]
    stops = calls.named({**weights, **neurons, **maps})
    reached_by = {n: upstream(calls.inputs[n], stops) for n in (*neurons, *layers, *maps) if n in calls.inputs}
    network = Network(
        layers=layers,
        neurons=tuple(n for n in calls.inputs if n in neurons),
        drives={name: tuple(n for n, by in reached_by.items() if n in neurons and name in by) for name in layers}
        | {as_layers[n]: (neuron,) for n, neuron in held.items()},
        producers={name: tuple(p for p in layers if p in by) for name, by in fed_by.items()},
        norms=_norms(calls, norms, stops),
        classifiers=(*last, *(w for w, module in takers.items() if module in visible and module in cells)),
        direct={n: tuple(p for p in layers if p in by) for n, by in reached_by.items() if n not in neurons},
        shared=shared,
    )
    fed = {n: upstream(calls.inputs[n], stops) for n in cells if n in calls.inputs}
    readers = {n: by.pop() for n, by in fed.items() if len(by) == 1}
    inner = weight_layers(nn.ModuleList(neurons.values()))  # of neurons that hold what drives them
    if not (any(network.drives.values()) or inner or shared):
        cause = next(iter(_firing(weights, neurons).values()), "an operation without a gradient between them")
        raise ModelError(
            f"No weight layer of {type(copy).__name__} drives a spiking neuron, as far as it can be traced. Likely "
            f"cause: {cause}."
        )
    if uncalled := [name for name in weights if name not in layers]:
        read = leaves(o.grad_fn for o in outputs)
        network.skipped |= {n: _READ if id(stored_weight(weights[n])) in read else _IDLE for n in uncalled}
    if not groups:
        return network
    exposed = [name for name in visible if name in weights and name not in last]
    # a weight that forward computes from a parameter is cut with it, as far as a trial shows
    skipped = computed_or_shared(copy, computed_before) | {
        n: f"the channels of {n} are part of the model's output" for n in exposed
    }
    sites = {n: Site.of(currents[m], calls.axes) for n, m in neurons.items() if m in currents}
    rows = {as_layers[cell]: neuron for cell, neuron in held.items()}
    if readable:
        add_groups(network, graph, copy, sites, readers, rows, skipped)
    else:
        network.skipped.update(dict.fromkeys(layers, LOST))
    add_lost_groups(network, copy, adapter, run, sites, readers, rows, skipped)
    for name in network.skipped.keys() & set(layers):
        several = next((n for n in network.drives[name] if several_widths(places.get(neurons[n], set()))), None)
        if several is not None:
            network.skipped[name] = f"{several} is one neuron for layers of several widths"
    everything = calls.named(watched)
    taken = {name: upstream(nodes, everything) for name, nodes in calls.inputs.items()}
    network.groups = [replace(group, shifted=tuple(_shifted(group, network, taken, copy))) for group in network.groups]
    graph.forget()
    return network


def _firing(layers: Iterable[str], neurons: Iterable[str]) -> dict[str, str]:
    """Layer → that it fires, of those of users' own classes that hold neurons."""
    return {
        layer: f"{neuron} fires in the forward of {layer} itself, which so doesn't put out its channels"
        for layer, neuron in itertools.product(layers, neurons)
        if neuron.startswith(f"{layer}.")
    }


def _norms(calls: Calls, norms: dict[str, nn.Module], stops: dict[Any, str]) -> dict[str, str]:
    """weight layer → the batch normalization that it alone feeds."""
    found = {}
    for norm in norms:
        feeding = upstream(calls.inputs.get(norm, []), stops)
        if len(feeding) == 1:
            found[feeding.pop()] = norm
    return found


def _shifted(
    group: ChannelGroup, network: Network, taken: dict[str, set[str]], model: nn.Module
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Ways from the group's neurons, or a depthwise convolution that takes in silence, to what reads the group.

    What a layer that isn't silent writes straight into is silenced there, so that nothing comes through.
    """

    def way_to(name: str) -> tuple[str, ...] | None:
        module, sources = layer_at(model, name), taken.get(name, set())
        if not (depthwise(module) or isinstance(module, _BatchNorm)) or name not in made:
            return None
        if sources <= neurons or (depthwise(module) and not any(map(way_to, sources))):
            return (name,)
        before = way_to(*sources) if len(sources) == 1 else None
        return before and (*before, name)

    made, neurons = set(group.names("out")), set(group.names("neuron"))
    writers = {name for name in made if not multiplier(layer_at(model, name))}
    for reader in group.names("in"):
        if writers & set(network.direct.get(reader, ())):
            continue
        yield from ((way, reader) for source in taken.get(reader, ()) if (way := way_to(source)))


def _build(
    graph: tp.DependencyGraph, model: nn.Module, adapter: Adapter, run: Run, neurons: dict[str, nn.Module]
) -> tuple[list[Tensor], bool]:
    """The outputs, and whether torch-pruning could make a graph of what they come from."""
    outputs: list[Tensor] = []

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        outputs.extend(t for t in tensors_in(run(model)) if t.grad_fn is not None)
        if not outputs:
            raise ModelError(
                f"The output of {type(model).__name__} has no gradient, so its channels can't be followed. Likely "
                f"cause: it runs under torch.no_grad() or detaches its output."
            )
        return outputs

    pruners: dict[type, Any] = {type(m): CellPruner() for m in model.modules() if input_weights(m)}
    pruners |= {type(m): NeuronPruner() for m in neurons.values()}
    pruners[ChannelMap] = MapPruner()
    try:
        with torch.enable_grad():
            graph.build_dependency(model, (), forward, customized_pruners=pruners, verbose=False)
    except SNNCompressError:
        raise
    except Exception:  # torch-pruning gives up in many ways
        if not outputs:
            raise
        return outputs, False
    return outputs, True
