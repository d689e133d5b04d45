"""Finds a network's structure: one forward pass with every neuron an identity, read by torch-pruning.

What torch-pruning concludes is not believed but tested: see :mod:`snncompress.structure.verifying`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops
from torch_pruning.dependency import shape_infer
from torch_pruning.pruner.function import BasePruningFunc

from snncompress.errors import DataError, ModelError, SNNCompressError
from snncompress.interfaces import Adapter
from snncompress.model.copying import plain_copy
from snncompress.model.modules import patched, tensors_in
from snncompress.model.network import (
    WEIGHT_LAYERS,
    ChannelGroup,
    Member,
    Network,
    Side,
    channel_axis,
    computed_or_shared,
    prunable_type,
    width,
)
from snncompress.running.data import Run, time_as_samples

from .axes import Axes
from .reshaping import Key, TiedError, Touched, UnfitError, concatenated, find_reshapings, flatten, in_runs, offset
from .verifying import leave_out_what_breaks

_LOST = "its channels can't be followed through what forward does with them"


def trace(
    model: nn.Module, adapter: Adapter, run: Run, *, timesteps: int | None = None, groups: bool = True
) -> Network:
    """The network's structure; the model itself is not touched.

    ``run(copy)`` must run an example; with ``timesteps``, one sample as constant current. Raises DataError where the
    neurons took those steps for samples; ModelError where no weight layer drives a neuron. Without ``groups``
    nothing is found out, and tried, about channels that go together.
    """
    with torch.inference_mode(False), torch.enable_grad(), _full_precision():
        return _trace(plain_copy(model, adapter), adapter, run, timesteps, groups)


def _trace(copy: nn.Module, adapter: Adapter, run: Run, timesteps: int | None, groups: bool) -> Network:
    modules = dict(copy.named_modules())
    neurons = adapter.neurons(copy)
    inside = {f"{n}.{sub}" for n in neurons for sub, _ in neurons[n].named_modules() if sub}
    weights = {n: m for n, m in modules.items() if isinstance(m, WEIGHT_LAYERS) and n not in inside}
    norms: dict[str, nn.Module] = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm) and n not in inside}

    calls = _Calls({name: channel_axis(layer) for name, layer in weights.items()})
    graph = _Graph(calls.axes)
    watched = {**weights, **neurons, **norms}
    currents: dict[nn.Module, Tensor] = {}

    def wire(neuron: nn.Module, x: Tensor) -> Tensor:
        currents[neuron] = x
        return x * 1.0  # out of place: the input keeps its own node in the graph

    with adapter.identities(copy, wire), calls.watching(watched), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's remarks are about its own internals
        outputs, readable = _build(graph, copy, adapter, run, neurons)

    if timesteps not in (None, 1) and {len(x) for x in currents.values()} == {timesteps}:
        raise DataError(time_as_samples(timesteps))
    layers = tuple(name for name in calls.inputs if name in weights)
    fed_by = {name: _upstream(calls.inputs[name], calls.named(weights)) for name in layers}
    visible = _upstream([o.grad_fn for o in outputs], calls.named(weights))
    consumed = set().union(*fed_by.values()) if fed_by else set()
    last = [n for n in layers if n in visible and n not in consumed] or [n for n in layers if n in visible][-1:]
    stops = calls.named({**weights, **neurons})
    driven_by = {n: _upstream(calls.inputs[n], stops) for n in neurons if n in calls.inputs}
    network = Network(
        layers=layers,
        neurons=tuple(n for n in calls.inputs if n in neurons),
        drives={name: tuple(n for n, by in driven_by.items() if name in by) for name in layers},
        producers={name: tuple(p for p in layers if p in fed_by[name]) for name in layers},
        norms=_norms(calls, norms, stops),
        classifiers=tuple(last),
    )
    if not any(network.drives.values()):
        raise ModelError(
            f"No weight layer of {type(copy).__name__} drives a spiking neuron, as far as it can be traced. Likely "
            f"cause: an operation without a gradient between them."
        )
    for name in weights:
        if name not in layers:
            network.skipped[name] = "the model never calls it on this input"
    if not groups:
        return network
    if not readable:
        network.skipped.update(dict.fromkeys(layers, _LOST))
        return network
    exposed = [name for name in visible if name not in last]
    skipped = computed_or_shared(copy) | {n: f"the channels of {n} are part of the model's output" for n in exposed}
    sites = {n: _Site.of(currents[m], calls.axes) for n, m in neurons.items() if m in currents}
    _add_groups(network, graph, copy, sites, skipped)
    leave_out_what_breaks(network, copy, adapter, run)
    return network


@contextmanager
def _full_precision() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class _Calls:
    """The autograd nodes that go in and out of watched modules; ``layers`` maps weight layers to their channel axis.

    From the third time on that a module is called with an input that went through the same modules, it returns what
    it returned the second time: a model with its own loop over T steps then costs little more graph than two steps,
    which is where a recurrent connection shows itself.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.axes = Axes()
        self._layers = layers
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[Any, str] = {}
        self._ancestors: dict[Any, frozenset[str]] = {}  # of an output: all watched modules it went through
        self._results: dict[Any, list[Any]] = {}

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(patched(module, "forward", self._watched(name, module.forward)))
            yield

    def _watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            x = next(tensors_in([args, named]))
            through = frozenset({name}).union(*(self._ancestors[n] for n in _stops([x.grad_fn], self.outputs)))
            results = self._results.setdefault((name, x.shape, through), [])
            if len(results) == 2:
                return results[-1]
            result = forward(*args, **named)
            results.append(result)
            self.inputs.setdefault(name, []).append(x.grad_fn)
            node = next(tensors_in(result)).grad_fn
            self.outputs[node], self._ancestors[node] = name, through
            if name in self._layers:
                self.axes.known[node] = self._layers[name]
            return result

        return call

    def named(self, modules: Iterable[str]) -> dict[Any, str]:
        wanted = set(modules)
        return {node: name for node, name in self.outputs.items() if name in wanted}


def _upstream(nodes: Iterable[Any], stops: dict[Any, str]) -> set[str]:
    """Names of the first stops met when walking the graph backwards."""
    return {stops[node] for node in _stops(nodes, stops)}


def _stops(nodes: Iterable[Any], stops: dict[Any, str]) -> set[Any]:
    found, seen, stack = set(), set(), [n for n in nodes if n is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.add(node)
        else:
            stack.extend(n for n, _ in node.next_functions if n is not None)
    return found


def _norms(calls: _Calls, norms: dict[str, nn.Module], stops: dict[Any, str]) -> dict[str, str]:
    """weight layer → the batch normalization that it alone feeds."""
    found = {}
    for norm in norms:
        feeding = _upstream(calls.inputs.get(norm, []), stops)
        if len(feeding) == 1:
            found[feeding.pop()] = norm
    return found


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

    pruners = {type(m): _NeuronPruner() for m in neurons.values()}
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


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's graph, told which reshape is the flatten, where concatenated channels start, what shuffles do.

    It guesses the flatten from the layers before and after, and so takes every reshape on the way for a flatten: in
    multi-step mode, where [T, N] is folded and unfolded, indices would be multiplied again and again.
    """

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self._axes = axes

    def _trace(self, *args: Any, **kwargs: Any) -> Any:
        nodes = super()._trace(*args, **kwargs)
        self._2d_4d = True
        self._reshapings = dict(find_reshapings(nodes.values(), self._axes))
        for node in nodes.values():
            if node.type == ops.OPTYPE.CONCAT:
                node.module.concat_sizes = concatenated(node, self._axes)
            elif node.type == ops.OPTYPE.RESHAPE and self._flattens(node) and (reshaping := flatten(node, self._axes)):
                self._reshapings[node] = reshaping
            if node in self._reshapings or node.type == ops.OPTYPE.RESHAPE:
                node.type = ops.OPTYPE.ELEMENTWISE
        return nodes

    def build_dependency(self, *args: Any, **kwargs: Any) -> Any:
        super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == ops.OPTYPE.CONCAT and node.module.offsets is None:
                offset(self, node)
        for node, reshaping in self._reshapings.items():
            reshaping.attach(node)
        return self

    def get_pruning_group(self, *args: Any, **kwargs: Any) -> Any:
        for reshaping in self._reshapings.values():
            reshaping.restart()
        return super().get_pruning_group(*args, **kwargs)

    def _flattens(self, node: Any) -> bool:
        before = getattr(node.grad_fn, "_saved_self_sym_sizes", None)
        after = [m.shape for m in node.grad_fn._input_metadata]
        if not before or not after:
            return True
        taken = (shape_infer.infer_in_channels_recursively(self, n, [0]) for n in node.outputs)
        consumer = next((t for t in taken if t is not None), None)
        return bool(before[-1] != after[0][-1] == consumer)


@dataclass(frozen=True)
class _Site:
    """How many channels a neuron has, and on which axis of its input."""

    width: int
    axis: int

    @classmethod
    def of(cls, current: Tensor, axes: Axes) -> _Site:
        axis = axes.of(current.grad_fn)
        if axis is None or current.dim() < -axis:
            axis = min(1, current.dim() - 1) - current.dim()
        return cls(current.shape[axis] if current.dim() else 1, axis)


class _NeuronPruner(BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning that a neuron has as many inputs as outputs; the adapter does the cutting."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> None:
        return None

    get_in_channels = get_out_channels


def _add_groups(
    network: Network, graph: _Graph, model: nn.Module, neurons: dict[str, _Site], skipped: dict[str, str]
) -> None:
    names = {m: n for n, m in model.named_modules()}
    done: set[str] = set()
    for layer in network.layers:
        if layer in done:
            continue
        try:
            group = _group(graph, model.get_submodule(layer), names, neurons)
        except UnfitError as error:
            network.skipped[layer] = str(error)
            continue
        except Exception:  # here too; each way means: don't touch this layer
            network.skipped[layer] = _LOST
            continue
        outs = group.names("out")
        weight_outs = [n for n in outs if n in network.layers]
        done.update(weight_outs)
        reason = _why_whole(network, group, weight_outs, skipped)
        if reason:
            network.skipped.update(dict.fromkeys(weight_outs, reason))
        else:
            network.groups.append(group)


def _why_whole(network: Network, group: ChannelGroup, outs: list[str], skipped: dict[str, str]) -> str:
    for name in outs:
        if name in network.classifiers:
            return f"{name} is the classifier: its outputs are the model's"
    for name in (m.module for m in group.members):
        if name in skipped:
            return skipped[name] if name in outs else f"coupled with {name}: {skipped[name]}"
    for name in outs:
        cut = [n for n in network.drives[name] if n not in group.names("neuron")]
        if cut or not network.drives[name]:
            return f"no spiking neuron follows {name} that its channels could be traced to"
    if not group.names("in"):
        return "no layer that takes these channels in could be traced"
    if group.size // group.runs < 2:
        return "it has a single channel" if group.runs == 1 else f"each of its {group.runs} groups has one channel"
    return ""


def _group(graph: _Graph, module: nn.Module, names: dict[nn.Module, str], neurons: dict[str, _Site]) -> ChannelGroup:
    """torch-pruning's group of all output channels of ``module``."""
    pruner = graph.get_pruner_of_module(module)
    size = int(pruner.get_out_channels(module))

    def touched(channels: list[int]) -> Touched:
        group = graph.get_pruning_group(module, pruner.prune_out_channels, channels)
        return _touched(graph, group, names, neurons)

    own: Key = (names[module], "out")
    try:
        everything = touched(list(range(size)))
    except TiedError:
        indices, runs = in_runs(touched, own, size)
    else:
        indices, runs = {key: _index(idxs, roots, size) for key, (idxs, roots) in everything.items()}, 1
        if any(touched([probe])[own][0] != [probe] for probe in {0, size // 2}):
            raise UnfitError("its channels are tied to one another")
    members, counts = [], {1, runs}
    for (name, side), index in indices.items():
        member, target = Member(name, side, index), graph.model.get_submodule(name)
        if name in neurons:
            member = replace(member, width=neurons[name].width, axis=neurons[name].axis)
        elif side == "out" and isinstance(target, WEIGHT_LAYERS) and index.shape != (width(target, side), 1):
            raise UnfitError(f"some, not all of the channels of {name} are coupled with it")
        members.append(member)
        counts.add(_runs(target, member))
    if len(counts) > 2:
        raise UnfitError(f"it is coupled with convolutions of different group counts ({sorted(counts - {1})})")
    return ChannelGroup(tuple(members), size, max(counts))


def _touched(graph: _Graph, group: Any, names: dict[nn.Module, str], neurons: Iterable[str]) -> Touched:
    found: Touched = {}
    for item in group:
        target, handler = item.dep.target.module, item.dep.handler
        if isinstance(target, nn.Parameter):
            raise UnfitError("a parameter that belongs to no layer depends on its channels")
        name = names.get(target)
        if name is None:  # torch-pruning's stand-in for an addition, a reshape, a concatenation
            continue
        if name not in neurons and not prunable_type(target):
            continue
        side: Side = "neuron" if name in neurons else "out" if graph.is_out_channel_pruning_fn(handler) else "in"
        if (name, side) in found:
            raise UnfitError(f"{name} takes its channels in twice")
        found[name, side] = (item.idxs, item.root_idxs)
    return found


def _index(idxs: list[int], roots: list[int], size: int) -> Tensor:
    if None in roots or len(idxs) % size or len(idxs) == 0:
        raise UnfitError("its channels don't map evenly onto what follows")
    root, index = torch.tensor(roots), torch.tensor(idxs)
    order = torch.argsort(root * (int(index.max()) + 1) + index)
    rows = root[order].view(size, -1)
    if not torch.equal(rows, torch.arange(size)[:, None].expand_as(rows)):
        raise UnfitError("its channels don't map evenly onto what follows")
    return index[order].view(size, -1)


def _runs(module: nn.Module, member: Member) -> int:
    groups = getattr(module, "groups", 1)
    depthwise = groups == getattr(module, "out_channels", None) == getattr(module, "in_channels", None)
    if groups == 1 or depthwise:
        return 1
    if not torch.equal(member.index.flatten(), torch.arange(len(member.index))):
        raise UnfitError(f"the {groups} groups of {member.module} don't match its channels one to one")
    return int(groups)
