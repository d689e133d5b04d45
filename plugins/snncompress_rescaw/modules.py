"""ReScaW as Brevitas modules, and the injector that puts them together. Imports Brevitas, so import it late."""

from __future__ import annotations

from typing import Any, Literal

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp, TensorClampSte
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.inject import ExtendedInjector, value
from brevitas.proxy import WeightQuantProxyFromInjector
from torch import Tensor, nn

from snncompress.extend import Remembered

from .gamma import Gamma, range_of, scale_of

_HALF = (torch.float16, torch.bfloat16)


def _steps(bit_width: Tensor) -> Tensor:
    """s = 2^b - 1, in float32: model.half() turns the bit width to half precision, which can't hold 2^16."""
    return 2.0 ** bit_width.float() - 1.0


class ReScaWSteps(nn.Module):
    """Brevitas' ``int_scaling_impl``: bit width → s."""

    def __init__(self) -> None:  # the injector refuses nn.Module's own *args, **kwargs
        super().__init__()

    def forward(self, bit_width: Tensor) -> Tensor:
        """[] → []."""
        return _steps(bit_width)


class ReScaWScaling(nn.Module):
    """Brevitas' ``scaling_impl``: (weight, s) → 2γ/s, with γ from the weight as it is now and constant
    backward.

    An all-zero weight has γ = 0; its scale is the smallest normal number instead. γ is remembered until the weight is
    another.
    """

    def __init__(
        self,
        gamma: Gamma | Literal["one"] = "mse",
        per_channel: bool = True,
        percentile: float = 0.01,
        channel_dim: int = 0,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.percentile = percentile
        self.channel_dim = channel_dim if per_channel else None
        self._before = Remembered()

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """[C, ...] → [] or one scale per channel."""
        x = x.detach()
        wide = x.float() if x.dtype in _HALF else x
        gamma = range_of(wide, self.gamma, self.channel_dim, self.percentile, steps, x.dtype, self._before)
        return scale_of(gamma, steps)


class ReScaWZeroPoint(nn.Module):
    """Brevitas' ``zero_point_impl``: s/2, a half-integer."""

    def __init__(self) -> None:  # the injector refuses nn.Module's own *args, **kwargs
        super().__init__()

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """→ []."""
        return _steps(bit_width) / 2


class ReScaWIntQuant(IntQuant):  # type: ignore[misc]
    """Brevitas' ``IntQuant`` with the clamp before the rounding, as in Eq. 10.

    The values are the same either way, the gradient isn't: behind the rounding the clamp would let it
    through up to |W/γ| < 1 + 1/s, at one bit twice the range.
    """

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The number of the grid value of every weight, 0 … s."""
        y = self.input_view_impl(x) / scale + zero_point
        steps = _steps(bit_width)
        # a weight of exactly ±γ may land a rounding error outside, and its gradient must pass
        slack = 4 * torch.finfo(y.dtype).eps * steps
        y = self.tensor_clamp_impl(y, min_val=-slack, max_val=steps + slack)
        number: Tensor = self.float_to_int_impl(y)
        return number

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The quantized weight, in the weight's dtype."""
        wide = x.float() if x.dtype in _HALF else x
        y = (self.to_int(scale, zero_point, bit_width, wide) - zero_point) * scale
        # γ = 0, so x is 0 too; as it is, it also keeps its gradient
        y = torch.where(scale > torch.finfo(scale.dtype).tiny, y, wide)
        result: Tensor = self.delay_wrapper(x, y.to(x.dtype))
        return result


class ReScaWWeightQuant(ExtendedInjector):  # type: ignore[misc]
    """ReScaW for Brevitas layers: ``qnn.QuantConv2d(..., weight_quant=ReScaWWeightQuant,
    weight_bit_width=4)``.

    The options of :class:`snncompress_rescaw.ReScaW`, with the same defaults, are given the way Brevitas has it:
    ``weight_gamma="l1_mean"``, ``weight_per_channel=False``, ``weight_ste="pass"``. Per channel follows the
    layer's output channels, also in a transposed convolution.

    Example:
        >>> import brevitas.nn as qnn
        >>> conv = qnn.QuantConv2d(8, 8, 3, weight_quant=ReScaWWeightQuant, weight_bit_width=2)
        >>> [len(channel.unique()) for channel in conv.quant_weight().value[:2]]
        [4, 4]
    """

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = RescalingIntQuant
    int_quant = ReScaWIntQuant
    scaling_impl = ReScaWScaling
    int_scaling_impl = ReScaWSteps
    zero_point_impl = ReScaWZeroPoint
    bit_width_impl = BitWidthConst
    float_to_int_impl = RoundSte
    input_view_impl = Identity
    signed = False
    narrow_range = False
    bit_width = 4
    gamma = "mse"
    per_channel = True
    percentile = 0.01
    ste = "pass"

    @value  # type: ignore[untyped-decorator]
    def tensor_clamp_impl(ste: str) -> Any:  # noqa: N805, D102 - the injector reads the parameter's name
        return TensorClampSte if ste == "pass" else TensorClamp

    @value  # type: ignore[untyped-decorator]
    def channel_dim(module: Any) -> int:  # noqa: N805, D102
        return int(getattr(module, "output_channel_dim", 0))


def build(bits: int, *, gamma: Gamma | Literal["one"], per_channel: bool, ste: str, percentile: float) -> nn.Module:
    """The tensor quantizer of these options, with the output channels of the weight first."""
    injector = ReScaWWeightQuant.let(
        bit_width=bits, gamma=gamma, per_channel=per_channel, ste=ste, percentile=percentile, channel_dim=0
    )
    quant: nn.Module = injector.tensor_quant
    return quant
