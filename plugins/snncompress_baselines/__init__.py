"""Plugin: for every comparison, of channels and of single weights."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .baselines import BNScale, BNScaleGradient, FiringRate, Magnitude, Random, Taylor
from .weights import LAMP, SNIP, WeightGradient, WeightMagnitude, WeightRandom

CHANNELS = (Magnitude, Random, BNScale, BNScaleGradient, FiringRate, Taylor)
WEIGHTS = (WeightMagnitude, LAMP, WeightRandom, WeightGradient, SNIP)

__all__ = [
    "LAMP",
    "SNIP",
    "BNScale",
    "BNScaleGradient",
    "FiringRate",
    "Magnitude",
    "Random",
    "Taylor",
    "WeightGradient",
    "WeightMagnitude",
    "WeightRandom",
]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer them all."""
    for criterion in (*CHANNELS, *WEIGHTS):
        register(criterion)
