"""Tests what tracing concluded, before anything is removed for good.

Two networks that agree at a random point of their parameter space agree everywhere, almost surely. So a copy gets
random parameters, a random half of each group's channels is (a) silenced at the neurons, (b) removed, and the outputs
must agree. Neurons are identities here: no threshold can hide or exaggerate a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.interfaces import Adapter
from snncompress.model.copying import private_copy
from snncompress.model.edits import RemoveChannels
from snncompress.model.network import WEIGHT_LAYERS, ChannelGroup, Network, without
from snncompress.model.parametrizations import computed_weight
from snncompress.running.data import Run
from snncompress.running.sameness import same, wired_outputs


def leave_out_what_breaks(network: Network, model: nn.Module, adapter: Adapter, run: Run) -> None:
    """Drop every group whose removal differs from silencing its neurons; ``network.skipped`` says so.

    ``model`` is a copy for this purpose: its parameters are overwritten.

    All groups are tried together first; only if that fails is each tried alone, and then the sound ones together.
    """
    if not network.groups:
        return
    generator = torch.Generator().manual_seed(0)
    _randomize(model, generator)
    removals = [_random_half(group, generator) for group in network.groups]
    pairs = list(zip(network.groups, removals, strict=True))
    with torch.no_grad():
        if _difference(model, adapter, run, pairs) is None:
            return
        sound = []
        for group, removed in pairs:
            why = _difference(model, adapter, run, [(group, removed)])
            if why is None:
                sound.append((group, removed))
            else:
                network.skipped.update({n: why for n in group.names("out") if n in network.layers})
        why = _difference(model, adapter, run, sound) if sound else None
    if why is not None:  # sound one by one, not together: nothing is safe
        network.skipped.update({n: why for group, _ in sound for n in group.names("out") if n in network.layers})
        sound = []
    network.groups = [group for group, _ in sound]


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    def uniform(tensor: Tensor, bound: float) -> None:
        tensor.data.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    for module in model.modules():
        if isinstance(module, WEIGHT_LAYERS) and not computed_weight(module):
            fan_in = module.weight[0].numel()
            uniform(module.weight, (3 / fan_in) ** 0.5)
            if module.bias is not None:
                uniform(module.bias, 0.1)
        elif isinstance(module, _BatchNorm):
            for name, offset in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                tensor = getattr(module, name)
                if tensor is not None:
                    tensor.data.copy_(offset + 0.3 * torch.rand(tensor.shape, generator=generator))


def _random_half(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    local = group.size // group.runs
    some = torch.randperm(local, generator=generator)[: max(1, local // 2)].sort().values
    return (some + torch.arange(group.runs)[:, None] * local).flatten()


def _difference(model: nn.Module, adapter: Adapter, run: Run, pairs: list[tuple[ChannelGroup, Tensor]]) -> str | None:
    masks: dict[nn.Module, Tensor] = {}
    for group, removed in pairs:
        for member in group.members:
            indices = member.index[removed].flatten()
            if member.side == "neuron":
                neuron = model.get_submodule(member.module)
                masks[neuron] = torch.cat([masks[neuron], indices]) if neuron in masks else indices
    try:
        pruned = private_copy(model, adapter)
        groups = [group for group, _ in pairs]
        for number, (_, removed) in enumerate(pairs):
            RemoveChannels.of(pruned, groups[number], removed).apply(pruned, adapter)
            groups = without(groups, number, removed)
        wanted = wired_outputs(model, adapter, run, masks)
        got = wired_outputs(pruned, adapter, run)
    except Exception as error:  # whatever goes wrong on the trial copy would go wrong on the user's model
        cause = error.__cause__ or error
        return f"its channels can't be removed safely: a trial on a copy failed ({type(cause).__name__}: {cause})"
    for a, b in zip(wanted, got, strict=True):
        if a.shape != b.shape:
            return f"removing its channels would change the output's shape from {list(a.shape)} to {list(b.shape)}"
        if not same(a, b):
            return "removing its channels is not the same as silencing its neurons (something adds to silent channels)"
    return None
