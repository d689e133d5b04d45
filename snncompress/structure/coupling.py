"""Channels that go together where torch-pruning loses them: walked over the segments of the network.

From a layer's output channels on, every channel that they make or that makes something with them belongs to them: those
of norms and neurons that they run through, those of other layers that are added, the inputs of layers that read them.
In an attention the channels of q and k, multiplied and summed, belong together head by head. Where only some of a
layer's channels meet those of another, as where zeros pad a narrower one to its width, they fall into parts: of each
part all channels meet the same. What comes out is a proposal, to be tried like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import lcm

import torch
from torch import Tensor, nn

from snncompress.model.cells import layer_at
from snncompress.model.network import WEIGHT_LAYERS, ChannelGroup, Member, Side, multiplier, width
from snncompress.model.resizing import prunable_type

from .reshaping import UnfitError
from .segments import Link, Segments
from .ties import fits_runs, tied

Space = tuple[str, Side]
"""The channels of a layer on one side, or, as "neuron", of a module whose output channels are those of its input."""


def coupled(root: str, model: nn.Module, neurons: dict[str, nn.Module], found: Segments) -> list[ChannelGroup]:
    """The groups of a layer's output channels; raises UnfitError where they don't map evenly onto what follows."""
    start = torch.arange(found.widths[root])
    while True:
        try:
            return _Walk(root, model, neurons, found, start).groups()
        except _TogetherError as error:
            start = error.colours


class _TogetherError(UnfitError):
    """Several of the root's channels go together: those of one of these colours."""

    def __init__(self, colours: Tensor) -> None:
        super().__init__("its channels are tied to one another")
        self.colours = colours


class _Walk:
    """Colours channels: those of colour r go with the root's channel, or channels, of that colour."""

    def __init__(
        self, root: str, model: nn.Module, neurons: dict[str, nn.Module], found: Segments, start: Tensor
    ) -> None:
        self.model, self.neurons, self.found = model, neurons, found
        self.root, self.start = self._out(root), start
        self.size = int(start.max()) + 1
        self.heads = 1
        self.colours: dict[Space, Tensor] = {}
        self._todo: list[Space] = []

    def groups(self) -> list[ChannelGroup]:
        self._colour(self.root, self.start)
        while self._todo:
            space = self._todo.pop()
            self._pass(space)
            for target, link in self._links_out_of(space):
                self._follow(space, target, link)
            for link in self._links_into(space):
                self._back(space, link)
        parts = self._parts()
        if len(parts) > 1 and any(self._across_heads(part) for part in parts):
            raise UnfitError("its channels don't map evenly onto what follows")
        return [self._group(part) for part in parts]

    def _parts(self) -> list[Tensor]:
        """The colours, those apart that aren't met by the same channels, or that zeros in other places meet."""
        kinds = [_counts(colours, self.size) for colours in self.colours.values()]
        for space, colours in self.colours.items():
            for place in _beside_zeros(self._links_into(space)):
                here = (colours >= 0) & (place >= 0)
                kind = torch.full((self.size,), -1)
                kind[colours[here]] = place[here]
                kinds.append(kind)
        _, part = torch.unique(torch.stack(kinds, 1), dim=0, return_inverse=True)
        return [(part == number).nonzero().flatten() for number in part.unique().tolist()]

    def _across_heads(self, part: Tensor) -> bool:
        """Isn't it as many channels in each head, side by side there or in all?"""
        if self.heads == 1 or len(part) % self.heads:
            return self.heads > 1
        head = torch.arange(self.heads)[:, None]
        in_each = torch.equal(
            part.view(self.heads, -1) * self.heads // self.size, head.expand(-1, len(part) // self.heads)
        )
        return not in_each and int(part[-1] - part[0]) >= len(part)

    def _group(self, part: Tensor) -> ChannelGroup:
        members = [self._member(space, colours, part) for space, colours in self.colours.items()]
        kept, heads = [member for member in members if member is not None], self.heads
        if fits_runs(kept, heads, self.model) != heads:
            kept, heads = tied(kept, heads, self.model), 1
        return ChannelGroup(tuple(kept), len(kept[0].index), heads, part=any(map(self._in_part, kept)))

    def _in_part(self, member: Member) -> bool:
        module = layer_at(self.model, member.module)
        weights = member.side == "out" and isinstance(module, WEIGHT_LAYERS)
        return weights and member.index.numel() != width(module, "out")

    def _out(self, name: str) -> Space:
        return name, "neuron" if name in self.found.through else "out"

    def _into(self, name: str) -> Space:
        return name, "neuron" if name in self.found.through else "in"

    def _links_out_of(self, space: Space) -> Iterator[tuple[str, Link]]:
        if space[1] != "in":
            yield from ((t, link) for t, links in self.found.links.items() for link in links if link.source == space[0])

    def _links_into(self, space: Space) -> Iterator[Link]:
        if space[1] != "out":
            yield from self.found.links.get(space[0], ())

    def _colour(self, space: Space, colours: Tensor) -> None:
        if space[0] in self.found.uneven:
            raise UnfitError(f"{space[0]} is used at several widths")
        before = self.colours.get(space)
        if before is None:
            merged = colours
        else:
            if len(before) != len(colours):
                raise UnfitError(f"{space[0]} is used at several widths")
            self._together(before, colours)
            merged = torch.maximum(before, colours)
        if bool((merged >= 0).any()) and (before is None or not torch.equal(before, merged)):
            self.colours[space] = merged
            self._todo.append(space)

    def _together(self, one: Tensor, other: Tensor) -> None:
        """Start anew where channels in the same place have different colours: the root's go together then."""
        differ = (one != other) & (one >= 0) & (other >= 0)
        if not bool(differ.any()):
            return
        a, b = one[differ], other[differ]
        least, before = torch.arange(self.size), None
        while before is None or not torch.equal(least, before):
            before, low = least, torch.minimum(least[a], least[b])
            least = least.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
            least = least[least]
        if not bool(least.any()):
            raise UnfitError("its channels are all tied to one another")
        raise _TogetherError(torch.unique(least[self.start], return_inverse=True)[1])

    def _pass(self, space: Space) -> None:
        """Through a convolution that makes each channel by itself into several, which go with it."""
        name, side = space
        times = multiplier(layer_at(self.model, name))
        if times < 2 or not self.found.links.get(name):
            return
        mine = self.colours[space]
        if side == "in":
            self._colour((name, "out"), mine.repeat_interleave(times))
            return
        each = mine.view(-1, times)
        most = each.amax(1, keepdim=True)
        self._together(each, most.expand_as(each))
        self._colour((name, "in"), most[:, 0])

    def _follow(self, space: Space, target: str, link: Link) -> None:
        if link.onto is not None:
            self._side_by_side(space, target, link.onto)
            return
        if link.made is not None:
            mine = self.colours[space]
            if int(link.made.max()) >= len(mine):
                raise UnfitError(f"{space[0]} is used at several widths")
            if link.parts > 1:
                self._in_heads(link.heads)
                parts = mine.view(link.parts, -1)
                self._together(parts, parts.amax(0).expand_as(parts))
            self._colour(self._into(target), torch.where(link.made >= 0, mine[link.made.clamp_min(0)], -1))
            return
        self._in_heads(link.heads)
        for other in self.found.links[target]:  # multiplied and summed with these
            alike = other.made is None and other.heads == link.heads and other.source != link.source
            mine, its = self._mixed(link), self._mixed(other)
            if alike and len(mine) == len(its):
                colours = torch.full((self.found.widths[other.source],), -1)
                colours[its] = self.colours[space][mine]
                self._colour(self._out(other.source), colours)

    def _mixed(self, link: Link) -> Tensor:
        """The channels of its source that are mixed in heads."""
        return torch.arange(self.found.widths[link.source]) if link.read is None else link.read

    def _side_by_side(self, space: Space, target: str, onto: Tensor) -> None:
        """All channels that make one of the target's go with it."""
        mine = self.colours[space]
        if len(mine) != len(onto):
            raise UnfitError(f"{space[0]} is used at several widths")
        made, reached = torch.full((int(onto.max()) + 1,), -1), onto >= 0
        made.scatter_reduce_(0, onto[reached], mine[reached], "amax")
        self._together(mine[reached], made[onto[reached]])
        self._colour(self._into(target), made)

    def _back(self, space: Space, link: Link) -> None:
        if link.onto is not None:
            if int(link.onto.max()) >= len(self.colours[space]):
                raise UnfitError(f"{space[0]} is used at several widths")
            colours = self.colours[space][link.onto.clamp_min(0)]
            self._colour(self._out(link.source), torch.where(link.onto >= 0, colours, -1))
            return
        if link.made is None:
            self._in_heads(link.heads)
            return
        mine = self.colours[space]
        if len(link.made) != len(mine):
            raise UnfitError(f"{space[0]} is used at several widths")
        count = self.found.widths[link.source]
        if self._broadcast(link.made, count):  # one number for all channels of a head, as of which tokens pass
            self._in_heads(count)
            return
        source, reached = torch.full((count,), -1), link.made >= 0
        source.scatter_reduce_(0, link.made[reached], mine[reached], "amax")
        self._together(mine[reached], source[link.made[reached]])
        if link.parts > 1:
            self._in_heads(link.heads)
            source = source.view(link.parts, -1).amax(0).repeat(link.parts)
        self._colour(self._out(link.source), source)

    @staticmethod
    def _broadcast(made: Tensor, count: int) -> bool:
        """Does each of ``count`` channels make as many places in a row, and more than one?"""
        rows = len(made) // count
        return rows > 1 and torch.equal(made, torch.arange(len(made)) // rows)

    def _in_heads(self, heads: int) -> None:
        self.heads = lcm(self.heads, heads)

    def _member(self, space: Space, colours: Tensor, part: Tensor) -> Member | None:
        """What a part of the colours occupies there; None where that is nothing."""
        name, side = space
        module = layer_at(self.model, name)
        if side == "in" and multiplier(module) > 1:  # which goes with what comes out
            return None
        number = torch.full((self.size + 1,), -1)  # the last for channels without a colour
        number[part] = torch.arange(len(part))
        mine = number[colours]
        counts = _counts(mine, len(part))
        if int(counts[0]) == 0:
            return None
        order = mine.argsort(stable=True)
        index = order[len(mine) - int(counts.sum()) :].view(len(part), -1)
        if name in self.neurons:
            return Member(name, "neuron", index, self.found.widths[name], self.found.axes[name])
        if not prunable_type(module):
            raise UnfitError(f"{name} is a {type(module).__name__}, which can't be cut")
        return Member(name, "out" if side == "neuron" else side, index)


def _counts(colours: Tensor, size: int) -> Tensor:
    """How often each colour occurs."""
    return torch.bincount(colours[colours >= 0], minlength=size)


def _beside_zeros(links: Iterable[Link]) -> Iterator[Tensor]:
    """Where a link leaves positions empty that links which are added to it don't: how many of its own stand before.

    For each such link one number per position; -1 elsewhere.
    """
    reached = [link.made >= 0 for link in links if link.made is not None]
    for number, mine in enumerate(reached):
        others = [other for i, other in enumerate(reached) if i != number and len(other) == len(mine)]
        added = [other for other in others if bool((other & mine).any()) and bool((other & ~mine).any())]
        if added:
            yield torch.where(torch.stack(added).any(0) & ~mine, mine.cumsum(0), -1)
