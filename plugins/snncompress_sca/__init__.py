"""Plugin: the channel criterion ``sca``, spiking channel activity (Li et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .sca import SCA

__all__ = ["SCA"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer ``sca``."""
    register(SCA)
