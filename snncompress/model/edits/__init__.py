"""The edits: all that compression ever does to a network.

Each is immutable, has a JSON form, and is applied in place to a model that has the structure it expects. Where a
module isn't there or has another width, PlanError is raised before anything is changed.
"""

from .base import Budget, Edit, edit_from_dict
from .blocks import RemoveBlock, Resized
from .channels import RemoveChannels
from .masks import MaskWeights
from .norms import FoldNorm
from .quantization import QuantizeWeights
from .silence import SilenceChannels
from .slices import Slice
from .states import QuantizeStates
from .timesteps import TruncateTimesteps

__all__ = [
    "Budget",
    "Edit",
    "FoldNorm",
    "MaskWeights",
    "QuantizeStates",
    "QuantizeWeights",
    "RemoveBlock",
    "RemoveChannels",
    "Resized",
    "SilenceChannels",
    "Slice",
    "TruncateTimesteps",
    "edit_from_dict",
]
