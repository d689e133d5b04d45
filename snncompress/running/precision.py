"""How precise products are: as networks have it where something is compared or solved, as users have it elsewhere.

Beside autocast there is a second way to less precision: float32 operands that are rounded inside of a product. On GPUs
convolutions do so unless told otherwise (TensorFloat-32, ten bits of mantissa), and not at every width, so that a
network and what is left of it after pruning differ by more than rounding in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

V = TypeVar("V")


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, autocast is off, and products of float32 are products of float32."""
    found = _Rounding()
    _outside.append(found)
    try:
        _exact()
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        _outside.pop()
        found.put()


@contextmanager
def rounding_as_outside() -> Iterator[None]:
    """Inside of :func:`full_precision`, for training: products are rounded where the user lets them be."""
    here = _Rounding()
    try:
        if _outside:
            _outside[0].put()
        yield
    finally:
        here.put()


class _Rounding:
    """torch's settings. It has two ways to say them, and refuses to tell of one where the user took the other: None."""

    def __init__(self) -> None:
        self.convolutions = _asked(lambda: torch.backends.cudnn.allow_tf32) if _on_gpus() else None
        self.matrices = _asked(torch.get_float32_matmul_precision)
        self.by_kind: list[str] = [kind.fp32_precision for kind in _kinds()]

    def put(self) -> None:
        """Let these hold. What does so already isn't touched: told once, it no longer follows what is told of all."""
        now = _Rounding()
        if self.convolutions not in (None, now.convolutions):
            _asked(lambda: setattr(torch.backends.cudnn, "allow_tf32", self.convolutions))  # refused where frozen
        if self.matrices not in (None, now.matrices):
            torch.set_float32_matmul_precision(str(self.matrices))
        for kind, precision in zip(_kinds(), self.by_kind, strict=True):
            if kind.fp32_precision != precision:
                kind.fp32_precision = "none"  # then it is what holds for all kinds
                if kind.fp32_precision != precision:
                    kind.fp32_precision = precision


def _exact() -> None:
    wanted = _Rounding()
    wanted.convolutions = None if wanted.convolutions is None else False
    wanted.matrices = None if wanted.matrices is None else "highest"
    wanted.by_kind = [precision if precision == "none" else "ieee" for precision in wanted.by_kind]
    wanted.put()
    for kind in _kinds():
        if kind.fp32_precision not in ("none", "ieee"):
            kind.fp32_precision = "ieee"


_outside: list[_Rounding] = []
"""What held before each :func:`full_precision` that the program is in."""


def _kinds() -> list[Any]:
    """Since torch 2.9 each kind of product has a setting of its own."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    if not hasattr(cudnn, "conv"):
        return []
    gpu = [cudnn.conv, cudnn.rnn, backends.cuda.matmul] if _on_gpus() else []
    return [*gpu, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]


def _on_gpus() -> bool:
    return torch.cuda.is_available()


def _asked(ask: Callable[[], V]) -> V | None:
    try:
        return ask()
    except RuntimeError:
        return None
