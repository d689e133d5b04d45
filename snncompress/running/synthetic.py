"""A synthetic calibration batch for a model that comes without data: the input shape is found by trying."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import DataError, SyntheticDataWarning
from snncompress.interfaces import Adapter, Forward
from snncompress.model.cells import layer_at
from snncompress.model.network import weight_layers

from .data import Feed

_TIMESTEPS = 4
_PROBE = 5  # samples while probing: a number that is neither T nor a usual width
_SAMPLES = 8
_COMMON_SIZES = {1: (28, 32), 2: (34, 128, 32), 3: (32, 224, 64)}  # by input channels: MNIST, event data, RGB


def synthetic_feed(
    model: nn.Module, adapter: Adapter, timesteps: int | None, forward: Forward | None, needs_labels: str
) -> Feed:
    """A batch of uniform noise in [0, 1) of a shape that the model takes.

    Raises DataError where noise can't do: labels are needed, the model is run by ``forward``, or no shape fits.
    """
    remedy = "Pass data=…, a batch or a DataLoader."
    if needs_labels:
        raise DataError(f"Without data there are no labels, and {needs_labels}. {remedy}")
    if forward is not None:
        raise DataError(f"forward= needs data to be called with. {remedy}")
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    probe = copy.deepcopy(model).eval()
    refusal = ""
    for shape in _shapes(model):
        for steps in (timesteps,) if timesteps is not None else (_TIMESTEPS, None):
            sample = torch.zeros(_PROBE, *shape, dtype=parameter.dtype, device=parameter.device)
            refused = _refusal(probe, adapter, sample, steps)
            refusal = refusal or refused
            if not refused:
                x = torch.rand(_SAMPLES, *shape, dtype=parameter.dtype, device=parameter.device)
                fed = f"fed as constant current for T = {steps}" if steps else "fed as it is"
                warnings.warn(
                    f"No calibration data: scores come from {_SAMPLES} synthetic samples of shape {list(shape)} "
                    f"(uniform noise, {fed}). Real data will score better: pass data=…",
                    SyntheticDataWarning,
                    stacklevel=6,  # the call of the user: past the bench
                )
                return Feed(adapter, x, steps)
    raise DataError(
        f"No input shape could be found that {type(model).__name__} takes; the first try ended with {refusal}. {remedy}"
    )


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    layer: Any = layer_at(model, weight_layers(model)[0])
    if isinstance(layer, nn.Linear):
        yield (layer.in_features,)
        return
    channels, dims = layer.in_channels, layer.weight.dim() - 2
    common = _COMMON_SIZES.get(channels, (32,))
    for size in (*common, *(s for s in range(1, 257) if s not in common)):
        yield (channels, *[size] * dims)


def _refusal(model: nn.Module, adapter: Adapter, x: Tensor, timesteps: int | None) -> str:
    """Why the batch doesn't go through with every neuron seeing one row per sample; empty if it does."""
    rows: set[int] = set()

    def wire(neuron: nn.Module, current: Tensor) -> Tensor:
        rows.add(len(current) if current.dim() > 1 else 0)
        return current * 1.0

    adapter.reset(model)
    try:
        with torch.no_grad(), adapter.identities(model, wire):
            adapter.run(model, x, timesteps)
    except Exception as error:  # the model is the user's: anything can come out of it
        return f"{type(error).__name__}: {error}"
    if not adapter.neurons(model):  # an ordinary network
        return ""
    return "" if rows == {_PROBE} else f"neurons that saw {sorted(rows)} rows for {_PROBE} samples"
