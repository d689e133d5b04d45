"""Copies of a model that leave the original bitwise as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snncompress.interfaces import Adapter

from .parametrizations import computed_weight, separate_classes

M = TypeVar("M", bound=nn.Module)


def private_copy(model: M, adapter: Adapter, *, share: bool = False) -> M:
    """A deep copy with neurons reset; also of a model whose neurons still hold a live autograd graph.

    ``copy.deepcopy`` refuses tensors inside a graph, and resetting the user's model first would change it; so those
    tensors are replaced by detached clones on the way. With ``share`` the copy has the same parameters, which must not
    be written into, but may be replaced.
    """
    with torch.inference_mode(False):  # else the copy's parameters could never be changed
        memo: dict[int, Any] = {id(t): t.detach().clone() for t in _graph_tensors(model)}
        if share:
            memo |= {id(parameter): parameter for parameter in model.parameters()}
        result = copy.deepcopy(model, memo)
        separate_classes(result)
        adapter.reset(result)
    return result


def _graph_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _non_leaves(vars(module))


def _non_leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _non_leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _non_leaves(item)


def plain_copy(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A private copy in eval mode with plain weights that all require a gradient, ready to be traced."""
    copy = private_copy(model, adapter).eval()
    for module in list(copy.modules()):
        if parametrize.is_parametrized(module, "weight") and not computed_weight(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return copy
