"""torch-pruning's dependency graph, told what it can't see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import shape_infer
from torch_pruning.pruner.function import BasePruningFunc

from snncompress.model.channel_map import ChannelMap

from .axes import Axes
from .reshaping import UnfitError, concatenated, find_reshapings, flatten, merge, offset

LOST = "its channels can't be followed through what forward does with them"
_ROUNDS = 4  # how often a group may pass each edge; once is what nearly all do


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
