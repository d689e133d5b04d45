"""The pluggy hooks that a plugin implements.

A plugin is an importable module that a distribution names in the entry-point group ``snncompress``::

    [project.entry-points.snncompress]
    my_criterion = "my_package"

    # my_package/__init__.py
    from snncompress.extend import hookimpl

    @hookimpl
    def register_criteria(register):
        register(MyCriterion)

Every hook is handed ``register``, which takes a class. The class is registered under its ``name``; a name that is
taken is an error that names both distributions.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from snncompress.interfaces import Adapter, Criterion, EnergyModel, Quantizer, Scheduler, Target

PROJECT = "snncompress"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_criteria(register: Callable[[type[Criterion]], None]) -> None:
    """Offer pruning criteria."""


@hookspec
def register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer weight quantizers."""


@hookspec
def register_schedulers(register: Callable[[type[Scheduler]], None]) -> None:
    """Offer pruning schedules."""


@hookspec
def register_energy_models(register: Callable[[type[EnergyModel]], None]) -> None:
    """Offer energy models."""


@hookspec
def register_targets(register: Callable[[type[Target]], None]) -> None:
    """Offer chips, and what they can hold."""


@hookspec
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Offer an adapter for a framework; it is registered under its ``framework``."""
