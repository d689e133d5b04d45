"""What a profile doesn't count, by name: products outside convolutions and linear layers, bits that nobody knows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.cells import CellWeight, layer_at
from snncompress.model.weights_in_use import Products, computes_its_weight, weight_in_use


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


@contextmanager
def products_outside(model: nn.Module, layers: Collection[str], neurons: Collection[str]) -> Iterator[list[str]]:
    """Inside, every product of tensors that is neither a layer's nor a neuron's own is noted: "matmul in attn"."""
    notes: list[str] = []
    inside: list[str] = []
    cells = {name.rpartition(".")[0] for name in layers if isinstance(layer_at(model, name), CellWeight)}
    counted = {*layers, *cells}

    def seen(product: str, operands: list[Any]) -> None:
        where = inside[-1] if inside else ""
        if where in neurons or any(name in counted for name in inside):
            return
        note = f"{product.strip('_')} in {where or type(model).__name__}"
        if note not in notes:
            notes.append(note)

    def enter(name: str, *_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(Products(seen))
        yield notes
