"""Plugin: ``magnitude``, ``random``, ``bn_scale``, ``firing_rate`` and ``taylor``, for every comparison."""

from __future__ import annotations

from collections.abc import Callable

from snncompress import Criterion, hookimpl

from .baselines import BNScale, FiringRate, Magnitude, Random, Taylor

__all__ = ["BNScale", "FiringRate", "Magnitude", "Random", "Taylor"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer the five."""
    register(Magnitude)
    register(Random)
    register(BNScale)
    register(FiringRate)
    register(Taylor)
