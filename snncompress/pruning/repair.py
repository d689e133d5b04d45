"""Repair: what removal took from the network is given back in closed form, without labels and without training.

Layer by layer, in order of execution, with the network as it is so far: the weights that are left are fitted so that
the neurons integrate what they integrated before.

    u[t] = (1 − leak) · u[t−1] + x[t]        what a leaky neuron makes of its input, without reset
    min over W, b of  Σ ‖ y_d − (W u_c + b) ‖²       y_d what the same layer of the network before gave, filtered alike

A quantized layer's weights are fitted as floats and put onto its grid. Removed single weights stay 0.
Source: the least squares of one-shot compression (Optimal Brain Surgeon and its successors) on what spiking neurons
integrate; compare Shi, Li and Ward-Cherrier, "Spiking Brain Compression", arXiv 2506.03996.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, OptionError, PlanError
from snncompress.interfaces import Adapter, Forward
from snncompress.measuring.timestep_counting import Rehearsal, Timeline
from snncompress.model.chance import set_seed
from snncompress.model.copying import private_copy
from snncompress.model.edits import Edit
from snncompress.model.modules import in_mode
from snncompress.model.network import Network, computed_or_shared
from snncompress.model.parametrizations import compression_of, stored_weight, weight_mask
from snncompress.model.patches import as_matrix, as_weight, outputs, patches, positions, samples_first
from snncompress.model.plan import Plan, attach, has_plan, plan_of, refuse_frozen
from snncompress.running.bench import bench
from snncompress.running.data import Batch, Feed
from snncompress.structure.tracing import trace

from .least_squares import Sums, solved

M = TypeVar("M", bound=nn.Module)
RepairKind = Literal["membrane", "current"]
_RIDGE = 1e-3
_MOST_READS = 8192
"""Of one output: a layer that reads more keeps its weights, since the Gram matrix would take over half a gigabyte."""
_POSITIONS = 64
"""Of an output map, in a sample: more add little, since neighbours say the same."""


def check_repair(value: Any) -> None:
    """Raise OptionError for what can't be."""
    if value not in (None, *get_args(RepairKind)):
        raise OptionError(f"repair must be 'membrane', 'current' or None, not {value!r}.")


def repair(
    model: M,
    original: nn.Module,
    data: Any,
    *,
    kind: RepairKind = "membrane",
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> M:
    """A compressed network whose weights are fitted to give back what compression took; both models stay as they are.

    For networks that were compressed already, or loaded from a file; ``apply(..., repair="membrane")`` does it in every
    step, before any fine-tuning. No labels are needed, and nothing is trained.

    Args:
        model: the compressed network, with its plan.
        original: the network that it was made from.
        data: calibration data, as for ``apply``; a few hundred samples do.
        kind: "membrane" fits what the neurons integrate, "current" what they get in single timesteps.
        timesteps: as for ``apply``.
        forward: as for ``apply``.
        adapter: as for ``apply``.
        seed: of what is random.
        progress: as for ``apply``.

    Raises:
        PlanError: the two networks don't belong together.
        DataError: the data don't fit them.

    Example:
        >>> import snncompress
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(4, 32), neuron.IFNode(), nn.Linear(32, 8), neuron.IFNode(), nn.Linear(8, 2))
        >>> x = torch.rand(64, 4)
        >>> small = snncompress.apply(net, "random", 0.5, None, data=x, timesteps=4, repair=None)
        >>> fitted = repair(small, net, x, timesteps=4)
        >>> torch.equal(fitted[0].weight, small[0].weight), torch.equal(fitted[2].weight, small[2].weight)
        (True, False)
    """
    if kind not in get_args(RepairKind):
        raise OptionError(f"kind must be 'membrane' or 'current', not {kind!r}.")
    refuse_frozen(model, "repaired")
    plan = plan_of(model) if has_plan(model) else Plan()
    found = find_adapter(model, adapter)
    with bench(model, data, timesteps, forward, adapter=found, seed=seed) as table:
        work, before = table.model, private_copy(original, found)
        network = trace(work, found, table.feed.example(), timesteps=timesteps, groups=False)
        layers = fit(work, before, network, table.feed, plan.edits, kind, seed, progress)
    found.reset(work)
    found.adopt(work)
    if has_plan(model):
        attach(work, Plan(plan.edits, plan.skipped, {**plan.origin, "repaired": layers}))
    return work


def fit(
    model: nn.Module,
    before: nn.Module,
    network: Network,
    feed: Feed,
    edits: Sequence[Edit],
    kind: RepairKind,
    seed: int,
    progress: Progress | None = None,
    what: str = "",
) -> list[str]:
    """Fit, in place, every layer of ``model`` whose weights or inputs aren't those of ``before``; return their names.

    ``edits`` lead from ``before`` to ``model``. Both are on a bench.
    """
    plan = Plan(tuple(edits))
    removed, shrunk = plan.removed_channels(), plan.removed_channels("neuron")
    neurons = feed.adapter.neurons(model)
    left_alone = computed_or_shared(model)
    fitted = []
    with in_mode(model, training=False), in_mode(before, training=False), torch.no_grad():
        lines = _timelines(before, feed)
        for name in tracked(list(lines), progress, f"{what}repairing"):
            if name in left_alone or not _there(model, name) or _reads(model.get_submodule(name)) > _MOST_READS:
                continue
            holder = next((neuron for neuron in neurons if name.startswith(f"{neuron}.")), None)
            gone = removed.get(name, []) if holder is None else shrunk.get(holder, [])
            task = _Task(model, before, name, lines[name], _kept(model, before, name, gone), network, feed, kind)
            if task.gather(seed) and task.solve():
                fitted.append(name)
    return fitted


def _there(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def _kept(model: nn.Module, before: nn.Module, name: str, removed: list[int]) -> Tensor:
    """The output channels of the layer before that it still has."""
    now, then = (_channels(net.get_submodule(name)) for net in (model, before))
    gone = torch.tensor(removed, dtype=torch.long)
    kept = torch.ones(then, dtype=torch.bool)
    if len(gone) and int(gone.max()) < then:
        kept[gone] = False
    if int(kept.sum()) != now:
        raise PlanError(
            f"{name!r} has {now} output channels, and {then} in the network that it is to be repaired by, less the "
            f"{len(gone)} that its plan removed. Pass the network that it was compressed from."
        )
    return kept.nonzero().flatten()


def _reads(layer: nn.Module) -> int:
    return int(as_matrix(layer, stored_weight(layer)).shape[2])


def _channels(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _timelines(model: nn.Module, feed: Feed) -> dict[str, Timeline | None]:
    """The weight layers in order of execution, each with the timesteps of its calls; None where those can't be told."""
    with ExitStack() as stack:
        rehearsal = Rehearsal(model, feed.adapter, stack)
        feed.example()(model)
    feed.adapter.reset(model)
    neurons = feed.adapter.neurons(model)
    steps, samples = rehearsal.extent()
    lines: dict[str, Timeline | None] = {}
    for name in rehearsal.called():
        if name in neurons:
            continue
        try:
            lines[name] = rehearsal.timelines(steps, samples, only=name)[name]
        except ModelError:
            lines[name] = None
    return lines


class _EnoughError(BaseException):
    """Ends a forward pass early: past handlers of ordinary exceptions in a user's code."""


class _BatchState:
    """How far a batch is: positions that are looked at, what is wanted there, and both sides' filters."""

    def __init__(self, generator: torch.Generator, *, compare: bool) -> None:
        self.generator, self.unchanged = generator, compare
        self.where: Tensor | None = None
        self.wanted: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.u: Any = 0.0
        self.v: Any = 0.0
        self.one = 0.0


@dataclass
class _Task:
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
        for number, batch in enumerate(self.feed):
            self._batch = _BatchState(
                torch.Generator().manual_seed(number), compare=number == 0 and self._same_weights()
            )
            self._run(self.before, self.old, batch, seed, self._want)
            self._run(self.model, self.layer, batch, seed, self._read)
            if self._batch.unchanged or self._batch.wanted or self.sums is None:
                return False  # nothing changed here, nor upstream; or the layer isn't called as it was
        return self.sums is not None

    def _want(self, x: Tensor, y: Tensor) -> None:
        """A timestep of the network before: what its layer put out."""
        state = self._batch
        if state.where is None:
            state.where = positions(self.layer, y, _POSITIONS, state.generator)
        state.wanted.append(outputs(self.layer, y.index_select(1, self.kept.to(y.device)), state.where))
        if state.unchanged:
            state.inputs.append(x)

    def _read(self, x: Tensor, y: Tensor) -> None:
        """The same timestep of the network as it is: filter both sides through time, and add up products."""
        state = self._batch
        if not state.wanted or state.where is None:
            return
        if state.unchanged:
            then = state.inputs.pop(0)
            state.unchanged = then.shape == x.shape and torch.equal(then, x)
        state.u = self._decay * state.u + x
        state.v = self._decay * state.v + state.wanted.pop(0)
        state.one = self._decay * state.one + 1
        read = patches(self.layer, state.u, state.where)
        if self._offset:
            read = torch.cat([read, torch.full_like(read[..., :1], state.one)], 2)
        if self.sums is None:
            self.sums = Sums(read.shape[1], read.shape[2], state.v.shape[2], read.device)
        self.sums.add(read, state.v)

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
            return torch.zeros(groups, _channels(self.layer) // groups, dtype=torch.float64, device=self._device())
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
        return norm if isinstance(mean, Tensor) and mean.shape == (_channels(self.layer),) else None

    def _keep(self) -> float:
        """What a timestep leaves of the membrane potential, of the neurons that the layer drives; 0: no filter."""
        if self.kind == "current" or self.line is None:
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
        set_seed(seed, [])
        try:
            with self.feed.adapter.alone(net):
                self.feed(net, batch)
        except _EnoughError:
            pass
        finally:
            handle.remove()
            self.feed.adapter.reset(net)
