"""Plugin: the weight quantizers ``rescaw`` and ``uniform`` (QP-SNN, ICLR 2025), on Brevitas.

``ReScaWWeightQuant`` is the Brevitas injector, for use without ``snncompress.apply``::

    qnn.QuantConv2d(64, 128, 3, weight_quant=ReScaWWeightQuant, weight_bit_width=4)

It is loaded when it is first asked for, because importing Brevitas takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snncompress.extend import Quantizer, hookimpl

from .rescaw import ReScaW, Uniform

if TYPE_CHECKING:
    from .modules import ReScaWWeightQuant

__all__ = ["ReScaW", "ReScaWWeightQuant", "Uniform"]


@hookimpl
def register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``rescaw`` and ``uniform``."""
    register(ReScaW)
    register(Uniform)


def __getattr__(name: str) -> Any:
    if name == "ReScaWWeightQuant":
        from .modules import ReScaWWeightQuant

        return ReScaWWeightQuant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
