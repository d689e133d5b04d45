"""Neurons that no adapter knows, seen by what they do: spikes come out where none went in, behind a weight layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from snncompress.contract.detection import HOW_TO_NAME, described, neuron_like
from snncompress.errors import UnknownNeuronsWarning
from snncompress.interfaces import Adapter
from snncompress.model.modules import tensors_in
from snncompress.model.network import WEIGHT_LAYERS

_KNOWN_PACKAGES = ("torch", "spikingjelly", "snntorch", "brevitas")


@contextmanager
def unknown_neurons(model: nn.Module, adapter: Adapter) -> Iterator[dict[str, str]]:
    """Inside, while the model runs, modules that fire and that the adapter doesn't know are noted: name → class.

    In a network in which no neuron is known, also weight layers that get spikes, "the input of 'fc'" → class: what
    fires may be a line of code.
    """
    found: dict[str, str] = {}
    known = adapter.neurons(model)
    behind = {"layers": 0}

    def watch(name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        taken, made = next(tensors_in([args, named]), None), next(tensors_in(output), None)
        if behind["layers"] and made is not None and fires(made) and not (taken is not None and fires(taken)):
            found[name] = type(module).__name__

    def count(name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        taken = next(tensors_in([args, named]), None)
        if behind["layers"] and not known and not found and taken is not None and fires(taken):
            found[f"the input of {name}"] = type(module).__name__
        behind["layers"] += 1

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, WEIGHT_LAYERS):
                hook = partial(count, name)
            elif name and _may_be_one(name, module, known):
                hook = partial(watch, name)
            else:
                continue
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield found
    for name in [n for n in found if any(other.startswith(f"{n}.") for other in found)]:
        del found[name]  # what holds one fires too
    if not found and not known:
        found.update(neuron_like(model))


def warn_of_unknown(model: nn.Module, unknown: Mapping[str, str], adapter: Adapter, *, stacklevel: int) -> None:
    """Name them, and what follows from it."""
    if not unknown:
        return
    what = "is taken for an ordinary network" if not adapter.neurons(model) else "is known in part"
    warnings.warn(
        f"{described(unknown)} put out spikes, or go by the name of neurons, and no adapter knows them: this "
        f"{type(model).__name__} {what}. Operations behind them may be priced as multiplications, and the layers that "
        f"drive them stay whole. {HOW_TO_NAME}",
        UnknownNeuronsWarning,
        stacklevel=stacklevel,
    )


def fires(x: Tensor) -> bool:
    """Whether a tensor of floats holds nothing but 0 and 1, and both."""
    return x.is_floating_point() and bool(((x == 0) | (x == 1)).all()) and bool(x.any()) and not bool(x.all())


def _may_be_one(name: str, module: nn.Module, known: Mapping[str, nn.Module]) -> bool:
    return (
        type(module).__module__.partition(".")[0] not in _KNOWN_PACKAGES
        and not any(name == n or n.startswith(f"{name}.") or name.startswith(f"{n}.") for n in known)
        and not any(isinstance(part, WEIGHT_LAYERS) for part in module.modules())
    )
