"""Plugin: the criterion ``cqp``, and ``cqp_relaxed``, the convex relaxation that it replaces."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .cqp import CQP
from .relaxed import CQPRelaxed

__all__ = ["CQP", "CQPRelaxed"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer both."""
    register(CQP)
    register(CQPRelaxed)
