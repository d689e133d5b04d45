"""A network in whole numbers as one timestep in ONNX: ConvInteger and MatMulInteger, and neurons in 64-bit integers.

ONNX has no arithmetic shift of negative numbers, so that ⌊q / 2^k⌋ is (q - q mod 2^k) / 2^k. ONNX Runtime has no
convolutions in float64, so that a layer before the first spikes is a product with the windows that it slides over; and
its Sign is that of the lower 32 bits, so that what is less than 0 is asked.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from snncompress.errors import ModelError
from snncompress.model.fixed_point import LEAK_BITS

from .integer_neurons import FRACTION, ROUNDING
from .integer_program import Program

_OPSET, _IR = 21, 10
_LONG = np.int64


def integer_onnx(program: Program) -> bytes:
    """The serialized model; raises ModelError where what it became isn't valid ONNX.

    Inputs "input" [N, …], in float32, and of every neuron its number of steps, "name.q" [N, C, …], in int32; outputs
    "output", in float32, and "name.q_next". Spikes are inside, a byte each, as "name.out".
    """
    import onnx

    writer = _Writer(program)
    writer.done()
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            writer.nodes, "integer_network", writer.inputs, writer.outputs, initializer=writer.constants
        ),
        producer_name="snncompress", opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=_IR,
    )  # fmt: skip
    onnx.helper.set_model_props(model, {"initial_states": json.dumps(writer.start)})
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of the checker, in C++
        raise ModelError(f"What this network in whole numbers became isn't valid ONNX: {error}.") from error
    return cast(bytes, model.SerializeToString())


class _Writer:
    """ONNX nodes; ``_types`` are those of the values that nodes of the program put out."""

    def __init__(self, program: Program) -> None:
        from onnx import TensorProto

        self._kinds: Any = TensorProto
        self._program = program
        self._shapes = {"input": list(program.input), **{node["name"]: node["shape"] for node in program.nodes}}
        self._types: dict[str, int] = {"input": TensorProto.FLOAT}
        self._values: dict[tuple[str, int], str] = {("input", TensorProto.FLOAT): "input"}
        self._count = 0
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = [self._shown("input", TensorProto.FLOAT, program.input)]
        self.outputs: list[Any] = []
        self.start: dict[str, Any] = {}
        for node in program.nodes:
            name = node["name"]
            made, kind = getattr(self, f"_{node['op']}")(node, *node["inputs"])
            self._op("Identity", made, out=f"{name}.out")
            self._types[name], self._values[name, kind] = kind, f"{name}.out"

    def done(self) -> None:
        """Put the output before the states, in float32."""
        floats, name = self._kinds.FLOAT, self._program.output
        self._op("Identity", self._as(name, floats), out="output")
        self.outputs.insert(0, self._shown("output", floats, self._shapes[name]))

    def _op(self, kind: str, *inputs: str, out: str = "", **settings: Any) -> str:
        from onnx import helper

        self._count += 1
        out = out or f"/{self._count}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **settings))
        return out

    def _constant(self, array: Any, name: str = "") -> str:
        from onnx import numpy_helper

        self._count += not name
        name = name or f"/{self._count}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _whole(self, value: Any) -> str:
        return self._constant(np.asarray(value, _LONG))

    def _get(self, node: dict[str, Any], what: str) -> NDArray[Any] | None:
        found = self._program.tensors.get(f"{node['name']}.{what}")
        return None if found is None else found.numpy()

    def _must(self, node: dict[str, Any], what: str) -> NDArray[Any]:
        return self._program.tensors[f"{node['name']}.{what}"].numpy()

    def _shown(self, name: str, kind: int, shape: Any) -> Any:
        from onnx import helper

        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    def _as(self, name: str, kind: int) -> str:
        """What a node of the program puts out, as numbers of another type."""
        if (name, kind) not in self._values:
            self._values[name, kind] = self._op("Cast", self._values[name, self._types[name]], to=kind)
        return self._values[name, kind]

    def _linear(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        weight = self._must(node, "weight")
        if weight.dtype.kind == "f":
            made = self._op("MatMul", self._as(source, self._kinds.DOUBLE), self._constant(weight.T.astype(np.float64)))
            return self._finished(node, made, self._kinds.DOUBLE)
        made = self._summed("MatMulInteger", source, weight.T)
        return self._finished(node, made, self._kinds.INT32)

    def _conv(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        weight, padding = self._must(node, "weight"), node["padding"]
        if weight.dtype.kind == "f":
            return self._finished(node, self._windowed(node, source, weight.astype(np.float64)), self._kinds.DOUBLE)
        geometry = {"strides": node["stride"], "dilations": node["dilation"], "pads": [*padding, *padding]}
        made = self._summed("ConvInteger", source, weight, group=node["groups"], **geometry)
        return self._finished(node, made, self._kinds.INT32)

    def _summed(self, kind: str, source: str, weight: NDArray[Any], **settings: Any) -> str:
        """Sums in int32, of weights of two bytes 256 times those of the upper ones and those of the lower ones."""
        x = self._as(source, self._kinds.UINT8)
        if weight.dtype == np.int8:
            return self._op(kind, x, self._constant(weight), **settings)
        upper, lower = (weight >> 8).astype(np.int8), (weight & 0xFF).astype(np.uint8)
        more, less = (self._op(kind, x, self._constant(part), **settings) for part in (upper, lower))
        return self._op("Add", self._op("Mul", more, self._constant(np.int32(256))), less)

    def _finished(self, node: dict[str, Any], sums: str, kind: int) -> tuple[str, int]:
        """A readout's scale and bias, and that of a layer in float, in float64."""
        per_channel = (-1, *[1] * (self._must(node, "weight").ndim - 2))
        for op, what in (("Mul", "scale"), ("Add", "bias")):
            values = self._get(node, what)
            if values is not None:
                if kind != self._kinds.DOUBLE:
                    sums, kind = self._op("Cast", sums, to=self._kinds.DOUBLE), self._kinds.DOUBLE
                sums = self._op(op, sums, self._constant(values.astype(np.float64).reshape(per_channel)))
        return sums, kind

    def _windowed(self, node: dict[str, Any], source: str, weight: NDArray[Any]) -> str:
        """A convolution in float64: what each place of the kernel meets, [N, G, K · C/G, P], times the weights."""
        x, groups, size = self._as(source, self._kinds.DOUBLE), node["groups"], node["shape"][1:]
        padding, axes = node["padding"], self._whole(range(2, 2 + len(size)))
        if any(padding):
            x = self._op("Pad", x, self._whole([0, 0, *padding, 0, 0, *padding]))
        inner, spots, steps = weight.shape[1], int(np.prod(size)), self._whole(node["stride"])
        parts = []
        for place in product(*map(range, weight.shape[2:])):
            first = [k * d for k, d in zip(place, node["dilation"], strict=True)]
            last = [f + (n - 1) * s + 1 for f, n, s in zip(first, size, node["stride"], strict=True)]
            part = self._op("Slice", x, self._whole(first), self._whole(last), axes, steps)
            parts.append(self._op("Reshape", part, self._whole([0, groups, inner, spots])))
        seen = self._op("Concat", *parts, axis=2)
        rows = np.moveaxis(weight.reshape(groups, len(weight) // groups, inner, -1), 3, 2)
        made = self._op("MatMul", self._constant(rows.reshape(groups, len(weight) // groups, -1)), seen)
        return self._op("Reshape", made, self._whole([0, len(weight), *size]))

    def _max_pool(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        given, pads = self._types[source], node["padding"]
        kind = given if given == self._kinds.UINT8 else self._kinds.DOUBLE  # ONNX Runtime pools no int32
        windows = {"kernel_shape": node["kernel_size"], "strides": node["stride"], "pads": [*pads, *pads]}
        made = self._op("MaxPool", self._as(source, kind), dilations=node["dilation"], **windows)
        return (made, kind) if kind == given else (self._op("Cast", made, to=given), given)

    def _flatten(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        kind = self._types[source]
        return self._op("Flatten", self._as(source, kind), axis=1), kind

    def _add(self, node: dict[str, Any], one: str, other: str) -> tuple[str, int]:
        floats = {self._kinds.FLOAT, self._kinds.DOUBLE} & {self._types[one], self._types[other]}
        kind = self._kinds.DOUBLE if floats else self._kinds.INT32
        return self._op("Add", self._as(one, kind), self._as(other, kind)), kind

    def _neuron(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        name, op = node["name"], self._op
        theta, rest = self._must(node, "threshold"), self._must(node, "rest")
        limit, q, less = self._constant(theta), self._state(node, rest), ""
        fires = "GreaterOrEqual" if node["fires"] == ">=" else "Greater"
        if node["reset"] == "subtract late":
            before = op("Cast", op(fires, q, limit), to=self._kinds.INT64)
            less = op("Mul", before, self._constant(theta << FRACTION))
        q = self._charged(node, q, source, less)
        spikes = op(fires, q, limit)
        if node["reset"] != "subtract late":
            after = self._constant(rest) if node["reset"] == "value" else op("Sub", q, limit)
            q = op("Where", spikes, after, q)
        op("Cast", q, to=self._kinds.INT32, out=f"{name}.q_next")
        return op("Cast", spikes, to=self._kinds.UINT8), self._kinds.UINT8

    def _current(self, node: dict[str, Any], source: str) -> tuple[str, int]:
        q = self._charged(node, self._state(node, np.zeros(1, _LONG)), source)
        return self._op("Cast", q, to=self._kinds.INT32, out=f"{node['name']}.q_next"), self._kinds.INT32

    def _state(self, node: dict[str, Any], rest: NDArray[Any]) -> str:
        """What it was after the timestep before."""
        label, kind = f"{node['name']}.q", self._kinds.INT32
        self.inputs.append(self._shown(label, kind, node["shape"]))
        self.outputs.append(self._shown(f"{label}_next", kind, node["shape"]))
        self.start[label] = int(rest.flat[0]) if (rest == rest.flat[0]).all() else rest.tolist()
        return self._op("Cast", label, to=self._kinds.INT64)

    def _charged(self, node: dict[str, Any], q: str, source: str, less: str = "") -> str:
        op, whole = self._op, self._whole
        y = op("Add", self._driven(node, source), self._constant(self._must(node, "bias")))
        y = op("Add", y, self._leaked(node, q))
        y = op("Sub", y, less) if less else y
        size = op("Div", op("Add", op("Abs", y), whole(ROUNDING)), whole(2**FRACTION))
        return self._held(node, op("Where", op("Less", y, whole(0)), op("Neg", size), size))

    def _driven(self, node: dict[str, Any], source: str) -> str:
        long, scale = self._kinds.INT64, self._get(node, "scale")
        if scale is None:
            return self._op("Mul", self._as(source, long), self._constant(self._must(node, "multiplier")))
        steps = self._op("Mul", self._as(source, self._kinds.DOUBLE), self._constant(scale))
        return self._op("Cast", self._op("Round", steps), to=long)

    def _leaked(self, node: dict[str, Any], q: str) -> str:
        """In units of 2^-24."""
        if node["leak"] == "exact":
            return self._op("Mul", q, self._constant(self._must(node, "decay") << FRACTION - LEAK_BITS))
        power = self._constant(_LONG(1) << self._must(node, "shift"))
        shifted = self._op("Div", self._op("Sub", q, self._op("Mod", q, power)), power)
        leaks = self._constant(self._must(node, "leaks").astype(_LONG))
        return self._op("Mul", self._op("Sub", q, self._op("Mul", leaks, shifted)), self._whole(2**FRACTION))

    def _held(self, node: dict[str, Any], q: str) -> str:
        """What a register of so many bits holds."""
        half = 2 ** (node["bits"] - 1)
        if node["overflow"] == "saturate":
            return self._op("Clip", q, self._whole(-half), self._whole(half - 1))
        wrapped = self._op("Mod", self._op("Add", q, self._whole(half)), self._whole(2 * half))
        return self._op("Sub", wrapped, self._whole(half))
