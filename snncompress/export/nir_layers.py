"""Layers as NIR nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snncompress.model.weights_in_use import weight_in_use

from .nir_neurons import RefusedError


def without_bias(layer: Any) -> tuple[Any, NDArray[Any]]:
    """A recurrent layer as a node without its bias, and that."""
    import nir

    if isinstance(layer, nir.Linear):
        return layer, np.zeros(len(layer.weight))
    bias = layer.bias
    if isinstance(layer, nir.Affine):
        return nir.Linear(layer.weight), bias
    layer.bias = np.zeros_like(bias)
    return layer, bias


def _weight(module: nn.Module) -> Tensor:
    if (weight := weight_in_use(module)) is None:
        raise RefusedError("it computes its weight in forward, and which can't be told")
    return weight


def _array(values: Tensor) -> Any:
    """In numpy, which has no bfloat16, and whose half floats few readers know: at 32 bits, the same numbers."""
    return (values if values.dtype == torch.float64 else values.float()).numpy()


def _linear(module: nn.Linear, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    if len(source) != 1:
        raise RefusedError(
            f"NIR's linear node takes vectors, and this one gets {list(source)}; put an nn.Flatten before it"
        )
    weight = _array(_weight(module))
    return nir.Linear(weight) if module.bias is None else nir.Affine(weight, _array(module.bias))


def _conv(module: Any, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    import nir

    if module.padding_mode != "zeros":
        raise RefusedError(f"NIR pads with zeros, not {module.padding_mode!r}")
    weight = ungrouped(_weight(module), module.groups)
    bias = module.bias if module.bias is not None else weight.new_zeros(len(weight))
    flat = isinstance(module, nn.Conv1d)
    kind, shape = (nir.Conv1d, source[1]) if flat else (nir.Conv2d, source[1:])
    stride, padding, dilation = (
        value[0] if flat and not isinstance(value, str) else value
        for value in (module.stride, module.padding, module.dilation)
    )
    return kind(shape, _array(weight), stride, padding, dilation, 1, _array(bias))


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The same convolution in one group, the other weights 0: NIR 1.0.8 and its readers take groups for one."""
    inputs = weight.shape[1]
    result = weight.new_zeros(len(weight), inputs * groups, *weight.shape[2:])
    for group, part in enumerate(weight.chunk(groups)):
        result[group * len(part) : (group + 1) * len(part), group * inputs : (group + 1) * inputs] = part
    return result


def avg_pool(module: nn.AvgPool2d, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    """Average pooling; raises RefusedError where windows are cut or counted otherwise than in NIR."""
    import nir

    kernel, stride, padding = (pair(v) for v in (module.kernel_size, module.stride, module.padding))
    size = (np.array(source[1:]) + 2 * padding - kernel) // stride + 1
    if tuple(size) != result[1:]:
        raise RefusedError("NIR's pooling leaves incomplete windows out; set ceil_mode=False")
    if padding.any() and not module.count_include_pad:
        raise RefusedError("NIR's average counts the padding; set count_include_pad=True")
    if module.divisor_override not in (None, 1):
        raise RefusedError("NIR's average divides by the size of the window; leave divisor_override out")
    return (nir.AvgPool2d if module.divisor_override is None else nir.SumPool2d)(kernel, stride, padding)


def adaptive_pool(module: nn.AdaptiveAvgPool2d, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    """Average pooling to a size that divides the map's."""
    import nir

    before, after = np.array(source[1:]), np.array(result[1:])
    if (before % after).any():
        raise RefusedError(
            f"its windows differ in size, as {after.tolist()} doesn't divide {before.tolist()}; use nn.AvgPool2d"
        )
    return nir.AvgPool2d(before // after, before // after, np.array((0, 0)))


def flatten_node(module: nn.Flatten, source: tuple[int, ...], result: tuple[int, ...]) -> Any:
    """A sample made flat."""
    import nir

    if result != (int(np.prod(source)),):
        raise RefusedError(f"NIR flattens a sample whole, and this turns {list(source)} into {list(result)}")
    return nir.Flatten({"input": np.array(source)}, 0, -1)


def pair(value: Any) -> NDArray[np.int64]:
    """Of one number or two."""
    return np.broadcast_to(np.array(value, dtype=np.int64), 2).copy()


LAYERS: dict[type[Any], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.AvgPool2d: avg_pool,
    nn.AdaptiveAvgPool2d: adaptive_pool,
    nn.Flatten: flatten_node,
}
FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
}
MAX_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    f"{prefix}max_pool{n}d": getattr(nn, f"{word}MaxPool{n}d")
    for prefix, word in (("", ""), ("adaptive_", "Adaptive"))
    for n in (1, 2, 3)
}
