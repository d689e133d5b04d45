"""A network cut into segments: what goes from one layer, norm or neuron to the next, and which channel makes which.

Each of them takes in what others put out, through reshapes, sums, products of attention. Its output is replaced by a
leaf of random numbers, so gradients end there and tell what the segment does, whatever it is written in. Where channels
are only moved and added, a cotangent of one number per position says in one gradient which channel makes which. Else a
cotangent on half of the positions has a gradient in those channels that make them, and as many halvings as the
positions have binary digits tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from snncompress.interfaces import Adapter
from snncompress.model.chance import Steady, seeded
from snncompress.model.channel_map import ChannelMap
from snncompress.model.modules import patched
from snncompress.model.network import NORMS, WEIGHT_LAYERS, channel_axis, width
from snncompress.running.data import Run

_LEAVES = 2**10  # values that a leaf may have; float16 holds them
_CALLS = 2  # of one module that are looked at: in the second, recurrence shows itself


@dataclass
class Link:
    """How the channels of ``source`` get into another module.

    ``made`` [n] names for each of the module's n input channels the source's channel that makes it, -1 for none. Where
    channels are mixed, it is None, and they are so within ``heads`` equal parts of both. Where a source is split in
    ``parts``, as into q, k and v, or into heads that a neuron doesn't tell apart, ``made`` names a channel of one of
    them, and the others' channels in its place make the same or are mixed. Where each of the module's channels is made
    of several, side by side, as behind an unflattening, ``onto`` names it for each of the source's channels instead, -1
    for those that make none.
    Where only some of the source's channels are mixed in heads, ``read`` names them.
    """

    source: str
    made: Tensor | None
    heads: int = 1
    parts: int = 1
    onto: Tensor | None = None
    read: Tensor | None = None


@dataclass
class Segments:
    """What was found: ``links`` into each module, its number of channels, and where those of its output stand."""

    links: dict[str, list[Link]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    uneven: set[str] = field(default_factory=set)
    """Modules that are called at several widths."""
    through: set[str] = field(default_factory=set)
    """Modules whose output channels are those of their input: norms, neurons, depthwise convolutions."""


def segments(
    model: nn.Module, adapter: Adapter, run: Run, axes: Mapping[str, int], shared: Collection[str] = ()
) -> Segments:
    """Run a copy whose neurons are wires, and look at every segment; ``axes`` are where to look for channels first.

    Neurons that are ``shared`` are parts of segments, as other operations are.
    """
    cut = _Cut(model, adapter, axes, shared)
    cut.run(run)
    found = Segments(through=cut.through)
    for name, x, leaf in cut.calls:
        sources = [(cut.names[v], v) for v in _leaves(x) if v in cut.names]
        usable = [(source, v) for source, v in sources if source in found.axes]
        axis, links = cut.linked(name, x, [(source, v, found.axes[source]) for source, v in usable])
        found.links.setdefault(name, []).extend(links)
        module = model.get_submodule(name)
        if leaf is not None and leaf.dim() >= -axis:
            found.axes[name] = axis if name in cut.through else channel_axis(module)
            width = leaf.shape[found.axes[name]]
            if found.widths.setdefault(name, width) != width:
                found.uneven.add(name)
    return found


class _Cut:
    """The calls of one run: (module, its input, the leaf that stands for its output)."""

    def __init__(self, model: nn.Module, adapter: Adapter, axes: Mapping[str, int], shared: Collection[str]) -> None:
        self.model, self.adapter, self.axes, self._shared = model, adapter, axes, shared
        self.calls: list[tuple[str, Tensor, Tensor | None]] = []
        self.names: dict[Tensor, str] = {}
        neurons = adapter.neurons(model)
        inside = {m for neuron in neurons.values() for m in neuron.modules()}
        self._modules = {
            name: m
            for name, m in model.named_modules()
            if m not in inside and isinstance(m, (*WEIGHT_LAYERS, *NORMS, ChannelMap))
        }
        depthwise = {n for n, m in self._modules.items() if ops.module2type(m) == ops.OPTYPE.DEPTHWISE_CONV}
        self.through = {
            *(neurons.keys() - set(shared)),
            *depthwise,
            *(n for n, m in self._modules.items() if isinstance(m, NORMS)),
        }
        self._generator = torch.Generator().manual_seed(0)

    def run(self, run: Run) -> None:
        names = {m: n for n, m in self.model.named_modules()}

        def stand_in(neuron: nn.Module, x: Tensor) -> Tensor:
            return x * 1.0 if names[neuron] in self._shared else self._called(names[neuron], x, x)

        with seeded(self.model), Steady(), self.adapter.identities(self.model, stand_in), ExitStack() as stack:
            for name, module in self._modules.items():
                stack.enter_context(patched(module, "forward", self._forward(name, module.forward)))
            run(self.model)

    def _forward(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **named: Any) -> Any:
            with torch.no_grad():
                y = forward(x, *args, **named)
            return self._called(name, x, y) if isinstance(y, Tensor) else y

        return call

    def _called(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        numbers = torch.randint(_LEAVES, y.shape, generator=self._generator)  # torch.rand is steady here
        leaf = (numbers.to(y) / _LEAVES).add_(0.5).requires_grad_()
        if sum(name == other for other, _, _ in self.calls) < _CALLS:
            self.calls.append((name, x, leaf))
            self.names[leaf] = name
        return leaf * 1.0  # models write into it

    def linked(self, name: str, x: Tensor, sources: list[tuple[str, Tensor, int]]) -> tuple[int, list[Link]]:
        """The axis of the module's input channels, and how its sources make them."""
        module = self._modules.get(name)
        dims = x.dim()
        if isinstance(module, (*WEIGHT_LAYERS, ChannelMap)):
            return channel_axis(module), self._links(x, channel_axis(module), sources)
        best, most = (min(1, dims - 1) - dims, list[Link]()), -1
        for axis in dict.fromkeys((self.axes.get(name, 1 - dims), 1 - dims, -1, -3, *range(-dims, 0))):
            if not -dims <= axis < 0 or (isinstance(module, NORMS) and x.shape[axis] != width(module, "in")):
                continue
            links = self._links(x, axis, sources)
            if links and (tells := _tells(links) if x.shape[axis] > 1 else 0) > most:
                best, most = (axis, links), tells
            if most == 2:
                break
        return best

    def _links(self, x: Tensor, axis: int, sources: list[tuple[str, Tensor, int]]) -> list[Link]:
        if not sources or x.dim() < -axis:
            return []
        n = x.shape[axis]
        weights = torch.rand(x.shape, generator=self._generator).to(x).add_(0.5)
        one_each = _labels(x, weights, axis, torch.arange(n), sources)
        links = []
        for (name, leaf, own), labels in zip(sources, one_each, strict=True):
            count = leaf.shape[own]
            made, heads, parts, read = _made(labels, torch.arange(n)), 1, 1, None
            if made is None and n % count == 0:
                for places in (torch.arange(n) // (n // count), torch.arange(n) % count):
                    if made is None:
                        made = _made(_labels(x, weights, axis, places, [(name, leaf, own)])[0], places)
            if made is None and self._side_by_side(x, axis, labels, (name, leaf, own)):
                links.append(Link(name, None, onto=labels))
                continue
            if made is None and n > 1 and (one := _one_part(labels)) is not None:
                parts = count // int((one >= 0).sum())
                made = _made(one, torch.arange(n))
                if bool((labels == -2).any()):  # as q and k are, beside v
                    heads, _ = _heads(x, weights, axis, (name, leaf, own), parts)
            elif made is None:
                heads, read = _heads(x, weights, axis, (name, leaf, own))
            links.append(Link(name, made, heads, parts, read=read))
        return links

    @staticmethod
    def _side_by_side(x: Tensor, axis: int, labels: Tensor, source: tuple[str, Tensor, int]) -> bool:
        """Is each channel made of as many of the source's, each by itself and none of them summed with another?"""
        n, counts = x.shape[axis], torch.bincount(labels[labels >= 0])
        if not 1 < n == len(counts) < len(labels) or bool((labels == -2).any()) or not 1 < counts.min() == counts.max():
            return False
        one = torch.zeros_like(x)
        one[(0,) * x.dim()] = 1.0
        (gradient,) = _gradients(x, one, [source])
        return gradient is not None and int(_channels(gradient, source[1], source[2]).sum()) == 1


def _tells(links: list[Link]) -> int:
    """How much is known of channels on this axis: which makes which, or at least in which head."""
    known = (2 if link.made is not None or link.onto is not None else int(link.heads > 1) for link in links)
    return max(known, default=0)


def _heads(
    x: Tensor, weights: Tensor, axis: int, source: tuple[str, Tensor, int], parts: int = 1
) -> tuple[int, Tensor | None]:
    """Into how many parts channels fall of which each mixes only with its like: those that make the first tell.

    Where the source itself is split in ``parts``, each of them does so; where only some of its channels are read, those
    do, which come second: they stand side by side, or as many in each part of the source.
    """
    n, width = x.shape[axis], source[1].shape[source[2]]
    first, all_read = (_touched(x, weights, axis, torch.arange(n) < end, [source])[0] for end in (1, n))
    read = all_read.nonzero().flatten() if parts == 1 else torch.arange(width)
    count = len(read) // parts
    heads = count // max(1, int(first[read].view(parts, count).sum(1).max()))
    if heads < 2 or count % heads or n % heads:
        return 1, None
    head = torch.arange(count) // (count // heads)
    if int(read[-1] - read[0]) >= len(read) and (width % heads or not torch.equal(read // (width // heads), head)):
        return 1, None
    labels = _labels(x, weights, axis, torch.arange(n) // (n // heads), [source])[0][read]
    return (heads, None if len(read) == width else read) if torch.equal(labels, head.repeat(parts)) else (1, None)


def _one_part(labels: Tensor) -> Tensor | None:
    """The labels of the first of several equal parts, where each part has the same ones or is mixed."""
    reached = labels >= 0
    size = len(set(labels[reached].tolist()))
    if not 0 < size < len(labels) or len(labels) % size:
        return None
    parts = labels.view(-1, size)
    first = next((part for part in parts if bool((part >= 0).all())), None)
    if first is None or not all(torch.equal(part, first) or bool((part == -2).all()) for part in parts):
        return None
    only = torch.full_like(parts, -1)
    only[next(i for i, part in enumerate(parts) if torch.equal(part, first))] = first
    return only.flatten()


def _made(labels: Tensor, places: Tensor) -> Tensor | None:
    """For each place the channel that has its label; None where a channel makes several or two make one."""
    reached = labels >= 0
    if bool((labels == -2).any()) or not bool(reached.any()):
        return None
    if len(set(labels[reached].tolist())) < int(reached.sum()):
        return None
    channel = torch.full((int(places.max()) + 1,), -1)
    channel[labels[reached]] = reached.nonzero().flatten()
    return channel[places]


def _labels(
    x: Tensor, weights: Tensor, axis: int, places: Tensor, sources: list[tuple[str, Tensor, int]]
) -> list[Tensor]:
    """Per source the label of those positions that each of its channels makes; -1 for none, -2 for several labels."""
    found = _read_off(x, axis, places, sources)
    unread = [source for source, labels in zip(sources, found, strict=True) if labels is None]
    rest = iter(_bit_by_bit(x, weights, axis, places, unread))
    return [next(rest) if labels is None else labels for labels in found]


_CODES = 2**15
"""Numbers 1, 1 + 2⁻¹⁹, … below 1 + 1/16: float32 holds them exactly, and up to 16 times them."""


def _read_off(x: Tensor, axis: int, places: Tensor, sources: list[tuple[str, Tensor, int]]) -> list[Tensor | None]:
    """The labels where channels are only moved and added: the number sent down from a place comes out as it went in.

    Or several times, from windows that overlap or timesteps; the sum of two numbers is none of them, nor hardly ever a
    multiple. None for a source of which a channel gets anything else.
    """
    count = int(places.max()) + 1
    if count > _CODES or torch.finfo(x.dtype).eps > 2**-23:
        return [None] * len(sources)
    step = _CODES // count
    jitter = torch.randint(step, (count,), generator=torch.Generator().manual_seed(0))
    codes = (1 + (step * torch.arange(count) + jitter) * 2.0**-19).to(x)
    cotangent = codes[places].view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())]).expand_as(x)
    found: list[Tensor | None] = []
    for gradient, (_, leaf, own) in zip(_gradients(x, cotangent, sources), sources, strict=True):
        if gradient is None:
            found.append(torch.full((leaf.shape[own],), -1))
            continue
        rows = gradient.movedim(own, 0).flatten(1)
        most = rows.amax(1)
        one = most / most.floor()  # NaN where none comes out
        at = torch.searchsorted(codes, one.nan_to_num(0)).clamp_max(count - 1)
        times = rows / codes[at][:, None]
        known = torch.equal(times, times.round()) and bool(((codes[at] == one) | (most == 0)).all())
        found.append(torch.where(most == 0, -1, at).cpu() if known else None)
    return found


def _bit_by_bit(
    x: Tensor, weights: Tensor, axis: int, places: Tensor, sources: list[tuple[str, Tensor, int]]
) -> list[Tensor]:
    """The labels whatever is done with the channels."""
    found = [torch.zeros(leaf.shape[own], dtype=torch.long) for _, leaf, own in sources]
    for bit in range(max(1, int(places.max()).bit_length()) if sources else 0):
        touched = [_touched(x, weights, axis, ((places >> bit) & 1) == value, sources) for value in (0, 1)]
        for labels, low, high in zip(found, *touched, strict=True):
            several, none = low & high, ~low & ~high
            labels.add_(high.long() << bit)
            labels[several] = -(2**40)
            labels[none] = torch.minimum(labels[none], torch.tensor(-(2**30)))
    return [labels.where(labels >= 0, torch.where(labels < -(2**35), -2, -1)) for labels in found]


def _touched(
    x: Tensor, weights: Tensor, axis: int, chosen: Tensor, sources: list[tuple[str, Tensor, int]]
) -> list[Tensor]:
    """Per source which of its channels make any of the positions chosen."""
    shape = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
    cotangent = weights * chosen.view(shape).to(weights)
    gradients = _gradients(x, cotangent, sources)
    return [_channels(g, leaf, own) for g, (_, leaf, own) in zip(gradients, sources, strict=True)]


def _gradients(x: Tensor, cotangent: Tensor, sources: list[tuple[str, Tensor, int]]) -> tuple[Tensor | None, ...]:
    leaves = [leaf for _, leaf, _ in sources]
    return torch.autograd.grad(x, leaves, cotangent, retain_graph=True, allow_unused=True)


def _channels(gradient: Tensor | None, leaf: Tensor, axis: int) -> Tensor:
    if gradient is None:
        return torch.zeros(leaf.shape[axis], dtype=torch.bool)
    return (gradient != 0).movedim(axis, 0).flatten(1).any(1).cpu()


def _leaves(x: Tensor) -> list[Tensor]:
    """What a tensor was made of."""
    found, seen, stack = [], set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(n for n, _ in node.next_functions)
    return found[::-1]
