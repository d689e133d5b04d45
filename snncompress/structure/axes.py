"""On which axis of each tensor the channels stand, found by following autograd's graph back to where it is known.

A layer's type says where its output has them: [N, C, H, W] behind a convolution, [..., C] behind a linear layer. From
there they go through transposes, reshapes, sums. Axes are counted from the end: -1 in [N, C] and in tokens [N, L, C],
-3 in [N, C, H, W], with samples and time in front or without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_WRITTEN = "torch::autograd::CopySlices"


class Axes:
    """The axis of channels in what comes out of autograd's nodes; ``known`` are those that a layer's type tells."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self._lost: set[Any] = set()

    def of(self, node: Any) -> int | None:
        """The axis, or None where channels don't have one of their own."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top is None or top in self.known or top in self._lost:
                stack.pop()
                continue
            for source, _ in top.next_functions:
                if source is not None and source not in self.known and source not in self._lost:
                    stack.append(source)
                    break
                if source in self.known and (axis := _behind(top, source, self.known[source])) is not None:
                    self.known[top] = axis
                    break
            else:
                self._lost.add(top)
        return self.known.get(node)

    def into(self, node: Any) -> int | None:
        """The same of what goes into a node that takes one tensor."""
        return self.of(node.next_functions[0][0]) if node.next_functions else None


def signed(number: int) -> int:
    """Autograd saves a negative axis, start or end as an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def name_of(node: Any) -> str:
    """Such as "ViewBackward0"; torch-pruning's stand-ins for modules have none."""
    name = getattr(node, "name", None)
    return str(name()) if name is not None else ""


def _behind(node: Any, source: Any, axis: int) -> int | None:
    """Where channels on ``axis`` of what ``source`` puts out stand in what ``node`` puts out."""
    name = name_of(node)
    before = getattr(node, "_saved_self_sym_sizes", None)
    dims = len(before) if before else 0
    if name == "TransposeBackward0":
        return _transposed(node, source, axis)
    if name == "PermuteBackward0":
        order = [signed(d) for d in node._saved_dims]
        return [d % len(order) for d in order].index(axis % len(order)) - len(order)
    if name in ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"):
        return reshaped(before or (), node._input_metadata[0].shape, axis)
    if name == "UnsqueezeBackward0":
        after = len(node._input_metadata[0].shape)
        dim = signed(node._saved_dim) % after - after
        return axis - 1 if dim >= axis else axis
    if name in ("StackBackward0", _WRITTEN, "_AllBackward", "_FirstBackward"):
        return _timed(node, source, axis)
    if name == "SelectBackward0" or (name in ("MeanBackward1", "SumBackward1") and not node._saved_keepdim):
        gone = [node._saved_dim] if name == "SelectBackward0" else node._saved_dim or range(dims)
        places = [signed(d) % dims - dims for d in gone]
        return None if axis in places else axis + sum(place > axis for place in places)
    if name == "SqueezeBackward1":
        place = signed(node._saved_dim) % dims - dims
        return axis + (place > axis and len(node._input_metadata[0].shape) < dims)
    if name in ("BmmBackward0", "MmBackward0"):
        contracted = -1 if node.next_functions[0][0] is source else -2
        return None if axis == contracted else axis
    return axis


def _timed(node: Any, source: Any, axis: int) -> int:
    """Behind an axis that comes in, as that of time, or goes: written piece by piece, it is last or first."""
    before, after = source._input_metadata[0].shape, node._input_metadata[0].shape
    if abs(len(after) - len(before)) != 1:
        return axis
    longer, shorter = (after, before) if len(after) > len(before) else (before, after)
    if name_of(node) == "StackBackward0":
        place = signed(node._saved_dim) % len(after) - len(after)
    elif name_of(node) == _WRITTEN:
        place = -1 if longer[:-1] == shorter else -len(longer)
    else:
        place = node.axis % len(longer) - len(longer)
    if longer is before:
        return axis + (place > axis)
    return axis - (place >= axis)


def _transposed(node: Any, source: Any, axis: int) -> int:
    dims = len(node._input_metadata[0].shape)
    one, other = (signed(d) % dims - dims for d in (node._saved_dim0, node._saved_dim1))
    return {one: other, other: one}.get(axis, axis)


def reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Where an axis went in a reshape: to that of as many elements behind it, or to the one that it is flattened into.

    >>> reshaped([2, 3, 8, 4, 4], [6, 8, 4, 4], -3), reshaped([2, 8, 4, 4], [2, 8, 16], -3)
    (-3, -2)
    >>> reshaped([2, 8, 4], [2, 32], -2)
    -1
    """
    size, behind = before[axis], math.prod(before[axis:][1:])
    for place in range(-1, -len(after) - 1, -1):
        rest = math.prod(after[place:][1:])
        if rest == behind and after[place] == size:
            return place
    for place in range(-1, -len(after) - 1, -1):  # merged with what is behind it, or taken apart
        rest = math.prod(after[place:][1:])
        if rest <= behind < rest * after[place]:
            return place
    return None
