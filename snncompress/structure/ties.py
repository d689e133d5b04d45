"""Channels that are tied to one another: either all of them go or none.

A shuffle or a split into equal parts ties those at the same position of each part, a grouped convolution those at the
same position of each group, since each must stay as wide as the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from snncompress.model.cells import layer_at
from snncompress.model.network import WEIGHT_LAYERS, Member, made_of_one, width

from .reshaping import Key, Touched, UnfitError

ALL = "its channels are all tied to one another: "
"""Such reasons are final: no other way to follow the channels unties them."""
_UNEVEN = "its channels don't map evenly onto what follows"


def in_runs(touched: Callable[[list[int]], Touched], own: Key, size: int) -> tuple[dict[Key, Tensor], int]:
    """Indices of every member where channels are tied, and how many runs their rows stand in.

    Tied channels stand at the same position of each run: removing the same positions from every run, as from the blocks
    of a grouped convolution, removes all that are tied. Where a layer takes in only some of them, a row lists all.
    """
    left = dict.fromkeys(range(size))
    classes: list[dict[Key, list[int]]] = []
    while left:
        found = {key: sorted(idxs) for key, (idxs, _) in touched([next(iter(left))]).items()}
        if any(left.pop(c, c) is not None for c in found[own]) or found.keys() != (classes or [found])[0].keys():
            raise UnfitError(_UNEVEN)
        classes.append(found)
    if len(classes) == 1:
        raise UnfitError(f"{ALL}a shuffle or a split in forward counts on them")
    if any(len(found[key]) != len(classes[0][key]) for found in classes for key in found):
        raise UnfitError(_UNEVEN)
    rows = {key: torch.tensor([found[key] for found in classes]) for key in classes[0]}
    runs = rows[own].shape[1]
    if any(index.shape[1] % runs for index in rows.values()):
        return rows, 1
    indices = {}
    for key, index in rows.items():
        indices[key] = index.view(len(classes), runs, -1).transpose(0, 1).reshape(size, -1)
    return indices, runs


def grouped(module: nn.Module) -> int:
    """The groups of a convolution; 1 where each channel is its own."""
    groups = int(getattr(module, "groups", 1))
    depthwise = groups == getattr(module, "out_channels", None) == getattr(module, "in_channels", None)
    return 1 if depthwise or not isinstance(module, WEIGHT_LAYERS) else groups


def _grouped(member: Member, model: nn.Module) -> int:
    """The same for a member; 1 where all that a channel is made into goes with it."""
    module = layer_at(model, member.module)
    return 1 if member.side == "out" and made_of_one(module, member.index) else grouped(module)


def fits_runs(members: list[Member], runs: int, model: nn.Module) -> int | None:
    """In how many runs the members' channels stand, once grouped convolutions are heard; None where these disagree."""
    counts = {1, runs}
    for member in members:
        groups = _grouped(member, model)
        counts.add(groups)
        if groups > 1 and not torch.equal(member.index.flatten(), torch.arange(len(member.index))):
            return None
    return max(counts) if len(counts) <= 2 else None


def tied(members: list[Member], runs: int, model: nn.Module) -> list[Member]:
    """The same with one row for all channels that grouped convolutions tie, besides those that ``runs`` tie already."""
    size = len(members[0].index)
    if size % runs:
        raise UnfitError(_UNEVEN)
    label = torch.arange(size) % (size // runs)  # the least row that a row is tied to, as far as known
    while True:
        before = label
        for member in members:
            if (groups := _grouped(member, model)) > 1:
                per_group = width(layer_at(model, member.module), member.side) // groups
                place = member.index % per_group
                least = torch.full((per_group,), size).scatter_reduce(
                    0, place.flatten(), label[:, None].expand_as(place).flatten(), "amin"
                )
                label = label.scatter_reduce(0, label, least[place].amin(1), "amin")
                label = label[label]
        if torch.equal(label, before):
            break
    _, number, counts = torch.unique(label, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        raise UnfitError(f"{ALL}grouped convolutions count on as many in each group")
    if len(counts.unique()) > 1:
        raise UnfitError(_UNEVEN)
    order = number.argsort(stable=True)
    return [replace(member, index=member.index[order].reshape(len(counts), -1).sort(1).values) for member in members]
