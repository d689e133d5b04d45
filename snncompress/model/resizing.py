"""Channels removed from single layers, in place: torch-pruning's pruners, and what they don't know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch_pruning import ops
from torch_pruning.pruner.function import PrunerBox

from .brevitas_layers import learned_scales
from .cells import input_weights
from .channel_map import ChannelMap
from .modules import without
from .network import NORMS, WEIGHT_LAYERS, Side, made_of_one, multiplier, pruner_of, width
from .parametrizations import resize_weight


def remove_from_layer(module: nn.Module, side: Side, indices: list[int]) -> None:
    """Remove output or input channels from a layer, in place, through torch-pruning's pruner for its type.

    Of a recurrent cell or layer what it takes in.
    """
    if isinstance(module, ChannelMap):
        return module.remove_channels(side, indices)
    if views := input_weights(module):
        for view in views:
            resize_weight(view, partial(_without_columns, indices))
        cast(Any, module).input_size -= len(indices)
        return
    pruner = pruner_of(module)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    prune: Callable[[Any, list[int]], Any] = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
    if isinstance(module, _ConvTransposeNd) and 1 < module.groups < max(module.in_channels, module.out_channels):
        prune = partial(_without_of_groups, side)

    inputs = multiplier(module) if side == "out" and made_of_one(module, torch.tensor(sorted(indices))) else 0

    def resize(layer: nn.Module) -> None:
        if side == "out":
            _remove_beside(layer, indices)
        with _with_a_bias(layer):
            prune(layer, indices)
        if inputs:
            cast(_ConvNd, layer).in_channels -= len(indices) // inputs
            cast(_ConvNd, layer).groups -= len(indices) // inputs

    with learned_scales(module, indices if side == "out" else []):
        resize_weight(module, resize)
    for name, parameter in module.named_parameters():  # torch-pruning makes every new parameter trainable
        parameter.requires_grad_(name not in frozen)


def _without_of_groups(side: Side, layer: Any, indices: list[int]) -> None:
    """Of a transposed convolution in groups, with a weight [in, out/groups, …], as many from each group."""
    old, groups = layer.weight.detach(), layer.groups
    count, axis = (layer.out_channels, 2) if side == "out" else (layer.in_channels, 1)
    kept = without(torch.arange(count), indices, 0)
    places = kept.view(groups, -1) % (count // groups)
    parts = old.view(groups, len(old) // groups, *old.shape[1:])
    cut = [part.index_select(axis - 1, place.to(old.device)) for part, place in zip(parts, places, strict=True)]
    layer.weight = nn.Parameter(torch.cat(cut))
    if side == "in":
        layer.in_channels = len(kept)
        return
    layer.out_channels = len(kept)
    if layer.bias is not None:
        layer.bias = nn.Parameter(without(layer.bias.detach(), indices, 0))


@contextmanager
def _with_a_bias(layer: Any) -> Iterator[None]:
    """Inside, a norm that scales and doesn't shift, as snnTorch's BNTT, has the bias that torch-pruning expects."""
    lacks = isinstance(layer, NORMS) and layer.affine and layer.bias is None
    if lacks:
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight))
    yield
    if lacks:
        layer.bias = None


def _remove_beside(module: nn.Module, indices: list[int]) -> None:
    """Remove output channels from what a layer of the user's own holds for each: gains, scales [C] or [C, 1, ...]."""
    if not isinstance(module, WEIGHT_LAYERS):
        return
    channels = width(module, "out")
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in ("weight", "bias") and tensor.dim() and tensor.numel() == len(tensor) == channels:
            kept = without(tensor.detach(), indices, 0)
            setattr(module, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)


def _without_columns(indices: list[int], layer: nn.Module) -> None:
    weight = cast(nn.Parameter, layer.weight)
    layer.weight = nn.Parameter(without(weight.detach(), indices, 1), weight.requires_grad)


def resize_inputs(module: nn.Module, channels: int, *, fresh: bool) -> None:
    """Give a layer another number of input channels, in place: the first ones stay, further ones are zero.

    With ``fresh`` all weights are drawn anew, uniform within ±1/√(fan-in) as torch does, always the same ones.
    """

    def resize(layer: nn.Module) -> None:
        old = cast(nn.Parameter, layer.weight)
        dim = 0 if isinstance(layer, _ConvTransposeNd) else 1
        shape = list(old.shape)
        shape[dim] = channels
        new = old.detach().new_zeros(shape)
        if fresh:
            bound = new.movedim(dim, 0)[:, 0].numel() ** -0.5
            draws = torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
            new.copy_(draws)
        else:
            kept = min(channels, old.shape[dim])
            new.narrow(dim, 0, kept).copy_(old.detach().narrow(dim, 0, kept))
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", channels)

    resize_weight(module, resize)


def prunable_type(module: nn.Module, side: Side | None = None) -> bool:
    """Can this kind of module be shrunk on this side? torch-pruning may know it, or it takes in as a recurrent one.

    A PReLU with one slope for all has nothing to lose.
    """
    if isinstance(module, ChannelMap):
        return True
    if isinstance(module, (RNNBase, RNNCellBase)):
        return side == "in" and bool(input_weights(module))
    return ops.module2type(module) in PrunerBox and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)
