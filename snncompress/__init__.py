"""Make spiking neural networks small and cheap without leaving the framework they were built in.

compressed = snncompress.apply(model, criterion="svs", ratio=0.6, bits=4)
"""

from .base.ranking import layer_adaptive
from .contract.hookspecs import hookimpl
from .contract.registry import criteria, energy_models, plugins, quantizers, schedulers
from .conversion.converting import convert
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
from .export.exporting import export
from .export.freezing import freeze
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
from .measuring.conventions import Conventions
from .measuring.evaluation import Evaluation, evaluate
from .measuring.gradients import GradientAwareLoss, GradientFlow, gradient_flow
from .measuring.profiling import compare, profile
from .measuring.reporting import Comparison, LayerProfile, Profile
from .measuring.temporal import TemporalAnalysis, temporal_analysis
from .model.edits import Edit, MaskWeights, QuantizeWeights, RemoveBlock, RemoveChannels, Repair, TruncateTimesteps
from .model.modules import patched, remove_along
from .model.network import remove_from_layer
from .model.plan import Plan, plan_of
from .pruning.apply import apply
from .pruning.collapse import collapse
from .pruning.training import finetune
from .running.data import Batch, Feed
from .running.scores import cross_entropy
from .saving.storage import load, save
from .studies.curves import Sensitivity, ThresholdSweep
from .studies.searching import BlockSearch, Candidate, block_search
from .studies.sweeps import sensitivity, threshold_sweep
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
