"""Make spiking neural networks small and cheap without leaving the framework they were built in.

compressed = snncompress.apply(model, criterion="svs", ratio=0.6, bits=4)
"""

from .collapse import collapse
from .converting import convert
from .curves import Sensitivity, ThresholdSweep
from .data import Batch, Feed
from .edits import Edit, MaskWeights, QuantizeWeights, RemoveBlock, RemoveChannels, Repair, TruncateTimesteps
from .energy import Conventions
from .errors import (
    DataError,
    EmptyLayerWarning,
    ModelError,
    NothingToDoWarning,
    OptionError,
    PlanError,
    PluginError,
    SilentNeuronsWarning,
    SNNCompressError,
    StorageError,
    SyntheticDataWarning,
    UnknownNameError,
)
from .evaluation import Evaluation, evaluate
from .exporting import export
from .freezing import freeze
from .gradients import GradientAwareLoss, GradientFlow, gradient_flow
from .hookspecs import hookimpl
from .interfaces import (
    Adapter,
    BlockCriterion,
    Criterion,
    Dynamics,
    EnergyModel,
    Fire,
    Granularity,
    Layer,
    Observer,
    OperationCounts,
    Quantizer,
    Scheduler,
    Scope,
    Signal,
)
from .network import remove_from_layer
from .pipeline import apply
from .plan import Plan, plan_of
from .profiling import compare, profile
from .registry import criteria, energy_models, plugins, quantizers, schedulers
from .reporting import Comparison, LayerProfile, Profile
from .searching import BlockSearch, Candidate, block_search
from .selection import layer_adaptive
from .storage import load, save
from .surgery import patched, remove_along
from .sweeps import sensitivity, threshold_sweep
from .temporal import TemporalAnalysis, temporal_analysis
from .training import cross_entropy, finetune
from .version import __version__

__all__ = [
    "Adapter",
    "Batch",
    "BlockCriterion",
    "BlockSearch",
    "Candidate",
    "Comparison",
    "Conventions",
    "Criterion",
    "DataError",
    "Dynamics",
    "Edit",
    "EmptyLayerWarning",
    "EnergyModel",
    "Evaluation",
    "Feed",
    "Fire",
    "GradientAwareLoss",
    "GradientFlow",
    "Granularity",
    "Layer",
    "LayerProfile",
    "MaskWeights",
    "ModelError",
    "NothingToDoWarning",
    "Observer",
    "OperationCounts",
    "OptionError",
    "Plan",
    "PlanError",
    "PluginError",
    "Profile",
    "QuantizeWeights",
    "Quantizer",
    "RemoveBlock",
    "RemoveChannels",
    "Repair",
    "SNNCompressError",
    "Scheduler",
    "Scope",
    "Sensitivity",
    "Signal",
    "SilentNeuronsWarning",
    "StorageError",
    "SyntheticDataWarning",
    "TemporalAnalysis",
    "ThresholdSweep",
    "TruncateTimesteps",
    "UnknownNameError",
    "__version__",
    "apply",
    "block_search",
    "collapse",
    "compare",
    "convert",
    "criteria",
    "cross_entropy",
    "energy_models",
    "evaluate",
    "export",
    "finetune",
    "freeze",
    "gradient_flow",
    "hookimpl",
    "layer_adaptive",
    "load",
    "patched",
    "plan_of",
    "plugins",
    "profile",
    "quantizers",
    "remove_along",
    "remove_from_layer",
    "save",
    "schedulers",
    "sensitivity",
    "temporal_analysis",
    "threshold_sweep",
]
