"""Whether what lies between a CNN's activations keeps averages over time, as rates need it to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import NonlinearWarning
from snncompress.model.chance import seeded
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.running.sameness import all_same
from snncompress.structure.fx_graphs import called

Read = dict[str, list[Tensor]]


def warn_of_nonlinear(model: nn.Module, sources: Iterable[str], run: Callable[[], Any]) -> None:
    """Warn of the first layer or neuron that doesn't read a weighted sum of what activations put out.

        g((a + b) / 2) = (g(a) + g(b)) / 2

    for all that lies between ``sources``, activations and max-poolings, and what reads them; with random a and b in
    the place of what they put out. Behind the last layer anything may come, such as a softmax.
    """
    names = list(sources)
    made: dict[str, Tensor] = {}
    _heard(model, run, {name: partial(made.__setitem__, name) for name in names})
    with seeded(model):
        low, high = ({name: torch.rand_like(y) * y.abs().amax() for name, y in made.items()} for _ in range(2))
    middle = {name: (low[name] + high[name]) / 2 for name in made}
    reads = [_heard(model, run, {name: partial(_first, y) for name, y in put.items()}) for put in (low, high, middle)]
    for name, found in reads[2].items():
        wanted = [(a + b) / 2 for a, b in zip(reads[0][name], reads[1][name], strict=True)]
        if not all_same(wanted, found):
            warnings.warn(
                f"What {called(model, name)} reads isn't a weighted sum of what activations put out, so spikes over "
                f"time don't come to what the CNN computes there. Likely causes: a clamp, a maximum, a product or a "
                f"normalization in the forward. Make activations nn.ReLU, norms batch norms, or train the result.",
                NonlinearWarning,
                stacklevel=5,
            )
            return


def _first(y: Tensor, made: Tensor) -> Tensor:
    return y


def _heard(model: nn.Module, run: Callable[[], Any], put: Mapping[str, Callable[[Tensor], Any]]) -> Read:
    """What activations and weight layers read, in the order of their calls; ``put`` replaces what some put out."""
    read: Read = {}

    def note(name: str, module: nn.Module, args: Any) -> None:
        read.setdefault(name, []).extend(x.clone() for x in args[:1])

    def replace(name: str, module: nn.Module, args: Any, output: Tensor) -> Any:
        return put[name](output)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in put or isinstance(module, WEIGHT_LAYERS):
                stack.callback(module.register_forward_pre_hook(partial(note, name)).remove)
            if name in put:
                stack.callback(module.register_forward_hook(partial(replace, name)).remove)
        run()
    return read
