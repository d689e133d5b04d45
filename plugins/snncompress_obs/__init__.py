"""Plugin: second-order saliency on what neurons integrate, ``obs`` of weights, ``reconstruction`` of channels."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Criterion, hookimpl

from .obs import OBS
from .reconstruction import Reconstruction

__all__ = ["OBS", "Reconstruction"]


@hookimpl
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer both."""
    register(OBS)
    register(Reconstruction)
