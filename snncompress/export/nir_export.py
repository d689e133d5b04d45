"""One timestep of a network as a NIR graph: torch.fx shows what feeds what, an example the shapes."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.model.fixed_point import state_grid
from snncompress.structure.fx_graphs import called, operation

from .nir_layers import FUNCTIONS, LAYERS, MAX_FUNCTIONS, adaptive_pool, avg_pool, flatten_node, pair, without_bias
from .nir_neurons import DT, RefusedError, factor, neuron_part
from .step_graphs import step_graph

_ADDS = {"add", "iadd"}
_SAME = {"contiguous", "clone", "detach", "dropout", "to", "float"}  # where they leave every value as it is
_RESHAPES = {"flatten", "view", "reshape", "squeeze"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def nir_graph(model: nn.Module, adapter: Adapter, x: Tensor, *, approximate: bool) -> tuple[Any, dict[str, str]]:
    """The ``nir.NIRGraph`` of a model that is called once per timestep, with plain weights.

    With it node → what was written in the place of what NIR can't express, where it may be ``approximate``. ``x``
    [1, ...] is one sample. Raises ModelError, naming the module, for what can't be written.
    """
    import nir

    writer = _Writer(model, adapter, x, approximate)
    metadata: dict[str, Any] = {"dt": DT, "fires": writer.fires}
    grids = {name: grid for name, neuron in adapter.neurons(model).items() if (grid := state_grid(neuron))}
    if grids:
        metadata["fixed_point"] = json.dumps(
            {n: {"bits": g.bits, "overflow": g.overflow, "step": g.step.flatten().tolist()} for n, g in grids.items()}
        )
    return nir.NIRGraph(writer.nodes, writer.edges, metadata), writer.replaced


class _Writer:
    """NIR nodes and edges; ``_sources`` are the nodes whose outputs add up to a tensor of the traced graph."""

    def __init__(self, model: nn.Module, adapter: Adapter, x: Tensor, approximate: bool) -> None:
        self._approximate = approximate
        self.replaced: dict[str, str] = {}
        self._spiking: set[str] = set()
        """Nodes that put out 0 or 1."""
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.fires = "v > v_threshold"
        self._model, self._adapter = model, adapter
        self._sources: dict[fx.Node, tuple[str, ...]] = {}
        graph, run = step_graph(model, adapter, x)
        self._values = run.values
        self._memory = {n: v.untyped_storage().data_ptr() for n, v in run.env.items() if isinstance(v, Tensor)}
        for node in graph.nodes:
            try:
                self._write(node)
            except (RefusedError, ModelError) as error:
                raise ModelError(f"{self._place(node)} can't be written as NIR: {error}.") from error

    def _write(self, node: fx.Node) -> None:
        import nir

        if node.op == "placeholder":
            self._add(node, "input", nir.Input(np.array(self._shape(node))), ())
        elif node.op == "output":
            result: Any = node.args[0]
            if not isinstance(result, fx.Node) or result not in self._sources:
                raise RefusedError("the model must return one tensor, or a neuron's (spikes, membrane potential)")
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
                raise RefusedError("it is called twice in one timestep; give each use a neuron of its own")
            self._add_neuron(node, name, module, source)
        elif isinstance(module, (nn.Identity, _DropoutNd)):
            self._sources[node] = self._sources[source]
        elif isinstance(module, _MAX_POOLS):
            self._add_max_pool(node, name, module, source)
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
                raise RefusedError("the membrane potential is used, and NIR's neurons hand on their spikes alone")
            self._sources[node] = self._sources[operands[0]]
        elif name in _JOINS:
            raise RefusedError("NIR can't concatenate, its edges only add up; use a sum")
        elif name in MAX_FUNCTIONS and len(operands) == 1:
            self._add_max_pool(node, node.name, MAX_FUNCTIONS[name](*node.args[1:], **node.kwargs), operands[0])
        elif len(operands) != 1:
            raise RefusedError(f"NIR has nothing for {name}")
        elif name in _SAME and torch.equal(value, self._values[operands[0]]):
            self._sources[node] = self._sources[operands[0]]
        elif name in _RESHAPES:
            self._add(node, node.name, self._flatten(operands[0], node), self._sources[operands[0]])
        elif name in FUNCTIONS:
            layer = self._layer(FUNCTIONS[name](*node.args[1:], **node.kwargs), operands[0], node)
            self._add(node, node.name, layer, self._sources[operands[0]])
        elif name == "mean" and self._is_global_mean(operands[0], node):
            self._add_global_mean(operands[0], node)
        else:
            raise RefusedError(f"NIR has nothing for {name}")

    def _sum(self, node: fx.Node) -> tuple[str, ...]:
        parts: list[Any] = [*node.args, *node.kwargs.values()]
        if len(parts) != 2 or not all(isinstance(p, fx.Node) and p in self._sources for p in parts):
            raise RefusedError("NIR adds what two layers put out, not a constant and not with a factor")
        if self._memory[node] == self._memory[parts[0]] and self._used_elsewhere(parts[0]):
            raise RefusedError("it changes in place what is used elsewhere too; write y = x + … instead of x += …")
        if len({self._shape(p) for p in parts}) != 1:
            raise RefusedError("NIR adds tensors of one shape, and these must be broadcast")
        result = self._sources[parts[0]] + self._sources[parts[1]]
        if len(set(result)) != len(result):
            raise RefusedError(
                "it adds one tensor twice, and NIR has one edge between two nodes; double the weights instead"
            )
        return result

    def _used_elsewhere(self, changed: fx.Node) -> bool:
        """Whether something but the next node in the same memory takes this node, or an earlier one there."""
        earlier = [n for n in self._sources if self._memory.get(n) == self._memory[changed]]
        return any(self._memory.get(user) != self._memory[changed] for n in earlier for user in n.users)

    def _layer(self, module: nn.Module, source: fx.Node, node: fx.Node) -> Any:
        for kind, write in LAYERS.items():
            if isinstance(module, kind):
                layer = write(module, self._shape(source), self._shape(node))
                plain = kind.forward(cast(Any, module), self._values[source])
                if not torch.equal(plain, self._values[node]):
                    raise RefusedError(f"its class computes something else than {kind.__name__}")
                return self._checked(layer, source, node)
        if isinstance(module, _BatchNorm):
            raise RefusedError(
                "NIR has no batch normalization, and this one doesn't follow a layer it could be folded into"
            )
        raise RefusedError(f"NIR has no node for {type(module).__name__}")

    def _checked(self, layer: Any, source: fx.Node, node: fx.Node) -> Any:
        """NIR infers shapes again when a file is read."""
        for what, type_, wanted in (("input", layer.input_type, source), ("output", layer.output_type, node)):
            inferred = type_[what]
            if inferred is not None and tuple(inferred) != self._shape(wanted):
                raise RefusedError(
                    f"NIR infers the {what} shape {list(map(int, inferred))} instead of {list(self._shape(wanted))}, "
                    f"as it takes kernels for square"
                )
        return layer

    def _flatten(self, source: fx.Node, node: fx.Node) -> Any:
        return flatten_node(nn.Flatten(), self._shape(source), self._shape(node))

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
            self._add(node, f"{node.name}flatten_node", flat, self._sources[node])

    def _add_neuron(self, node: fx.Node, name: str, module: nn.Module, source: fx.Node) -> None:
        d, shape = self._adapter.dynamics(module), self._shape(node)
        if d.inclusive:
            self.fires = "v >= v_threshold"
        back, sources = None, self._sources[source]
        if isinstance(d.recurrent, nn.Module):
            back, bias = without_bias(LAYERS[type(d.recurrent)](d.recurrent, shape, shape))
            sources = self._biased(source, name, bias)
        elif d.recurrent is not None:
            back = factor(d.recurrent, shape)
        part = neuron_part(name, d, shape, back, plain=self._approximate)
        if d.reset is None and self._approximate:
            self.replaced[name] = "reset to its rest, in the place of a reset by subtraction"
        for inner, made in part.nodes.items():
            self._add_node(inner, made, sources if inner == part.entry else ())
        self.edges += part.edges
        self._sources[node] = (name,)
        self._spiking.add(name)

    def _biased(self, source: fx.Node, name: str, bias: NDArray[Any]) -> tuple[str, ...]:
        """What feeds the neuron, with what its recurrent layer adds without a spike, also in the first timestep.

        It goes to the layer before, where that feeds nothing else, since programs don't run edges back before that.
        """
        import nir

        before = self._sources[source]
        layer = self.nodes[before[0]]
        direct = source.op == "call_module" and before == (str(source.target),) and len(source.users) == 1
        if not bias.any():
            return before
        if direct and isinstance(layer, nir.Linear):
            self.nodes[before[0]] = nir.Affine(layer.weight, bias)
        elif direct and isinstance(layer, (nir.Affine, nir.Conv2d)):
            layer.bias = layer.bias + bias
        else:
            one, shape = np.eye(len(bias)), self._shape(source)
            kernel = one[..., None, None]
            flat = len(shape) == 1
            added = nir.Affine(one, bias) if flat else nir.Conv2d(shape[1:], kernel, 1, 0, 1, 1, bias)
            self._add_node(f"{name}_bias", added, before)
            before = (f"{name}_bias",)
        return before

    def _add_node(self, name: str, layer: Any, sources: tuple[str, ...]) -> None:
        if name in self.nodes:
            raise RefusedError(f"a node of its name, {name!r}, is there already")
        self.nodes[name] = layer
        self.edges += [(source, name) for source in sources]

    def _add_max_pool(self, node: fx.Node, name: str, module: Any, source: fx.Node) -> None:
        """Of spikes: whether the sum over a window is more than half a spike."""
        import nir

        if not isinstance(module, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)):
            raise RefusedError("NIR pools in two dimensions")
        before, after = self._shape(source), self._shape(node)
        if isinstance(module, nn.AdaptiveMaxPool2d):
            average = adaptive_pool(nn.AdaptiveAvgPool2d(after[1:]), before, after)
        elif tuple(pair(module.dilation)) != (1, 1):
            raise RefusedError("NIR's pooling has no dilation")
        else:
            windows: list[Any] = [module.kernel_size, module.stride, module.padding]
            average = avg_pool(nn.AvgPool2d(*windows), before, after)
        sources = self._sources[source]
        if self._approximate:
            self._add(node, name, average, sources)
            self.replaced[self._sources[node][0]] = "average pooling, in the place of max-pooling"
        elif len(sources) == 1 and sources[0] in self._spiking:
            sums = nir.SumPool2d(average.kernel_size, average.stride, average.padding)
            self._add(node, f"{name}_sum", sums, sources)
            self._add(node, name, nir.Threshold(np.full(after, 0.5)), self._sources[node])
            self._spiking.add(self._sources[node][0])
        else:
            raise RefusedError(
                "NIR has no max-pooling but of spikes, and what it pools isn't spikes. Put it behind the neurons, or "
                "train with nn.AvgPool2d in its place; approximate=True writes averages, and says what they change"
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
            raise RefusedError("it must have one input")
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
