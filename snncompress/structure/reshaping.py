"""Follows channels through flattens, shuffles, splits, slices and padding, by the shapes that autograd has saved.

A shuffle is written with numbers in ``forward``: two groups, three parts, every other channel. After pruning the same
numbers must still mean the same channels. They do where each part loses the same positions, so those positions are
*tied*: either all of them go or none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import shape_infer
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

from snncompress.model.network import Side

from .axes import Axes, name_of, signed

Key = tuple[str, Side]
Touched = dict[Key, tuple[list[int], list[int]]]
"""(module, side) → indices there, and the channel each of them comes from."""


_LOST = "a split of its channels can't be followed"


class UnfitError(Exception):
    """Why a group can't be pruned."""


class TiedError(UnfitError):
    """Channels that were followed one by one turn out to be tied to one another, see :mod:`.ties`."""


@dataclass
class Reshaping:
    """What an operation does with channel indices: ties those of its input, then moves each to its place.

    ``part`` [C] numbers the tied positions of the input, ``moved`` lists for each channel where it comes out; None: no
    ties, no moves. ``outlets`` are a split's first channel and size for each node that it feeds.
    """

    part: Tensor | None = None
    moved: list[list[int]] | None = None
    outlets: list[tuple[int, int]] | None = None
    refusal: str = ""
    # Tied positions that went forward and backward already, and the channel that they came from: going on with what is
    # new alone keeps the way through a long row of shuffles short.
    _ahead: dict[int, Any] = field(default_factory=dict)
    _back: dict[int, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget what went through: another group is followed."""
        self._ahead.clear()
        self._back.clear()

    def attach(self, node: Any) -> None:
        """Put the mappings on the edges of a torch-pruning node.

        An edge applies its mappings in order, and torch-pruning keeps writing to slot 1, next to a concatenation: what
        comes first goes to slot 0, what comes last is appended.
        """
        for dep in node.dependencies:
            if dep.target in node.inputs:
                dep.index_mapping[0] = self._backward
        for source in node.inputs:
            for dep in source.dependencies:
                if dep.target is node:
                    dep.index_mapping.append(self._forward)
        for into, (start, size) in zip(node.outputs, self.outlets or (), strict=self.outlets is not None):
            inward = next((d for d in node.dependencies if d.target is into and d.index_mapping[0] is None), None)
            outward = next((d for d in into.dependencies if d.target is node and len(d.index_mapping) == 2), None)
            if inward is None or outward is None:  # torch-pruning has its own idea of what follows, such as attention
                self.refusal = _LOST
                return
            inward.index_mapping[0] = _Outlet(start, size, into=False)
            outward.index_mapping.append(_Outlet(start, size, into=True))

    def _forward(self, channels: list[Any]) -> list[Any]:
        closed = self._closed(channels, self._ahead)
        if self.moved is None:
            return closed
        found = [_HybridIndex(idx=to, root_idx=c.root_idx) for c in closed for to in self.moved[c.idx]]
        return sorted(found, key=lambda c: int(c.idx))

    def _backward(self, channels: list[Any]) -> list[Any]:
        if self.moved is None:
            return self._closed(channels, self._back)
        back = {to: source for source, places in enumerate(self.moved) for to in places}
        if any(c.idx not in back for c in channels):
            raise UnfitError("zeros pad the channels of a narrower layer to its width")
        found = dict.fromkeys(_HybridIndex(idx=back[c.idx], root_idx=c.root_idx) for c in channels)
        return self._closed(list(found), self._back)

    def _closed(self, channels: list[Any], seen: dict[int, Any]) -> list[Any]:
        if self.refusal:
            raise UnfitError(self.refusal)
        if self.part is None:
            return channels
        part = self.part.tolist()
        new = {part[c.idx]: c.root_idx for c in channels if part[c.idx] not in seen}
        seen.update(new)
        if any(seen[part[c.idx]] != c.root_idx for c in channels):
            raise TiedError
        return [_HybridIndex(idx=i, root_idx=new[p]) for i, p in enumerate(part) if p in new]


@dataclass
class _Outlet:
    """Between a split's channels and those of one part."""

    start: int
    size: int
    into: bool

    def __call__(self, channels: list[Any]) -> list[Any]:
        if self.into:
            return [_HybridIndex(idx=c.idx + self.start, root_idx=c.root_idx) for c in channels]
        return [
            _HybridIndex(idx=c.idx - self.start, root_idx=c.root_idx)
            for c in channels
            if self.start <= c.idx < self.start + self.size
        ]


def find_reshapings(nodes: Iterable[Any], axes: Axes) -> Iterator[tuple[Any, Reshaping]]:
    """Shuffles, splits and slices of channels among torch-pruning's nodes; call before it maps any index."""
    for node in nodes:
        kind, name = node.type, _name(node)
        if kind == ops.OPTYPE.RESHAPE or name == "ChannelShuffleBackward0":
            found = _shuffle(node, axes)
        elif kind == ops.OPTYPE.SPLIT:
            found = _split(node, axes)
        elif kind == ops.OPTYPE.SLICE:
            found = _slice(node, axes)
        elif name == "ConstantPadNdBackward0":
            found = _padding(node, axes)
        else:
            continue
        if found is not None:
            yield node, found


def offset(graph: Any, node: Any) -> None:
    """Index offsets of a concatenation that torch-pruning passed over: in [T, N, C, …], before a flatten or a split."""
    spans: list[tuple[int, int]] | None = getattr(node, "spans", None)
    if spans is None:
        sizes = [shape_infer.infer_channels_between(graph, n, node) for n in node.inputs]
        if None in sizes or sum(sizes) not in node.grad_fn._input_metadata[0].shape:
            return
        spans = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    node.module.concat_sizes, node.module.offsets = [end - start for start, end in spans], [start for start, _ in spans]
    for span, source in zip(spans, node.inputs, strict=True):
        for one, other, reverse in ((node, source, True), (source, node, False)):
            link = next((d for d in one.dependencies if d.target is other and d.index_mapping[1] is None), None)
            if link is not None:
                link.index_mapping[1] = _ConcatIndexMapping(list(span), reverse=reverse)


def concatenated(node: Any, axes: Axes) -> list[tuple[int, int]] | None:
    """Where a concatenation along the channels puts what it takes in; None for one along another axis.

    Of what comes from no layer, as the network's own input, autograd has no size: several take equal parts of the rest.
    """
    sources = node.grad_fn.next_functions
    traced = [(f, number) for f, number in sources if f is not None]
    if len(traced) != len(node.inputs):
        return None
    shape = node.grad_fn._input_metadata[0].shape
    dim = signed(node.grad_fn._saved_dim) % len(shape)
    known = axes.of(node.grad_fn)
    if dim != (_axis_in(node, axes, len(shape)) if known is None else known % len(shape)):
        return None
    taken = [0 if f is None else int(f._input_metadata[number].shape[dim]) for f, number in sources]
    rest = (shape[dim] - sum(taken)) // max(1, len(sources) - len(traced))
    sizes = [rest if f is None else size for (f, _), size in zip(sources, taken, strict=True)]
    spans = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [span for span, (f, _) in zip(spans, sources, strict=True) if f is not None]


def _name(node: Any) -> str:
    return name_of(node.grad_fn)


def _axis_in(node: Any, axes: Axes, dims: int) -> int:
    """Where channels stand in what goes into a node; by default in [N, C, …], or [T, N, C, …] of 3 or 5 axes."""
    axis = axes.into(node.grad_fn)
    return (2 if dims in (3, 5) else 1) if axis is None or dims < -axis else axis % dims


def _shuffle(node: Any, axes: Axes) -> Reshaping | None:
    """A reshape of [N, C, …] to [N, g, C/g, …], moves, and a reshape back, as one permutation of channels."""
    shape = node.grad_fn._input_metadata[0].shape
    if _name(node) == "ChannelShuffleBackward0":
        size, groups = shape[_axis_in(node, axes, len(shape))], node.grad_fn._saved_groups
        moved = torch.arange(size).view(-1, groups).t().reshape(-1)
        return Reshaping(torch.arange(size) % (size // groups), _one_each(moved))
    before = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    axis = _axis_in(node, axes, len(before))
    factors = shape[axis : axis + 2]
    if len(shape) != len(before) + 1 or (*before[:axis], *factors, *before[axis + 1 :]) != tuple(shape):
        return None
    size = before[axis]
    labels = torch.arange(size).view(*[1] * axis, size, *[1] * (len(before) - axis - 1))
    labels = labels.expand(before).reshape(shape)
    while labels.shape != before:
        if len(node.outputs) != 1:
            return None
        node = node.outputs[0]
        labels = _moved(labels, node)
        if labels is None:
            return None
    rows = labels.movedim(axis, 0).flatten(1)
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return None
    # The smaller factor is the number of groups, which stays; tried on a copy before it is believed.
    channels = torch.arange(size)
    part = channels % factors[1] if factors[0] <= factors[1] else channels // factors[1]
    return Reshaping(part, _one_each(rows[:, 0].argsort()))


def _moved(labels: Tensor, node: Any) -> Any:
    saved, name = node.grad_fn, _name(node)
    if node.type == ops.OPTYPE.RESHAPE:
        return labels.reshape(saved._input_metadata[0].shape)
    if name == "TransposeBackward0":
        return labels.transpose(signed(saved._saved_dim0), signed(saved._saved_dim1))
    if name == "PermuteBackward0":
        return labels.permute([signed(d) for d in saved._saved_dims])
    return labels if name == "CloneBackward0" else None


def _split(node: Any, axes: Axes) -> Reshaping | None:
    saved = node.grad_fn
    shape = getattr(saved, "_saved_self_sym_sizes", ())
    if not shape or not hasattr(saved, "_saved_dim"):
        return None
    dim = signed(saved._saved_dim) % len(shape)
    if dim != _axis_in(node, axes, len(shape)):
        return Reshaping()
    sizes = [int(m.shape[dim]) for m in saved._input_metadata]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    node.outputs.sort(key=lambda out: _numbers(out, saved))
    numbers: list[int] = []
    for out in dict.fromkeys(node.outputs):
        numbers += _numbers(out, saved)
    if len(numbers) != len(node.outputs):
        return Reshaping(refusal=_LOST)
    found = Reshaping(outlets=[(starts[i], sizes[i]) for i in numbers])
    if hasattr(saved, "_saved_split_sizes"):  # the layers' own widths or numbers: a trial shows which
        return found
    if len(set(sizes)) == 1:
        found.part = torch.arange(shape[dim]) % sizes[0]
    else:
        found.refusal = f"a split cuts its channels into unequal parts ({sizes})"
    return found


def _padding(node: Any, axes: Axes) -> Reshaping | None:
    shape, pad = node.grad_fn._input_metadata[0].shape, node.grad_fn._saved_pad
    axis = _axis_in(node, axes, len(shape))
    last = 2 * (len(shape) - 1 - axis)  # padding is listed from the last axis on
    before, after = pad[last : last + 2] if len(pad) > last else (0, 0)
    size = shape[axis] - before - after
    return Reshaping(moved=_one_each(torch.arange(size) + before)) if before or after else None


def flatten(node: Any, axes: Axes) -> Reshaping | None:
    """[…, C, H, W] to […, C·H·W]: where the columns of each channel are."""
    before, after = node.grad_fn._saved_self_sym_sizes, node.grad_fn._input_metadata[0].shape[-1]
    starts = [axis for axis in range(len(before)) if math.prod(before[axis:]) == after]
    if not starts:
        return None
    channels, merged = axes.into(node.grad_fn), before[starts[-1] :]
    axis = 0 if channels is None or len(merged) < -channels else channels
    return Reshaping(moved=torch.arange(after).view(merged).movedim(axis, 0).flatten(1).tolist())


def merge(node: Any, axes: Axes) -> Reshaping | None:
    """The same with something behind: [N, C, H, W, T] to [N, C·H·W, T]."""
    before, after = node.grad_fn._saved_self_sym_sizes, tuple(node.grad_fn._input_metadata[0].shape)
    axis = axes.into(node.grad_fn)
    if axis is None or len(before) < -axis:
        return None
    first, gone = axis % len(before), len(before) - len(after)
    last = first + gone + 1
    merged = before[first:last]
    # two axes that become one are a shuffle's, which parts the channels first
    if gone < 2 or last >= len(before) or (*before[:first], math.prod(merged), *before[last:]) != after:
        return None
    return Reshaping(moved=torch.arange(math.prod(merged)).view(merged[0], -1).tolist())


def _one_each(places: Tensor) -> list[list[int]]:
    return [[to] for to in places.tolist()]


def _numbers(out: Any, split: Any) -> list[int]:
    """Which parts of a split a node takes in."""
    sources = out.grad_fn.next_functions
    # a module that is called at every timestep is one node, and its first call tells for all
    return [n for f, n in sources if f is split] or [n for f, n in sources if type(f) is type(split)]


def _slice(node: Any, axes: Axes) -> Reshaping | None:
    saved = node.grad_fn
    shape = saved._saved_self_sym_sizes
    dim = signed(saved._saved_dim) % len(shape)
    if dim != _axis_in(node, axes, len(shape)):
        return Reshaping()
    size = int(shape[dim])
    taken = torch.arange(size)[slice(signed(saved._saved_start), signed(saved._saved_end), saved._saved_step)]
    place = {channel: [to] for to, channel in enumerate(taken.tolist())}
    found = Reshaping(moved=[place.get(channel, []) for channel in range(size)])
    step, length = saved._saved_step, len(taken)
    if step == 1 and size % length == 0 and int(taken[0]) % length == 0:
        found.part = torch.arange(size) % length
    elif step > 1 and size % step == 0 and length == size // step:
        found.part = torch.arange(size) // step
    else:
        found.refusal = f"a slice takes {length} of its {size} channels"
    return found
