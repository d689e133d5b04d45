"""For authors of plugins and adapters: the interfaces, the hook, and what their code may need.

    from snncompress.extend import Criterion, Layer, hookimpl

Users find everything that they call in :mod:`snncompress` itself. A plugin that imports from nowhere else keeps working
when the core is rearranged; :mod:`snncompress.testing` checks it against the contract.
"""

from .base.ranking import layer_adaptive
from .contract.hookspecs import hookimpl
from .errors import DataError, ModelError, OptionError, PluginError, SNNCompressError
from .interfaces import (
    Adapter,
    BlockCriterion,
    Criterion,
    CriticalityCriterion,
    Dynamics,
    Emission,
    EnergyModel,
    Granularity,
    Inputs,
    Layer,
    Limit,
    Memory,
    MemoryUse,
    Observer,
    OperationCounts,
    Placement,
    Pooling,
    Quantizer,
    Reader,
    Scheduler,
    Scope,
    Signal,
    Stage,
    StandIn,
    StateGrid,
    Target,
)
from .model.computed_once import Remembered
from .model.modules import patched, remove_along, stacked, without
from .model.one_step import all_steps, first_step, through
from .model.resizing import remove_from_layer

__all__ = [
    "Adapter",
    "BlockCriterion",
    "Criterion",
    "CriticalityCriterion",
    "DataError",
    "Dynamics",
    "Emission",
    "EnergyModel",
    "Granularity",
    "Inputs",
    "Layer",
    "Limit",
    "Memory",
    "MemoryUse",
    "ModelError",
    "Observer",
    "OperationCounts",
    "OptionError",
    "Placement",
    "PluginError",
    "Pooling",
    "Quantizer",
    "Reader",
    "Remembered",
    "SNNCompressError",
    "Scheduler",
    "Scope",
    "Signal",
    "Stage",
    "StandIn",
    "StateGrid",
    "Target",
    "all_steps",
    "first_step",
    "hookimpl",
    "layer_adaptive",
    "patched",
    "remove_along",
    "remove_from_layer",
    "stacked",
    "through",
    "without",
]
