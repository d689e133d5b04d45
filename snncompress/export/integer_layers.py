"""Layers that multiply spikes, a byte each, with weights of 8 bits, through oneDNN's operators inside torch.

y_c = scale_c · Σ k_ci · s_i + bias_c        sums exact in 32 bits, weights w_ci = scale_c · k_ci, spikes s_i

The operators are not part of torch's public interface: :func:`unavailable` tries them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from snncompress.model.grids import Grid
from snncompress.model.parametrizations import PACKED
from snncompress.model.spikes import MOST, counts_of, in_float

from .mixing import blank, mixed, ways

_CONVOLUTIONS: tuple[tuple[type[_ConvNd], Callable[..., Tensor]], ...] = (
    (nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d),
)  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """A weight as whole numbers, w = scale · (numbers + offset); the scale is found when batch norms are folded.

    Fields:
        numbers: int8, [C, ...].
        offset: 0, but where 8 bits have no number for 0: there half of one.
        bits: of the grid, not of the codes.
    """

    numbers: Tensor
    offset: float = 0.0
    bits: int = 8


def codes(grid: Grid, numbers: Tensor, mask: Tensor | None) -> Codes | str:
    """The codes of a quantized weight, removed weights being 0; or why there are none.

    A grid of b bits without a number for 0 has one in steps of half its scale: n − z becomes 2n − 2z.

    >>> grid = Grid(torch.tensor(0.5), 1.5, 2)
    >>> codes(grid, torch.arange(4.0), None).numbers
    tensor([-3, -1,  1,  3], dtype=torch.int8)
    """
    for step in (1, 2):
        if (grid.zero_point * step).is_integer():
            exact = ((numbers - grid.zero_point) * step).where(grid.nonzero(numbers), 0.0)
            exact = exact if mask is None else torch.where(mask, exact, 0.0)
            if not exact.numel() or -128 <= float(exact.min()) <= float(exact.max()) <= 127:
                return Codes(exact.to(torch.int8), bits=grid.bits)
    if grid.bits > 8 or not (grid.zero_point * 2).is_integer():
        return f"its weights have {grid.bits} bits, more than a byte"
    if mask is not None:
        return "its grid of 8 bits has no number for the weights that were removed"
    return Codes((numbers - 128).to(torch.int8), 128 - grid.zero_point)


class IntegerLayer(nn.Module):
    """What a layer becomes whose input is spikes and whose weight is whole numbers; mixed into the layer's own class.

    An input that is not whole numbers from 0 to 127, on another device, of another dtype or with a gradient is taken
    all the same, in float.
    """

    offset: float
    scale: Tensor
    bias: Tensor | None
    _numbers: Tensor | None
    _packed: _Packed | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, *] → [..., C', *], any number of axes in front."""
        differentiated = torch.is_grad_enabled() and x.requires_grad
        counts = None if differentiated or self.scale.dtype != torch.float32 else counts_of(x)
        if counts is None or not counts.numel() or counts.device.type != "cpu" or unavailable():
            return self._in_float(in_float(x))
        lead = counts.dim() - _axes(self) - 1
        if lead == 1:
            return self._summed(counts)
        shape = counts.shape
        made = self._summed(counts.reshape(-1, *shape[lead:]))
        return made.view(*shape[:lead], *made.shape[1:])

    def _summed(self, counts: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = self._pack(counts)
        made = self._packed(counts)
        if not self.offset:
            return made
        factor = (self.scale * self.offset).view(-1, *[1] * _axes(self))
        return torch.addcmul(made[:, :-1], made[:, -1:], factor)

    def _pack(self, counts: Tensor) -> _Packed:
        layer = cast(Any, self)
        numbers, scale, bias = self._with_ones(cast(Tensor, self._numbers)), self.scale, layer.bias
        if self.offset:
            scale = torch.cat([scale, scale.new_ones(1)])
            bias = None if bias is None else torch.cat([bias, bias.new_zeros(1)])
        packed = _Packed(numbers, scale, bias, _geometry(layer), counts)
        if torch.equal(packed.numbers(), numbers):
            self._numbers = None  # the packed ones hold all
        return packed

    def _with_ones(self, numbers: Tensor) -> Tensor:
        """With an offset one more channel, which sums up what all others read."""
        return torch.cat([numbers, torch.ones_like(numbers[:1])]) if self.offset else numbers

    def _in_float(self, x: Tensor) -> Tensor:
        return _multiplied(self, x, self.weight, cast(Any, self).bias)

    @property
    def numbers(self) -> Tensor:
        """The codes, int8 [C, ...]."""
        if self._numbers is not None:
            return self._numbers
        found = cast(_Packed, self._packed).numbers()
        return found[:-1] if self.offset else found

    @property
    def weight(self) -> Tensor:
        """The weight in float, computed anew."""
        numbers = self.numbers.to(self.scale)
        return (numbers + self.offset) * self.scale.view(-1, *[1] * (numbers.dim() - 1))

    def get_extra_state(self) -> Tensor:
        """The codes, for a state_dict."""
        return self.numbers

    def set_extra_state(self, state: Tensor) -> None:
        """Codes from a state_dict."""
        self._numbers, self._packed = state, None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._numbers, self._packed = self.numbers, None  # what is packed holds tensors of before
        return cast(Any, super())._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_numbers": self.numbers, "_packed": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, ways(type(self)), self.__getstate__()

    def extra_repr(self) -> str:
        """The layer's own, and that it computes with integers."""
        return f"{cast(Any, super()).extra_repr()}, integer"


class ExactLayer(nn.Module):
    """A layer that multiplies in float64, whatever it is given; mixed into the layer's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, *] → [..., C', *]."""
        layer = cast(Any, self)
        bias = None if layer.bias is None else layer.bias.double()
        return _multiplied(self, in_float(x).double(), layer.weight.double(), bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, ways(type(self)), vars(self)


def make_exact(layer: nn.Module) -> str:
    """Let a layer compute in float64, in place; or leave it and say why it can't."""
    if not isinstance(layer, (nn.Linear, *dict(_CONVOLUTIONS))):
        return f"{type(layer).__name__} has no form of its own in float64"
    layer.__class__ = mixed(ExactLayer, cast(Any, type(layer)))
    return ""


def _multiplied(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer or a convolution makes of an input with any number of axes in front."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    axes = _axes(layer) + 1
    merged = x.reshape(-1, *x.shape[x.dim() - axes :])
    made: Tensor = layer._conv_forward(merged, weight, bias)
    return made.view(*x.shape[: x.dim() - axes], *made.shape[1:])


class SumLayer(IntegerLayer):
    """An integer layer that hands its sums on as they are, int32, to neurons that count in whole numbers.

    Its scale and bias are theirs to use. Where 8 bits have no number for 0, what it hands on is twice the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Σ k · s, or with an offset o of a half Σ (2k + 2o) · s; of other input floats, which no neuron takes."""
        counts = counts_of(x)
        if counts is None:
            return self._in_float(in_float(x))
        axes = _axes(self) + 1
        shape = counts.shape
        made = self._exact(counts.reshape(-1, *shape[len(shape) - axes :]))
        if self.offset:
            made = 2 * made[:, :-1] + round(2 * self.offset) * made[:, -1:]
        return made.view(*shape[: len(shape) - axes], *made.shape[1:])

    @property
    def unit(self) -> Tensor:
        """What one in a sum means, [C], in float64: the scale, or with an offset half of it."""
        return self.scale.double() / (2 if self.offset else 1)

    def _exact(self, counts: Tensor) -> Tensor:
        """[N, C, *] → [N, C', *], int32."""
        if counts.numel() and counts.device.type == "cpu" and not unavailable() and self._most() < 2**24:
            if self._packed is None:
                self._packed = self._pack(counts)
            return self._packed(counts).to(torch.int32)  # floats hold whole numbers up to 2^24
        layer = cast(Any, self)
        x, weight = counts.double(), self._with_ones(self.numbers).double()
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight).to(torch.int32)
        g = cast(_Geometry, _geometry(layer))
        convolve = dict(_CONVOLUTIONS)[next(kind for kind, _ in _CONVOLUTIONS if isinstance(layer, kind))]
        return convolve(x, weight, None, g.stride, g.padding, g.dilation, g.groups).to(torch.int32)

    def _most(self) -> int:
        """No sum is larger."""
        wide = self._with_ones(self.numbers).long().abs().flatten(1).sum(1)
        return int(wide.max()) * MOST if wide.numel() else 0

    def _pack(self, counts: Tensor) -> _Packed:
        numbers = self._with_ones(self.numbers)
        packed = _Packed(numbers, torch.ones(len(numbers)), None, _geometry(self), counts)
        if torch.equal(packed.numbers(), numbers):
            self._numbers = None
        return packed


def make_sums(layer: nn.Module, found: Codes) -> str:
    """Turn a layer, batch norm folded, into one that hands on sums, in place; or leave it and say why not."""
    if reason := make_integer(layer, found):
        return reason
    layer.__class__ = mixed(SumLayer, type(layer).__bases__[1])
    return ""


def make_integer(layer: nn.Module, found: Codes) -> str:
    """Turn a layer, batch norm folded, into one of integers, in place; or leave it and say why it can't be one."""
    weight: Tensor = cast(Any, layer).weight.detach().double()
    if reason := refusal(layer, found):
        return reason
    whole = (found.numbers.double() + found.offset).flatten(1)
    scale = (weight.flatten(1) * whole).sum(1) / (whole**2).sum(1).clamp_min(0.25)
    rest = (weight.flatten(1) - whole * scale[:, None]).abs()
    if bool((rest > 1e-5 * weight.flatten(1).abs().amax(1, keepdim=True)).any()):
        return "its weights aren't whole multiples of one number per channel"
    module: Any = layer
    numbers = found.numbers
    del module._parameters["weight"]
    vars(module).update({"_numbers": numbers, "_packed": None, "offset": found.offset, PACKED: found.bits})
    module.register_buffer("scale", scale.float())
    module.__class__ = mixed(IntegerLayer, cast(Any, type(module)))
    return ""


def make_float(layer: nn.Module) -> None:
    """Turn an integer layer back into one of floats, in place."""
    if isinstance(layer, IntegerLayer):
        module: Any = layer
        weight = module.weight
        module.__class__ = type(module).__bases__[1]
        for name in ("_numbers", "_packed", "offset", PACKED):
            del vars(module)[name]
        del module._buffers["scale"]
        module.weight = nn.Parameter(weight, requires_grad=False)


def refusal(layer: nn.Module, found: Codes) -> str:
    """Why a layer can't be one of integers, whatever its input; empty where it can."""
    module: Any = layer
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{type(layer).__name__} has no integer form"
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return "integer operators take float32 on a CPU"
    if isinstance(layer, _ConvNd) and layer.padding_mode != "zeros":
        return f"integer operators pad with zeros, not {layer.padding_mode!r}"
    if isinstance(layer, _ConvNd) and any(layer._reversed_padding_repeated_twice[i] != p for i, p in _uneven(layer)):
        return "integer operators pad both sides alike"
    if found.offset and getattr(module, "groups", 1) > 1:
        return "8 bits with an offset have no integer form in groups"
    largest = int(found.numbers.long().abs().flatten(1).sum(1).max()) if found.numbers.numel() else 0
    if max(largest, found.numbers[0].numel()) * MOST >= 2**31:
        return "a sum of its inputs might exceed 32 bits"
    return unavailable()


def _uneven(layer: _ConvNd) -> list[tuple[int, int]]:
    pads = layer._reversed_padding_repeated_twice
    return [(i, pads[i + 1]) for i in range(0, len(pads), 2)]


def _axes(layer: Any) -> int:
    """Of an input [N, C, *]: how many come after C."""
    return next((n for n, (kind, _) in enumerate(_CONVOLUTIONS, start=1) if isinstance(layer, kind)), 0)


@dataclass(frozen=True)
class _Geometry:
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _geometry(layer: Any) -> _Geometry | None:
    """None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    padding = list(layer._reversed_padding_repeated_twice[::-2])
    return _Geometry(list(layer.stride), padding, list(layer.dilation), layer.groups)


class _Packed:
    """A weight in the order in which this machine's instructions want it, and what else its operator takes."""

    def __init__(
        self, numbers: Tensor, scale: Tensor, bias: Tensor | None, geometry: _Geometry | None, x: Tensor
    ) -> None:
        ops: Any = torch.ops.onednn
        self._shape = numbers.shape
        end: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
        if geometry is None:
            self._operator = ops.qlinear_pointwise
            self._weight = ops.qlinear_prepack(numbers, list(x.shape))
        else:
            g = geometry
            plan = g.stride, g.padding, g.dilation, g.groups
            self._operator = ops.qconv_pointwise if hasattr(ops, "qconv_pointwise") else ops.qconv2d_pointwise
            self._weight = ops.qconv_prepack(numbers, torch.ones(len(numbers)), 1.0, 0, *plan, list(x.shape))
            end = *plan, *end
        self._rest = self._weight, scale, torch.zeros(len(scale), dtype=torch.int64), bias, *end

    def __call__(self, counts: Tensor) -> Tensor:
        made: Tensor = self._operator(counts, 1.0, 0, *self._rest)
        return made

    def numbers(self) -> Tensor:
        """The weight as it was."""
        dense: Tensor = self._weight.to_dense()
        return dense.t().contiguous() if len(self._shape) == 2 else dense.reshape(self._shape)


@cache
def unavailable() -> str:
    """Why this machine's torch has no integer operators that compute right; empty where it has."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    x = draw(0, MOST, 2, 16, 6, 6)
    x[0], k = MOST, draw(-128, 127, 8, 16, 3, 3)
    k[0], k[1] = 127, -128  # where sums of pairs are largest
    scale, bias = torch.rand(8, generator=generator) - 0.5, torch.rand(8, generator=generator)
    geometry = _Geometry([1, 1], [1, 1], [1, 1], 1)
    try:
        for wide, whole, plan in ((x, k, geometry), (x.flatten(1)[:, :64], k.flatten(1)[:, :64], None)):
            counts, numbers = wide.to(torch.uint8), whole.to(torch.int8)
            made = _Packed(numbers, scale, bias, plan, counts)(counts)
            x64, k64 = wide.double(), whole.double()
            exact = F.linear(x64, k64) if plan is None else F.conv2d(x64, k64, padding=1)
            shape = (-1, *[1] * (exact.dim() - 2))
            wanted = exact * scale.double().view(shape) + bias.double().view(shape)
            if not torch.allclose(made.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())):
                return "torch's integer operators compute something else on this machine"
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return "this build of torch has no integer operators (oneDNN)"
    return ""


def instructions() -> str:
    """The processor's instructions that matter to integer layers, as torch knows them.

    AMX, VNNI and AVX512 multiply bytes, in this order of speed.
    """
    cpu: Any = torch.cpu
    found = [torch.backends.cpu.get_cpu_capability()]
    for name, test in (("VNNI", "_is_vnni_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(cpu, test, lambda: False)():
            found.append(name)
    return ", ".join(found)
