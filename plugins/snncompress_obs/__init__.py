"""Plugin: the criterion ``obs`` for single weights, second-order saliency on what spiking neurons integrate."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .obs import OBS

__all__ = ["OBS"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer ``obs``."""
    register(OBS)
