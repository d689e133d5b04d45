"""Random numbers in the place of a network's parameters, for trials: two networks that agree on them agree on all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.network import NORMS, WEIGHT_LAYERS
from snncompress.model.parametrizations import computed_weight

_NUMBERS = 1_000_003  # drawn for a tensor, and then repeated: a prime, so no two of its rows begin with the same


def randomize(model: nn.Module, adapter: Adapter, generator: torch.Generator) -> None:
    """Other parameters, so that none is 0 by chance or by its initialization; what neurons hold stays."""

    def between(low: float, high: float, like: Tensor) -> Tensor:
        return torch.empty(min(like.numel(), _NUMBERS)).uniform_(low, high, generator=generator)

    def all_between(low: float, high: float, like: Tensor) -> Tensor:
        made = torch.empty_like(like)
        _fill(made, between(low, high, like))
        return made

    done = {p for neuron in adapter.neurons(model).values() for p in neuron.parameters()}
    for module in model.modules():
        if isinstance(module, WEIGHT_LAYERS) and not computed_weight(module):
            bounds = {"weight": (3 / module.weight[0].numel()) ** 0.5, "bias": 0.1}
            new = {n: between(-b, b, t) for n, b in bounds.items() if (t := getattr(module, n)) is not None}
        elif isinstance(module, (*NORMS, nn.LayerNorm)):
            offsets = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            new = {n: between(o, o + 0.3, t) for n, o in offsets.items() if (t := getattr(module, n, None)) is not None}
        else:
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
            new = {n: p * all_between(1, 1.3, p) + all_between(0, 0.03, p) for n, p in own.items()}
        for name, values in new.items():
            tensor = getattr(module, name)
            if tensor not in done:
                _fill(tensor.data, values)
                done.add(tensor)


def _fill(tensor: Tensor, numbers: Tensor) -> None:
    """Write the numbers into the tensor, in order and again and again."""
    flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)
    numbers = numbers.detach().flatten()
    for part in torch.split(flat, max(1, len(numbers))):
        part.copy_(numbers[: len(part)])
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))
