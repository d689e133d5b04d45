"""Channels that go together: what torch-pruning's dependency graph, set right, says of each layer's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
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
from snncompress.model.settings import axis_for
from snncompress.running.data import Run

from .coupling import coupled
from .graphs import LOST, Graph, Site
from .reshaping import Key, TiedError, Touched, UnfitError
from .segments import segments
from .ties import ALL, fits_runs, in_runs, tied

_CLASSIFIER = "is the classifier: its outputs are the model's"


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
        if isinstance(target, nn.Parameter) and axis_for(target, size) is not None:
            continue  # cut with them, if a trial bears it
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
