"""A NIR graph as chips want it: sums in the place of averages, whole numbers as weights, thresholds to match.

An average of n spikes is their sum over n. A layer whose weights are s · k, with whole numbers k, makes of sums z of n
spikes the current s/n · (k z + n/s · b). Its neurons, which know it only beside their threshold, fire alike where both
are in units of u = s/n:

    W → k,   b → b / u,   threshold, reset and rest → those / u,   averages → sums

Neurons that don't leak, behind whole numbers without a bias, and are reset to a whole number, have whole potentials
then; so have those whose states are on a grid of step u, which round what a bias adds. Their threshold is put a quarter
below the whole number that they must reach, so that those who fire where v > θ, those who do where v ≥ θ, and those who
round θ first, agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snncompress.model.fixed_point import nearest
from snncompress.model.parametrizations import compression_of, gridded, stored_weight, weight_mask

Array = NDArray[np.float64]


def whole_numbers(layer: nn.Module) -> Tensor | None:
    """A quantized weight as whole numbers, output channels first: odd ones where its grid has no zero. None of floats.

    >>> whole_numbers(nn.Linear(2, 1)) is None
    True
    """
    compression = compression_of(layer)
    found = None if compression is None else gridded(compression, stored_weight(layer))
    if compression is None or found is None:
        return None
    grid, numbers = found
    times = 1 if float(grid.zero_point).is_integer() else 2
    whole = ((numbers - grid.zero_point) * times).round().where(grid.nonzero(numbers), 0.0)
    mask = weight_mask(layer)
    return whole if mask is None else whole * compression.turned(mask)


def for_chip(graph: Any, numbers: Mapping[str, Tensor]) -> Any:
    """The graph with sums and whole numbers, computing the same; ``numbers`` are those of the layers that have them.

    Where neurons get currents of several layers, or what they get isn't theirs alone, weights stay as they are but for
    what averages were.
    """
    return _Writer(graph, numbers).graph()


class _Writer:
    def __init__(self, graph: Any, numbers: Mapping[str, Tensor]) -> None:
        import nir

        self._nir, self._graph, self._numbers = nir, graph, numbers
        self._nodes: dict[str, Any] = dict(graph.nodes)
        self._before: dict[str, list[str]] = {name: [a for a, b in graph.edges if b == name] for name in self._nodes}
        self._after: dict[str, list[str]] = {name: [b for a, b in graph.edges if a == name] for name in self._nodes}
        self._counts: dict[str, float] = {}
        self._grids: dict[str, Any] = json.loads(graph.metadata.get("fixed_point", "{}"))

    def graph(self) -> Any:
        """The new one."""
        for name, node in list(self._nodes.items()):
            if isinstance(node, self._nir.AvgPool2d) and self._summed(name):
                self._nodes[name] = self._nir.SumPool2d(node.kernel_size, node.stride, node.padding)
        for name, node in list(self._nodes.items()):
            if isinstance(node, (self._nir.Linear, self._nir.Affine, self._nir.Conv1d, self._nir.Conv2d)):
                self._scale(name, node)
        metadata = dict(self._graph.metadata)
        if self._grids:
            metadata["fixed_point"] = json.dumps(self._grids)
        return self._nir.NIRGraph(self._nodes, list(self._graph.edges), metadata)

    def _summed(self, name: str) -> bool:
        """Is it read by weights alone, through pooling and reshaping, none of which adds up what differs?"""
        passing = (self._nir.Flatten, self._nir.AvgPool2d, self._nir.SumPool2d)
        weights = (self._nir.Linear, self._nir.Affine, self._nir.Conv1d, self._nir.Conv2d)
        for after in self._after[name]:
            node = self._graph.nodes[after]
            if len(self._before[after]) > 1 or not isinstance(node, (*passing, *weights)):
                return False
            if isinstance(node, passing) and not self._summed(after):
                return False
        return bool(self._after[name])

    def _count(self, name: str) -> float:
        """How many spikes a value that this node puts out was the average of, and is the sum of now."""
        if name not in self._counts:
            node, before = self._nodes[name], self._before[name]
            was = isinstance(self._graph.nodes[name], self._nir.AvgPool2d) and isinstance(node, self._nir.SumPool2d)
            passing = isinstance(node, (self._nir.Flatten, self._nir.AvgPool2d, self._nir.SumPool2d))
            own = float(np.prod(node.kernel_size)) if was else 1.0
            self._counts[name] = own * (self._count(before[0]) if passing and len(before) == 1 else 1.0)
        return self._counts[name]

    def _scale(self, name: str, node: Any) -> None:
        sources, readers = self._before[name], self._after[name]
        count = self._count(sources[0]) if len(sources) == 1 else 1.0
        weight = np.asarray(node.weight, dtype=np.float64)
        bias = np.asarray(getattr(node, "bias", np.zeros(len(weight))), dtype=np.float64)
        neurons = [r for r in readers if isinstance(self._nodes[r], (self._nir.IF, self._nir.LIF))]
        alone = len(readers) == len(neurons) == 1 and self._before[readers[0]] == [name]
        unit = np.ones(len(weight))
        if alone:
            unit = self._units(name, weight) / count
        new = weight / (count * _along(unit, weight))
        whole = alone and name in self._numbers
        bias = bias / unit
        if alone and whole and self._shares(readers[0], unit):
            bias = nearest(torch.from_numpy(bias)).numpy()
        self._nodes[name] = self._with(node, (new.round() if whole else new), bias)
        if alone:
            exact = whole and np.array_equal(bias, bias.round())
            self._nodes[readers[0]] = self._neurons(self._nodes[readers[0]], unit, whole=exact)

    def _shares(self, neuron: str, unit: Array) -> bool:
        """Do its potentials count in the units of its weights? Its step is 1 then."""
        grid = self._grids.get(neuron, {"step": [0.0]})
        step = np.array(grid["step"]) / unit
        if shares := bool(np.allclose(step, 1.0, rtol=1e-5)):
            grid["step"] = [1.0]
        return shares

    def _units(self, name: str, weight: Array) -> Array:
        """Of each output channel the value of a 1, above 0; of floats 1."""
        if name not in self._numbers:
            return np.ones(len(weight))
        numbers = self._numbers[name].double().numpy()
        if numbers.size != weight.size:  # grouped: NIR has it in one group
            return np.ones(len(weight))
        rows, ours = weight.reshape(len(weight), -1), numbers.reshape(len(weight), -1)
        largest = np.abs(ours).argmax(1)[:, None]
        tops, values = (np.take_along_axis(a, largest, 1)[:, 0] for a in (ours, rows))
        return np.where(tops != 0, np.abs(values / np.where(tops != 0, tops, 1)), 1.0)

    def _with(self, node: Any, weight: Array, bias: Array) -> Any:
        nir = self._nir
        weight, bias = weight.astype(np.float32), bias.astype(np.float32)
        if isinstance(node, (nir.Linear, nir.Affine)):  # one kind for both: some readers take no other
            return nir.Affine(weight, bias)
        kind = type(node)
        return kind(node.input_shape, weight, node.stride, node.padding, node.dilation, node.groups, bias)

    def _neurons(self, node: Any, unit: Array, *, whole: bool) -> Any:
        scale = _along(unit, node.v_threshold)
        threshold, reset = node.v_threshold / scale, node.v_reset / scale
        if isinstance(node, self._nir.LIF):
            return self._nir.LIF(node.tau, node.r, node.v_leak / scale, threshold, reset)
        if whole and np.array_equal(reset, reset.round()):
            strict = self._graph.metadata.get("fires") == "v > v_threshold"
            near = threshold.round()
            close = np.abs(threshold - near) <= 1e-6 * np.maximum(1.0, np.abs(near))  # whole, but for rounding
            reached = np.where(close, near + strict, np.floor(threshold) + 1)
            threshold = reached - 0.25
        return self._nir.IF(node.r, threshold, reset)


def _along(unit: Array, like: Any) -> Array:
    """One number per output channel or neuron, the channels of which stand first."""
    return unit.reshape(-1, *[1] * (np.ndim(like) - 1))
