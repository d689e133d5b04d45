"""What a pruned network must compute, found without the library: the original with the removed channels silenced.

Of the library only the plan's text is read. Spikes of removed channels are forced to 0. Where layers write into a
stream that no neuron closes, what reads it takes in 0 instead: a reader's channel is fed so if it changes with what the
layers put out while every neuron, and every other layer but depthwise convolutions, puts out the same. Only a neuron
object of several shapes, none of whose own channels goes, is a wire then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .networks import Case
from .own import OwnFire

LAYERS = (_ConvNd, nn.Linear)
TOLERANCE = 1e-8
"""Of float64 sums whose order changes with the width, as a share of the largest number."""


@dataclass
class Removed:
    """What one or more edits take: module → channels as they were in the original, and where neurons have them."""

    outs: dict[str, set[int]] = field(default_factory=dict)
    ins: dict[str, set[int]] = field(default_factory=dict)
    neurons: dict[str, set[int]] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


def removed_by(edits: list[dict[str, Any]]) -> list[Removed]:
    """Of each edit of a plan's JSON that removes channels; indices there count what earlier edits have left."""
    left: dict[tuple[str, str], list[int]] = {}
    found = []
    for edit in edits:
        if edit["edit"] != "remove_channels":
            continue
        one = Removed()
        for piece in edit["slices"]:
            name, side = piece["module"], piece["side"]
            alive = left.setdefault((name, side), list(range(piece["width"])))
            gone = {alive[i] for i in piece["indices"]}
            left[name, side] = [i for i in alive if i not in gone]
            {"out": one.outs, "in": one.ins, "neuron": one.neurons}[side][name] = gone
            if side == "neuron":
                one.axes[name] = piece["axis"]
        found.append(one)
    return found


def silenced(case: Case, edits: list[dict[str, Any]]) -> nn.Module:
    """A copy of the case's network in which nothing comes out of what the edits remove."""
    model = copy.deepcopy(case.model)
    removed = removed_by(edits)
    direct = _Replay(case, {name for one in removed for name in one.neurons})
    silent: dict[str, set[int]] = {}
    axes: dict[str, int] = {}
    unread: dict[str, set[int]] = {}
    for one in removed:
        axes.update(one.axes)
        for name, gone in one.neurons.items():
            silent.setdefault(name, set()).update(gone)
        reads = {name: gone for name, gone in one.ins.items() if isinstance(model.get_submodule(name), LAYERS)}
        for name, fed in direct.readers(one.outs, reads).items():
            if fed & one.ins[name]:
                unread.setdefault(name, set()).update(fed & one.ins[name])
    for name, gone in silent.items():
        model.get_submodule(name).register_forward_hook(_silence(sorted(gone), axes[name]))
    for name, gone in unread.items():
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(_unread(sorted(gone), 1 - layer.weight.dim()))
    return model


def _silence(gone: list[int], axis: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        spikes = result[0] if isinstance(result, tuple) else result
        spikes = spikes.index_fill(axis, torch.tensor(gone), 0.0)
        if hasattr(module, "spk"):  # snnTorch's recurrent neurons feed their own spikes back
            module.spk = spikes
        return (spikes, *result[1:]) if isinstance(result, tuple) else spikes

    return hook


def _unread(gone: list[int], axis: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        return args[0].index_fill(axis, torch.tensor(gone, dtype=torch.long), 0.0), *args[1:]

    return hook


class _Replay:
    """Runs the original with random numbers in place of all that neurons and layers put out, the same in every run."""

    def __init__(self, case: Case, cut: set[str]) -> None:
        self.case = case
        self.neurons = [name for name, shapes in _shapes(case).items() if name in cut or len(shapes) < 2]
        self.leaves: dict[tuple[str, int], Tensor] = {}
        self.inputs: dict[str, list[Tensor]] | None = None

    def readers(self, writers: dict[str, set[int]], readers: dict[str, set[int]]) -> dict[str, set[int]]:
        """Reader → those of its input channels that writers make with no neuron or other layer between."""
        if not readers:
            return {}
        if self.inputs is None:
            self.inputs = self._inputs(frozenset())
        now = self._inputs(frozenset(writers))
        found: dict[str, set[int]] = {}
        for name in readers:
            axis = 1 - self.case.model.get_submodule(name).weight.dim()
            for a, b in zip(self.inputs.get(name, []), now.get(name, []), strict=True):
                other = (a != b).movedim(axis, 0).flatten(1).any(1)
                found.setdefault(name, set()).update(other.nonzero().flatten().tolist())
        return found

    def _inputs(self, writers: frozenset[str]) -> dict[str, list[Tensor]]:
        """What layers take in where ``writers`` put out something else."""
        model = copy.deepcopy(self.case.model)
        neurons = self.neurons
        seen: dict[str, list[Tensor]] = {}
        calls: dict[str, int] = {}
        drawn = torch.Generator().manual_seed(0)

        def hook(name: str) -> Callable[..., Any]:
            def replay(module: nn.Module, args: Any, result: Any) -> Any:
                y = result[0] if isinstance(result, tuple) else result
                number = calls[name] = calls.get(name, -1) + 1
                if name not in neurons:
                    seen.setdefault(name, []).append(args[0].clone())
                leaf = self.leaves.setdefault((name, number), 0.2 + 0.6 * torch.rand_like(y))
                # drawn anew, since norms and rounding may hide a small change
                y = 3 * torch.rand(y.shape, generator=drawn).to(y) if name in writers else leaf.clone()
                return (y, *result[1:]) if isinstance(result, tuple) else y

            return replay

        everyone = neurons_of(model)
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{n}.") for n in everyone)
            if name in everyone and name not in neurons:
                module.register_forward_hook(_wire)
            elif name in neurons or (isinstance(module, LAYERS) and not inside and not passes_on(module)):
                module.register_forward_hook(hook(name))
        self.case.run(model)
        return seen


def _wire(module: nn.Module, args: Any, result: Any) -> Any:
    return (args[0], *result[1:]) if isinstance(result, tuple) else args[0]


def _shapes(case: Case) -> dict[str, set[tuple[int, ...]]]:
    """Neuron → the shapes of what it is called with."""
    model = copy.deepcopy(case.model)
    found: dict[str, set[tuple[int, ...]]] = {}
    for name in neurons_of(model):
        shapes = found.setdefault(name, set())
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, shapes=shapes: shapes.add(tuple(args[0].shape))
        )
    case.run(model)
    return found


def passes_on(module: nn.Module) -> bool:
    """Is it a depthwise convolution? What it puts out of a channel, once or several times, is made of that channel."""
    return isinstance(module, _ConvNd) and not module.transposed and module.groups == module.in_channels > 1


def neurons_of(model: nn.Module) -> list[str]:
    """Names of the neurons of all styles."""
    found = []
    for name, module in model.named_modules():
        kinds = [
            cls for cls in type(module).__mro__ if cls.__module__.startswith("spikingjelly.activation_based.neuron")
        ]
        fires = bool(kinds) and not any("NonSpiking" in kind.__name__ for kind in kinds)
        if fires or isinstance(module, (snn.SpikingNeuron, snn.LeakyParallel, OwnFire)):
            found.append(name)
    return found


def difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest, as a share of the largest number wanted; infinite where shapes differ or anything isn't finite."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return float("inf")
    largest = max((float(t.abs().max()) for t in wanted if t.numel()), default=0.0)
    worst = max((float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True) if a.numel()), default=0.0)
    return worst / max(1.0, largest) if worst == worst else float("inf")
