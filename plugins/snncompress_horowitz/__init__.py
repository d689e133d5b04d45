"""Plugin: the energy models ``horowitz_45nm`` (arithmetic alone) and ``lemaire_45nm`` (memory too)."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import EnergyModel, hookimpl

from .horowitz import Horowitz45nm
from .lemaire import Lemaire45nm

__all__ = ["Horowitz45nm", "Lemaire45nm"]


@hookimpl
def register_energy_models(register: Callable[[type[EnergyModel]], None]) -> None:
    """Offer both."""
    register(Horowitz45nm)
    register(Lemaire45nm)
