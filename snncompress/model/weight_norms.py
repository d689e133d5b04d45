"""Layers whose weight is a length times a direction, w = g · v / ‖v‖: torch's weight_norm, of both kinds.

They are pruned in channels like others. ‖v‖ is taken over all that an output reads; where inputs go it shrinks, and g
with it, so that the weights that are left are what they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass
class _Norm:
    """What was taken off a layer. ``key`` is that of the hook which computes the weight, None of a parametrization."""

    how: Any
    g: nn.Parameter
    v: nn.Parameter
    key: int | None = None

    def put_back(self, layer: Any) -> None:
        """The layer's weight, a plain parameter, is computed from g and v again."""
        if self.key is None:
            parametrize.register_parametrization(layer, "weight", self.how, unsafe=True)
            pair = layer.parametrizations.weight
            pair.original0, pair.original1 = self.g, self.v
        else:
            del layer._parameters["weight"]
            layer.register_parameter("weight_g", self.g)
            layer.register_parameter("weight_v", self.v)
            layer.weight = self.how.compute_weight(layer)
            layer._forward_pre_hooks[self.key] = self.how


def _taken_off(layer: Any) -> _Norm | None:
    """Make the weight a plain parameter; None where it isn't normalized, or something else computes it, too."""
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations.weight
        if len(chain) != 1 or not isinstance(chain[0], _WeightNorm):
            return None
        norm = _Norm(chain[0], chain.original0, chain.original1)
        weight = layer.weight.detach().clone()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer._buffers.pop("weight", None)  # where g and v are frozen torch makes it one
        layer.weight = nn.Parameter(weight)
    else:
        hooks = ((k, h) for k, h in layer._forward_pre_hooks.items() if isinstance(h, WeightNorm))
        key, hook = next(((k, h) for k, h in hooks if h.name == "weight"), (None, None))
        if hook is None:
            return None
        norm = _Norm(hook, layer.weight_g, layer.weight_v, key)
        hook.remove(layer)
        del layer._forward_pre_hooks[key]
    layer.weight.requires_grad_(norm.v.requires_grad)
    return norm


def without_norms(model: nn.Module) -> list[tuple[nn.Module, _Norm]]:
    """Make all such weights plain parameters, in place; what was taken off."""
    found = [(layer, _taken_off(layer)) for layer in list(model.modules())]
    return [(layer, norm) for layer, norm in found if norm is not None]


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Inside, all such weights are plain parameters; afterwards they are computed from the same g and v as before."""
    norms = without_norms(model)
    try:
        yield
    finally:
        for layer, norm in norms:
            norm.put_back(layer)


def resize_normed(layer: nn.Module, resize: Callable[[nn.Module], None]) -> bool:
    """Let ``resize`` replace the weight, and g and v make it; False where it isn't normalized.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> before = layer.weight[:, 1:]
    >>> def without_first(layer):
    ...     layer.weight = nn.Parameter(layer.weight.detach()[:, 1:])
    >>> resize_normed(layer, without_first), torch.allclose(layer.weight, before)
    (True, True)
    """
    norm = _taken_off(layer)
    if norm is None:
        return False
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(norm.v.detach().clone())
    resize(twin)
    resize(layer)
    weight, v = cast(Tensor, layer.weight).detach(), cast(Tensor, twin.weight).detach()
    over = [axis for axis in range(v.dim()) if norm.how.dim == -1 or axis != norm.how.dim % v.dim()]
    empty = v.square().sum(over, keepdim=True) == 0
    v = torch.where(empty, 1.0, v)  # of length 0, so no direction is lost
    g = torch.where(empty, 0.0, (weight * v).sum(over, keepdim=True) / v.square().sum(over, keepdim=True).sqrt())
    norm.g = nn.Parameter(g.view([*g.shape] if norm.g.dim() else []), norm.g.requires_grad)
    norm.v = nn.Parameter(v, norm.v.requires_grad)
    norm.put_back(layer)
    return True
