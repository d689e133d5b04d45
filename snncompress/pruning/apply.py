"""apply(): the whole story, top-down."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import nn

from snncompress.base.progress import Progress
from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, NothingToDoWarning
from snncompress.interfaces import Adapter, Criterion, Forward, Loss, Quantizer, Scheduler, Target
from snncompress.model.fixed_point import Leak, Overflow
from snncompress.model.network import weight_layers
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.plan import attach, continued, refuse_frozen
from snncompress.running.bench import bench

from .budgets import Budget
from .checkpoint import Checkpoint, digest_of
from .fitting import Rounding
from .meeting import within
from .run import Run
from .settings import Finetune, RepairChoice, Settings
from .smallest import check_max_drop, smallest
from .states import StateSettings
from .targeting import confirmed, prepared

M = TypeVar("M", bound=nn.Module)


def apply(
    model: M,
    criterion: str | Criterion | None = "svs",
    ratio: float | Mapping[str, float] | None = None,
    bits: int | Mapping[str, int | None] | Literal["auto"] | None = 4,
    *,
    data: Any = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    quantizer: str | Quantizer = "rescaw",
    scheduler: str | Scheduler = "one_shot",
    order: str = "qp",
    finetune: Finetune = None,
    skip: Any = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    truncate: Literal["auto"] | int | None = None,
    repair: RepairChoice = "auto",
    rounding: Rounding = "gptq",
    refresh: bool = False,
    budget: Mapping[str, float] | None = None,
    round_to: int = 1,
    state_bits: int | Mapping[str, int | None] | None = None,
    state_overflow: Overflow = "saturate",
    state_leak: Leak = "exact",
    max_drop: float | None = None,
    validation: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    target: Target | str | None = None,
) -> M:
    """Compress a spiking network: remove channels or weights, quantize; the original stays bitwise as it was.

    Several processes, where ``torch.distributed`` is initialized, call it each with its own part of the data, and all
    end with the same: the model of rank 0, compressed as one process would with all data (docs/distributed.md).

    Args:
        model: a SpikingJelly or snnTorch network.
        criterion: which channels or weights matter: a name (:func:`snncompress.criteria` lists them), an instance, or
            None to prune nothing. What it scores is what goes: whole channels, or single weights, which are exactly
            0 from then on, however the model is trained.
        ratio: share to remove, 0.6 where nothing else is said: a number for every prunable layer, or a mapping from
            layer name or glob to number. Nothing goes from a layer that no key matches. Of c channels ⌈ratio · c⌉ go,
            coupled layers following their smallest ratio; of n weights ⌊ratio · n⌋, those removed before included.
            With a budget, the most that may go, 0.95 where nothing else is said.
        bits: weight bit width, 1 to 16: a number, a mapping, or None for no quantization; with a budget of size "auto":
            2 to 8 bits for each layer.
        data: calibration data: a tensor, an (x, y) batch, a DataLoader, or any iterable of either. Without any, a
            synthetic batch of the shape the model takes is used, and a SyntheticDataWarning says so.
        timesteps: T feeds static samples [N, ...] as constant current for T steps (direct encoding); None feeds a batch
            as it is ([T, N, ...] for a multi-step model).
        forward: ``forward(model, batch)`` runs a model that takes anything else.
        loss: ``loss(output, y)``, for criteria that need gradients and for fine-tuning by epochs; None: cross-entropy
            on the time-averaged output.
        quantizer: name or instance. "rescaw" takes the range of least error of every output channel; to train as QP-SNN
            does, ``ReScaW(gamma="l1_mean", per_channel=False)``.
        scheduler: name or instance: in how many steps they go; each step scores what the one before has left. With
            "prune_regrow" some come back in between.
        order: "qp" quantizes first, then prunes (QP-SNN); "pq" the reverse.
        finetune: None, a number of epochs for the built-in trainer (labels from ``data``, learning rate 1e-3), or
            ``callable(model)``, which trains in place: a loop of yours, or :func:`snncompress.finetune` with options,
            ``lambda net: snncompress.finetune(net, loader, epochs=3, lr=3e-3, timesteps=4, teacher=model)``. Called
            after quantization and after each pruning step.
        skip: None: the first weight layer and the classifier stay at 32 bits and the classifier's input layer keeps
            its channels, unless it writes into a residual stream; a DefaultSkipWarning says so where that is more than
            a fifth of what could go. Names or globs of layers to leave alone altogether take the place of that
            default; an empty list leaves out nothing. ``{"prune": …}`` or ``{"quantize": …}`` replaces one half of it.
            A classifier's outputs are never pruned; single weights are, in every layer.
        adapter: settles the framework by hand.
        neurons: the class of spiking neurons of your own, or several (:class:`snncompress.OwnNeurons`).
        time_dim: the axis of time in what they take, None where they take one timestep.
        seed: seed of everything random; same seed, data and threads give bitwise the same plan.
        progress: None or True for a bar on a terminal (stderr) and in a notebook, False for none, or
            ``callable(what, done, total)``.
        truncate: number of timesteps that the result runs, or "auto" for those that matter
            (:func:`snncompress.temporal_analysis`); None leaves them.
        repair: "membrane" fits the weights that are left so that the neurons integrate what they did before, in closed
            form and without labels (:func:`snncompress.repair`); "current" fits single timesteps; None leaves the bare
            network, which computes exactly what the original does with the removed channels silenced. "auto" is
            "membrane" where ``data`` are given, else None. It comes before fine-tuning, in every step. Where blocks
            are removed, what reads them starts from the weights of its first inputs, zeros where there were less;
            "reinit" draws new ones there instead, and fits nothing.
        rounding: where weights are fitted and quantized, "gptq" passes each one's rounding error on to those that are
            rounded after it, on the quantizer's own grid; "nearest" rounds each on its own.
        refresh: take the statistics of batch norms again from ``data`` after every step (:func:`snncompress.refresh`);
            after a repair there is little left to do.
        budget: what the result may cost, instead of ratios: ``{"energy": 0.5}``, or several at once: "energy", "size",
            "params", "synops", "macs" and "timesteps", as shares of the original's; counts (from 2) also as numbers,
            energy and size in units: "energy_pj" (nj, uj, mj), "size_mb" (kb). Energy is that of ``profile`` on
            ``data``. How much goes from which layer is found by comparing what channels take with them, with what they
            save (:mod:`snncompress.pruning.allocation`), and by trying: the result keeps to the budget within 2 %,
            where channels are fine enough, before any fine-tuning, which may change how much it fires.
        max_drop: the accuracy that may be lost, 0.01 for a point: the result is the smallest network that was found to
            lose no more, on labelled data that were held out. What becomes small is the first kind of cost that
            ``budget`` names, by default energy; what else it says holds, too. Shares are tried by bisection, each with
            repair, and with fine-tuning where that is asked for; all trials stand in the plan's origin, and as its
            budget the one that was met. Accuracy is known as exactly as the samples held out allow.
        validation: what is held out. By default that is every fifth batch of ``data``, or of fewer than five batches
            the last fifth of each one's samples, which then neither calibrates nor trains; the batches are gone
            through once and kept in memory.
        round_to: layers with a multiple of so many channels are left one, as some hardware likes them.
        state_bits: bit width of membrane potentials, 3 to 32: a number for all neurons, a mapping from neuron name or
            glob to number, or None for states in float. Potential, threshold and what a layer adds up, its bias in it,
            lie on one fixed-point grid per layer, or per channel where the layer's weights have scales per channel;
            its step is found on ``data`` (:mod:`snncompress.pruning.states`). It is done last, before any fine-tuning,
            which trains through it.
        state_overflow: whether a potential beyond the range stays at its end ("saturate") or wraps around ("wrap").
        state_leak: "exact" takes the leak to the nearest 2^-12; "shift" to the nearest 2^-k, which subtracts v >> k.
        checkpoint: a folder in which every finished step is kept. The same call with the same folder goes on after
            the last one, and ends with the plan of a run that was never stopped (where all that is random comes from
            torch's generators or the data loader's, as the built-in trainer's does).
        target: a chip that the result must fit on, a name (:func:`snncompress.targets`) or an instance. Nothing is
            skipped then unless ``skip`` says so, ``ratio`` is the most that may go from a layer (0.95 where nothing
            else is said), and only what the chip can't hold goes, besides what ``budget`` asks for. Bits are those that
            were asked for, lowered to what it holds; the first weight layer and the classifier get as many as it holds,
            where ``bits`` names no layers. Where it has one scale per layer, batch norms are folded first, and a
            quantizer that is named gets one scale, too, and states count in what one in their weights means, as those
            are behind ``finetune``. What compression can't change (neurons that leak where the chip
            has none such, max pooling) is an error that lists it.

    Returns:
        A new model of the same class, with the same call contract, flags and hooks (which run on calibration batches
        too, as part of the model); :func:`snncompress.plan_of` tells what was done. A model that was compressed before
        is compressed further, and its plan continues.

    Raises:
        SNNCompressError: ModelError, DataError, OptionError, PlanError or PluginError; the model is then unchanged.

    Example:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = torch.nn.Sequential(
        ...     layer.Conv2d(1, 8, 3), neuron.LIFNode(), layer.Conv2d(8, 16, 3), neuron.LIFNode(),
        ...     layer.Flatten(), layer.Linear(256, 10),
        ... )
        >>> small = apply(model, "magnitude", ratio=0.5, bits=4, data=torch.rand(2, 1, 8, 8), timesteps=4)
        >>> small[0].weight.shape, all(len(channel.unique()) <= 16 for channel in small[2].weight)
        (torch.Size([4, 1, 3, 3]), True)
        >>> from snncompress import plan_of
        >>> plan_of(small).skipped["2"]
        'it feeds the classifier'
    """
    found = find_adapter(model, named_neurons(adapter, neurons, time_dim))
    settings = Settings.of(
        criterion, ratio, bits, quantizer, scheduler, order, finetune, seed, truncate, repair, rounding, refresh,
        data is None, round_to, target, StateSettings(state_bits, state_overflow, state_leak),
    )  # fmt: skip
    limits = None if budget is None else Budget.of(budget)
    check_max_drop(max_drop, validation, data, checkpoint)
    if not weight_layers(model):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer: nothing to prune or quantize.")
    refuse_frozen(model, "compressed")
    compared = "" if max_drop is None or validation is not None else "max_drop, which compares accuracies, needs labels"
    needs: dict[str, Any] = {"noise": "scores", "labels": settings.needs_labels or compared, "seed": seed}
    origin: dict[str, Any] = {} if budget is None else {"budget": dict(budget)}
    with bench(
        model, data, timesteps, forward, loss, found, test=validation, **needs, gradients=True, unknown=True
    ) as table:
        settings, skip = prepared(table, settings, skip)
        if max_drop is not None:
            if validation is None:
                table.feed, table.test = table.feed.parted()
            best = smallest(max_drop, budget, table, settings, skip, progress)
            run, origin = best.run, best.origin
        else:
            if limits is not None or settings.chip is not None:
                settings = within(limits or Budget({}, {}), table, settings, skip, progress)
            run = Run(table.model, table.feed, settings.settled(), skip, progress)
            store = None if checkpoint is None else Checkpoint(checkpoint, _asked(run), model)
            run.carry_out(store)
        run.try_out(model)
        confirmed(table, run.model, run.settings)
    for warned in () if max_drop is None else best.warned:
        warnings.warn(warned, stacklevel=2)
    if why := run.why_nothing():
        warnings.warn(why, NothingToDoWarning, stacklevel=2)
    found.reset(run.model)
    found.adopt(run.model)
    _restore_flags(model, run.model)
    attach(run.model, continued(model, run.plan(origin)))
    return run.model


def _asked(run: Run[M]) -> dict[str, Any]:
    """All that tells one run from another."""
    feed, settings = run.feed, run.settings
    tuner = settings.finetune if callable(settings.finetune) else None
    functions = {"forward": feed.forward, "loss": feed.loss, "finetune": tuner}
    return {
        **settings.origin(feed.adapter.framework),
        "timesteps": feed.timesteps,
        "skip": [dict(run.skips.prune), dict(run.skips.quantize)],
        "order of keys": [list(v) if isinstance(v, Mapping) else [] for v in (settings.ratio, settings.bits)],
        "first batch": digest_of(feed.first().raw),
        "functions": {key: getattr(value, "__qualname__", type(value).__name__) for key, value in functions.items()},
    }


def _restore_flags(original: nn.Module, result: nn.Module) -> None:
    modes = {name: module.training for name, module in original.named_modules()}
    for name, module in result.named_modules():
        parent = name.split(".parametrizations", 1)[0]
        module.training = modes.get(name, modes.get(parent, result.training))
