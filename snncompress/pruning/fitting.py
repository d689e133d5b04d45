"""Fits one layer of a compressed network to what the same layer did before; see :mod:`snncompress.pruning.repair`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, processes, together
from snncompress.measuring.timestep_counting import Timeline
from snncompress.model.chance import seeded
from snncompress.model.network import Network, width
from snncompress.model.parametrizations import compression_of, gridded, stored_weight, weight_mask
from snncompress.model.patches import as_matrix, as_weight, outputs, patches, positions
from snncompress.running.data import Batch, Feed
from snncompress.running.resuming import OffTrackError, Resumed

from .integration import POSITIONS, decay, input_of, timesteps_of
from .least_squares import Sums, chosen_ridge, solved, stretched
from .rounding import passed_on

RepairKind = Literal["membrane", "current"]
Rounding = Literal["gptq", "nearest"]
RIDGE = 1e-2
"""How much the weights that are there count, relative to the mean power of what is read, where a sample is all."""
_PIECES = 8
"""Of a batch; every other one goes to the other half of the data."""
_DAMPING = 1e-2
_LEAST = 1e-6
"""Of the gain of a batch norm: with less, nothing passes it."""
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


@dataclass(frozen=True)
class _Answer:
    """Weights to store [G, R, D], intercepts [G, R], and what comes of them: the errors, the distance to θ [G, R]."""

    weights: Tensor
    offset: Tensor
    errors: Tensor
    distance: Tensor


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
    batches: Iterable[Batch]
    """The feed's."""
    runs: Mapping[nn.Module, Resumed]
    """Of both networks."""
    kind: RepairKind
    rounding: Rounding = "nearest"
    sums: Sums | None = None
    others: Sums | None = None
    """The other half of the data."""

    def __post_init__(self) -> None:
        self.layer: Any = self.model.get_submodule(self.name)
        self.old: Any = self.before.get_submodule(self.name)
        self.norm: Any = self._norm()
        self._through = self._between()
        self._offset = self.layer.bias is not None or self.norm is not None
        current = self.kind == "current"
        self._decay = 0.0 if current else decay(self.model, self.name, self.line, self.network, self.feed)

    def gather(self, seed: int) -> bool:
        """Run both networks on the data, up to this layer; False where there is nothing to do for it.

        Several processes take as many samples together, add up what they saw, and agree on whether there is.
        """
        while True:
            try:
                return self._gathered(seed)
            except OffTrackError:  # once more, then, and all of it
                self.sums = self.others = None

    def _gathered(self, seed: int) -> bool:
        batches, most = enumerate(self.batches), _SAMPLES / processes()
        with together():
            samples = self._add(*next(batches), seed)
        if all(gathered(self._batch.unchanged)):
            return False  # nothing changed here, nor upstream
        with together():
            while samples < most and not self._odd and (more := next(batches, None)):
                samples += self._add(*more, seed)
        if any(gathered(self._odd)) or self.sums is None or self.others is None:
            return False  # the layer isn't called as it was
        self.sums.reduce()
        self.others.reduce()
        return True

    def _add(self, number: int, batch: Batch, seed: int) -> int:
        """Run both networks on a batch; of how many samples it is."""
        self._batch = _BatchState(torch.Generator().manual_seed(number), compare=number == 0 and self._same_weights())
        for net, layer, seen in (self.before, self.old, self._want), (self.model, self.layer, self._read):
            with self.runs[net].up_to(self.name, number, batch):
                self._run(net, layer, batch, seed, seen)
        return self._batch.samples

    @property
    def _odd(self) -> bool:
        """Whether the layer wasn't called as it was before."""
        return bool(self._batch.wanted) or self.sums is None

    @property
    def _maps(self) -> bool:
        """Whether it puts out more than one position."""
        return any(math.prod(shape) > 1 for shape in self._batch.where)

    def _want(self, x: Tensor, y: Tensor) -> None:
        """A timestep of the network before: what its layer put out."""
        state = self._batch
        shape = tuple(y.shape[2:])
        state.samples = len(y)
        if shape not in state.where:
            state.where[shape] = positions(self.layer, y, POSITIONS, state.generator)
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
        if self._through is not None:
            wanted = self._through[0] * wanted + self._through[1] * state.one
        read = patches(self.layer, x, state.where[shape])
        if self._offset:
            read = torch.cat([read, torch.full_like(read[..., :1], state.one)], 2)
        if self.sums is None or self.others is None:
            sizes = read.shape[1], read.shape[2], wanted.shape[2], read.device
            self.sums, self.others = Sums(*sizes), Sums(*sizes, dtype=torch.float32)
        for number, piece in enumerate(zip(read.chunk(_PIECES), wanted.chunk(_PIECES), strict=True)):
            (self.others if number % 2 else self.sums).add(*piece, first=state.one == 1)

    def solve(self) -> bool:
        """Put better weights in, row by row; False where the old ones are as good."""
        stored, offset = stored_weight(self.layer), self._intercept()
        old = as_matrix(self.layer, stored.detach()).double()
        mask = weight_mask(self.layer)
        support = kept = None
        if mask is not None:
            support = kept = as_matrix(self.layer, mask)
            if self._offset:
                support = torch.cat([support, torch.ones_like(support[..., :1])], 2)
        sums, ridge = self._whole(old, offset, support)
        errors = sums.errors(self._theta(self._effective(), offset))
        start = _Answer(old, offset, errors, torch.full_like(errors, torch.inf))
        prior = self._prior(old, offset)
        theta = self._levelled(prior) if ridge is None else solved(sums, prior, ridge, support)
        if self._offset and self.network.drives.get(self.name):
            wide = stretched(sums, theta)
            # behind another norm the start is no measure; what undoes the change is
            most = errors if self._through is None else errors.minimum(sums.errors(prior))
            theta = wide.where((sums.errors(wide) < most).unsqueeze(2), theta)
        if support is not None:
            theta = theta.where(support, 0.0)
        best = self._better(start, start, self._weights(theta), theta)
        for weights in self._rounded(theta, kept) if self.rounding == "gptq" else ():
            best = self._better(start, best, weights, theta)
        self._put(best.weights)  # whatever was tried last
        if best is start:
            return False
        self._put_intercept(best.offset - offset)
        return True

    def _whole(self, weights: Tensor, offset: Tensor, support: Tensor | None) -> tuple[Sums, float | None]:
        """The sums of all data, and the ridge to fit with, found on their halves; None for what is there already.

        So where a map is read out, by the weights that were there: least squares, summed over all positions, draws what
        few of them show to the mean, such as what a detector puts out where there is something.
        """
        sums, others = cast(Sums, self.sums), cast(Sums, self.others)
        if not self.network.drives.get(self.name) and self._maps and self._same_weights():
            sums.absorb(others)
            return sums, None
        found = chosen_ridge(sums, others, self._prior(weights, offset), support) if others.samples else None
        ridge = found if others.samples else RIDGE * sums.scarcity()
        sums.absorb(others)
        self.others = None
        return sums, ridge

    def _prior(self, weights: Tensor, offset: Tensor) -> Tensor:
        """θ that is stayed near: what is there, or what undoes the change of the norm behind, row by row the better."""
        there = self._theta(weights, offset)
        if self._through is None:
            return there
        gain, shift = (part.double() for part in self._through)
        undone = self._theta(gain.unsqueeze(2) * weights, gain * offset + shift)
        sums = cast(Sums, self.sums)
        return undone.where((sums.errors(undone) < sums.errors(there)).unsqueeze(2), there)

    def _levelled(self, theta: Tensor) -> Tensor:
        """With the intercept that is best for these weights."""
        return self._theta(theta[..., :-1], self._level(theta[..., :-1])) if self._offset else theta

    def _level(self, weights: Tensor) -> Tensor:
        """The intercept [G, R] that is best for weights [G, R, D − 1]."""
        sums = cast(Sums, self.sums)
        explained = (weights * sums.gram[:, -1:, :-1]).sum(2)
        fitted: Tensor = (sums.cross[:, -1] - explained) / sums.gram[:, -1:, -1]
        return fitted

    def _better(self, start: _Answer, best: _Answer, weights: Tensor, theta: Tensor) -> _Answer:
        """What comes nearer to θ and isn't worse than the start, row by row.

        Where rows share a scale that moves, of the whole layer.
        """
        new = self._answer(weights, theta)
        rows = (new.errors < start.errors) & (new.distance < best.distance)
        if bool(rows.all()):
            return new
        if bool(rows.any()):
            mixed = self._answer(weights.where(rows.unsqueeze(2), best.weights), theta, rows, best.offset)
            if bool((mixed.errors <= start.errors * (1 + 1e-6)).all()):
                return mixed
            if new.errors.sum() < start.errors.sum() and new.distance.sum() < best.distance.sum():
                return self._answer(weights, theta)
        return best

    def _answer(
        self, weights: Tensor, theta: Tensor, rows: Tensor | None = None, instead: Tensor | None = None
    ) -> _Answer:
        """Put weights in, with the intercepts that suit them; in some rows only, others have theirs ``instead``."""
        sums = cast(Sums, self.sums)
        self._put(weights)
        offset = self._refitted(theta)
        if rows is not None and instead is not None:
            offset = offset.where(rows, instead)
        made = self._theta(self._effective(), offset)
        return _Answer(weights, offset, sums.errors(made), sums.distance(made, theta))

    def _rounded(self, theta: Tensor, kept: Tensor | None) -> Iterator[Tensor]:
        """Weights to store whose values on the grid have each other's rounding errors passed on.

        Either what is nearest to θ and rounded to those values, or they themselves: which of the two leaves the grid
        where it is depends on how the quantizer finds it. Where both do, the first is the better start for training.
        """
        layer, compression = self.layer, compression_of(self.layer)
        self._put(self._weights(theta))
        found = None if compression is None else gridded(compression, stored_weight(layer))
        if compression is None or found is None:
            return
        grid = found[0]
        like = compression.turned(stored_weight(layer))
        scale = as_matrix(layer, compression.turned(grid.scale.expand_as(like))).double()[..., :1]
        weights = self._weights(theta)
        sums = cast(Sums, self.sums)
        damping = _DAMPING * sums.scarcity()
        numbers = passed_on(theta, sums.gram, weights.shape[2], scale, grid, kept, damping)
        if numbers is None:
            return
        values = (numbers - grid.zero_point) * scale
        exists = torch.ones_like(values, dtype=torch.bool) if kept is None else kept
        exists = exists & weights.any(2, keepdim=True)  # rows of zeros stay so
        inside = 0.499 * scale
        low = torch.where(numbers > 0, values - inside, -torch.inf)
        high = torch.where(numbers < 2.0**grid.bits - 1, values + inside, torch.inf)
        yield weights.clamp(low, high).where(exists, 0.0)
        yield values.where(exists, 0.0)

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
        return self._level(self._effective())

    def _intercept(self) -> Tensor:
        groups = int(getattr(self.layer, "groups", 1))
        bias = self.layer.bias
        if bias is None:
            return torch.zeros(groups, channels(self.layer) // groups, dtype=torch.float64, device=self._device())
        offset: Tensor = bias.detach().double().view(groups, -1)
        return offset

    def _put(self, weights: Tensor) -> None:
        """[G, R, D]."""
        stored = stored_weight(self.layer)
        stored.copy_(as_weight(self.layer, weights, stored))

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

    def _between(self) -> tuple[Tensor, Tensor] | None:
        """a, c [G, R]: the norm as it is makes of a·y + c what the norm before made of y; None where they are equal."""
        norm = None if self.norm is None else self.network.norms.get(self.name)
        if norm is None:
            return None
        (gain, shift), (then, base) = _affine(self.norm), _affine(self.before.get_submodule(norm))
        then, base = (t[self.kept.to(t.device)] if len(t) != len(self.kept) else t for t in (then, base))
        if torch.equal(gain, then) and torch.equal(shift, base):
            return None
        usable = gain.abs() > _LEAST * then.abs()
        safe = gain.where(usable, 1.0)
        ratio, offset = (then / safe).where(usable, 1.0), ((base - shift) / safe).where(usable, 0.0)
        groups = int(getattr(self.layer, "groups", 1))
        like = stored_weight(self.layer)
        a, c = (
            t.view(groups, -1).to(like.device, torch.promote_types(like.dtype, torch.float32)) for t in (ratio, offset)
        )
        return a, c

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
            for piece, out in timesteps_of(layer, line, input_of(args, named), output):
                # else a forward of its own turns them
                if (piece.shape[1], out.shape[1]) == (width(layer, "in"), channels(layer)):
                    seen(piece, out)
            if line is None:
                return
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


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Gain and shift per channel of a batch norm in eval mode, in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gain = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -mean * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double()


def channels(layer: Any) -> int:
    """Output channels, or features."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
