"""check_criterion: a criterion is fed made-up activity, the way calibration does it."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from snncompress.errors import PluginError
from snncompress.interfaces import BlockCriterion, Criterion, Inputs, Layer, Reader, Scope, Signal

from .common import broken, calling, check_name, check_options

_T, _C = 4, 6
_GONE = 5  # weights to select


def check_criterion(criterion: Criterion) -> None:
    """Feeds a criterion made-up activity of convolutions and a linear layer.

    Checked: scores are [C], or of the weight's shape for single weights, and finite, also for a silent layer;
    they are the same when the timesteps come one by one and all at once, when the fold is repeated under another
    global seed, when two layers are folded in turns (so no state sits in the instance), and, where there is a
    ``merge``, when batches are folded apart and put together; the tensors that the criterion is shown stay as they are;
    the options are JSON. A block criterion is given made-up losses instead: its scores are finite, one per block, and
    the same every time.

    Raises:
        PluginError: the first of these that fails, or an exception in the criterion.

    Example:
        >>> from snncompress.extend import Criterion
        >>> class Mean(Criterion):
        ...     name = "mean"
        ...     def score(self, layer, state):
        ...         return layer.weight.mean()
        >>> check_criterion(Mean())
        Traceback (most recent call last):
        snncompress.errors.PluginError: conv2d: Mean: score() must return one score per channel, [6], not [].
    """
    check_name(criterion)
    check_options(criterion)
    if isinstance(criterion, BlockCriterion):
        _check_blocks(criterion)
        return
    if criterion.granularity not in ("channel", "weight"):
        raise broken(criterion, f"granularity must be 'channel' or 'weight', not {criterion.granularity!r}.")
    if criterion.scope not in get_args(Scope):
        raise broken(criterion, f"scope must be one of {get_args(Scope)}, not {criterion.scope!r}.")
    signals = get_args(Signal)
    if not isinstance(criterion.needs, (set, frozenset)) or not criterion.needs <= set(signals):
        raise broken(criterion, f"needs must be a frozenset out of {signals}, not {criterion.needs!r}.")
    with torch.random.fork_rng(devices=[]):
        for kind, maps in (("conv2d", (5, 3)), ("conv1d", (5,)), ("linear", ())):
            try:
                _check_scores(criterion, _Activity.random(maps, seed=0), _Activity.random(maps, seed=1))
            except PluginError as error:
                raise PluginError(f"{kind}: {error}") from error


def _check_blocks(criterion: BlockCriterion) -> None:
    """Five blocks, the loss without some of which is made up."""
    losses = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.1, "e": 0.3}
    with calling(criterion, "score_blocks()"):
        scores = [
            torch.as_tensor(criterion.score_blocks(list(losses), lambda names: 1 + sum(losses[n] for n in names)))
            for _ in range(2)
        ]
    for found in scores:
        if found.shape != (len(losses),) or not bool(torch.isfinite(found.double()).all()):
            raise broken(criterion, f"score_blocks() must return {len(losses)} finite numbers, not {found.tolist()}.")
    if not torch.equal(*scores):
        raise broken(criterion, "the same blocks got other scores the second time.")


def _check_scores(criterion: Criterion, activity: _Activity, other: _Activity) -> None:
    before = [t.clone() for t in activity.tensors()]
    torch.manual_seed(0)
    (scores,) = _in_turns(_fold(criterion, activity, chunk=_T))
    if not all(map(torch.equal, activity.tensors(), before)):
        raise broken(criterion, "it changes in place what it is shown: the network's own spikes or weights.")
    torch.manual_seed(1)
    (again,) = _in_turns(_fold(criterion, activity, chunk=_T))
    if not torch.equal(scores, again):
        cause = "chance that doesn't come from layer.generator, or state kept in the instance"
        raise broken(criterion, f"the same data gave other scores the second time. Likely cause: {cause}.")
    (by_step,) = _in_turns(_fold(criterion, activity, chunk=1))
    if not torch.allclose(scores, by_step, rtol=1e-5, atol=1e-6 * float(scores.abs().max())):
        raise broken(criterion, f"{_T} timesteps observed at once and one by one give different scores.")
    (alone,) = _in_turns(_fold(criterion, other, chunk=1))
    together = _in_turns(_fold(criterion, activity, chunk=1), _fold(criterion, other, chunk=1))
    if not all(map(torch.equal, together, (by_step, alone))):
        remedy = "Keep what is folded in `state`, not in self"
        raise broken(criterion, f"two layers folded in turns disturb each other. {remedy}.")
    if type(criterion).merge is not Criterion.merge:
        (merged,) = _in_turns(_fold(criterion, activity, chunk=1, apart=True))
        if not torch.allclose(merged, by_step, rtol=1e-5, atol=1e-6 * float(scores.abs().max())):
            raise broken(criterion, "batches folded apart, and put together by merge(), give other scores.")
    try:
        _in_turns(_fold(criterion, activity.silent(), chunk=1))
    except PluginError as error:
        raise PluginError(f"silent neurons: {error}") from error


@dataclass
class _Activity:
    """A layer, and what its neurons did in each batch: spikes, membrane [T, N, C, ...]; a weight gradient."""

    module: nn.Module
    weight: Tensor
    norm: nn.Module
    batches: list[tuple[Tensor, Tensor, Tensor]]
    inputs: Inputs
    readers: tuple[Reader, ...]

    @classmethod
    def random(cls, maps: tuple[int, ...], seed: int) -> _Activity:
        torch.manual_seed(seed)
        module: nn.Linear | nn.Conv1d | nn.Conv2d
        norm: nn.BatchNorm1d | nn.BatchNorm2d
        if len(maps) == 2:
            module, norm = nn.Conv2d(3, _C, 3), nn.BatchNorm2d(_C)
        else:
            module = nn.Conv1d(3, _C, 3) if maps else nn.Linear(3, _C)
            norm = nn.BatchNorm1d(_C)
        nn.init.uniform_(norm.weight)
        batches = []
        for samples in (3, 2):
            membrane = 2 * torch.rand(_T, samples, _C, *maps) - torch.rand(_C, *maps)
            batches.append(((membrane > 0.8).float(), membrane, torch.randn(module.weight.shape)))
        inputs, readers = _moments(torch.rand(40, module.weight[0].numel())), _readers(torch.rand(40, 2 * _C))
        return cls(module, module.weight.detach(), norm, batches, inputs, readers)

    def silent(self) -> _Activity:
        """The same layer, with neurons that do nothing and pass no gradient, and inputs that are 0."""
        nothing = [(torch.zeros_like(s), torch.zeros_like(u), torch.zeros_like(g)) for s, u, g in self.batches]
        quiet = _moments(torch.zeros(40, self.weight[0].numel()))
        return _Activity(self.module, self.weight, self.norm, nothing, quiet, _readers(torch.zeros(40, 2 * _C)))

    def tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.norm.parameters(), *itertools.chain(*self.batches)]


def _moments(u: Tensor) -> Inputs:
    """Of samples [n, D]."""
    u = u.double()
    gram = (u.T @ u)[None]
    return Inputs(gram.diagonal(dim1=1, dim2=2), u.sum(0)[None], float(len(u)), gram)


def _readers(u: Tensor) -> tuple[Reader, ...]:
    """One of samples [n, 2 C], in which a channel has two places next to one another; and one that was never called."""
    linear, columns = nn.Linear(2 * _C, 3), torch.arange(2 * _C).view(_C, 2)
    all_of = torch.ones(_C, dtype=torch.bool)
    return tuple(
        Reader(name, linear, linear.weight.detach(), None, columns, all_of, inputs)
        for name, inputs in (("reader", _moments(u)), ("another", None))
    )


def _fold(
    criterion: Criterion, activity: _Activity, chunk: int, *, apart: bool = False
) -> Generator[None, None, Tensor]:
    """The calls that calibration makes, one per ``next``; returns the scores.

    With ``apart`` each of the two batches is folded by itself, as on as many processes.
    """
    generator = torch.Generator().manual_seed(7)
    needs = criterion.needs

    def layer(gradient: Tensor | None = None, inputs: Inputs | None = None, read: tuple[Reader, ...] = ()) -> Layer:
        weight, norm = activity.weight, activity.norm
        return Layer("layer", activity.module, weight, gradient, norm, ("neuron",), generator, inputs, read)

    with calling(criterion, "begin()"):
        state = before = criterion.begin(layer())
    yield
    for number, (spikes, membrane, gradient) in enumerate(activity.batches if needs else ()):
        if apart and number:
            before, state = state, criterion.begin(layer())
        for start in range(0, _T, chunk) if needs & {"spikes", "membrane"} else ():
            steps = slice(start, start + chunk)
            shown = membrane[steps] if "membrane" in needs else None
            with calling(criterion, "observe()"):
                state = criterion.observe(layer(), state, spikes[steps], shown)
            yield
        with calling(criterion, "end_batch()"):
            state = criterion.end_batch(layer(gradient if "gradients" in needs else None), state)
        if apart and number:
            with calling(criterion, "merge()"):
                state = criterion.merge(layer(), before, state)
        yield
    with calling(criterion, "score()"), torch.no_grad():
        inputs, readers = activity.inputs if "inputs" in needs else None, activity.readers if "readers" in needs else ()
        scores = criterion.score(layer(None, inputs, readers), state)
    if not isinstance(scores, Tensor):
        raise broken(criterion, f"score() must return a tensor, not {type(scores).__name__}.")
    per, shape = ("weight", activity.weight.shape) if criterion.granularity == "weight" else ("channel", (_C,))
    if scores.shape != shape:
        got = list(scores.shape)
        raise broken(criterion, f"score() must return one score per {per}, {list(shape)}, not {got}.")
    if not bool(torch.isfinite(scores).all()):
        raise broken(criterion, f"scores must be finite, not {scores.tolist()}.")
    if per == "weight":
        with calling(criterion, "select()"):
            gone = criterion.select(scores.flatten(), _GONE)
        if not (isinstance(gone, Tensor) and gone.dtype == torch.bool and gone.shape == (scores.numel(),)):
            raise broken(criterion, f"select() must return a bool tensor [{scores.numel()}].")
    return scores.detach().double().clone()


def _in_turns(*folds: Generator[None, None, Tensor]) -> list[Tensor]:
    scores: dict[int, Tensor] = {}
    while len(scores) < len(folds):
        for number, fold in enumerate(folds):
            if number not in scores:
                try:
                    next(fold)
                except StopIteration as stop:
                    scores[number] = stop.value
    return [scores[number] for number in range(len(folds))]
