"""What a profile doesn't count, by name: bits and zeros that nobody knows."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.cells import layer_at
from snncompress.model.weights_in_use import computes_its_weight, weight_in_use


def unknown_weights(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Of layers that compute their weight in forward, what isn't known."""
    notes = []
    for name in layers:
        module = layer_at(model, name)
        if not computes_its_weight(module) or brevitas_bits(module) is not None:
            continue
        what = "bits" if weight_in_use(module) is not None else "zeros and bits"
        notes.append(f"{what} of the weight that {name or 'the model'} ({type(module).__name__}) computes")
    return notes
