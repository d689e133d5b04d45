"""A network cut into segments: what goes from one layer, norm or neuron to the next, and which channel makes which.

Each of them takes in what others put out, through reshapes, sums, products of attention. Its output is replaced by a
leaf of random numbers, so gradients end there and tell what the segment does, whatever it is written in: a cotangent on
half of the input's positions has a gradient in those channels that make them, and as many halvings as the positions
have binary digits tell which channel makes which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

_CALLS = 2  # of one module that are looked at: in the second, recurrence shows itself


@dataclass
class Link:
    """How the channels of ``source`` get into another module.

    ``made`` [n] names for each of the module's n input channels the source's channel that makes it, -1 for none. Where
    channels are mixed, it is None, and they are so within ``heads`` equal parts of both. Where a source is split in
    ``parts``, as into q, k and v, or into heads that a neuron doesn't tell apart, ``made`` names a channel of one of
    them, and the others' channels in its place make the same or are mixed.
    """

    source: str
    made: Tensor | None
    heads: int = 1
    parts: int = 1


@dataclass
class Segments:
    """What was found: ``links`` into each module, its number of channels, and where those of its output stand."""

    links: dict[str, list[Link]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    through: set[str] = field(default_factory=set)
    """Modules whose output channels are those of their input: norms, neurons, depthwise convolutions."""


def segments(model: nn.Module, adapter: Adapter, run: Run, axes: Mapping[str, int]) -> Segments:
    """Run a copy whose neurons are wires, and look at every segment; ``axes`` are where to look for channels first."""
    cut = _Cut(model, adapter, axes)
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
            found.widths[name] = leaf.shape[found.axes[name]]
    return found


class _Cut:
    """The calls of one run: (module, its input, the leaf that stands for its output)."""

    def __init__(self, model: nn.Module, adapter: Adapter, axes: Mapping[str, int]) -> None:
        self.model, self.adapter, self.axes = model, adapter, axes
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
        self.through = {*neurons, *depthwise, *(n for n, m in self._modules.items() if isinstance(m, NORMS))}
        self._generator = torch.Generator().manual_seed(0)

    def run(self, run: Run) -> None:
        names = {m: n for n, m in self.model.named_modules()}

        def stand_in(neuron: nn.Module, x: Tensor) -> Tensor:
            return self._called(names[neuron], x, x)

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
        leaf = torch.rand(y.shape, generator=self._generator).to(y).add_(0.5).requires_grad_()
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
        best: tuple[int, list[Link]] = (min(1, dims - 1) - dims, [])
        for axis in dict.fromkeys((self.axes.get(name, 1 - dims), 1 - dims, -1, -3, *range(-dims, 0))):
            if not -dims <= axis < 0 or (isinstance(module, NORMS) and x.shape[axis] != width(module, "in")):
                continue
            links = self._links(x, axis, sources)
            if not best[1]:
                best = axis, links
            if any(link.made is not None for link in links):
                return axis, links
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
            made, heads, parts = _made(labels, torch.arange(n)), 1, 1
            if made is None and n % count == 0:
                for places in (torch.arange(n) // (n // count), torch.arange(n) % count):
                    if made is None:
                        made = _made(_labels(x, weights, axis, places, [(name, leaf, own)])[0], places)
            if made is None and (one := _one_part(labels)) is not None:
                parts = count // int((one >= 0).sum())
                made = _made(one, torch.arange(n))
                heads = _heads(x, weights, axis, (name, leaf, own), parts)
            elif made is None:
                heads = _heads(x, weights, axis, (name, leaf, own))
            links.append(Link(name, made, heads, parts))
        return links


def _heads(x: Tensor, weights: Tensor, axis: int, source: tuple[str, Tensor, int], parts: int = 1) -> int:
    """Into how many parts channels fall of which each mixes only with its like: those that make the first tell.

    Where the source itself is split in ``parts``, each of them does so.
    """
    n, count = x.shape[axis], source[1].shape[source[2]] // parts
    (first,) = _touched(x, weights, axis, torch.arange(n) == 0, [source])
    heads = count // max(1, int(first.view(parts, count).sum(1).max()))
    if heads < 2 or count % heads or n % heads:
        return 1
    labels = _labels(x, weights, axis, torch.arange(n) // (n // heads), [source])[0]
    return heads if torch.equal(labels, (torch.arange(count) // (count // heads)).repeat(parts)) else 1


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
    bits = max(1, int(places.max()).bit_length())
    found = [torch.zeros(leaf.shape[own], dtype=torch.long) for _, leaf, own in sources]
    for bit in range(bits):
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
    leaves = [leaf for _, leaf, _ in sources]
    gradients = torch.autograd.grad(x, leaves, cotangent, retain_graph=True, allow_unused=True)
    return [_channels(g, leaf, own) for g, (_, leaf, own) in zip(gradients, sources, strict=True)]


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
