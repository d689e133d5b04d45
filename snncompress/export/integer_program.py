"""A network in whole numbers as a program: what is computed in a timestep, in which order, from which numbers.

One description, of which files are written: docs/integer.md has it, with an interpreter in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.model.fixed_point import LEAK_BITS
from snncompress.structure.fx_graphs import called, operation

from .integer_layers import IntegerLayer, SumLayer
from .integer_neurons import FRACTION, ROUNDING, IntegerGrid
from .step_graphs import step_graph

FORMAT = 1
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_RESHAPES = {"flatten", "view", "reshape", "squeeze"}
_SAME = {"contiguous", "clone", "detach"}


@dataclass(frozen=True)
class Program:
    """Nodes in the order in which they are computed in each timestep, and their tensors, "name.weight" and so on.

    Fields:
        nodes: of each a name, an op, inputs (names of nodes, or "input"), the shape of its value, and settings.
        tensors: whole numbers, and floats where a layer computes in float.
        input: shape of one sample in one timestep.
        output: name of the node whose value the network puts out.
    """

    nodes: tuple[dict[str, Any], ...]
    tensors: dict[str, Tensor]
    input: tuple[int, ...]
    output: str

    def header(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        return {
            "format": FORMAT, "input": list(self.input), "output": self.output, "fraction": FRACTION,
            "leak_fraction": LEAK_BITS, "rounding": ROUNDING, "nodes": list(self.nodes),
        }  # fmt: skip


def integer_program(step: nn.Module, adapter: Adapter, x: Tensor) -> Program:
    """The program of a network in whole numbers that is called once per timestep; ``x`` [1, …] is one sample.

    Raises ModelError, naming the module, for what it can't express.
    """
    writer = _Writer(step, adapter, x)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in writer.tensors.items()}
    return Program(tuple(writer.nodes), tensors, tuple(x.shape[1:]), writer.output)


class _Writer:
    """Nodes in the order in which they are computed; ``_names`` says which of them made a value."""

    def __init__(self, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.output = ""
        self._model, self._adapter = model, adapter
        self._names: dict[fx.Node, str] = {}
        graph, run = step_graph(model, adapter, x)
        self._values = run.values
        for node in graph.nodes:
            if reason := self._write(node):
                where = called(model, str(node.target)) if node.op == "call_module" else operation(node) or node.name
                raise ModelError(f"{where} can't be written in whole numbers: {reason}.")

    def _write(self, node: fx.Node) -> str:
        """Write a node, or say why it can't be."""
        if node.op == "placeholder":
            self._names[node] = "input"
            return ""
        sources = [n for n in node.all_input_nodes if n in self._names]
        if node.op == "output":
            result: Any = node.args[0]
            self.output = self._names.get(result, "") if isinstance(result, fx.Node) else ""
            return "" if self.output else "the model must return one tensor"
        if not sources or not isinstance(self._shown(node), Tensor):
            return ""  # a size
        if node.op == "call_module":
            return self._write_module(node, sources)
        return self._write_operation(node, sources)

    def _write_module(self, node: fx.Node, sources: list[fx.Node]) -> str:
        module, name = self._model.get_submodule(str(node.target)), str(node.target)
        if any(entry["name"] == name for entry in self.nodes):
            return "it is called twice in one timestep"
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            self._names[node] = self._names[sources[0]]
        elif self._adapter.is_neuron(module):
            grid = counting_grid(module)
            if grid.current is not None:
                self._add(node, f"{name}.current", "current", sources, **self._charge(f"{name}.current", grid.current))
                sources = [node]
            self._add(node, name, "neuron", sources, **self._charge(name, grid), **self._firing(name, grid))
        elif isinstance(module, (nn.Linear, _ConvNd)):
            self._add(node, name, "linear" if isinstance(module, nn.Linear) else "conv", sources, **self._layer(name))
        elif isinstance(module, nn.Flatten):
            return self._flatten(node, name, sources)
        elif isinstance(module, _POOLS):
            if module.ceil_mode or module.return_indices:
                return "its windows are cut short, or it returns indices"
            numbers = {key: _each(getattr(module, key), self._shown(sources[0]).dim() - 2) for key in _POOL}
            self._add(node, name, "max_pool", sources, **numbers)
        else:
            return "it is neither a layer, a neuron, a maximum nor a reshaping"
        return ""

    def _write_operation(self, node: fx.Node, sources: list[fx.Node]) -> str:
        name = operation(node)
        if name in ("add", "iadd") and len(sources) == 2:
            self._add(node, node.name, "add", sources)
        elif (name == "getitem" and node.args[1] == 0) or (name in _SAME and len(sources) == 1):
            self._names[node] = self._names[sources[0]]
        elif name in _RESHAPES and len(sources) == 1:
            return self._flatten(node, node.name, sources)
        else:
            return "it is neither a sum nor a reshaping"
        return ""

    def _flatten(self, node: fx.Node, name: str, sources: list[fx.Node]) -> str:
        before, after = self._shown(sources[0]), self._shown(node)
        if after.dim() != 2 or after.shape[1] != before.shape[1:].numel():
            return f"it turns {list(before.shape[1:])} into {list(after.shape[1:])}, and samples are flattened whole"
        self._add(node, name, "flatten", sources)
        return ""

    def _layer(self, name: str) -> dict[str, Any]:
        layer: Any = self._model.get_submodule(name)
        self.tensors[f"{name}.weight"] = _codes(layer) if isinstance(layer, IntegerLayer) else layer.weight
        if isinstance(layer, IntegerLayer) and not isinstance(layer, SumLayer):
            self.tensors[f"{name}.scale"] = layer.scale / (2 if layer.offset else 1)
        if layer.bias is not None and not isinstance(layer, SumLayer):
            self.tensors[f"{name}.bias"] = layer.bias
        if isinstance(layer, nn.Linear):
            return {}
        plan = {key: list(getattr(layer, key)) for key in ("stride", "dilation")}
        return {**plan, "padding": list(layer._reversed_padding_repeated_twice[::-2]), "groups": layer.groups}

    def _charge(self, name: str, grid: IntegerGrid) -> dict[str, Any]:
        held = {"scale": grid.scale} if grid.analog else {"multiplier": grid.multiplier}
        held |= {"shift": grid.shift, "leaks": grid.leaky.byte()} if grid.leaks == "shift" else {"decay": grid.decay}
        self.tensors |= {f"{name}.{kind}": tensor for kind, tensor in {**held, "bias": grid.bias}.items()}
        return {"bits": grid.bits, "overflow": grid.overflow, "leak": grid.leaks}

    def _firing(self, name: str, grid: IntegerGrid) -> dict[str, Any]:
        self.tensors |= {f"{name}.threshold": grid.theta, f"{name}.rest": grid.rest}
        reset = "value" if grid.resets else "subtract late" if grid.late else "subtract"
        return {"fires": ">=" if grid.inclusive else ">", "reset": reset}

    def _add(self, node: fx.Node, name: str, op: str, sources: list[fx.Node], **more: Any) -> None:
        inputs, shape = [self._names[source] for source in sources], list(self._shown(node).shape[1:])
        self.nodes.append({"name": name, "op": op, "inputs": inputs, "shape": shape, **more})
        self._names[node] = name

    def _shown(self, node: fx.Node) -> Any:
        value = self._values[node]
        return value[0] if isinstance(value, tuple) else value


_POOL = ("kernel_size", "stride", "padding", "dilation")


def counting_grid(neuron: nn.Module) -> IntegerGrid:
    """The grid of a neuron that counts; raises ModelError for one in float."""
    grid = getattr(neuron, "state_grid", None)
    if not isinstance(grid, IntegerGrid):
        raise ModelError(f"a {type(neuron).__name__} of this network computes in float")
    return grid


def _codes(layer: IntegerLayer) -> Tensor:
    """Whole numbers, w = scale · codes; int16 where they are twice what 8 bits hold, and odd."""
    if not layer.offset:
        return layer.numbers
    return (2 * layer.numbers.short() + round(2 * layer.offset)).short()


def _each(value: Any, axes: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * axes
