"""A network in whole numbers as a NIR graph: codes and resets are integers, potentials numbers of a step.

    v ← v + dt/τ · (v_leak - v + r · (Σ k s + B / M))        r = M / 2^24 / leak, τ = dt / leak

NIR's equation has no rounding and no registers: where M / 2^24 is whole, nothing leaks and nothing saturates, that
is the network to the last spike; elsewhere it is the network but for what rounding does. Thresholds stand a quarter
below the whole number that must be reached, so that those who fire where v > θ, those who do where v ≥ θ, and those who
round θ first, agree.
"""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from snncompress.errors import ModelError
from snncompress.interfaces import Dynamics
from snncompress.model.fixed_point import LEAK_BITS

from .integer_neurons import FRACTION
from .integer_program import Program
from .nir_layers import ungrouped
from .nir_neurons import DT, RefusedError, neuron_part

_ONE = 2.0**FRACTION
_WIDTHS = (np.int8, np.int16, np.int32, np.int64)
_WHOLE = {"weight", "bias", "v_leak", "v_reset"}
Array = NDArray[Any]


def integer_nir(program: Program) -> Any:
    """The ``nir.NIRGraph``; raises ModelError, naming the node, for what NIR can't express."""
    import nir

    writer = _Writer(program)
    metadata = {"dt": DT, "fires": "v > v_threshold", "fixed_point": json.dumps(writer.registers)}
    return nir.NIRGraph({name: _in_integers(node) for name, node in writer.nodes.items()}, writer.edges, metadata)


class _Writer:
    """NIR nodes and edges; ``_sources`` are the nodes whose outputs add up to the value of a node of the program."""

    def __init__(self, program: Program) -> None:
        import nir

        self._program, self._nir = program, nir
        self._nodes = {node["name"]: node for node in program.nodes}
        self._sources: dict[str, tuple[str, ...]] = {"input": ("input",)}
        self.nodes: dict[str, Any] = {"input": nir.Input(np.array(program.input))}
        self.edges: list[tuple[str, str]] = []
        self.registers = {
            node["name"]: {"bits": node["bits"], "overflow": node["overflow"], "step": [1.0]}
            for node in program.nodes
            if node["op"] in ("neuron", "current")
        }
        for node in program.nodes:
            try:
                getattr(self, f"_{node['op']}")(node, *node["inputs"])
            except RefusedError as error:
                raise ModelError(
                    f"{node['name']} can't be written as NIR in whole numbers: {error}. format='onnx' and 'integer' "
                    f"hold this network."
                ) from error
        self._put("output", nir.Output(np.array(self._shape(program.output))), self._sources[program.output])

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._nodes[name]["shape"]) if name in self._nodes else self._program.input

    def _put(self, name: str, node: Any, sources: tuple[str, ...]) -> None:
        if name in self.nodes:
            raise RefusedError(f"a node of its name, {name!r}, is there already")
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        self._sources[name] = (name,)

    def _get(self, node: Any, what: str) -> Array | None:
        found = self._program.tensors.get(f"{node['name']}.{what}")
        return None if found is None else np.atleast_1d(found.double().numpy())

    def _linear(self, node: Any, source: str) -> None:
        if len(self._shape(source)) != 1:
            raise RefusedError("NIR's linear node takes vectors")
        weight, bias = self._numbers(node)
        layer = self._nir.Affine(weight, bias) if bias.any() else self._nir.Linear(weight)
        self._put(node["name"], layer, self._sources[source])

    def _conv(self, node: Any, source: str) -> None:
        size = self._shape(source)[1:]
        if len(size) > 2:
            raise RefusedError("NIR has convolutions of one and two axes")
        weight, bias = self._numbers(node)
        whole = ungrouped(torch.from_numpy(weight), node["groups"]).numpy()
        flat = len(size) == 1
        plan = [node[key][0] if flat else tuple(node[key]) for key in ("stride", "padding", "dilation")]
        kind, before = (self._nir.Conv1d, size[0]) if flat else (self._nir.Conv2d, size)
        self._put(node["name"], kind(before, whole, *plan, 1, bias), self._sources[source])

    def _numbers(self, node: Any) -> tuple[Array, Array]:
        """Weight and bias: of what a neuron reads in units of its sums, of a readout in its own."""
        name = node["name"]
        weight, bias, scale = (self._get(node, what) for what in ("weight", "bias", "scale"))
        weight = cast(Array, weight)
        bias = np.zeros(len(weight)) if bias is None else bias
        weight = weight if scale is None else weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        readers = [other for other in self._program.nodes if name in other["inputs"]]
        for reader in readers:
            if reader["op"] not in ("neuron", "current"):
                continue
            added = cast(Array, self._get(reader, "bias")).flatten()
            if added.any() and len(readers) > 1:
                raise RefusedError("a neuron adds a bias to it, and something else reads it too")
            factor = self._factor(reader).flatten()
            bias = bias + added / np.where(factor, factor, 1.0) / np.where(factor, 1.0, _ONE)
            weight = weight * (factor != 0).reshape(-1, *[1] * (weight.ndim - 1))
        return weight, bias

    def _factor(self, neuron: Any) -> Array:
        """2^24 times how many steps one in a current is."""
        found = self._get(neuron, "multiplier")
        return cast(Array, self._get(neuron, "scale")) if found is None else found

    def _charge(self, node: Any, source: str) -> tuple[Array, Array]:
        """Leak and gain."""
        if self._nodes.get(source, {}).get("op") not in ("linear", "conv", "current"):
            raise RefusedError("NIR's layers hold the biases of neurons, and it doesn't follow one")
        factor = self._factor(node)
        if node["leak"] == "exact":
            leak = 1 - self._must(node, "decay") / 2**LEAK_BITS
        else:
            leak = self._must(node, "leaks") * 2.0 ** -self._must(node, "shift")
        return leak, np.where(factor, factor, _ONE) / _ONE

    def _current(self, node: Any, source: str) -> None:
        leak, gain = (np.broadcast_to(values, node["shape"]) for values in self._charge(node, source))
        if leak.any() and not leak.all():
            raise RefusedError("some of its currents leak and others don't, and NIR has either LI or I")
        zeros = np.zeros(leak.shape)
        held = self._nir.LI(DT / leak, gain / leak, zeros) if leak.any() else self._nir.I(gain / DT)
        self._put(node["name"], held, self._sources[source])

    def _neuron(self, node: Any, source: str) -> None:
        name, shape = node["name"], tuple(node["shape"])
        theta, rest, (leak, gain) = self._must(node, "threshold"), self._must(node, "rest"), self._charge(node, source)
        reset: Any = rest if node["reset"] == "value" else None
        leaks, gains, thetas = (torch.from_numpy(values) for values in (leak, gain, theta))
        equation = Dynamics(leaks, gains, thetas, 0.0, reset, False, node["reset"] == "subtract late")
        part = neuron_part(name, equation, shape, None, plain=False)
        for inner, made in part.nodes.items():
            self._put(inner, made, self._sources[source] if inner == part.entry else ())
        self.edges += part.edges
        fired = self.nodes[name]
        held = "threshold" if isinstance(fired, self._nir.Threshold) else "v_threshold"
        reached = getattr(fired, held) + (node["fires"] == ">")
        setattr(fired, held, reached - 0.25)

    def _must(self, node: Any, what: str) -> Array:
        return cast(Array, self._get(node, what))

    def _max_pool(self, node: Any, source: str) -> None:
        """Of spikes: whether the sum over a window is more than half a spike."""
        if len(node["kernel_size"]) != 2 or any(d != 1 for d in node["dilation"]):
            raise RefusedError("NIR pools in two dimensions, without dilation")
        if self._nodes.get(source, {}).get("op") not in ("neuron", "max_pool"):
            raise RefusedError("NIR has no max-pooling but of spikes")
        sums = self._nir.SumPool2d(*(np.array(node[key]) for key in ("kernel_size", "stride", "padding")))
        self._put(f"{node['name']}_sum", sums, self._sources[source])
        self._put(node["name"], self._nir.Threshold(np.full(node["shape"], 0.5)), (f"{node['name']}_sum",))

    def _flatten(self, node: Any, source: str) -> None:
        flat = self._nir.Flatten({"input": np.array(self._shape(source))}, 0, -1)
        self._put(node["name"], flat, self._sources[source])

    def _add(self, node: Any, one: str, other: str) -> None:
        sources = self._sources[one] + self._sources[other]
        if len(set(sources)) != len(sources):
            raise RefusedError("it adds one value twice, and NIR has one edge between two nodes")
        self._sources[node["name"]] = sources


def _in_integers(node: Any) -> Any:
    """With the narrowest integers in the place of floats that are whole, and 32 bits for those that have no more."""
    for key, value in vars(node).items():
        if key in _WHOLE and isinstance(value, np.ndarray):
            kinds = (*(t for t in _WIDTHS if np.abs(value).max(initial=0) <= np.iinfo(t).max), np.float32, np.float64)
            setattr(node, key, next(made for made in map(value.astype, kinds) if np.array_equal(made, value)))
    return node
