"""Which batch norms can be folded into the layers before them."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.errors import DataError
from snncompress.interfaces import Adapter
from snncompress.model.copying import private_copy
from snncompress.model.edits.norms import fold_norm
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import computed_weight
from snncompress.running.data import Run
from snncompress.running.sameness import all_same, wire, wired_outputs


def foldable(model: nn.Module, adapter: Adapter, run: Run) -> list[tuple[str, str]]:
    """(layer, batch norm) of a model with plain weights, in eval mode: what can be folded, tried on copies.

    All at once if the outputs stay, else one by one.
    """
    probe = private_copy(model, adapter)
    pairs = _pairs(probe, adapter, run)
    with torch.no_grad():
        _randomize([probe.get_submodule(norm) for _, norm in pairs])
        expected = wired_outputs(probe, adapter, run)

    def stays(folds: list[tuple[str, str]]) -> bool:
        trial = private_copy(probe, adapter)
        try:
            with torch.no_grad():
                for fold in folds:
                    fold_norm(trial, *fold)
                found = wired_outputs(trial, adapter, run)
        except (RuntimeError, DataError):  # of a norm over another axis than the layer's channels
            return False
        return all_same(expected, found)

    return pairs if stays(pairs) else [fold for fold in pairs if stays([fold])]


def _pairs(model: nn.Module, adapter: Adapter, run: Run) -> list[tuple[str, str]]:
    """(layer, batch norm): the norm gets the layer's output, and nothing else, each time it is called."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no identity is used twice
    calls: Counter[str] = Counter()
    sources: dict[str, list[str]] = defaultdict(list)

    def made_by(name: str, module: nn.Module, args: Any, output: Any) -> None:
        made[id(output)] = name, output
        calls[name] += 1

    def taken_by(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        sources[name].append(made.get(id(args[0]), ("", args[0]))[0] if args else "")

    with ExitStack() as stack:
        stack.enter_context(adapter.identities(model, wire))
        for name, module in model.named_modules():
            if isinstance(module, WEIGHT_LAYERS) and not computed_weight(module):
                stack.callback(module.register_forward_hook(partial(made_by, name)).remove)
            elif isinstance(module, _BatchNorm) and module.running_var is not None:
                stack.callback(module.register_forward_pre_hook(partial(taken_by, name)).remove)
        run(model)
    norms = Counter(source for found in sources.values() for source in set(found))
    return [
        (found[0], norm)
        for norm, found in sources.items()
        if set(found) == {found[0]} and found[0] and len(found) == calls[found[0]] and norms[found[0]] == 1
    ]


def _randomize(norms: list[Any]) -> None:
    """A norm that has learned nothing yet would hide a wrong fold."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        tensors = ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5))
        for tensor, low in tensors:
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
