"""Batch norms that were folded into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import fusion

from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.parametrizations import compression_of, computed_weight

from .base import Edit, find


@dataclass(frozen=True)
class FoldNorm(Edit):
    """Fold a batch norm into the layer before it: an ``nn.Identity`` takes its place, and the layer has a bias.

    W' = γ/√(σ² + ε) · W,  b' = γ/√(σ² + ε) · (b − μ) + β
    """

    layer: str
    norm: str
    kind: ClassVar[str] = "fold_norm"

    def check(self, model: nn.Module) -> None:
        """There must be such a layer, of plain weights, and such a norm of as many channels."""
        layer, norm = (find(model, name, "the plan folds a batch norm") for name in (self.layer, self.norm))
        right = isinstance(layer, (_ConvNd, nn.Linear)) and isinstance(norm, _BatchNorm)
        width = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        if not right or norm.running_var is None or norm.num_features != width:
            raise PlanError(
                f"{self.norm[:80]} ({type(norm).__name__}) can't be folded into {self.layer[:80]} "
                f"({type(layer).__name__}): that takes a batch norm with statistics behind a convolution or linear "
                f"layer of as many channels. Is it another architecture?"
            )
        if compression_of(layer) is not None or computed_weight(layer):
            raise PlanError(f"{self.layer!r} has no plain weight any more, into which a batch norm could be folded.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Fold it, in place."""
        self.check(model)
        with torch.no_grad():
            fold_norm(model, self.layer, self.norm)

    def describe(self) -> str:
        """Which norm went into which layer."""
        return f"{self.norm} folded into {self.layer}"


def fold_norm(model: nn.Module, layer: str, norm: str) -> None:
    """Fold a batch norm into a layer with plain weights, in place, as eval mode has it."""
    before: Any = model.get_submodule(layer)
    bn: Any = model.get_submodule(norm)
    gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
    beta = torch.zeros_like(bn.running_var) if bn.bias is None else bn.bias
    args = before.weight, before.bias, bn.running_mean, bn.running_var, bn.eps, gamma, beta
    if isinstance(before, nn.Linear):
        weight, bias = fusion.fuse_linear_bn_weights(*args)
    else:
        weight, bias = fusion.fuse_conv_bn_weights(*args, transpose=isinstance(before, _ConvTransposeNd))
    before.weight, before.bias = cast(tuple[Tensor, Tensor], (weight, bias))
    model.set_submodule(norm, nn.Identity())
