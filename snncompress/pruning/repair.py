"""Repair: what removal took from the network is given back in closed form, without labels and without training.

Layer by layer, in order of execution, with the network as it is so far: the weights that are left are fitted so that
the neurons integrate what they integrated before.

    u[t] = (1 − leak) · u[t−1] + x[t]        what a leaky neuron makes of its input, without reset
    min over W, b of  Σ ‖ y_d − (W u_c + b) ‖²       y_d what the same layer of the network before gave, filtered alike

Rows are then stretched until what is integrated varies as much as before, since least squares leaves out what can't be
explained. A quantized layer's weights are fitted as floats and put onto its grid. Removed single weights stay 0.
Source: the least squares of one-shot compression (Optimal Brain Surgeon and its successors) on what spiking neurons
integrate; compare Shi, Li and Ward-Cherrier, "Spiking Brain Compression", arXiv 2506.03996.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.errors import OptionError, PlanError
from snncompress.interfaces import Adapter, Forward
from snncompress.model.computed_once import evaluating
from snncompress.model.copying import private_copy, same_everywhere
from snncompress.model.edits import Edit
from snncompress.model.network import Network, computed_or_shared
from snncompress.model.plan import Plan, attach, has_plan, plan_of, refuse_frozen
from snncompress.running.bench import bench
from snncompress.running.data import Feed
from snncompress.running.resuming import Resumed, SameBatches
from snncompress.structure.tracing import trace

from .fitting import LayerFit, RepairKind, Rounding, channels
from .integration import MOST_READS, reads, timelines

M = TypeVar("M", bound=nn.Module)


def check_rounding(value: Any) -> None:
    """Raise OptionError for what can't be."""
    if value not in get_args(Rounding):
        raise OptionError(f"rounding must be 'gptq' or 'nearest', not {value!r}.")


def repair(
    model: M,
    original: nn.Module,
    data: Any,
    *,
    kind: RepairKind = "membrane",
    rounding: Rounding = "gptq",
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> M:
    """A compressed network whose weights are fitted to give back what compression took; both models stay as they are.

    For networks that were compressed already, or loaded from a file; ``apply`` does it in every step where it is given
    data, before any fine-tuning. No labels are needed, and nothing is trained.

    Left as they are: layers that nothing changed upstream of, layers that share or compute their weight, and those
    whose outputs read more than 8,192 inputs each.

    Args:
        model: the compressed network, with its plan.
        original: the network that it was made from.
        data: calibration data, as for ``apply``; a few hundred samples do, and the batches after the first 2,048 are
            left out.
        kind: "membrane" fits what the neurons integrate, "current" what they get in single timesteps.
        rounding: of quantized layers, "gptq" or "nearest", as for ``apply``.
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
    check_rounding(rounding)
    refuse_frozen(model, "repaired")
    plan = plan_of(model) if has_plan(model) else Plan()
    found = find_adapter(model, adapter)
    with bench(model, data, timesteps, forward, adapter=found, seed=seed) as table:
        work, before = table.model, private_copy(original, find_adapter(original, found))
        feed = table.feed
        network = trace(work, found, feed.example(), timesteps=feed.telling_timesteps, groups=False)
        layers = fit(work, before, network, feed, plan.edits, kind, seed, progress, rounding=rounding)
        same_everywhere(work)
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
    rounding: Rounding = "nearest",
    only: Collection[str] | None = None,
) -> list[str]:
    """Fit, in place, every layer of ``model`` whose weights or inputs aren't those of ``before``; return their names.

    ``edits`` lead from ``before`` to ``model``, whose ``network`` this is. Both are on a bench. With ``only``, no other
    layers are fitted.
    """
    plan = Plan(tuple(edits))
    removed, shrunk = plan.removed_channels(), plan.removed_channels("neuron")
    neurons = feed.adapter.neurons(model)
    left_alone = computed_or_shared(model)
    fitted = []
    with evaluating(model), evaluating(before):
        lines = timelines(before, feed)
        names = [name for name in lines if only is None or name in only]
        runs = {net: Resumed(net, feed, names, seed) for net in (before, model)}
        batches = SameBatches(feed, runs.values())
        for name in tracked(names, progress, f"{what}repairing"):
            if name in left_alone or not _there(model, name) or reads(model.get_submodule(name)) > MOST_READS:
                continue
            holder = next((neuron for neuron in neurons if name.startswith(f"{neuron}.")), None)
            gone = removed.get(name, []) if holder is None else shrunk.get(holder, [])
            kept = _kept(model, before, name, gone)
            task = LayerFit(model, before, name, lines[name], kept, network, feed, batches, runs, kind, rounding)
            if task.gather(seed) and task.solve():
                fitted.append(name)
    return fitted


def _there(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def _kept(model: nn.Module, before: nn.Module, name: str, removed: list[int]) -> Tensor:
    """The output channels of the layer before that it still has."""
    now, then = (channels(net.get_submodule(name)) for net in (model, before))
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
