"""How much neurons fire in a run, as a part of autograd's graph: what training may match, or punish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter


class Firing:
    """Spikes of a network's neurons, added up over time from :meth:`restart` on.

    Where autograd records, the sums lead back to the weights, by the neurons' surrogate gradients.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, torch.Size], Tensor] = {}
        self._steps: dict[tuple[str, torch.Size], int] = {}

    def restart(self) -> None:
        """Forget what was seen."""
        self._sums.clear()
        self._steps.clear()

    def rates(self) -> dict[str, Tensor]:
        """Neuron → spikes per timestep, [N, C, ...]; without those that are called with several shapes."""
        names = [name for name, _ in self._sums]
        return {k[0]: total / self._steps[k] for k, total in self._sums.items() if names.count(k[0]) == 1}

    def mean(self) -> Tensor | None:
        """Spikes per neuron and timestep, of all neurons together; None where none was called."""
        if not self._sums:
            return None
        count = sum(total.numel() * self._steps[key] for key, total in self._sums.items())
        return torch.stack([total.sum() for total in self._sums.values()]).sum() / count

    def _add(self, name: str, spikes: Tensor, _: Tensor | None) -> None:
        key = name, spikes.shape[1:]
        total = spikes.sum(0, dtype=torch.promote_types(spikes.dtype, torch.float32))
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._steps[key] = self._steps.get(key, 0) + len(spikes)


@contextmanager
def watched(model: nn.Module, adapter: Adapter) -> Iterator[Firing]:
    """Inside, what neurons fire is added up. Raises ModelError for neurons whose spikes can't be read."""
    firing = Firing()
    with ExitStack() as stack:
        for name, neuron in adapter.neurons(model).items():
            stack.callback(adapter.observe(neuron, partial(firing._add, name), membrane=False))
        yield firing
