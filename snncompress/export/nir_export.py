"""One timestep of a network as a NIR graph: torch.fx shows what feeds what, an example the shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.model.weights_in_use import weight_in_use
from snncompress.structure.fx_graphs import Tracer, called, operation

DT = 1e-4  # seconds per timestep: what snnTorch, SpikingJelly and others assume

_ADDS = {"add", "iadd"}
_SAME = {"contiguous", "clone", "detach", "dropout", "to", "float"}  # where they leave every value as it is
_RESHAPES = {"flatten", "view", "reshape", "squeeze"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_NO_MAX_POOL = "NIR has no max-pooling; train the network with nn.AvgPool2d in its place"


def nir_graph(model: nn.Module, adapter: Adapter, x: Tensor) -> Any:
    """The ``nir.NIRGraph`` of a model that is called once per timestep, with plain weights.

    ``x`` [1, ...] is one sample. Raises ModelError, naming the module, for what NIR can't express.
    """
    import nir

    writer = _Writer(model, adapter, x)
    return nir.NIRGraph(writer.nodes, writer.edges, {"dt": DT, "fires": writer.fires})


class _RefusedError(Exception):
    """Why a module or an operation can't be expressed."""


class _LeafTracer(Tracer):
    """Goes into modules that are written in terms of others; not into neurons, torch's layers and their subclasses."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(deep=True)
        self._adapter = adapter

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        homes = (cls.__module__ for cls in type(m).__mro__)
        layer = any(
            h.startswith("torch.nn.modules.") and h.split(".")[-1] not in ("module", "container") for h in homes
        )
        return layer or self._adapter.is_neuron(m)


class _Run(fx.Interpreter):
    """Keeps what every node computed, also where it is changed in place later."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n] = result.clone() if isinstance(result, Tensor) else result
        return result


class _Writer:
    """NIR nodes and edges; ``_sources`` are the nodes whose outputs add up to a tensor of the traced graph."""

    def __init__(self, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.fires = "v > v_threshold"
        self._model, self._adapter = model, adapter
        self._sources: dict[fx.Node, tuple[str, ...]] = {}
        try:
            tracer = _LeafTracer(adapter)
            graph = tracer.trace(model)
            run = _Run(fx.GraphModule(tracer.root, graph))
            run.run(x)
        except Exception as error:  # the code is the user's: anything can come out of it
            raise ModelError(
                f"torch.fx can't trace {type(model).__name__}: {type(error).__name__}: {error}. Keep loops over time "
                f"and decisions that depend on the input out of its forward."
            ) from error
        self._values = run.values
        self._memory = {n: v.untyped_storage().data_ptr() for n, v in run.env.items() if isinstance(v, Tensor)}
        for node in graph.nodes:
            try:
                self._write(node)
            except (_RefusedError, ModelError) as error:
                raise ModelError(f"{self._place(node)} can't be written as NIR: {error}.") from error

    def _write(self, node: fx.Node) -> None:
        import nir

        if node.op == "placeholder":
            self._add(node, "input", nir.Input(np.array(self._shape(node))), ())
        elif node.op == "output":
            result: Any = node.args[0]
            if not isinstance(result, fx.Node) or result not in self._sources:
                raise _RefusedError("the model must return one tensor, or a neuron's (spikes, membrane potential)")
            self._add(node, "output", nir.Output(np.array(self._shape(result))), self._sources[result])
        elif node.op == "call_module":
            self._write_module(node)
        elif node.op in ("call_function", "call_method"):
            self._write_operation(node)

    def _write_module(self, node: fx.Node) -> None:
        module, name = self._model.get_submodule(str(node.target)), str(node.target)
        source = self._operand(node)
        if self._adapter.is_neuron(module):
            if name in self.nodes:
                raise _RefusedError("it is called twice in one timestep; give each use a neuron of its own")
            dynamics = self._neuron(module, self._shape(node))
            self._add(node, name, dynamics, self._sources[source])
        elif isinstance(module, (nn.Identity, _DropoutNd)):
            self._sources[node] = self._sources[source]
        else:
            self._add(node, name, self._layer(module, source, node), self._sources[source])

    def _write_operation(self, node: fx.Node) -> None:
        name, value = operation(node), self._values[node]
        operands = [n for n in node.all_input_nodes if n in self._sources]
        if not isinstance(value, Tensor):  # a size
            return
        if name in _ADDS:
            self._sources[node] = self._sum(node)
        elif name == "getitem" and operands and isinstance(self._values[operands[0]], tuple):
            if node.args[1] != 0 and node.users:
                raise _RefusedError("the membrane potential is used, and NIR's neurons hand on their spikes alone")
            self._sources[node] = self._sources[operands[0]]
        elif name in _JOINS:
            raise _RefusedError("NIR can't concatenate, its edges only add up; use a sum")
        elif name.startswith(("max_pool", "adaptive_max_pool")):
            raise _RefusedError(_NO_MAX_POOL)
        elif len(operands) != 1:
            raise _RefusedError(f"NIR has nothing for {name}")
        elif name in _SAME and torch.equal(value, self._values[operands[0]]):
            self._sources[node] = self._sources[operands[0]]
        elif name in _RESHAPES:
            self._add(node, node.name, self._flatten(operands[0], node), self._sources[operands[0]])
        elif name in _FUNCTIONS:
            layer = self._layer(_FUNCTIONS[name](*node.args[1:], **node.kwargs), operands[0], node)
            self._add(node, node.name, layer, self._sources[operands[0]])
        elif name == "mean" and self._is_global_mean(operands[0], node):
            self._add_global_mean(operands[0], node)
        else:
            raise _RefusedError(f"NIR has nothing for {name}")

    def _sum(self, node: fx.Node) -> tuple[str, ...]:
        parts: list[Any] = [*node.args, *node.kwargs.values()]
        if len(parts) != 2 or not all(isinstance(p, fx.Node) and p in self._sources for p in parts):
            raise _RefusedError("NIR adds what two layers put out, not a constant and not with a factor")
        if self._memory[node] == self._memory[parts[0]] and self._used_elsewhere(parts[0]):
            raise _RefusedError("it changes in place what is used elsewhere too; write y = x + … instead of x += …")
        if len({self._shape(p) for p in parts}) != 1:
            raise _RefusedError("NIR adds tensors of one shape, and these must be broadcast")
        result = self._sources[parts[0]] + self._sources[parts[1]]
        if len(set(result)) != len(result):
            raise _RefusedError(
                "it adds one tensor twice, and NIR has one edge between two nodes; double the weights instead"
            )
        return result

    def _used_elsewhere(self, changed: fx.Node) -> bool:
        """Whether something but the next node in the same memory takes this node, or an earlier one there."""
        earlier = [n for n in self._sources if self._memory.get(n) == self._memory[changed]]
        return any(self._memory.get(user) != self._memory[changed] for n in earlier for user in n.users)

    def _layer(self, module: nn.Module, source: fx.Node, node: fx.Node) -> Any:
        for kind, write in _LAYERS.items():
            if isinstance(module, kind):
                layer = write(module, self._shape(source), self._shape(node))
                plain = kind.forward(cast(Any, module), self._values[source])
                if not torch.equal(plain, self._values[node]):
                    raise _RefusedError(f"its class computes something else than {kind.__name__}")
                return self._checked(layer, source, node)
        if isinstance(module, _MAX_POOLS):
            raise _RefusedError(_NO_MAX_POOL)
        if isinstance(module, _BatchNorm):
            raise _RefusedError(
                "NIR has no batch normalization, and this one doesn't follow a layer it could be folded into"
            )
        raise _RefusedError(f"NIR has no node for {type(module).__name__}")

    def _checked(self, layer: Any, source: fx.Node, node: fx.Node) -> Any:
        """NIR infers shapes again when a file is read."""
        for what, type_, wanted in (("input", layer.input_type, source), ("output", layer.output_type, node)):
            inferred = type_[what]
            if inferred is not None and tuple(inferred) != self._shape(wanted):
                raise _RefusedError(
                    f"NIR infers the {what} shape {list(map(int, inferred))} instead of {list(self._shape(wanted))}, "
                    f"as it takes kernels for square"
                )
        return layer

    def _flatten(self, source: fx.Node, node: fx.Node) -> Any:
        return _flatten(nn.Flatten(), self._shape(source), self._shape(node))

    def _is_global_mean(self, source: fx.Node, node: fx.Node) -> bool:
        x, y = self._values[source], self._values[node]
        return x.dim() == 4 and y.numel() == x.shape[1] and torch.equal(y.flatten(), x.mean((2, 3)).flatten())

    def _add_global_mean(self, source: fx.Node, node: fx.Node) -> None:
        import nir

        shape = self._shape(source)
        pool = nir.AvgPool2d(np.array(shape[1:]), np.array(shape[1:]), np.array((0, 0)))
        self._add(node, node.name, pool, self._sources[source])
        if len(self._shape(node)) == 1:
            flat = nir.Flatten({"input": np.array((shape[0], 1, 1))}, 0, -1)
            self._add(node, f"{node.name}_flatten", flat, self._sources[node])

    def _neuron(self, module: nn.Module, shape: tuple[int, ...]) -> Any:
        import nir

        d = self._adapter.dynamics(module)
        if d.reset is None:
            raise _RefusedError(
                "it resets by subtracting the threshold, and NIR's neurons are set to v_reset. Reset to a value "
                "(SpikingJelly: v_reset=0.0, snnTorch: reset_mechanism='zero') and fine-tune"
            )
        if d.inclusive:
            self.fires = "v >= v_threshold"
        leak, gain, threshold = (_full(t, shape) for t in (d.leak, d.gain, d.threshold))
        reset = np.full(shape, d.reset)
        if not leak.any():
            return nir.IF(r=gain / DT, v_threshold=threshold, v_reset=reset)
        if not leak.all():
            raise _RefusedError(
                "some of its neurons leak and others don't (a decay of 1), and NIR has either LIF or IF"
            )
        return nir.LIF(
            tau=DT / leak, r=gain / leak, v_leak=np.full(shape, d.rest), v_threshold=threshold, v_reset=reset
        )

    def _add(self, node: fx.Node, name: str, layer: Any, sources: tuple[str, ...]) -> None:
        base, number = name, 1
        while name in self.nodes:
            number += 1
            name = f"{base}_{number}"
        self.nodes[name] = layer
        self.edges += [(source, name) for source in sources]
        self._sources[node] = (name,)

    def _operand(self, node: fx.Node) -> fx.Node:
        operands = [n for n in node.all_input_nodes if n in self._sources]
        if len(operands) != 1 or len(node.all_input_nodes) != 1:
            raise _RefusedError("it must have one input")
        return operands[0]

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Without the batch axis."""
        value = self._values[node]
        return tuple((value[0] if isinstance(value, tuple) else value).shape[1:])

    def _place(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return called(self._model, str(node.target))
        stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
        owner = called(self._model, next(reversed(stack.values()))[0] if stack else "")
        return f"{owner}: {operation(node) or node.name}"


def _full(value: Tensor, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A value per neuron, of one that broadcasts against a batch of one sample."""
    try:
        result: NDArray[np.float64] = value.double().broadcast_to((1, *shape))[0].contiguous().numpy()
    except RuntimeError as error:
        raise _RefusedError(
            f"a decay or threshold of shape {list(value.shape)} doesn't fit neurons {list(shape)}"
        ) from error
    return result


def _weight(module: nn.Module) -> Tensor:
    if (weight := weight_in_use(module)) is None:
        raise _RefusedError("it computes its weight in forward, and which can't be told")
    return weight


def _linear(module: nn.Linear, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    if len(source) != 1:
        raise _RefusedError(
            f"NIR's linear node takes vectors, and this one gets {list(source)}; put an nn.Flatten before it"
        )
    weight = _weight(module).numpy()
    return nir.Linear(weight) if module.bias is None else nir.Affine(weight, module.bias.numpy())


def _conv(module: Any, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    if module.padding_mode != "zeros":
        raise _RefusedError(f"NIR pads with zeros, not {module.padding_mode!r}")
    weight = _ungrouped(_weight(module), module.groups)
    bias = module.bias if module.bias is not None else weight.new_zeros(len(weight))
    flat = isinstance(module, nn.Conv1d)
    kind, shape = (nir.Conv1d, source[1]) if flat else (nir.Conv2d, source[1:])
    stride, padding, dilation = (
        value[0] if flat and not isinstance(value, str) else value
        for value in (module.stride, module.padding, module.dilation)
    )
    return kind(shape, weight.numpy(), stride, padding, dilation, 1, bias.numpy())


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The same convolution in one group, the other weights 0: NIR 1.0.8 and its readers take groups for one."""
    inputs = weight.shape[1]
    result = weight.new_zeros(len(weight), inputs * groups, *weight.shape[2:])
    for group, part in enumerate(weight.chunk(groups)):
        result[group * len(part) : (group + 1) * len(part), group * inputs : (group + 1) * inputs] = part
    return result


def _avg_pool(module: nn.AvgPool2d, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    kernel, stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
    size = (np.array(source[1:]) + 2 * padding - kernel) // stride + 1
    if tuple(size) != result[1:]:
        raise _RefusedError("NIR's pooling leaves incomplete windows out; set ceil_mode=False")
    if padding.any() and not module.count_include_pad:
        raise _RefusedError("NIR's average counts the padding; set count_include_pad=True")
    if module.divisor_override not in (None, 1):
        raise _RefusedError("NIR's average divides by the size of the window; leave divisor_override out")
    return (nir.AvgPool2d if module.divisor_override is None else nir.SumPool2d)(kernel, stride, padding)


def _adaptive_pool(module: nn.AdaptiveAvgPool2d, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    before, after = np.array(source[1:]), np.array(result[1:])
    if (before % after).any():
        raise _RefusedError(
            f"its windows differ in size, as {after.tolist()} doesn't divide {before.tolist()}; use nn.AvgPool2d"
        )
    return nir.AvgPool2d(before // after, before // after, np.array((0, 0)))


def _flatten(module: nn.Flatten, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    if result != (int(np.prod(source)),):
        raise _RefusedError(f"NIR flattens a sample whole, and this turns {list(source)} into {list(result)}")
    return nir.Flatten({"input": np.array(source)}, 0, -1)


def _pair(value: Any) -> NDArray[np.int64]:
    return np.broadcast_to(np.array(value, dtype=np.int64), 2).copy()


_LAYERS: dict[type[Any], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
}
_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
}
