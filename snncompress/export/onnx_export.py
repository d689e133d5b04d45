"""One timestep as an ONNX model, the neurons' states being inputs and outputs, quantized weights integers."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.model.cells import CellWeight, layer_at
from snncompress.model.modules import tensors_in
from snncompress.model.network import weight_layers
from snncompress.model.parametrizations import bake, bare, float_weight, weight_bits

_OPSET = 21  # the first in which DequantizeLinear takes 16 bits
_EXACT = 2**24  # below, every integer is a float32
_SMALL = 16  # elements: what is folded are neurons' numbers, no weights


class Step(nn.Module):
    """(x, *states) → (*outputs, *next states): a model that is called once per timestep, without a memory."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        self.names: list[tuple[str, str]]
        self.start: list[float]

    def initial(self, x: Tensor) -> list[Tensor]:
        """The states before the first step of this batch; finds out which there are."""
        neurons = self.adapter.neurons(self.model)
        self.names, self.start = [], []
        self.adapter.reset(self.model)
        before = {name: self._states(name) for name in neurons}
        self.model(x)
        states = []
        for name in neurons:
            for state, value in self._states(name).items():
                if value.dim() == 0:
                    raise ModelError(f"{name} isn't called on this input, so its state has no shape. Remove it.")
                if value.shape[0] != len(x):
                    raise ModelError(
                        f"{name} has a state {state!r} of shape {list(value.shape)} for {len(x)} samples. Its first "
                        f"axis must be the batch."
                    )
                self.names.append((name, state))
                self.start.append(float(before[name][state]))
                states.append(before[name][state].to(value.dtype).expand(value.shape).contiguous())
        self.adapter.reset(self.model)
        return states

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """[N, ...] each."""
        self.adapter.reset(self.model)
        neurons: dict[str, dict[str, Tensor]] = {}
        for (name, state), value in zip(self.names, states, strict=True):
            neurons.setdefault(name, {})[state] = value
        for name, values in neurons.items():
            self.adapter.set_states(self.model.get_submodule(name), values)
        outputs = list(tensors_in(self.model(x)))
        following = [self._states(name)[state].clone() for name, state in self.names]  # no output twice
        return (*outputs, *following)

    def split(self, results: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """What ``forward`` returned, as outputs and states."""
        count = len(results) - len(self.names)
        return list(results[:count]), list(results[count:])

    def _states(self, name: str) -> dict[str, Tensor]:
        neuron = self.model.get_submodule(name)
        try:
            return self.adapter.states(neuron)
        except ModelError as error:
            raise ModelError(
                f"{name} ({type(neuron).__name__}) can't be exported: {error}. Replace it by a neuron whose states are "
                f"tensors, and fine-tune."
            ) from error


@dataclass(frozen=True)
class Integers:
    """A weight as numbers · scale; ``scale`` is [] or one per entry on ``axis``."""

    numbers: Tensor
    scale: Tensor
    axis: int


def onnx_model(step: Step, x: Tensor) -> bytes:
    """The serialized ONNX model; raises ModelError where PyTorch can't export the step."""
    import onnx

    quantized: dict[str, Integers | None] = {}
    for name in weight_layers(step.model):
        layer = layer_at(step.model, name)
        if isinstance(layer, CellWeight):
            bake(layer)
        else:
            quantized[f"model.{name}.weight"] = _bake(layer)
    states = step.initial(x)
    outputs, _ = step.split(step(x, *states))
    model = _exported(step, x, states, ["output", *(f"output_{i}" for i in range(1, len(outputs)))])
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with this machine's paths
    for name, integers in quantized.items():
        if integers is not None:
            _dequantize(model.graph, name, integers)
    start = dict(zip(_labels(step), step.start, strict=True))
    onnx.helper.set_model_props(model, {"initial_states": json.dumps(start)})
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of the checker, in C++
        kind = str(x.dtype).removeprefix("torch.")
        raise ModelError(
            f"What {type(step.model).__name__} became isn't valid ONNX: {error}. Likely cause: an operation of it that "
            f"ONNX has for other numbers than {kind}; model.float(), with data alike, has those that it knows best."
        ) from error
    return cast(bytes, model.SerializeToString())


def _exported(step: Step, x: Tensor, states: list[Tensor], outputs: list[str]) -> Any:
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    names = _labels(step)
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's exporter, about its own future and states that are set
            program = torch.onnx.export(
                step,
                (x, *states),
                input_names=["input", *names],
                output_names=[*outputs, *(f"{name}_next" for name in names)],
                dynamic_shapes=({0: batch}, tuple({0: batch} for _ in states)),
                opset_version=_OPSET,
                dynamo=True,
                optimize=False,  # it would fold batch norms into quantized weights
                verbose=False,
            )
            ir = cast(Any, program).model
            fold_constants(ir, input_size_limit=_SMALL, output_size_limit=_SMALL, onnx_shape_inference=False)
            remove_unused_nodes(ir)
    except Exception as error:  # the model is the user's: anything can come out of it
        cause = error.__cause__ or error
        first = str(cause).strip().partition("\n")[0]  # what follows goes on for pages
        raise ModelError(
            f"PyTorch can't export a timestep of {type(step.model).__name__} to ONNX: {type(cause).__name__}: {first}. "
            f"Likely cause: Python decisions in a forward that depend on the input's values or on the batch size."
        ) from error
    return cast(Any, program).model_proto


def _labels(step: Step) -> list[str]:
    return [".".join(filter(None, pair)) for pair in step.names]


def _bake(module: nn.Module) -> Integers | None:
    """Make the weight a plain parameter; return it as integers where that is exact."""
    found = _integers(module) if weight_bits(module) is not None else None
    bake(module)
    return found


def _integers(module: nn.Module) -> Integers | None:
    value, stored = cast(Tensor, module.weight).detach(), float_weight(module)
    with bare(module) as compression:
        quantizer: Any = cast(Any, compression).tensor_quant
        axis = 1 if cast(Any, compression).transposed else 0
        scale: Tensor = quantizer(stored.transpose(0, axis))[1].detach()
    if value.dtype != torch.float32 or scale.dtype != torch.float32:  # what DequantizeLinear computes in
        return None
    if scale.numel() > 1 and (scale.dim() != value.dim() or scale.shape[0] != scale.numel()):
        return None
    wide = scale.transpose(0, axis) if scale.numel() > 1 else scale.reshape(())
    for part in (1, 2):  # a grid without zero has half-integer multiples of its scale
        numbers = torch.round(value / (wide / part))
        if numbers.abs().max() < _EXACT and torch.equal(numbers * (wide / part), value):
            return Integers(numbers, (scale / part).flatten() if wide.dim() else wide / part, axis)
    return None


def _dequantize(graph: Any, name: str, integers: Integers) -> None:
    """Put integers and a DequantizeLinear in the place of a float weight."""
    from onnx import helper, numpy_helper

    weights = [w for w in graph.initializer if w.name == name]
    if not weights:  # the model never uses it
        return
    graph.initializer.remove(weights[0])
    largest = int(integers.numbers.abs().max())
    dtype = next(t for t in (np.int8, np.int16, np.int32) if largest <= np.iinfo(t).max)
    arrays = {f"{name}.integers": integers.numbers.numpy().astype(dtype), f"{name}.scale": integers.scale.numpy()}
    graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
    graph.node.insert(0, helper.make_node("DequantizeLinear", list(arrays), [name], axis=integers.axis))
