"""ReScaW: a uniform weight quantizer whose range follows the weights. The mathematics and the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from snncompress.extend import OptionError, Quantizer

from .gamma import Gamma

Ste = Literal["clip", "pass"]


@dataclass(frozen=True)
class ReScaW(Quantizer):
    """Rescaled weight quantization: the b-bit uniform grid, stretched to the weights' own range.

    With s = 2^b - 1 grid steps and round half to even::

        Ŵ = γ · (2/s · round(s/2 · (clamp(W/γ, -1, 1) + 1)) - 1)          (Eq. 9, 10)

    In Brevitas' terms an unsigned b-bit quantizer with scale 2γ/s and zero-point s/2. The zero-point is a
    half-integer: **the grid has no zero**, so a weight that is pruned must be masked after the quantizer. γ
    is that of the weight as it is at every forward (it is remembered while the weight stays the same) and a constant
    in the backward pass. It is a statistic of the weights that exist (≠ 0): pruning single weights doesn't shrink the
    grid of those that are left.

    The default is for networks that are used, or fine-tuned, from where quantization leaves them: the least error,
    channel by channel. Training as the paper does starts from ``ReScaW(gamma="l1_mean", per_channel=False)``. Without
    training that is no good: it clamps about 42 % of normal weights, at 8 bits as at 2.

    Args:
        gamma: "mse" = the γ ≤ max|W| of the least squared error ‖W - Ŵ‖² of the weights that exist, as nearly as a
            search over some twenty values finds it, and never worse than "max"; it takes several times as long as the
            others. "l1_mean" = mean|W| over the weights that exist, the paper's; "max" = max|W|; "percentile" =
            max(|P_x|, |P_{1-x}|) of the weights that exist, linearly interpolated.
        per_channel: one γ per output channel, dimension 0 of the weight, instead of one per layer.
        ste: the straight-through gradient is 1 where |W/γ| ≤ 1 and 0 elsewhere ("clip"), or 1 everywhere ("pass").
            At l1_mean, where about 40 % of normal weights are clamped, the two are equal when only quantizing, and
            "pass" recovers more after pruning at the trainer's default learning rate (benchmarks/mnist.py).
        percentile: the x of "percentile", 0 ≤ x < 0.5.

    Shapes:
        weight [C, ...] → (value [C, ...], scale, zero_point [], bit_width []); scale is [] or [C, 1, ...].
        The value keeps the weight's dtype; float16 and bfloat16 are computed, and their scale given, in
        float32.

    A weight (or channel) that is all zero stays zero: γ is 0, and γ times anything is 0.

    Raises:
        OptionError: an option, or the number of bits (1 to 16), has a value that can't work.

    Source: QP-SNN (ICLR 2025), Eq. 9-10; "l1_mean" is the paper's best after training (CIFAR-100: 79.16 %, max
    77.85, percentile 77.80). "mse" is not the paper's.

    Example:
        Two bits, γ = mean|W| = 0.5, so the grid is 0.5 · {-1, -1/3, 1/3, 1}:

        >>> import torch
        >>> quant = ReScaW(gamma="l1_mean", per_channel=False).tensor_quant(bits=2)
        >>> value, scale, zero_point, bits = quant(torch.tensor([[0.9, -0.3], [0.6, 0.2]]))
        >>> value
        tensor([[ 0.5000, -0.1667],
                [ 0.5000,  0.1667]])
        >>> scale, zero_point
        (tensor(0.3333), tensor(1.5000))

        One bit leaves ±γ, and the least error has γ = mean|W| of every channel:

        >>> ReScaW().tensor_quant(bits=1)(torch.tensor([[0.75, -0.25], [1.0, 2.0]]))[0]
        tensor([[ 0.5000, -0.5000],
                [ 1.5000,  1.5000]])
    """

    name: ClassVar[str] = "rescaw"

    gamma: Gamma = "mse"
    per_channel: bool = True
    ste: Ste = "pass"
    percentile: float = 0.01

    def __post_init__(self) -> None:
        _check_choice(self.name, "gamma", self.gamma, get_args(Gamma))
        _check_choice(self.name, "ste", self.ste, get_args(Ste))
        if not isinstance(self.per_channel, bool):
            raise OptionError(f"{self.name}: per_channel must be True or False, not {self.per_channel!r}.")
        if not 0 <= self.percentile < 0.5:
            raise OptionError(
                f"{self.name}: percentile is the share cut off at either end, 0 ≤ x < 0.5, not "
                f"{self.percentile!r}; the paper's 1 % is 0.01."
            )

    def tensor_quant(self, bits: int) -> nn.Module:
        """A Brevitas ``RescalingIntQuant``; it has no parameters and adds nothing to a state_dict."""
        from .modules import build  # imports Brevitas

        _check_bits(self.name, bits)
        return build(bits, gamma=self.gamma, per_channel=self.per_channel, ste=self.ste, percentile=self.percentile)


@dataclass(frozen=True)
class Uniform(Quantizer):
    """The vanilla b-bit uniform quantizer on the fixed range [-1, 1].

    With s = 2^b - 1 grid steps and round half to even::

        Ŵ = 2/s · round(s/2 · (clamp(W, -1, 1) + 1)) - 1          (Eq. 4-6)

    It is ``rescaw`` with γ = 1, and like that has no zero on its grid. Trained weights are much smaller than
    1, so few of the grid's values are used; the paper's comparison.

    Args:
        ste: the straight-through gradient is 1 where |W| ≤ 1 and 0 elsewhere ("clip"), or 1 everywhere ("pass").

    Shapes:
        weight [C, ...] → (value [C, ...], scale [], zero_point [], bit_width []).

    Raises:
        OptionError: ``ste``, or the number of bits (1 to 16), has a value that can't work.

    Source: QP-SNN (ICLR 2025), Eq. 4-6.

    Example:
        One bit leaves the sign:

        >>> import torch
        >>> Uniform().tensor_quant(bits=1)(torch.tensor([[0.3, -0.01], [-1.7, 0.2]]))[0]
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """

    name: ClassVar[str] = "uniform"

    ste: Ste = "pass"

    def __post_init__(self) -> None:
        _check_choice(self.name, "ste", self.ste, get_args(Ste))

    def tensor_quant(self, bits: int) -> nn.Module:
        """A Brevitas ``RescalingIntQuant``; it has no parameters and adds nothing to a state_dict."""
        from .modules import build  # imports Brevitas

        _check_bits(self.name, bits)
        return build(bits, gamma="one", per_channel=False, ste=self.ste, percentile=0.0)


def _check_choice(name: str, option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name}: {option} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise OptionError(f"{name}: bits must be a whole number from 1 to 16, not {bits!r}.")
