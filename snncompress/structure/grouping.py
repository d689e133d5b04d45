"""Channels that go together: what torch-pruning's dependency graph, set right, says of each layer's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import shape_infer
from torch_pruning.pruner.function import BasePruningFunc

from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
from snncompress.model.channel_map import ChannelMap
from snncompress.model.network import (
    WEIGHT_LAYERS,
    ChannelGroup,
    Member,
    Network,
    Side,
    multiplier,
    width,
)
from snncompress.model.resizing import prunable_type
from snncompress.running.data import Run

from .axes import Axes
from .coupling import coupled
from .reshaping import Key, TiedError, Touched, UnfitError, concatenated, find_reshapings, flatten, merge, offset
from .segments import segments
from .ties import ALL, fits_runs, in_runs, tied

_CLASSIFIER = "is the classifier: its outputs are the model's"
_ROUNDS = 4  # how often a group may pass each edge; once is what nearly all do
LOST = "its channels can't be followed through what forward does with them"


class Graph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's graph, told which reshape is the flatten, where concatenated channels start, what shuffles do.

    It guesses the flatten from the layers before and after, and so takes every reshape on the way for a flatten: in
    multi-step mode, where [T, N] is folded and unfolded, indices would be multiplied again and again.
    """

    def __init__(self, axes: Axes, ignored: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._axes = axes
        self.IGNORED_LAYERS_IN_TRACING.extend(ignored)

    def _trace(self, *args: Any, **kwargs: Any) -> Any:
        nodes = super()._trace(*args, **kwargs)
        self._2d_4d = True
        self._reshapings = dict(find_reshapings(nodes.values(), self._axes))
        for node in nodes.values():
            if node.type == ops.OPTYPE.CONCAT:
                node.spans = concatenated(node, self._axes)
                node.enable_index_mapping &= node.spans is None
            elif node.type == ops.OPTYPE.RESHAPE:
                found = flatten(node, self._axes) if self._flattens(node) else None
                if reshaping := found or merge(node, self._axes):
                    self._reshapings[node] = reshaping
            if node in self._reshapings or node.type == ops.OPTYPE.RESHAPE:
                node.type = ops.OPTYPE.ELEMENTWISE
        return nodes

    def build_dependency(self, *args: Any, **kwargs: Any) -> Any:
        """With what this graph knows of reshapes and concatenations put in."""
        super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == ops.OPTYPE.CONCAT and (node.spans is not None or node.module.offsets is None):
                offset(self, node)
        for node, reshaping in self._reshapings.items():
            reshaping.attach(node)
        self._patience = _Patience()
        for node in self.module2node.values():
            node.dependencies = _Edges(node.dependencies, self._patience)
            self._patience.edges += len(node.dependencies)
        return self

    def get_pruning_group(self, *args: Any, **kwargs: Any) -> Any:
        """From a clean slate."""
        for reshaping in self._reshapings.values():
            reshaping.restart()
        self._patience.passed = 0
        return super().get_pruning_group(*args, **kwargs)

    def forget(self) -> None:
        """Let go of what was traced: nodes hold on to one another, to modules and, through autograd, to activations."""
        nodes = getattr(self, "module2node", {})  # none where torch-pruning gave up
        for node in nodes.values():
            vars(node).clear()

    def _flattens(self, node: Any) -> bool:
        before = getattr(node.grad_fn, "_saved_self_sym_sizes", None)
        after = [m.shape for m in node.grad_fn._input_metadata]
        if not before or not after:
            return True
        taken = (shape_infer.infer_in_channels_recursively(self, n, [0]) for n in node.outputs)
        consumer = next((t for t in taken if t is not None), None)
        return bool(before[-1] != after[0][-1] == consumer)


@dataclass
class _Patience:
    """How many edges a graph has, and over how many torch-pruning looked for one group.

    It never comes to an end where channels come round with other numbers each time, as those of states that a recurrent
    forward stacks and takes apart in every timestep.
    """

    edges: int = 0
    passed: int = 0


class _Edges(list[Any]):
    """A node's dependencies, that are counted when they are looked through."""

    def __init__(self, edges: Iterable[Any], patience: _Patience) -> None:
        super().__init__(edges)
        self._patience = patience

    def __iter__(self) -> Iterator[Any]:
        self._patience.passed += len(self)
        if self._patience.passed > _ROUNDS * self._patience.edges:
            raise UnfitError(LOST)
        return super().__iter__()


@dataclass(frozen=True)
class Site:
    """How many channels a neuron has, and on which axis of its input."""

    width: int
    axis: int

    @classmethod
    def of(cls, current: Tensor, axes: Axes) -> Site:
        """Read off its input; by default channels stand behind the samples."""
        axis = axes.of(current.grad_fn)
        if axis is None or current.dim() < -axis:
            axis = min(1, current.dim() - 1) - current.dim()
        return cls(current.shape[axis] if current.dim() else 1, axis)


class NeuronPruner(BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning that a neuron has as many inputs as outputs; the adapter does the cutting."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Nothing."""
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> None:
        """Unknown."""
        return None

    get_in_channels = get_out_channels


class MapPruner(BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning that what goes into a map of channels and what comes out go each by itself."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Nothing."""
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Nothing."""
        return layer

    def get_out_channels(self, layer: ChannelMap) -> int:
        """How many come out."""
        return layer.width("out")

    def get_in_channels(self, layer: ChannelMap) -> int:
        """How many go in."""
        return layer.width("in")


def add_groups(
    network: Network, graph: Graph, model: nn.Module, neurons: dict[str, Site], cells: dict[str, str],
    held: Mapping[str, str], skipped: dict[str, str],
) -> None:  # fmt: skip
    """Put into ``network`` what groups its layers form, or why they can't be pruned; ``skipped`` are reasons known.

    ``cells`` are recurrent cells and layers, each with the one neuron that feeds it; ``held`` weights inside neurons,
    each with those that it drives.
    """
    names = {m: n for n, m in model.named_modules()}
    done: set[str] = set()
    for layer in network.layers:
        if layer in done:
            continue
        if layer in network.classifiers:
            network.skipped[layer] = f"{layer} {_CLASSIFIER}"
            continue
        try:
            group = _with_cells(_group(graph, model.get_submodule(layer), names, neurons), cells, held, model)
            if any(
                multiplier(layer_at(model, m.module)) > 1 and network.producers.get(m.module) for m in group.members
            ):
                raise UnfitError(LOST)
        except UnfitError as error:
            network.skipped[layer] = skipped.get(layer, str(error))
            continue
        except Exception:  # here too; each way means: don't touch this layer
            network.skipped[layer] = LOST
            continue
        outs = group.names("out")
        weight_outs = [n for n in outs if n in network.layers]
        done.update(weight_outs)
        reason = _why_whole(network, group, weight_outs, skipped)
        if reason:
            network.skipped.update(dict.fromkeys(weight_outs, reason))
        else:
            network.groups.append(group)


def add_lost_groups(
    network: Network, model: nn.Module, adapter: Adapter, run: Run, sites: dict[str, Site], cells: dict[str, str],
    held: Mapping[str, str], skipped: dict[str, str],
) -> None:  # fmt: skip
    """The same for layers whose channels torch-pruning has lost, as it has those of weights that are ``held``."""
    placed: dict[str, Tensor] = {}
    """Of layers in groups, which channels are."""

    def place(group: ChannelGroup) -> bool:
        """Note its channels; False where some are in another group, and not all of that are in this."""
        outs = [m for m in group.members if m.side == "out" and m.module in network.layers]
        for member in outs:
            channels = width(layer_at(model, member.module), "out")
            placed.setdefault(member.module, torch.zeros(channels, dtype=torch.bool))
        if any(bool(placed[m.module][m.index].any()) for m in outs):
            met = [other for other in network.groups if _meet(group, other)]
            if not all(_contains(group, other) for other in met):
                return False
            network.groups = [other for other in network.groups if not any(other is one for one in met)]
        for member in outs:
            placed[member.module][member.index] = True
        return True

    for group in list(network.groups):
        place(group)
    final = {*placed, *skipped, *network.classifiers, *(n for n, why in network.skipped.items() if why.startswith(ALL))}
    lost = [n for n in network.layers if n not in final]
    if not lost:
        return
    neurons = adapter.neurons(model)
    try:
        found = segments(model, adapter, run, {name: site.axis for name, site in sites.items()}, network.shared)
    except Exception:  # the model may not bear other numbers, or write where gradients are needed: they stay lost
        return
    for layer in lost:
        root = held.get(layer, layer)
        if root not in found.widths or (layer in placed and bool(placed[layer].all())):
            continue
        try:
            groups = [_with_cells(group, cells, held, model) for group in coupled(root, model, neurons, found)]
        except UnfitError:  # why torch-pruning lost them stands there already
            continue
        for group in groups:
            names = [n for n in group.names("out") if n in network.layers]
            if not _why_whole(network, group, names, skipped, read=True) and place(group):
                network.groups.append(group)
                for name in names:
                    network.skipped.pop(name, None)


def _meet(group: ChannelGroup, other: ChannelGroup) -> bool:
    """Are some outputs of layers in both?"""
    theirs = {m.module: m.index for m in other.members if m.side == "out"}
    return any(
        m.side == "out" and m.module in theirs and bool(torch.isin(m.index, theirs[m.module]).any())
        for m in group.members
    )


def _contains(group: ChannelGroup, other: ChannelGroup) -> bool:
    """Are all of the other's channels in it, as many and as they go together there, and more?"""
    if group.size != other.size or len(group.members) <= len(other.members):
        return False
    mine = {(m.module, m.side): m.index for m in group.members}
    return all((m.module, m.side) in mine and torch.equal(mine[m.module, m.side], m.index) for m in other.members)


def _with_cells(
    group: ChannelGroup, cells: Mapping[str, str], held: Mapping[str, str], model: nn.Module
) -> ChannelGroup:
    """The group with what recurrent cells read of it, as many columns for every channel, as behind a flatten.

    And with the rows of weights that its neurons hold.
    """
    rows = [Member(name, "out", own.index) for name, n in held.items() if (own := group.member(n, "neuron"))]
    reads = []
    for name, neuron in cells.items():
        source = group.member(neuron, "neuron")
        columns, odd = divmod(width(model.get_submodule(name), "in"), source.width if source else 1)
        if source is not None and not odd:
            index = source.index[:, :, None] * columns + torch.arange(columns)
            reads.append(Member(name, "in", index.flatten(1)))
    return replace(group, members=(*rows, *group.members, *reads))


def _why_whole(
    network: Network, group: ChannelGroup, outs: list[str], skipped: dict[str, str], *, read: bool = False
) -> str:
    """Why a group isn't to be pruned; with ``read`` it is known that something reads it, if only an attention."""
    for name in outs:
        if name in network.classifiers:
            return f"{name} {_CLASSIFIER}"
    for name in (m.module for m in group.members):
        if name in skipped:
            return skipped[name] if name in outs else f"coupled with {name}: {skipped[name]}"
    for name in outs:
        cut = [n for n in network.drives[name] if n not in group.names("neuron")]
        reads = any(name in network.direct.get(reader, ()) for reader in group.names("in"))
        heard = group.names("neuron") if group.part else network.drives[name]
        if (cut and not group.part) or not (heard or reads):
            return f"no spiking neuron follows {name} that its channels could be traced to"
    if not (read or group.names("in")):
        return "no layer that takes these channels in could be traced"
    if group.size // group.runs < 2:
        return "it has a single channel" if group.runs == 1 else f"each of its {group.runs} groups has one channel"
    return ""


def _group(graph: Graph, module: nn.Module, names: dict[nn.Module, str], neurons: dict[str, Site]) -> ChannelGroup:
    """torch-pruning's group of all output channels of ``module``."""
    pruner = graph.get_pruner_of_module(module)
    size = int(pruner.get_out_channels(module))

    def touched(channels: list[int]) -> Touched:
        group = graph.get_pruning_group(module, pruner.prune_out_channels, channels)
        return _touched(graph, group, names, neurons, size)

    own: Key = (names[module], "out")
    try:
        everything = touched(list(range(size)))
    except TiedError:
        indices, runs = in_runs(touched, own, size)
    else:
        indices, runs = {key: _index(idxs, roots, size) for key, (idxs, roots) in everything.items()}, 1
        if any(touched([probe])[own][0] != [probe] for probe in {0, size // 2}):
            raise UnfitError("its channels are tied to one another")
    members = []
    for (name, side), index in indices.items():
        member, target = Member(name, side, index), graph.model.get_submodule(name)
        if name in neurons:
            member = replace(member, width=neurons[name].width, axis=neurons[name].axis)
            if int(index.max()) >= member.width:  # a concatenation that torch-pruning sees from one side only
                raise UnfitError(f"its channels aren't those of {name}, which it drives")
        elif int(index.max()) >= width(target, side):  # a concatenation in a loop, or a sum over heads
            raise UnfitError(f"its channels aren't those that {name} takes in")
        elif side == "out" and isinstance(target, WEIGHT_LAYERS) and index.numel() != width(target, side):
            raise UnfitError(f"some, not all of the channels of {name} are coupled with it")
        members.append(member)
    in_all = fits_runs(members, runs, graph.model)
    if in_all is None:
        members, in_all = tied(members, runs, graph.model), 1
    return ChannelGroup(tuple(members), len(members[0].index), in_all)


def _touched(graph: Graph, group: Any, names: dict[nn.Module, str], neurons: Iterable[str], size: int) -> Touched:
    found: Touched = {}
    for item in group:
        target, handler = item.dep.target.module, item.dep.handler
        if isinstance(target, nn.Parameter) and all(length % size for length in target.shape):
            continue  # one number for all channels, or for each timestep
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
