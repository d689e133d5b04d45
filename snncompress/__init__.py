"""Make spiking neural networks small and cheap without leaving the framework they were built in.

compressed = snncompress.apply(model, criterion="svs", ratio=0.6, bits=4)

Who writes a plugin or an adapter imports from :mod:`snncompress.extend`.
"""

from .base.distributed import no_sync
from .contract.registry import criteria, energy_models, plugins, quantizers, schedulers, targets
from .conversion.converting import convert
from .errors import (
    DataError,
    DefaultSkipWarning,
    EmptyLayerWarning,
    KeptStateWarning,
    ModelError,
    NonlinearWarning,
    NothingToDoWarning,
    OptionError,
    PlanError,
    PluginError,
    SilentNeuronsWarning,
    SNNCompressError,
    StorageError,
    SyntheticDataWarning,
    UnknownNameError,
    UnknownNeuronsWarning,
)
from .export.exporting import export
from .export.freezing import freeze
from .export.nir_running import Approximation
from .export.quickening import FrozenLayer, FrozenLayers, frozen_layers
from .measuring.conventions import Conventions
from .measuring.evaluation import Evaluation, evaluate
from .measuring.fits import Fit, fits
from .measuring.gradients import GradientAwareLoss, GradientFlow, gradient_flow
from .measuring.profiling import compare, profile
from .measuring.reporting import Comparison, LayerProfile, Profile
from .measuring.temporal import TemporalAnalysis, temporal_analysis
from .model.channel_map import ChannelMap
from .model.edits import (
    Edit,
    FoldNorm,
    MaskWeights,
    QuantizeStates,
    QuantizeWeights,
    RemoveBlock,
    RemoveChannels,
    Resized,
    TruncateTimesteps,
)
from .model.own_neurons import OwnNeurons
from .model.plan import Plan, plan_of
from .pruning.apply import apply
from .pruning.collapse import collapse
from .pruning.distillation import Distillation
from .pruning.epochs import Epoch
from .pruning.refresh import refresh
from .pruning.repair import repair
from .pruning.training import finetune
from .reports.reporting import report
from .running.scores import cross_entropy
from .saving.storage import load, save
from .studies.curves import Sensitivity, ThresholdSweep
from .studies.heat_maps import Robustness, Scores
from .studies.scoring import robustness, scores
from .studies.search.result import Search, Trial
from .studies.search.searching import search
from .studies.searching import BlockSearch, Candidate, block_search
from .studies.sweeps import sensitivity, threshold_sweep
from .studies.utilization import GridUse, Utilization, WeightRange, utilization
from .version import __version__

__all__ = [
    "Approximation",
    "BlockSearch",
    "Candidate",
    "ChannelMap",
    "Comparison",
    "Conventions",
    "DataError",
    "DefaultSkipWarning",
    "Distillation",
    "Edit",
    "EmptyLayerWarning",
    "Epoch",
    "Evaluation",
    "Fit",
    "FoldNorm",
    "FrozenLayer",
    "FrozenLayers",
    "GradientAwareLoss",
    "GradientFlow",
    "GridUse",
    "KeptStateWarning",
    "LayerProfile",
    "MaskWeights",
    "ModelError",
    "NonlinearWarning",
    "NothingToDoWarning",
    "OptionError",
    "OwnNeurons",
    "Plan",
    "PlanError",
    "PluginError",
    "Profile",
    "QuantizeStates",
    "QuantizeWeights",
    "RemoveBlock",
    "RemoveChannels",
    "Resized",
    "Robustness",
    "SNNCompressError",
    "Scores",
    "Search",
    "Sensitivity",
    "SilentNeuronsWarning",
    "StorageError",
    "SyntheticDataWarning",
    "TemporalAnalysis",
    "ThresholdSweep",
    "Trial",
    "TruncateTimesteps",
    "UnknownNameError",
    "UnknownNeuronsWarning",
    "Utilization",
    "WeightRange",
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
    "fits",
    "freeze",
    "frozen_layers",
    "gradient_flow",
    "load",
    "no_sync",
    "plan_of",
    "plugins",
    "profile",
    "quantizers",
    "refresh",
    "repair",
    "report",
    "robustness",
    "save",
    "schedulers",
    "scores",
    "search",
    "sensitivity",
    "targets",
    "temporal_analysis",
    "threshold_sweep",
    "utilization",
]
