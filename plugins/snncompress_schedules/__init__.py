"""Plugin: the schedulers ``one_shot``, ``iterative`` and ``gradual``."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Scheduler, hookimpl

from .schedules import Gradual, Iterative, OneShot

__all__ = ["Gradual", "Iterative", "OneShot"]


@hookimpl
def register_schedulers(register: Callable[[type[Scheduler]], None]) -> None:
    """Offer the three."""
    register(OneShot)
    register(Iterative)
    register(Gradual)
