"""Refresh: the statistics of batch norms, taken again of what reaches them now, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.base.distributed import processes, summed, together
from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.interfaces import Adapter, Forward
from snncompress.model.computed_once import evaluating
from snncompress.model.plan import Plan, attach, has_plan, plan_of, refuse_frozen
from snncompress.running.bench import bench
from snncompress.running.data import Feed

M = TypeVar("M", bound=nn.Module)


def refresh(
    model: M,
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> M:
    """A copy of a network whose batch norms have the running mean and variance of these data; nothing else changes.

    In one pass over the data every batch norm normalizes with the statistics of the batch, and keeps their average
    over batches. Where weights went and nothing else gives back what they did, this recovers part of it; where
    ``repair`` was on there is little left to do, since it gives means and variances back itself. No labels are needed.

    Args:
        model: a network, compressed or not.
        data: as for ``apply``; batches of 32 or more, since their statistics are averaged.
        timesteps: as for ``apply``.
        forward: as for ``apply``.
        adapter: as for ``apply``.
        seed: of what is random.
        progress: as for ``apply``.

    Raises:
        DataError: the data don't fit the network.

    Example:
        >>> import snncompress, torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(4, 8), layer.BatchNorm1d(8), neuron.IFNode(), layer.Linear(8, 2))
        >>> x = torch.rand(64, 4)
        >>> fresh = snncompress.refresh(net, x, timesteps=4)
        >>> torch.allclose(fresh[1].running_mean, net[0](x).mean(0)), float(net[1].running_mean.sum())
        (True, 0.0)
    """
    refuse_frozen(model, "refreshed")
    found = find_adapter(model, adapter)
    with bench(model, data, timesteps, forward, adapter=found, seed=seed) as table:
        work = table.model
        refresh_statistics(work, table.feed, progress)
    found.reset(work)
    found.adopt(work)
    if has_plan(model):
        plan = plan_of(model)
        attach(work, Plan(plan.edits, plan.skipped, {**plan.origin, "refreshed": True}))
    return work


def refresh_statistics(model: nn.Module, feed: Feed, progress: Progress | None = None, what: str = "") -> None:
    """The same in place, on a bench; a network without batch norms is left as it is."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with together(), evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
                norm.training = True
            for batch in tracked(feed, progress, f"{what}refreshing statistics"):
                feed(model, batch)
        average_statistics(norms, all_batches=True)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        feed.adapter.reset(model)


def average_statistics(norms: Iterable[_BatchNorm], *, all_batches: bool = False) -> None:
    """Over all processes, each by how many batches it has seen; with ``all_batches`` all are counted, not its own."""
    if processes() == 1:
        return
    for norm in norms:
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            continue
        with torch.no_grad():
            total = norm.num_batches_tracked.double()
            means, variances = (tensor.double() * total for tensor in (norm.running_mean, norm.running_var))
            summed([means, variances, total])
            norm.running_mean.copy_(means / total.clamp_min(1))
            norm.running_var.copy_(variances / total.clamp_min(1))
            if all_batches:
                norm.num_batches_tracked.copy_(total)
