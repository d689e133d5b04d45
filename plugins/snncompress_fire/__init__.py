"""Plugin: the block criteria ``ablation`` and ``fire``, and the schedules of SNN SqueezeNet-P."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .fire import SCHEDULES, Ablation, Fire, Keep

__all__ = ["SCHEDULES", "Ablation", "Fire", "Keep"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer what is found by measuring; a schedule is made with :meth:`Keep.named`."""
    register(Ablation)
    register(Fire)
