"""Do two networks compute the same? They are run with every neuron a wire, so that no threshold hides a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.chance import seeded
from snncompress.model.modules import tensors_in

from .data import Run

Channels = tuple[Tensor, int]
"""Indices, and the axis on which they stand, counted from the end."""
NOTHING: Mapping[nn.Module, Channels] = MappingProxyType({})


def wire(neuron: nn.Module, x: Tensor) -> Tensor:
    """Stands in for a neuron: its input, in a tensor of its own."""
    return x * 1.0


def wired_outputs(
    model: nn.Module, adapter: Adapter, run: Run, silent: Mapping[nn.Module, Channels] = NOTHING
) -> list[Tensor]:
    """The floating-point tensors of the output, the channels ``silent`` of some neurons being 0.

    Noise inside the model is the same in every call.
    """

    def silenced(neuron: nn.Module, x: Tensor) -> Tensor:
        if neuron not in silent:
            return wire(neuron, x)
        indices, axis = silent[neuron]
        return x.index_fill(axis, indices.to(x.device), 0.0)

    with seeded(model), adapter.identities(model, silenced):
        return [t for t in tensors_in(run(model)) if t.is_floating_point()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in sums of another order: of the largest value 3.5e-4 in float32, 1.5e-8 in float64.

    NaN is never the same as anything.

    >>> same(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0001])), same(torch.ones(2), torch.tensor([1.0, 1.01]))
    (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    slack = torch.finfo(a.dtype).eps ** 0.5 * a.abs().amax()
    return bool((a - b).abs().amax() <= slack)


def all_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """:func:`same`, tensor by tensor; of another number of tensors False."""
    return len(a) == len(b) and all(map(same, a, b))
