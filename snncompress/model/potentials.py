"""The membrane potential of a neuron that nobody knows: what it compares to decide whether it fires."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .modules import patched

_ABOVE = frozenset({"gt", "ge", "greater", "greater_equal", "__gt__", "__ge__", "heaviside", "gt_", "ge_"})
_BELOW = frozenset({"lt", "le", "less", "less_equal", "__lt__", "__le__"})
_DIFFERENCES = frozenset({"sub", "subtract", "__sub__", "sub_"})


class _Comparisons(TorchFunctionMode):
    """Notes (result, what was compared) of every comparison inside; of Ũ - θ > 0 it notes Ũ."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._minuends: dict[int, tuple[Tensor, Tensor]] = {}  # results are held, so that no identity is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, operands = getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()]
        if name in _DIFFERENCES and isinstance(operands[0], Tensor):
            self._minuends[id(result)] = result, operands[0].detach().clone()
        elif name in _ABOVE or name in _BELOW:
            compared = operands[0 if name in _ABOVE else 1]
            if isinstance(compared, Tensor) and compared.shape == result.shape:
                found = self._minuends.get(id(compared), (None, compared.detach().clone()))[1]
                self.seen.append((result.detach().clone(), found if found.shape == result.shape else compared.detach()))
        return result


def watch_potential(
    neuron: nn.Module, time_dim: int | None, show: Callable[[Tensor, Tensor], None], refuse: Callable[[], Exception]
) -> AbstractContextManager[None]:
    """Inside, ``show(spikes, Ũ)`` is called at every call of the neuron, each [T', N, C, ...].

    Spikes must be what came of the comparisons, one for each timestep: else ``refuse()`` is raised.
    """
    forward = neuron.forward

    def call(*args: Any, **named: Any) -> Any:
        with _Comparisons() as comparisons:
            output = forward(*args, **named)
        made = (output[0] if isinstance(output, (tuple, list)) else output).detach()
        spikes = made.unsqueeze(0) if time_dim is None else made.movedim(time_dim, 0)
        for result, potential in comparisons.seen:
            if time_dim is not None and result.shape == made.shape and torch.equal(result != 0, made != 0):
                show(spikes, potential.movedim(time_dim, 0))  # all timesteps were compared at once
                return output
        steps = [pair for pair in comparisons.seen if pair[0].shape == spikes.shape[1:]]
        each = len(steps) // len(spikes)
        for first in range(each if len(steps) == each * len(spikes) else 0):
            results, potentials = (torch.stack(parts) for parts in zip(*steps[first::each], strict=True))
            if torch.equal(results != 0, spikes != 0):
                show(spikes, potentials)
                return output
        raise refuse()

    return patched(neuron, "forward", call)
