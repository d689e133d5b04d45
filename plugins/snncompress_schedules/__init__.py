"""Plugin: the schedulers ``one_shot``, ``iterative``, ``gradual`` and ``prune_regrow``."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Scheduler, hookimpl

from .regrowth import PruneRegrow
from .schedules import Gradual, Iterative, OneShot

__all__ = ["Gradual", "Iterative", "OneShot", "PruneRegrow"]


@hookimpl
def register_schedulers(register: Callable[[type[Scheduler]], None]) -> None:
    """Offer the four."""
    register(OneShot)
    register(Iterative)
    register(Gradual)
    register(PruneRegrow)
