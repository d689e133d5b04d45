"""The contract between the core and its plugins: Criterion, Quantizer, Scheduler, EnergyModel, Target, Adapter.

A plugin subclasses one of these and registers the class (see :mod:`snncompress.contract.hookspecs`). Where a class is a
dataclass, its fields are its options: they are stored in the plan, so they must be plain JSON values.
"""

from .adapters import Adapter, Dynamics, Emission, Forward, Loss, Memory, Observer, StandIn, StateGrid
from .plugins import (
    BlockCriterion,
    Criterion,
    CriticalityCriterion,
    EnergyModel,
    Granularity,
    Inputs,
    Layer,
    MemoryUse,
    OperationCounts,
    Quantizer,
    Reader,
    Scheduler,
    Scope,
    Signal,
)
from .targets import Limit, Placement, Pooling, Stage, Target

__all__ = [
    "Adapter",
    "BlockCriterion",
    "Criterion",
    "CriticalityCriterion",
    "Dynamics",
    "Emission",
    "EnergyModel",
    "Forward",
    "Granularity",
    "Inputs",
    "Layer",
    "Limit",
    "Loss",
    "Memory",
    "MemoryUse",
    "Observer",
    "OperationCounts",
    "Placement",
    "Pooling",
    "Quantizer",
    "Reader",
    "Scheduler",
    "Scope",
    "Signal",
    "Stage",
    "StandIn",
    "StateGrid",
    "Target",
]
