"""Calibrated conversion: firing rates that stand for a ReLU's values.

A neuron without leak, reset by subtraction and driven by x/λ for T steps fires ⌊T·x/λ⌋ spikes for x in [0, λ].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from snncompress.errors import DataError, ModelError
from snncompress.interfaces import Memory
from snncompress.model.modules import tensors_in
from snncompress.model.network import POOLS, WEIGHT_LAYERS, computed_or_shared
from snncompress.running.data import Feed
from snncompress.running.sameness import all_same
from snncompress.structure.fx_graphs import called, operation, trace_forward

from .averaging import warn_of_nonlinear

# Functions that pass a factor on: f(λ·x) = λ·f(x).
_HOMOGENEOUS = {
    "chunk", "contiguous", "flatten", "getitem", "mean", "permute", "reshape", "split", "squeeze", "transpose",
    "unsqueeze", "view",
}  # fmt: skip
_JOINS = {"add", "iadd", "cat", "concat", "concatenate"}
_NOT_DATA = {"size", "dim", "getattr"}


class CalibratedNeuron(nn.Module):
    """y = scale · neuron(gain · x + shift), any shape: spikes whose rate, times λ, is ReLU(x) up to λ = 1/gain.

    The three numbers are buffers, so that a state_dict holds the calibration.

    >>> CalibratedNeuron(nn.ReLU(), 0.5, 0.0, 2.0)(torch.tensor([-1.0, 3.0]))
    tensor([0., 3.])
    """

    gain: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, neuron: nn.Module, gain: float, shift: float, scale: float) -> None:
        super().__init__()
        self.neuron = neuron
        for name, value in (("gain", gain), ("shift", shift), ("scale", scale)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes, of the same shape."""
        spikes: Tensor = self.neuron(x * self.gain + self.shift)
        return spikes * self.scale


class RateMaxPool(nn.Module, Memory):
    """y[t] = max Σ_{s ≤ t} x[s] - max Σ_{s < t} x[s], so that y sums up to the maximum of what x sums up to.

    Ordinary max-pooling passes a spike of any input on, and so answers to the union of their rates. Of spikes this one
    makes spikes, as many as the busiest input had. It has a memory, which the adapter resets with the neurons'
    (in a loop of one's own: ``reset()``).

    >>> pool = RateMaxPool(nn.MaxPool1d(2))
    >>> [pool(torch.tensor([[s]])).item() for s in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0])]  # rates 1/3 and 2/3
    [1.0, 0.0, 1.0]
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self._total: Tensor | None = None

    def reset(self) -> None:
        """Forget all inputs."""
        self._total = None

    def forward(self, x: Tensor) -> Tensor:
        """One timestep, in the shape that the pooling takes."""
        before = self._total if self._total is not None and self._total.shape == x.shape else None
        self._total = x if before is None else before + x
        y: Tensor = self.pool(self._total)
        return y if before is None else y - self.pool(before)


def calibrate(
    model: nn.Module, original: nn.Module, names: list[str], pools: list[str], feed: Feed, percentile: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What each activation's spikes stand for (λ), and the factor that stays behind its neuron: λ or 1.

    ``model`` computes what ``original`` does, with an activation module for each of ``names``, and max-poolings
    ``pools``. λ is the percentile of an activation's values, averaged over batches; 1 where it is never positive.
    Where the factor doesn't stay, the next layer's weights are multiplied by λ, in place.
    """
    unlike = [n for n in names if not isinstance(model.get_submodule(n), (nn.ReLU, nn.ReLU6))]
    if unlike:
        raise ModelError(
            f"{called(model, unlike[0])} has negative values, which a spike rate can't express, so the CNN's function "
            f"can't be kept. Train the CNN with ReLU in its place, or convert without data and train the result."
        )
    x = feed.first().x
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            levels = _levels(model.eval(), names, feed, percentile)
            expected = _run(original.eval(), x)
            if not _agree(_run(model, x), expected):
                raise ModelError(
                    f"{type(original).__name__} computes something else with out-of-place activations in modules of "
                    f"their own. Likely cause: an in-place ReLU whose input is used again, or a forward that torch.fx "
                    f"traces wrongly. Write its activations as nn.ReLU modules, not in place."
                )
            warn_of_nonlinear(model, [*names, *pools], lambda: _run(model, x))
            return _fold(model, levels, lambda: _agree(_run(model, x), expected))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _levels(model: nn.Module, names: list[str], feed: Feed, percentile: float) -> dict[str, float]:
    levels: dict[str, list[float]] = {name: [] for name in names}
    with _hooked(model, {name: _records(found, percentile) for name, found in levels.items()}):
        for number, batch in enumerate(feed, 1):
            feed.check(model, batch)
            _run(model, batch.x)
            often = [name for name, found in levels.items() if len(found) > number]
            if often:
                raise ModelError(
                    f"{called(model, often[0])} runs several times in one pass: as a neuron it would mix what it gets "
                    f"each time. Give each use a module of its own."
                )
    return {name: sum(found) / max(1, len(found)) or 1.0 for name, found in levels.items()}


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _records(levels: list[float], percentile: float) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        values = output.flatten()
        level = values.kthvalue(math.ceil(percentile / 100 * len(values))).values
        levels.append(float(level) or float(values.max()))  # a layer may be silent but for a few

    return hook


def _run(model: nn.Module, x: Any) -> Any:
    try:
        return model(x)
    except Exception as error:  # the model is the user's: anything can come out of it
        raise DataError(
            f"{type(model).__name__} failed on a calibration batch of shape {list(x.shape)}: {type(error).__name__}: "
            f"{error}. Likely cause: data must be what the CNN takes, one batch of static samples at a time."
        ) from error


def _agree(got: Any, expected: Any) -> bool:
    return all_same(*([t for t in tensors_in(output) if t.is_floating_point()] for output in (expected, got)))


def _fold(
    model: nn.Module, own: dict[str, float], unchanged: Callable[[], bool]
) -> tuple[dict[str, float], dict[str, float]]:
    """Move what a spike stands for into the weights of the layers that take spikes: λ, and what stays, per neuron.

    Spikes of several neurons that meet, by concatenation or addition, get one λ, the largest of ``own``. A factor
    stays where spikes reach something else than a weight layer: an addition to currents, say, or the output. The graph
    is not believed: unless ``unchanged()``, all is put back.
    """
    try:
        graph = trace_forward(model, deep=True)[1]
    except Exception:  # the code is the user's; nothing is lost but binary spikes
        return own, dict(own)
    modules = dict(model.named_modules())
    fixed = set(computed_or_shared(model))
    groups = {name: {name} for name in own}
    sources: dict[fx.Node, set[str]] = {}  # of a node's value, where it is nothing but spikes
    takers: dict[str, set[str]] = {}
    stuck: set[str] = set()
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        found = set().union(*(sources.get(n, ()) for n in node.all_input_nodes))
        if node.op == "call_module" and node.target in own:
            sources[node] = {node.target}
            stuck |= found
        elif isinstance(module, WEIGHT_LAYERS):
            if node.target in takers or node.target in fixed:
                stuck |= found | takers.get(node.target, set())
            takers[node.target] = found
        elif _is_homogeneous(module, operation(node)) or _only_spikes_meet(node, sources):
            sources[node] = found
            merged = set().union(*(groups[n] for n in found))
            groups.update(dict.fromkeys(merged, merged))
        elif operation(node) not in _NOT_DATA:
            stuck |= found
    free = {name: not (group & stuck) for name, group in groups.items()}
    levels = {name: max(own[n] for n in groups[name]) if free[name] else own[name] for name in own}
    scales = {name: 1.0 if free[name] else own[name] for name in own}
    weights = {n: modules[n].weight for n, found in takers.items() if found and all(free[f] for f in found)}
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.mul_(levels[min(takers[name])])
    with _hooked(model, {name: _times(scales[name] / levels[name]) for name in own}):
        if unchanged():
            return levels, scales
    for name, weight in weights.items():
        weight.copy_(before[name])
    return own, dict(own)


def _times(factor: float) -> Callable[..., Tensor]:
    return lambda module, args, output: output * factor


def _is_homogeneous(module: nn.Module | None, name: str) -> bool:
    """f(λ·x) = λ·f(x), in eval mode."""
    return (
        name in _HOMOGENEOUS
        or "pool" in name
        or "dropout" in name
        or isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd, *POOLS))
    )


def _only_spikes_meet(node: fx.Node, sources: dict[fx.Node, set[str]]) -> bool:
    """Whether the node adds or concatenates, and spikes alone."""
    name = operation(node)
    if name not in _JOINS or node.kwargs.get("alpha") is not None:
        return False
    parts: Any = node.args if name in ("add", "iadd") else node.args[:1] or node.kwargs.get("tensors")
    parts = parts[0] if len(parts) == 1 else parts
    return all(isinstance(part, fx.Node) and sources.get(part) for part in parts)
