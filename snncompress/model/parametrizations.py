"""Masks and fake quantization as a torch parametrization of a layer's weight.

The layer keeps its class, so a SpikingJelly layer keeps its step mode and a torch layer its hooks; ``layer.weight``
is what the layer computes with, ``layer.parametrizations.weight.original`` the float weight that training moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from snncompress.interfaces import Quantizer

from .brevitas_layers import quantized_by_brevitas
from .cells import home, use_computed_weights
from .computed_once import kept, once_per_call
from .grids import FixedGrid, Grid
from .weight_norms import resize_normed
from .weights_in_use import computes_its_weight

PACKED = "packed_bits"
"""The attribute of a layer that holds its weight as whole numbers of so many bits, and not as a parameter."""


class CompressedWeight(nn.Module):
    """Stored float weight w → mask · quant(mask · w); either part may be missing.

    ``mask`` has the weight's shape, True = the weight exists. It stands behind the quantizer, whose grid may have no
    zero, so a removed weight is exactly 0.0 whatever an optimizer does to what is stored; and before it, so that the
    grid is a statistic of the weights that exist. ``tensor_quant`` is a Brevitas tensor quantizer with a
    straight-through gradient. Removed weights get the gradient 0, or, while it is ``passing``, that of a weight there.
    """

    mask: Tensor | None
    passing = False

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.quantizer: Quantizer | None = None
        self.bits: int | None = None
        self.tensor_quant: nn.Module | None = None
        self.register_buffer("mask", None, persistent=False)  # structure, so the plan's: no state_dict changes it

    def forward(self, weight: Tensor) -> Tensor:
        """[C, ...] → [C, ...]; inside a call of the network it is computed once."""
        return kept(self, (weight, self.mask, self.tensor_quant, self.passing), lambda: self._computed(weight))

    def _computed(self, weight: Tensor) -> Tensor:
        """For the quantizer a transposed convolution's weight is turned: output channels first."""
        weight = self.masked(weight)
        if self.tensor_quant is None:
            return weight
        value = cast(Tensor, self.tensor_quant(self.turned(weight))[0])
        return self.masked(self.turned(value))

    def turned(self, weight: Tensor) -> Tensor:
        """Output channels first, or back again."""
        return weight.transpose(0, 1) if self.transposed else weight

    def masked(self, weight: Tensor) -> Tensor:
        """The weights that exist, 0 elsewhere."""
        if self.mask is None:
            return weight
        masked = torch.where(self.mask, weight, 0.0)  # exact also for NaN and inf
        return passing_gradients(weight, masked) if self.passing else masked

    def __repr__(self) -> str:  # Brevitas' insides would fill the screen when a model is printed
        parts = [] if self.mask is None else [f"{int(self.mask.sum())} of {self.mask.numel()} weights"]
        if self.quantizer is not None:
            parts.append(f"{self.quantizer!r}, bits={self.bits}")
        return f"CompressedWeight({'; '.join(parts)})"


def passing_gradients(x: Tensor, masked: Tensor) -> Tensor:
    """The values of ``masked``, which is x or 0, bit by bit; the gradient is handed to all of x."""
    return x + (masked - x).detach()


def compute_once_per_call(model: nn.Module) -> None:
    """Let each call of the network compute each of its compressed weights once, if it has any."""
    once_per_call(model, wanted=any(isinstance(module, CompressedWeight) for module in model.modules()))


_GRIDS_FOLLOW = ContextVar("grids_follow", default=False)


@contextmanager
def grids_follow() -> Iterator[None]:
    """Inside, quantizers aren't built, because Brevitas takes a second to import.

    Whoever enters gives every quantized layer the grid that it is to :func:`hold`, or has it built after all.
    """
    token = _GRIDS_FOLLOW.set(True)
    try:
        yield
    finally:
        _GRIDS_FOLLOW.reset(token)


def quantize_weight(module: nn.Module, quantizer: Quantizer, bits: int) -> None:
    """Quantize ``module.weight`` to ``bits`` bits, in place."""
    tensor_quant = None if _GRIDS_FOLLOW.get() else quantizer.tensor_quant(bits)
    compression = compression_of(module) or _attach(module)
    compression.quantizer, compression.bits = quantizer, bits
    if tensor_quant is not None:
        compression.tensor_quant = tensor_quant.to(stored_weight(module).device).train(module.training)


def build_quantizer(compression: CompressedWeight, device: torch.device) -> None:
    """Where :func:`grids_follow` left it out, and no grid came."""
    if compression.tensor_quant is None and compression.quantizer is not None and compression.bits is not None:
        tensor_quant = compression.quantizer.tensor_quant(compression.bits)
        compression.tensor_quant = tensor_quant.to(device).train(compression.training)


def mask_weight(module: nn.Module, kept: Tensor) -> None:
    """Hold the weights where ``kept`` (bool, the weight's shape) is False at zero, in place and for good."""
    compression = compression_of(module) or _attach(module)
    stored = stored_weight(module)
    kept = kept.to(stored.device)
    compression.mask = kept if compression.mask is None else compression.mask & kept
    with torch.no_grad():
        stored.copy_(torch.where(compression.mask, stored, 0.0))


def restore_weights(module: nn.Module, kept: Tensor) -> None:
    """Let removed weights exist again where ``kept`` (bool, the weight's shape) is True; they start from zero."""
    compression = compression_of(module)
    if compression is None or compression.mask is None:
        return
    grown = kept.to(compression.mask.device) & ~compression.mask
    if bool(grown.any()):
        compression.mask = compression.mask | grown
        with torch.no_grad():
            stored_weight(module).masked_fill_(grown, 0.0)  # whatever an optimizer did to it meanwhile


def weight_mask(module: nn.Module) -> Tensor | None:
    """Which weights of this layer exist, bool, or None where none was removed one by one."""
    found = compression_of(module)
    return None if found is None else found.mask


def weight_bits(module: nn.Module) -> int | None:
    """Bit width of this layer's weight, or None where it is not quantized."""
    found = compression_of(module)
    return cast("int | None", vars(module).get(PACKED)) if found is None else found.bits


def computed_weight(module: nn.Module) -> str:
    """Why this layer's weight is not a plain parameter, our own compression aside; empty where it is one."""
    if why := computed_before(module):
        return why
    return "" if compression_of(module) is not None else computed_in_forward(module)  # asked before it was compressed


def computed_in_forward(module: nn.Module) -> str:
    """Why the layer doesn't multiply with its weight, a plain parameter; empty where it does."""
    if isinstance(module, (_ConvNd, nn.Linear)) and computes_its_weight(module):
        return f"its forward computes another weight from the stored one ({type(module).__name__})"
    return ""


def computed_before(module: nn.Module) -> str:
    """Why what the module calls its weight is none of its parameters; empty where it is."""
    others = [type(p).__name__ for p in _chain(module) if not isinstance(p, CompressedWeight)]
    if others:
        return f"its weight is computed by {', '.join(others)}"
    owner, tensor = home(module)
    if not _chain(module) and tensor not in owner._parameters:
        return "its weight is computed from other parameters before each forward pass (weight_norm, prune …)"
    if quantized_by_brevitas(module):
        return f"Brevitas quantizes its weight already ({type(module).__name__})"
    return ""


def stored_weight(module: nn.Module) -> nn.Parameter:
    """The float weight that training moves: ``module.weight`` itself where nothing is compressed."""
    owner, tensor = home(module)
    if parametrize.is_parametrized(owner, tensor):
        chain = cast(Any, owner.parametrizations)[tensor]
        return cast(nn.Parameter, chain.original if hasattr(chain, "original") else chain.original1)
    return cast(nn.Parameter, module.weight)


def float_weight(module: nn.Module) -> Tensor:
    """The float weight without gradient, removed weights as zeros, before any quantization."""
    stored, mask = stored_weight(module).detach(), weight_mask(module)
    return stored if mask is None else torch.where(mask, stored, 0.0)


def resize_weight(module: nn.Module, resize: Callable[[nn.Module], None]) -> None:
    """Let ``resize`` replace ``module.weight``, a plain parameter meanwhile, by another; mask and scales follow."""
    if resize_normed(module, resize):
        return
    with bare(module) as compression:
        if compression is not None:
            weight = cast(Tensor, module.weight)

            def cut(beside: Tensor) -> Tensor:
                twin = copy.deepcopy(module)  # the same cut through a layer whose weight is this
                twin.weight = nn.Parameter(beside.to(weight.dtype))
                resize(twin)
                return cast(Tensor, twin.weight).detach()

            if compression.mask is not None:
                compression.mask = cut(compression.mask).bool()
            grid = compression.tensor_quant
            if isinstance(grid, FixedGrid) and grid.scale.dim():
                scales = compression.turned(cut(compression.turned(grid.scale.expand_as(compression.turned(weight)))))
                if len(scales) != len(grid.scale):  # output channels went, not inputs
                    grid.scale = scales[(slice(None), *[slice(1)] * (scales.dim() - 1))].to(grid.scale.dtype)
        resize(module)


@contextmanager
def bare(module: nn.Module) -> Iterator[CompressedWeight | None]:
    """Inside, ``module.weight`` is the plain float parameter; its compression comes back on leaving."""
    found = compression_of(module)
    if found is not None:
        owner, tensor = home(module)
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=False)
    try:
        yield found
    finally:
        if found is not None:
            _register(module, found)


def separate_classes(model: nn.Module) -> None:
    """Give every parametrized module of a deep copy a class of its own.

    torch hangs a parametrization on the module's class, which deep copies share: removing it from one would break
    the others.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _attach(module: nn.Module) -> CompressedWeight:
    compression = CompressedWeight(transposed=isinstance(module, _ConvTransposeNd)).train(module.training)
    _register(module, compression)
    return compression


def _register(module: nn.Module, compression: CompressedWeight) -> None:
    owner, tensor = home(module)
    parametrize.register_parametrization(owner, tensor, compression, unsafe=True)  # keeps shape and type
    use_computed_weights(owner)


def compression_of(module: nn.Module) -> CompressedWeight | None:
    """What stands before this layer's weight, or None."""
    return next((p for p in _chain(module) if isinstance(p, CompressedWeight)), None)


def _chain(module: nn.Module) -> list[nn.Module]:
    owner, tensor = home(module)
    if not parametrize.is_parametrized(owner, tensor):
        return []
    return list(cast(Any, owner.parametrizations)[tensor])


def bake(module: nn.Module) -> None:
    """Let the weight that the layer computes with take the place of the stored one, for good."""
    owner, tensor = home(module)
    if parametrize.is_parametrized(owner, tensor):
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)


def gridded(compression: CompressedWeight, stored: Tensor) -> tuple[Grid, Tensor] | None:
    """The grid of a quantized layer's weight, and the number of each weight, output channels first.

    None where the values don't come from a grid of 2^bits values. Removed weights have any number.
    """
    if compression.tensor_quant is None or compression.bits is None:
        return None
    with torch.no_grad():
        value = compression.turned(compression(stored)).contiguous()
        made: Any = compression.tensor_quant(compression.turned(compression.masked(stored)))
        scale = made[1].detach()
        if made[2].numel() != 1 or tuple(scale.shape) not in ((), (len(value), *[1] * (value.dim() - 1))):
            return None
        zero_point = float(made[2])
        kept = torch.ones_like(value, dtype=torch.bool)
        if compression.mask is not None:
            kept = compression.turned(compression.mask)
        if not zero_point.is_integer():  # 0 lies between two values; where all are 0, so close that they are 0 too
            empty = ~value.flatten(1).any(1)
            scale = scale.where(~(empty.view(scale.shape) if scale.dim() else empty.all()), _least(scale.dtype))
        whole = torch.round(value.to(scale.dtype) / scale + zero_point)[kept]
        span = 2**compression.bits
        low = float(whole.min()) if whole.numel() else 0.0
        for start in (0.0, -span / 2, low):  # unsigned, signed, or whatever there is
            grid = Grid(scale, zero_point - start, compression.bits)
            numbers = grid.numbers(value)
            if torch.equal(grid.values(numbers, value.dtype)[kept], value[kept]):
                return grid, numbers
    return None


def _least(dtype: torch.dtype) -> float:
    """The least number above 0, half of which is 0."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def hold(compression: CompressedWeight, grid: Grid) -> None:
    """Quantize to this grid from now on."""
    compression.tensor_quant = FixedGrid(grid).train(compression.training)
