"""Layers that Brevitas quantizes: their bits, how to see through them, and how their scales survive a smaller weight.

They are known by what they have, so that Brevitas isn't imported for a network without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

_PROXIES = ("weight_quant", "bias_quant")


def quantized_by_brevitas(module: nn.Module) -> bool:
    """Whether Brevitas quantizes this layer's weight, and isn't told not to."""
    proxy = getattr(module, "weight_quant", None)
    return isinstance(proxy, nn.Module) and bool(getattr(proxy, "is_quant_enabled", False))


def brevitas_bits(module: nn.Module) -> int | None:
    """Bit width of the weight, learned ones rounded up; None where Brevitas doesn't quantize it or names none."""
    if not quantized_by_brevitas(module):
        return None
    with suppress(Exception), torch.no_grad():  # formats of other kinds than whole numbers have none
        return math.ceil(float(cast(Any, module.weight_quant).bit_width()) - 1e-6)
    return None


def without_quantization(model: nn.Module) -> None:
    """Let Brevitas' layers compute with floats, in place: for a copy in which channels are followed."""
    for module in model.modules():
        if hasattr(module, "disable_quant"):
            cast(Any, module).disable_quant = True


@contextmanager
def learned_scales(module: nn.Module, gone: list[int]) -> Iterator[None]:
    """Inside, the layer's weight is replaced; what its quantizers have learned stays, but for output channels ``gone``.

    Brevitas makes them anew for a new weight: without this, learned scales would become statistics of the weights.
    """
    before = {name: proxy.tensor_quant.state_dict() for name, proxy in _quantizers(module)}
    yield
    for name, proxy in _quantizers(module):
        proxy.update_tracked_modules()  # of a copied layer, it would ask the original for its number of channels
        proxy.init_tensor_quant()
        proxy.train(module.training)
        state = {key: _without(value, gone) for key, value in before.get(name, {}).items()}
        now = {**dict(proxy.tensor_quant.named_parameters()), **dict(proxy.tensor_quant.named_buffers())}
        fitting = {key: value for key, value in state.items() if key in now and value.shape == now[key].shape}
        proxy.tensor_quant.load_state_dict(fitting, strict=False)


def _quantizers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in _PROXIES:
        proxy: Any = getattr(module, name, None)
        if isinstance(getattr(proxy, "tensor_quant", None), nn.Module):
            yield name, proxy


def _without(scale: Tensor, gone: list[int]) -> Tensor:
    """A scale per channel, which stands on the one axis that is longer than 1, without some."""
    axis = next((axis for axis, size in enumerate(scale.shape) if size > 1), None)
    if axis is None or not gone or scale.shape[axis] <= max(gone):
        return scale
    kept = torch.ones(scale.shape[axis], dtype=torch.bool, device=scale.device)
    kept[gone] = False
    return scale.movedim(axis, 0)[kept].movedim(0, axis).contiguous()
