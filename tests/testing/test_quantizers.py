"""The checks of quantizers: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import snncompress
from snncompress.contract.registry import Entry, registry
from snncompress.extend import Quantizer
from snncompress.testing import (
    check_quantizer,
)
from tests.testing.common import broken, named


@pytest.mark.parametrize("entry", snncompress.quantizers(), ids=named)
def test_our_quantizers(entry: Entry) -> None:
    check_quantizer(entry.cls())


@pytest.mark.parametrize("gamma", ["mse", "l1_mean", "max", "percentile"])
@pytest.mark.parametrize("options", [{"per_channel": True}, {"per_channel": False}, {"ste": "clip"}], ids=str)
def test_our_quantizers_with_other_options(options: dict[str, Any], gamma: str) -> None:
    check_quantizer(registry().find("quantizer", "rescaw")(gamma=gamma, **options))


class Grid(nn.Module):
    """2^bits values from -max|W| to max|W|; subclasses spoil one thing each."""

    def __init__(self, bits: int, stretch: float = 1.0) -> None:
        super().__init__()
        self.bits, self.levels, self.stretch = bits, 2**bits, stretch

    def scale(self, weight: Tensor) -> Tensor:
        return self.stretch * 2 * weight.detach().abs().max().clamp_min(1e-30) / (2**self.bits - 1)

    def number(self, x: Tensor) -> Tensor:
        return x + (x.round().clamp(0, self.levels - 1) - x).detach()

    def forward(self, weight: Tensor) -> Any:
        scale, zero = self.scale(weight), torch.tensor((2**self.bits - 1) / 2)
        return (self.number(weight / scale + zero) - zero) * scale, scale, zero, torch.tensor(float(self.bits))


class Plain(Quantizer):
    name: ClassVar[str] = "plain"
    module: ClassVar[Callable[..., Any]] = Grid

    def tensor_quant(self, bits: int) -> nn.Module:
        return type(self).module(bits)


def test_a_right_quantizer_passes() -> None:
    check_quantizer(Plain())


def altered(change: Callable[[tuple[Tensor, ...], Tensor], Any]) -> type[Grid]:
    """A grid whose result is changed: ``change((value, scale, zero_point, bits), weight)``."""

    class Altered(Grid):
        def forward(self, weight: Tensor) -> Any:
            return change(super().forward(weight), weight)

    return Altered


class TooManyLevels(Grid):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.levels += 1
        self.stretch = 0.8


class NoGradient(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x).round()


class Detached(Grid):
    def forward(self, weight: Tensor) -> Any:
        return super().forward(weight.detach())


class WildGradient(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x) + 0 * (x - x.detach()).sqrt()


class DividesByMax(Grid):
    def scale(self, weight: Tensor) -> Tensor:
        return 2 * weight.detach().abs().max() / (2**self.bits - 1)


class DividesByTooLittle(Grid):
    def forward(self, weight: Tensor) -> Any:
        value, *rest = super().forward(weight)
        return value * (weight.abs().max() / weight.abs().max()).detach(), *rest


class Scales(Grid):
    def forward(self, weight: Tensor) -> Any:
        result = super().forward(weight)
        weight.data.mul_(0.5)
        return result


class Stochastic(Grid):
    def number(self, x: Tensor) -> Tensor:
        return super().number(x + (torch.rand_like(x) - 0.5))


class Uncopyable(Grid):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.lock = threading.Lock()


class NaNAtOneBit(Grid):
    def forward(self, weight: Tensor) -> Any:
        value, *rest = super().forward(weight)
        return value / (self.bits - 1) * (self.bits - 1) if self.bits == 1 else value, *rest


class FailsAt16(Grid):
    def __init__(self, bits: int) -> None:
        if bits > 8:
            raise ValueError("at most 8 bits")
        super().__init__(bits)


class FailsForward(Grid):
    def forward(self, weight: Tensor) -> Any:
        raise RuntimeError("no forward")


MODULES: dict[str, tuple[Callable[..., Any], str]] = {
    "not a module": (lambda bits: abs, "tensor_quant() must return a module, not builtin"),
    "value alone": (altered(lambda r, w: r[0]), "must return tensors (value, scale, zero_point, bit_width)"),
    "a float among them": (altered(lambda r, w: (*r[:3], 4.0)), "must return tensors (value, scale"),
    "other shape": (altered(lambda r, w: (r[0].flatten(), *r[1:])), "keep the weight's shape and dtype"),
    "other dtype": (altered(lambda r, w: (r[0].float(), *r[1:])), "is [32, 4, 3, 3] torch.float32 at 1 bits"),
    "NaN at one bit": (NaNAtOneBit, "values must be finite, scales finite and positive at 1 bits"),
    "scale 0": (altered(lambda r, w: (r[0], 0 * r[1], *r[2:])), "scales finite and positive"),
    "infinite scale": (altered(lambda r, w: (r[0], r[1] / 0, *r[2:])), "scales finite and positive"),
    "wrong width": (altered(lambda r, w: (*r[:3], r[3] + 1)), "the bit width that it returns is 2.0"),
    "wrong zero point": (altered(lambda r, w: (r[0], r[1], r[2] + 0.5, r[3])), "aren't on the grid"),
    "shifted by one": (altered(lambda r, w: (r[0], r[1], r[2] + 1, r[3])), "aren't on the grid"),
    "not rounded": (altered(lambda r, w: (w, *r[1:])), "aren't on the grid"),
    "2^bits + 1 levels": (TooManyLevels, "aren't on the grid scale * (n - zero_point), n = 0 … 1"),
    "jitter": (altered(lambda r, w: (r[0] + 1e-5 * w.detach(), *r[1:])), "more than 2 distinct values"),
    "no gradient": (NoGradient, "not zero everywhere"),
    "detached": (Detached, "the backward pass at 1 bits"),
    "gradient of another weight": (
        altered(lambda r, w: (r[0].detach() + torch.zeros(1, requires_grad=True), *r[1:])),
        "the gradient must be finite",
    ),
    "infinite gradient": (WildGradient, "the gradient must be finite"),
    "changes the weight": (Scales, "changes the weight in place"),
    "stochastic": (Stochastic, "other values the second time"),
    "can't be copied": (Uncopyable, "a deep copy of the module for 1 bits failed"),
    "all zero, scale": (DividesByMax, "an all-zero weight becomes NaN"),
    "all zero, value": (DividesByTooLittle, "an all-zero weight becomes NaN"),
    "8 bits at most": (FailsAt16, "tensor_quant(16) failed: ValueError: at most 8 bits"),
    "raises": (FailsForward, "the module for 1 bits failed: RuntimeError: no forward"),
}


@pytest.mark.parametrize(("module", "said"), MODULES.values(), ids=MODULES)
def test_a_broken_tensor_quantizer(module: Callable[..., Any], said: str) -> None:
    cls = type("Broken", (Plain,), {"module": staticmethod(module)})
    assert said in broken(check_quantizer, cls())


class HidesAnOption(Plain):
    def __init__(self, stretch: float = 1.0) -> None:
        self.stretch = stretch

    def tensor_quant(self, bits: int) -> nn.Module:
        return Grid(bits, self.stretch)


class DropsAnOption(HidesAnOption):
    def options(self) -> dict[str, Any]:
        return {"stretch": self.stretch}

    def __init__(self, stretch: float = 1.0) -> None:
        super().__init__(stretch * 2)


class CannotBeRebuilt(Plain):
    def options(self) -> dict[str, Any]:
        return {"stretch": 1.0}


def test_a_quantizer_that_its_options_dont_describe() -> None:
    assert "it gives others" in broken(check_quantizer, HidesAnOption(stretch=0.5))
    assert "it has others: {'stretch': 4.0}" in broken(check_quantizer, DropsAnOption())
    assert "being rebuilt from its options" in broken(check_quantizer, CannotBeRebuilt())
