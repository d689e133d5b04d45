"""Plugin: the energy model ``horowitz_45nm``."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import EnergyModel, hookimpl

from .horowitz import Horowitz45nm

__all__ = ["Horowitz45nm"]


@hookimpl
def register_energy_models(register: Callable[[type[EnergyModel]], None]) -> None:
    """Offer ``horowitz_45nm``."""
    register(Horowitz45nm)
