"""Fits one layer of a compressed network to what the same layer did before; see :mod:`snncompress.pruning.repair`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snncompress.errors import ModelError
from snncompress.measuring.timestep_counting import Timeline
from snncompress.model.chance import seeded
from snncompress.model.network import Network
from snncompress.model.parametrizations import compression_of, stored_weight, weight_mask
from snncompress.model.patches import as_matrix, as_weight, outputs, patches, positions, samples_first
from snncompress.running.data import Batch, Feed

from .least_squares import Sums, solved

RepairKind = Literal["membrane", "current"]
_RIDGE = 1e-3
_POSITIONS = 64
"""Of an output map, in a sample: more add little, since neighbours say the same."""
_SAMPLES = 2048
"""Whole batches, until that many: more add little, and the data may be all that a network is trained on."""


class _EnoughError(BaseException):
    """Ends a forward pass early: past handlers of ordinary exceptions in a user's code."""


class _BatchState:
    """How far a batch is: positions that are looked at, what is wanted there, and both sides' filters."""

    def __init__(self, generator: torch.Generator, *, compare: bool) -> None:
        self.generator, self.unchanged = generator, compare
        self.where: dict[tuple[int, ...], Tensor] = {}  # by the map's shape
        self.wanted: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.samples = 0
        self.u: Any = 0.0
        self.v: Any = 0.0
        self.one = 0.0


@dataclass
class LayerFit:
    """One layer that is to be fitted: ``gather`` its sums over the data, then ``solve``."""

    model: nn.Module
    before: nn.Module
    name: str
    line: Timeline | None
    kept: Tensor
    network: Network
    feed: Feed
    kind: RepairKind
    sums: Sums | None = None

    def __post_init__(self) -> None:
        self.layer: Any = self.model.get_submodule(self.name)
        self.old: Any = self.before.get_submodule(self.name)
        self.norm: Any = self._norm()
        self._offset = self.layer.bias is not None or self.norm is not None
        self._decay = self._keep()

    def gather(self, seed: int) -> bool:
        """Run both networks on the data, up to this layer; False where there is nothing to do for it."""
        samples = 0
        for number, batch in enumerate(self.feed):
            if samples >= _SAMPLES:
                break
            self._batch = _BatchState(
                torch.Generator().manual_seed(number), compare=number == 0 and self._same_weights()
            )
            self._run(self.before, self.old, batch, seed, self._want)
            self._run(self.model, self.layer, batch, seed, self._read)
            if self._batch.unchanged or self._batch.wanted or self.sums is None:
                return False  # nothing changed here, nor upstream; or the layer isn't called as it was
            samples += self._batch.samples
        return self.sums is not None

    def _want(self, x: Tensor, y: Tensor) -> None:
        """A timestep of the network before: what its layer put out."""
        state = self._batch
        shape = tuple(y.shape[2:])
        state.samples = len(y)
        if shape not in state.where:
            state.where[shape] = positions(self.layer, y, _POSITIONS, state.generator)
        state.wanted.append(outputs(self.layer, y.index_select(1, self.kept.to(y.device)), state.where[shape]))
        if state.unchanged:
            state.inputs.append(x)

    def _read(self, x: Tensor, y: Tensor) -> None:
        """The same timestep of the network as it is: filter both sides through time, and add up products."""
        state = self._batch
        shape = tuple(y.shape[2:])
        if not state.wanted or shape not in state.where:
            return
        if state.unchanged:
            then = state.inputs.pop(0)
            state.unchanged = then.shape == x.shape and torch.equal(then, x)
        wanted = state.wanted.pop(0)
        if self._decay:
            x, wanted = self._decay * state.u + x, self._decay * state.v + wanted
        state.u, state.v, state.one = x, wanted, self._decay * state.one + 1
        read = patches(self.layer, x, state.where[shape])
        if self._offset:
            read = torch.cat([read, torch.full_like(read[..., :1], state.one)], 2)
        if self.sums is None:
            self.sums = Sums(read.shape[1], read.shape[2], wanted.shape[2], read.device)
        self.sums.add(read, wanted)

    def solve(self) -> bool:
        """Put the better weights in, row by row; False where the old ones are as good."""
        sums = cast(Sums, self.sums)
        stored, offset = stored_weight(self.layer), self._intercept()
        start = self._theta(as_matrix(self.layer, stored.detach()).double(), offset)
        mask = weight_mask(self.layer)
        support = None
        if mask is not None:
            support = as_matrix(self.layer, mask)
            if self._offset:
                support = torch.cat([support, torch.ones_like(support[..., :1])], 2)
        theta = solved(sums, start, _RIDGE, support)
        if support is not None:
            theta = theta.where(support, 0.0)
        old_weight = stored.detach().clone()
        errors = sums.errors(self._theta(self._effective(), offset))
        self._put(as_weight(self.layer, self._weights(theta), stored))
        new_offset = self._refitted(theta)
        better = sums.errors(self._theta(self._effective(), new_offset)) < errors
        if not bool(better.all()):  # rows that lose nothing keep what they had
            rows = better.unsqueeze(2)
            mixed = self._weights(theta).where(rows, as_matrix(self.layer, old_weight).double())
            self._put(as_weight(self.layer, mixed, stored))
            new_offset = new_offset.where(better, offset)
            found = sums.errors(self._theta(self._effective(), new_offset))
            if bool((found > errors * (1 + 1e-6)).any()) or not bool(better.any()):  # a scale of the whole layer moved
                self._put(old_weight)
                return False
        self._put_intercept(new_offset - offset)
        return True

    def _theta(self, weights: Tensor, offset: Tensor) -> Tensor:
        return torch.cat([weights, offset.unsqueeze(2)], 2) if self._offset else weights

    def _weights(self, theta: Tensor) -> Tensor:
        return theta[..., :-1] if self._offset else theta

    def _effective(self) -> Tensor:
        """What the layer multiplies with, [G, R, D]."""
        return as_matrix(self.layer, self.layer.weight.detach()).double()

    def _refitted(self, theta: Tensor) -> Tensor:
        """The intercept [G, R] that is best for the weights as they are now: they may have moved onto a grid."""
        groups, rows = theta.shape[:2]
        if not self._offset:
            return torch.zeros(groups, rows, dtype=torch.float64, device=theta.device)
        if compression_of(self.layer) is None or self.layer.parametrizations.weight[0].tensor_quant is None:
            return theta[..., -1]
        sums = cast(Sums, self.sums)
        explained = (self._effective() * sums.gram[:, -1:, :-1]).sum(2)
        fitted: Tensor = (sums.cross[:, -1] - explained) / sums.gram[:, -1:, -1]
        return fitted

    def _intercept(self) -> Tensor:
        groups = int(getattr(self.layer, "groups", 1))
        bias = self.layer.bias
        if bias is None:
            return torch.zeros(groups, channels(self.layer) // groups, dtype=torch.float64, device=self._device())
        offset: Tensor = bias.detach().double().view(groups, -1)
        return offset

    def _put(self, weight: Tensor) -> None:
        stored_weight(self.layer).copy_(weight)

    def _put_intercept(self, change: Tensor) -> None:
        if self.layer.bias is not None:
            self.layer.bias.add_(change.flatten().to(self.layer.bias.dtype))
        elif self.norm is not None:
            self.norm.running_mean.sub_(change.flatten().to(self.norm.running_mean.dtype))

    def _device(self) -> torch.device:
        return stored_weight(self.layer).device

    def _norm(self) -> Any:
        """The batch norm that the layer alone feeds, where it can take the intercept."""
        name = self.network.norms.get(self.name)
        norm: Any = None if name is None else self.model.get_submodule(name)
        mean = getattr(norm, "running_mean", None)
        return norm if isinstance(mean, Tensor) and mean.shape == (channels(self.layer),) else None

    def _keep(self) -> float:
        """What a timestep leaves of the membrane potential, of the neurons that the layer drives; 0: no filter."""
        if self.kind == "current" or self.line is None or self.line.per_step > 1:
            return 0.0
        neurons = self.feed.adapter.neurons(self.model)
        inside = [name for name in neurons if self.name.startswith(f"{name}.")]
        for name in (*inside, *self.network.drives.get(self.name, ())):
            try:
                leak = self.feed.adapter.leak(neurons[name])
            except ModelError:
                continue
            return float(1 - leak.double().mean().clamp(0, 1))
        return 0.0

    def _same_weights(self) -> bool:
        """Are they those of the channels that are kept?"""
        now, then = (as_matrix(layer, layer.weight.detach()).flatten(0, 1) for layer in (self.layer, self.old))
        then = then[self.kept.to(then.device)]
        return now.shape == then.shape and torch.equal(now, then)

    def _run(
        self, net: nn.Module, layer: nn.Module, batch: Batch, seed: int, seen: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Hand the layer's inputs and outputs [N, C, ...] of each timestep over, in order; nothing runs after it."""
        calls = 0
        line = None if self.line is None else self.line.fresh()

        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            nonlocal calls
            x = next(v for v in (*args, *named.values()) if isinstance(v, Tensor))
            if line is None:
                seen(samples_first(layer, x), samples_first(layer, output))
                return
            outs = output.chunk(line.steps, line.axis) if line.axis is not None else [output]
            for (_, piece), out in zip(line.pieces(x), outs, strict=True):
                seen(samples_first(layer, piece), samples_first(layer, out))
            calls += 1
            if calls == (1 if line.axis is not None else line.steps * line.per_step):
                raise _EnoughError

        handle = layer.register_forward_hook(hook, with_kwargs=True)
        try:
            with seeded(net, seed), self.feed.adapter.alone(net):
                self.feed(net, batch)
        except _EnoughError:
            pass
        finally:
            handle.remove()
            self.feed.adapter.reset(net)


def channels(layer: Any) -> int:
    """Output channels, or features."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
