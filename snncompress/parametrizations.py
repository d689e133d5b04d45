"""Fake quantization as a torch parametrization of a layer's weight.

The layer keeps its class, so a SpikingJelly layer keeps its step mode and a torch layer its hooks; ``layer.weight``
is the quantized weight, ``layer.parametrizations.weight.original`` the float one that training moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from .interfaces import Quantizer


class QuantizedWeight(nn.Module):
    """weight → fake-quantized weight, through a Brevitas tensor quantizer with a straight-through gradient."""

    def __init__(self, quantizer: Quantizer, bits: int, *, transposed: bool) -> None:
        super().__init__()
        self.quantizer, self.bits, self.transposed = quantizer, bits, transposed
        self.tensor_quant = quantizer.tensor_quant(bits)

    def forward(self, weight: Tensor) -> Tensor:
        """[C, ...] → [C, ...]; a transposed convolution's weight is turned so that output channels come first."""
        if self.transposed:
            weight = weight.transpose(0, 1)
        value = cast(Tensor, self.tensor_quant(weight)[0])
        return value.transpose(0, 1) if self.transposed else value

    def __repr__(self) -> str:  # Brevitas' insides would fill the screen when a model is printed
        return f"QuantizedWeight({self.quantizer!r}, bits={self.bits})"


def quantize_weight(module: nn.Module, quantizer: Quantizer, bits: int) -> None:
    """Quantize ``module.weight`` to ``bits`` bits, in place."""
    wrapper = QuantizedWeight(quantizer, bits, transposed=isinstance(module, _ConvTransposeNd))
    wrapper.train(module.training)
    parametrize.register_parametrization(module, "weight", wrapper)


def quantization(module: nn.Module) -> QuantizedWeight | None:
    """The quantization of this layer's weight, if it has one."""
    return next((p for p in _chain(module) if isinstance(p, QuantizedWeight)), None)


def weight_bits(module: nn.Module) -> int | None:
    """Bit width of this layer's weight, or None where it is not quantized."""
    found = quantization(module)
    return found.bits if found is not None else None


def computed_weight(module: nn.Module) -> str:
    """Why this layer's weight is not a plain parameter, quantization aside; empty where it is one."""
    others = [type(p).__name__ for p in _chain(module) if not isinstance(p, QuantizedWeight)]
    if others:
        return f"its weight is computed by {', '.join(others)}"
    if not _chain(module) and "weight" not in module._parameters:
        return "its weight is computed from other parameters before each forward pass (weight_norm, prune …)"
    return ""


def stored_weight(module: nn.Module) -> nn.Parameter:
    """The float weight that training moves: ``module.weight`` itself where nothing is quantized."""
    if parametrize.is_parametrized(module, "weight"):
        return cast(nn.Parameter, module.parametrizations["weight"].original)  # type: ignore[union-attr, index]
    return cast(nn.Parameter, module.weight)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Inside, ``module.weight`` is the plain float parameter; its parametrizations come back on leaving."""
    chain = _chain(module)
    if chain:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    try:
        yield
    finally:
        for wrapper in chain:
            parametrize.register_parametrization(module, "weight", wrapper)


def separate_classes(model: nn.Module) -> None:
    """Give every parametrized module of a deep copy a class of its own.

    torch hangs a parametrization on the module's class, which deep copies share: removing it from one would break
    the others.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _chain(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return list(cast(Any, module.parametrizations)["weight"])
