"""``sensitivity`` and ``threshold_sweep``: what pruning costs in accuracy, by layer and by threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from torch import nn

from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.errors import DataError, ModelError, OptionError
from snncompress.interfaces import Adapter, Criterion, CriticalityCriterion, Forward, Loss
from snncompress.measuring.evaluation import accuracy
from snncompress.model.cells import layer_at
from snncompress.model.edits import Edit
from snncompress.model.network import Network, computed_or_shared, weight_layers
from snncompress.model.parametrizations import stored_weight, weight_mask
from snncompress.model.plan import refuse_frozen
from snncompress.pruning.fitting import RepairKind
from snncompress.pruning.recording import Recording, calibrate, record
from snncompress.pruning.repair import fit
from snncompress.pruning.selection import (
    check_ratio,
    overruled,
    resolve_skip,
    weight_ratios,
)
from snncompress.pruning.settings import RepairChoice, fitting, resolve_repair
from snncompress.pruning.steps import WeightPruning
from snncompress.running.bench import Bench, bench
from snncompress.structure.tracing import trace

from .curves import Sensitivity, ThresholdSweep
from .units import Unit, criterion_of, fully, listed, pruning, reasons, refuse, scored, units


def sensitivity(
    model: nn.Module,
    data: Any,
    criterion: str | Criterion = "cqp",
    ratios: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    test: Any = None,
    layers: str | Iterable[str] | None = None,
    repair: RepairChoice = "auto",
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """How much accuracy each layer's pruning costs: every layer is pruned alone, to every ratio, and measured.

    What goes is what ``apply(model, criterion, {layer: ratio}, bits=None)`` removes: ⌈ratio · c⌉ of c channels or
    ⌊ratio · n⌋ of n weights, repaired but not fine-tuned. Coupled layers lose their channels together, so they have
    the same numbers, measured once.

    One pass over ``data`` to score (none where the criterion records nothing), one over ``test`` for each layer and
    ratio, and one for the dense model; repair adds, for each layer and ratio, two passes over ``data`` per layer that
    comes after. All on private copies: the model and torch's random state stay as they are.

    Args:
        model: the network.
        data: calibration data (x, y): a batch, a DataLoader, or an iterable of batches.
        criterion: name or instance, of channels or of single weights.
        ratios: shares to remove, each in [0, 1).
        test: labelled data on which accuracy is measured; None: ``data``.
        layers: names or globs; None: all that ``apply`` prunes by default, so without the layer that feeds the
            classifier where channels go. Naming that layer includes it.
        repair: as for ``apply``: "auto" and "membrane" are the same here, None measures bare removal, which is quicker.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        loss: ``loss(output, y)`` for criteria that need gradients; None: cross-entropy.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        seed: seed of everything random; each accuracy is measured from the same random state.
        progress: a bar on a terminal, a callable, or False for nothing.

    Raises:
        OptionError: a ratio out of range, a layer that isn't there or can't be pruned, or no layer at all.
        DataError: the test data have no labels, or don't fit the model.
        ModelError: no spiking neuron that an adapter knows, or no weight layer.

    Source: Li et al., "Pruning filters for efficient ConvNets", ICLR 2017 (sensitivity of single layers).

    Example:
        The weights 0.1 and 0.2 don't matter; with 1 gone too, class 1 isn't recognised any more:

        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode())
        >>> net[0].weight.data = torch.tensor([[2.0, 0.1], [0.2, 1.0]])
        >>> digits = torch.eye(2), torch.tensor([0, 1])
        >>> result = sensitivity(net, digits, "weight_magnitude", (0.5, 0.75), timesteps=1)
        >>> result.dense, result.accuracy
        (1.0, {'0': (1.0, 0.5)})
    """
    chosen = criterion_of(criterion, seed)
    shares = tuple(check_ratio(ratio, "ratios") for ratio in listed(ratios, "ratios"))
    kind = fitting(resolve_repair(repair, chosen))
    with _traced(model, data, test, timesteps, forward, loss, adapter, seed) as (table, network):
        found, skipped = units(table.model, network, chosen, layers, None if layers is None else [])
        layered = scored(found)
        scores = record(table.model, network, table.feed, chosen, layered, seed + 1, progress)
        dense = _accuracy(table, table.model)

        def measured(unit: Unit, ratio: float) -> float | None:
            if not unit.bears(ratio):
                return None
            copy = table.copy()
            edits = pruning([unit], copy, table.adapter, network, chosen, ratio).step(scores, fully)
            _repair(table, copy, network, edits, kind)
            return _accuracy(table, copy)

        rows: dict[str, list[float | None]] = {name: [] for name in weight_layers(table.model) if name in layered}
        for unit, ratio in tracked([(u, r) for u in found for r in shares], progress, "measuring accuracy"):
            point = measured(unit, ratio)
            for name in unit.layers:
                rows[name].append(point)
    accuracies = {name: tuple(row) for name, row in rows.items()}
    return Sensitivity(dense, accuracies, shares, chosen.name, skipped, type(model).__name__, kind)


def threshold_sweep(
    model: nn.Module,
    data: Any,
    taus: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ratio: float | Mapping[str, float] = 0.9,
    criterion: str | Criterion = "cqp",
    *,
    test: Any = None,
    repair: RepairChoice = "auto",
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ThresholdSweep:
    """Accuracy against the criticality threshold τ, at a fixed sparsity: how much protection does good.

    For every τ, what ``apply(model, criterion with that τ, ratio, bits=None)`` removes is removed from a private copy,
    which is repaired and measured. Nothing is fine-tuned. The sparsity stays the same because where more than 1 - ratio
    of the weights are critical, critical ones go too.

    One pass over ``data`` in all, forward and backward where the criterion needs gradients, and one over ``test`` for
    each τ and for the dense model; repair adds, for each τ, two passes over ``data`` per layer.

    Args:
        taus: thresholds, each in [0, 1]; 1 protects nothing.
        ratio: share of the weights to remove: a number, or a mapping from layer name or glob.
        criterion: name or instance of a :class:`snncompress.extend.CriticalityCriterion`. The instance's own ``tau``
            isn't used.
        model, data, test, repair, timesteps, forward, loss, adapter, seed, progress: as in :func:`sensitivity`.

    Raises:
        OptionError: a threshold or ratio out of range, another kind of criterion, a layer that isn't there or can't
            be pruned, or no layer at all.
        DataError: the data have no labels, or don't fit the model.
        ModelError: no spiking neuron that an adapter knows, or no weight layer.

    Source: the threshold experiment of the CQP paper (criticality-constrained pruning of spiking networks).

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode())
        >>> net[0].weight.data = torch.tensor([[2.0, 0.1], [0.2, 1.0]])
        >>> digits = torch.eye(2), torch.tensor([0, 1])
        >>> result = threshold_sweep(net, digits, (0.5, 1.0), ratio=0.5, timesteps=1)
        >>> result.sparsity, result.protected[-1]
        ((0.5, 0.5), 0.0)
    """
    chosen = criterion_of(criterion, seed)
    protecting = _protecting(chosen)
    thresholds = tuple(_check_tau(tau) for tau in listed(taus, "taus"))
    kind = fitting(resolve_repair(repair, chosen))
    variants: list[Criterion] = [dataclasses.replace(cast(Any, protecting), tau=tau) for tau in thresholds]
    with _traced(model, data, test, timesteps, forward, loss, adapter, seed) as (table, network):
        names = weight_layers(table.model)
        skips = resolve_skip(None, network, names, "weight")
        shares, skipped = weight_ratios(names, ratio, skips, computed_or_shared(table.model))
        refuse("ratio", overruled(ratio, skipped))
        if not shares:
            raise OptionError(f"No layer is left to prune. {reasons(skipped)}.")
        layers = dict.fromkeys(shares, ())
        recording = Recording(table.model, network, chosen, layers, seed + 1)
        calibrate(table.model, network, table.feed, [recording], progress)
        critical = torch.cat([c.flatten() for c in recording.scores(protecting.criticality).values()])
        dense = _accuracy(table, table.model)

        def measured(variant: Criterion) -> tuple[float, float]:
            copy = table.copy()
            masking = WeightPruning(copy, table.adapter, variant, network, shares)
            _repair(table, copy, network, masking.step(recording.scores(variant.score), fully), kind)
            return _accuracy(table, copy), _sparsity(copy, shares)

        found = [measured(variant) for variant in tracked(variants, progress, "measuring accuracy")]
    accuracies, sparsities = zip(*found, strict=True)
    protected = tuple(float((critical > tau).double().mean()) for tau in thresholds)
    title = type(model).__name__
    return ThresholdSweep(dense, thresholds, accuracies, protected, sparsities, shares, chosen.name, title, kind)


@contextmanager
def _traced(
    model: nn.Module, data: Any, test: Any, timesteps: int | None, forward: Forward | None,
    loss: Loss | None, adapter: Adapter | str | None, seed: int,
) -> Iterator[tuple[Bench[nn.Module], Network]]:  # fmt: skip
    """A bench for pruning and measuring copies, and what the model looks like."""
    found = find_adapter(model, adapter)
    if not weight_layers(model):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer: nothing to prune.")
    refuse_frozen(model, "compressed")
    options = {"test": test, "seed": seed, "gradients": True}
    with bench(model, data, timesteps, forward, loss, found, **options) as table:
        if table.test.first().y is None:
            raise DataError(
                "Accuracy needs labels, and these data have none. Pass (x, y) batches as data or test, y being class "
                "indices [N]."
            )
        feed = table.feed
        yield table, trace(table.model, found, feed.example(), timesteps=feed.telling_timesteps)


def _repair(
    table: Bench[nn.Module], copy: nn.Module, network: Network, edits: Sequence[Edit], kind: RepairKind | None
) -> None:
    """As ``apply`` would, after these edits."""
    if kind and edits:
        fit(copy, table.model, network, table.feed, edits, kind, table.seed, progress=False)


def _accuracy(table: Bench[nn.Module], model: nn.Module) -> float:
    """Each from the same random state."""
    table.reseed()
    with table.adapter.alone(model):
        return accuracy(model, table.test)


def _protecting(criterion: Criterion) -> CriticalityCriterion:
    """The criterion, where it has a threshold to vary."""
    fields: list[str] = (
        [field.name for field in dataclasses.fields(criterion)] if dataclasses.is_dataclass(criterion) else []
    )
    if isinstance(criterion, CriticalityCriterion) and "tau" in fields:
        return criterion
    lacks = ["granularity 'weight'"] if criterion.granularity != "weight" else []
    lacks += ["a dataclass field 'tau'", "a method criticality(layer, state)"]
    raise OptionError(
        f"threshold_sweep varies the threshold tau of a criterion that protects critical weights; {criterion.name!r} "
        f"lacks {', '.join(lacks)}: it is no snncompress.extend.CriticalityCriterion. Take 'cqp', or derive it so."
    )


def _check_tau(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise OptionError(f"taus must be numbers from 0 to 1, not {value!r}.")
    return float(value)


def _sparsity(model: nn.Module, layers: Iterable[str]) -> float:
    modules = [layer_at(model, name) for name in layers]
    gone = sum(int((~mask).sum()) for module in modules if (mask := weight_mask(module)) is not None)
    return gone / sum(stored_weight(module).numel() for module in modules)
