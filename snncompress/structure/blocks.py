"""Whole blocks of layers: which parts of a network can be passed by, found by structure or named by the user."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter
from snncompress.model.copying import plain_copy
from snncompress.model.network import WEIGHT_LAYERS, Network, width
from snncompress.running.data import Run
from snncompress.running.sameness import wire

Blocks = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
"""Names or globs of modules, a predicate ``(name, module) -> bool``, or None for what is found by structure."""


@dataclass(frozen=True)
class Block:
    """A module that can be replaced by a wire.

    ``kind`` is "fire" (one layer squeezes, others expand side by side and are concatenated), "residual" (the input
    plus something) or "named". It turns ``channels_in`` into ``channels_out``; ``consumers`` are the weight layers
    that read its output, whose width must be mended where the two differ.
    """

    name: str
    kind: str
    channels_in: int
    channels_out: int
    consumers: tuple[str, ...]


def find_blocks(
    model: nn.Module, adapter: Adapter, run: Run, network: Network, blocks: Blocks = None
) -> tuple[Block, ...]:
    """The blocks in order of execution.

    Raises OptionError where a name matches no module, ModelError where a named module can't be passed by.
    """
    copy = plain_copy(model, adapter)
    calls = _Calls(copy, adapter, run)
    named = _named(copy, blocks)
    found = []
    for name in calls.order if named is None else [n for n in calls.order if n in named]:
        kind = _kind(name, copy, network, calls) if named is None else "named"
        if kind and named is not None and name in calls.refusals:
            raise ModelError(f"Block {name!r} can't be removed: {calls.refusals[name]}.")
        if kind and name not in calls.refusals:
            found.append(Block(name, kind, *calls.widths[name], _consumers(name, network)))
    if named is not None and (unused := sorted(named - set(calls.order))):
        raise ModelError(
            f"Block {unused[0]!r} can't be removed: it holds no weight layer, or isn't called on this input."
        )
    inner = {b.name for b in found if not any(o.name.startswith(f"{b.name}.") for o in found)}
    return tuple(b for b in found if named is not None or b.name in inner)


class _Calls:
    """What goes in and out of every module that holds weight layers, with neurons as wires."""

    def __init__(self, copy: nn.Module, adapter: Adapter, run: Run) -> None:
        self.widths: dict[str, tuple[int, int]] = {}
        self.wires: set[str] = set()
        """Modules that put out their input where their layers put out nothing: a wire plus something."""
        self.refusals: dict[str, str] = {}
        """Why a module can't be replaced by a wire."""
        self.order: list[str] = []
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(adapter.identities(copy, wire))
            for name, module in copy.named_modules():
                if name and _layers(module):
                    stack.callback(module.register_forward_hook(partial(self._note, name), with_kwargs=True).remove)
            run(copy)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in self.order:
            return  # what it does in the first timestep, it does in all
        self.order.append(name)
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            self.refusals[name] = "it doesn't turn one tensor into one tensor"
            return
        x = inputs[0]
        axis = 1 - _layers(module)[0].weight.dim()  # of channels: -3 in [N, C, H, W], -1 in [N, C]
        if _elsewhere(x, axis) != _elsewhere(output, axis):
            self.refusals[name] = f"it turns {list(x.shape)} into {list(output.shape)}, which no wire can"
            return
        self.widths[name] = x.shape[axis], output.shape[axis]
        with _silent(module):
            if torch.equal(module.forward(x), x):
                self.wires.add(name)


def _elsewhere(x: Tensor, axis: int) -> list[int]:
    shape = list(x.shape)
    return shape[:axis] + shape[axis:][1:] if x.dim() >= -axis else [-1]


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Inside, weights, biases and batch norms are all zero."""
    changed = [
        parameter
        for m in module.modules()
        if isinstance(m, (*WEIGHT_LAYERS, _BatchNorm))
        for parameter in m.parameters(recurse=False)
    ]
    before = [parameter.data for parameter in changed]
    for parameter in changed:
        parameter.data = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, data in zip(changed, before, strict=True):
            parameter.data = data


def _layers(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if m is not module and isinstance(m, WEIGHT_LAYERS)]


def _kind(name: str, copy: nn.Module, network: Network, calls: _Calls) -> str:
    layers = [n for n in network.layers if n.startswith(f"{name}.")]
    if layers and name in calls.wires:
        return "residual"
    if len(layers) < 3 or name not in calls.widths:
        return ""
    squeeze, *expands = layers
    parallel = all(network.producers[e] == (squeeze,) for e in expands)
    total = sum(width(copy.get_submodule(e), "out") for e in expands)
    return "fire" if parallel and total == calls.widths[name][1] else ""


def _consumers(name: str, network: Network) -> tuple[str, ...]:
    inside = {n for n in network.layers if n.startswith(f"{name}.")}
    return tuple(n for n in network.layers if n not in inside and inside & set(network.producers[n]))


def _named(model: nn.Module, blocks: Blocks) -> set[str] | None:
    if blocks is None:
        return None
    modules = {n: m for n, m in model.named_modules() if n}
    if callable(blocks):
        return {n for n, m in modules.items() if blocks(n, m)}
    found: set[str] = set()
    for pattern in [blocks] if isinstance(blocks, str) else blocks:
        matches = {n for n in modules if n == pattern} or {n for n in modules if fnmatch.fnmatchcase(n, pattern)}
        if not matches:
            raise OptionError(f"blocks: {pattern!r} matches no module. The model's: {', '.join(modules)}.")
        found |= matches
    return found
