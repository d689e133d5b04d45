"""An independent check of mask equivalence: the original network with the removed channels' spikes forced to zero."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from snncompress_rescaw import ReScaW
from torch import Tensor, nn

import snncompress
from snncompress.model.copying import private_copy
from snncompress.model.edits import RemoveChannels
from snncompress.model.modules import tensors_in
from snncompress.model.network import channel_axis
from snncompress.running.data import Feed

PAPER = ReScaW(gamma="l1_mean", per_channel=False)  # one grid per layer, as QP-SNN trains


def silenced(model: nn.Module, plan: snncompress.Plan, feed: Feed, readers: Collection[str] = ()) -> nn.Module:
    """A copy whose neurons output 0 wherever the plan removes a channel.

    ``readers`` are layers that read a stream of currents without a neuron between: they take in 0 there.
    """
    copy = private_copy(model, feed.adapter)
    left: dict[str, list[int]] = {}
    axes: dict[str, int] = {}
    gone: dict[str, list[int]] = {}
    for edit in plan.edits:
        if not isinstance(edit, RemoveChannels):
            continue
        for piece in edit.slices:
            if piece.side == "neuron" or (piece.side == "in" and piece.module in readers):
                # by bookkeeping of what is left, not by the plan's own arithmetic
                alive = left.setdefault(piece.module, list(range(10_000)))
                removed = {alive[i] for i in piece.indices}
                gone.setdefault(piece.module, []).extend(removed)
                left[piece.module] = [i for i in alive if i not in removed]
                axes[piece.module] = piece.axis
    for name, indices in gone.items():
        module, where = copy.get_submodule(name), torch.tensor(indices)
        if name in readers:
            module.register_forward_pre_hook(_muter(where, channel_axis(module)))
        else:
            module.register_forward_hook(_silencer(where, axes[name]))
    return copy


def _muter(indices: Tensor, axis: int) -> Any:
    return lambda _, args: args[0].index_fill(axis, indices, 0.0)


def _silencer(indices: Tensor, axis: int) -> Any:
    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        spikes = output[0] if isinstance(output, tuple) else output
        spikes = spikes.index_fill(axis, indices.to(spikes.device), 0.0)
        if hasattr(module, "spk"):  # snnTorch's recurrent neurons feed their own spikes back
            module.spk = spikes
        return (spikes, *output[1:]) if isinstance(output, tuple) else spikes

    return hook


def outputs(model: nn.Module, feed: Feed) -> list[Tensor]:
    """All tensors that the model returns on the feed's first batch."""
    with torch.no_grad():
        result = [t.clone() for t in tensors_in(feed(model, feed.first()))]
    feed.adapter.reset(model)
    return result


def largest_difference(model: nn.Module, compressed: nn.Module, feed: Feed, readers: Collection[str] = ()) -> float:
    """Of any output at any timestep, between the compressed model and the silenced original."""
    expected = outputs(silenced(model, snncompress.plan_of(compressed), feed, readers), feed)
    got = outputs(compressed, feed)
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a user's model that must stay bitwise as it was."""
    return {
        "tensors": {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "ids": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "flags": {k: m.training for k, m in model.named_modules()},
        "types": {k: type(m) for k, m in model.named_modules()},
        "hooks": {k: list(m._forward_hooks.values()) for k, m in model.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "memories": {k: dict(getattr(m, "_memories", {})) for k, m in model.named_modules()},
        "rng": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Are two snapshots bitwise equal?"""
    return _equal(before, after)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b)
