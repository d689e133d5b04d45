"""Plugin: the channel criterion ``svs``, singular values of spike activity (QP-SNN, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .svs import SVS

__all__ = ["SVS"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer ``svs``."""
    register(SVS)
