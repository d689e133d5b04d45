"""check_quantizer: weights go through a quantizer at all widths."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from snncompress.interfaces import Quantizer

from .common import broken, calling, check_name, check_options

_BITS = (1, 2, 4, 8, 16)
_SHAPES = ((32, 4, 3, 3), (7, 5))


def check_quantizer(quantizer: Quantizer) -> None:
    """Quantizes convolution and linear weights to 1, 2, 4, 8 and 16 bits.

    Checked: the value keeps shape and dtype, is finite and lies on ``scale * (n - zero_point)``, n = 0 …
    2^bits - 1, with at most 2^bits distinct values per scale; the gradient is finite and lets something
    through; an all-zero weight stays finite; the same weight gives the same value again; the weight is left
    as it is; the module can be deep-copied; the options survive JSON and rebuild an equal quantizer.

    Raises:
        PluginError: the first of these that fails, or an exception in the quantizer.

    Example:
        >>> from snncompress_rescaw import ReScaW
        >>> check_quantizer(ReScaW(gamma="max"))
    """
    check_name(quantizer)
    options = check_options(quantizer)
    with calling(quantizer, f"being rebuilt from its options {options}"):
        rebuilt: Quantizer = type(quantizer)(**options)
    if rebuilt.options() != options:
        raise broken(quantizer, f"rebuilt from its options {options} it has others: {rebuilt.options()}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for bits, shape in itertools.product(_BITS, _SHAPES):
            where = f"at {bits} bits for a weight {list(shape)}"
            for dtype in (torch.float32, torch.float64):
                weight = (0.1 * torch.randn(shape, dtype=dtype)).requires_grad_()
                value = _check_value(quantizer, bits, weight, f"{where} of {dtype}")
                if not torch.equal(value, _quantized(rebuilt, bits, weight)[0]):
                    raise broken(quantizer, f"rebuilt from its options {options} it gives others {where}.")
            zero = torch.zeros(shape)
            if not bool(torch.isfinite(_quantized(quantizer, bits, zero)[0]).all()):
                raise broken(quantizer, f"an all-zero weight becomes NaN or infinite {where}.")


def _check_value(quantizer: Quantizer, bits: int, weight: Tensor, where: str) -> Tensor:
    before = weight.detach().clone()
    value, scale, zero_point, width = _quantized(quantizer, bits, weight)
    if value.shape != weight.shape or value.dtype != weight.dtype:
        got = f"{list(value.shape)} {value.dtype}"
        raise broken(quantizer, f"the value must keep the weight's shape and dtype, but is {got} {where}.")
    if not bool(torch.isfinite(value).all()) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise broken(quantizer, f"values must be finite, scales finite and positive {where}.")
    if float(width) != bits:
        raise broken(quantizer, f"the bit width that it returns is {float(width)} {where}.")
    number = value.detach().double() / scale.double() + zero_point.double()
    slack = 1e-3 + 16 * torch.finfo(torch.float32).eps * 2**bits  # scales are float32 often enough
    off = float((number - number.round()).abs().max())
    if off > slack or float(number.min()) < -slack or float(number.max()) > 2**bits - 1 + slack:
        grid = f"scale * (n - zero_point), n = 0 … {2**bits - 1}"
        raise broken(quantizer, f"values aren't on the grid {grid}, {where}.")
    scales = scale.detach().expand(value.shape)
    if any(len(set(value[scales == s].tolist())) > 2**bits for s in set(scale.flatten().tolist())):
        raise broken(quantizer, f"more than {2**bits} distinct values {where}.")
    with calling(quantizer, f"the backward pass {where}"):
        loss = (value * torch.rand_like(value)).sum()
        (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
    if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        raise broken(quantizer, f"the gradient must be finite, and not zero everywhere, {where}.")
    if not torch.equal(weight, before):
        raise broken(quantizer, f"it changes the weight in place {where}.")
    if not torch.equal(value, _quantized(quantizer, bits, weight)[0]):
        raise broken(quantizer, f"the same weight gives other values the second time {where}.")
    return value


def _quantized(quantizer: Quantizer, bits: int, weight: Tensor) -> tuple[Tensor, ...]:
    with calling(quantizer, f"tensor_quant({bits})"):
        module = quantizer.tensor_quant(bits)
    if not isinstance(module, nn.Module):
        raise broken(quantizer, f"tensor_quant() must return a module, not {type(module).__name__}.")
    with calling(quantizer, f"a deep copy of the module for {bits} bits"):
        copied = copy.deepcopy(module)
    with calling(quantizer, f"the module for {bits} bits"):
        result = copied(weight)
    if not (isinstance(result, tuple) and len(result) == 4 and all(isinstance(t, Tensor) for t in result)):
        raise broken(quantizer, "the module must return tensors (value, scale, zero_point, bit_width).")
    return result
