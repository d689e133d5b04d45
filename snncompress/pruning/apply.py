"""apply(): the whole story, top-down."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from snncompress.base.progress import Progress
from snncompress.contract import registry as _registry
from snncompress.contract.detection import find_adapter
from snncompress.errors import DataError, ModelError, NothingToDoWarning, OptionError
from snncompress.interfaces import Adapter, BlockCriterion, Criterion, Forward, Loss, Quantizer, Scheduler, Scope
from snncompress.measuring.temporal import analyse
from snncompress.model.copying import cuda_devices, private_copy, set_seed
from snncompress.model.edits import Edit, QuantizeWeights
from snncompress.model.network import Network, computed_or_shared, weight_layers
from snncompress.model.parametrizations import quantize_weight
from snncompress.model.plan import Plan, attach, continued
from snncompress.running.data import Feed
from snncompress.running.synthetic import synthetic_feed
from snncompress.structure.tracing import trace
from snncompress.structure.truncation import truncation
from snncompress.version import __version__

from .block_pruning import BlockPruning
from .checkpoint import Checkpoint, digest_of
from .selection import Skips, check_bits, check_ratio, overruled, per_layer, resolve_skip, targets, weight_ratios
from .steps import ChannelPruning, Pruning, WeightPruning
from .training import train

M = TypeVar("M", bound=nn.Module)
Finetune = int | Callable[[nn.Module], object] | None


def apply(
    model: M,
    criterion: str | Criterion | None = "svs",
    ratio: float | Mapping[str, float] = 0.6,
    bits: int | Mapping[str, int | None] | None = 4,
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
    seed: int = 0,
    progress: Progress | None = None,
    truncate: Literal["auto"] | int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> M:
    """Compress a spiking network: remove channels or weights, quantize; the original stays bitwise as it was.

    Args:
        model: a SpikingJelly or snnTorch network.
        criterion: which channels or weights matter: a name (:func:`snncompress.criteria` lists them), an instance, or
            None to prune nothing. What it scores is what goes: whole channels, or single weights, which are exactly
            0 from then on, however the model is trained.
        ratio: share to remove: a number for every prunable layer, or a mapping from layer name or glob to number.
            Nothing goes from a layer that no key matches. Of c channels ⌈ratio · c⌉ go, coupled layers following
            their smallest ratio; of n weights ⌊ratio · n⌋, those removed before included.
        bits: weight bit width, 1 to 16: a number, a mapping, or None for no quantization.
        data: calibration data: a tensor, an (x, y) batch, a DataLoader, or any iterable of either. Without any, a
            synthetic batch of the shape the model takes is used, and a SyntheticDataWarning says so.
        timesteps: T feeds static samples [N, ...] as constant current for T steps; None feeds a batch as it is
            ([T, N, ...] for a multi-step model).
        forward: ``forward(model, batch)`` runs a model that takes anything else.
        loss: ``loss(output, y)``, for criteria that need gradients and for fine-tuning by epochs; None: cross-entropy
            on the time-averaged output.
        quantizer: name or instance.
        scheduler: name or instance: in how many steps they go; each step scores what the one before has left.
        order: "qp" quantizes first, then prunes (QP-SNN); "pq" the reverse.
        finetune: None, a number of epochs for the built-in trainer (labels from ``data``, learning rate 1e-3), or
            ``callable(model)``, which trains in place. Called after quantization and after each pruning step.
        skip: None: the first weight layer and the classifier stay at 32 bits and the classifier's input layer keeps
            its channels. Names or globs of layers to leave alone altogether take the place of that default; an empty
            list leaves out nothing. ``{"prune": …}`` or ``{"quantize": …}`` replaces one half of it. A classifier's
            outputs are never pruned; single weights are, in every layer.
        adapter: settles the framework by hand.
        seed: seed of everything random; same seed, data and threads give bitwise the same plan.
        progress: None or True for a bar where stderr is a terminal, False for none, or ``callable(what, done, total)``.
        truncate: number of timesteps that the result runs, or "auto" for those that matter
            (:func:`snncompress.temporal_analysis`); None leaves them.
        checkpoint: a folder in which every finished step is kept. The same call with the same folder goes on after
            the last one, and ends with the plan of a run that was never stopped (where all that is random comes from
            torch's generators or the data loader's, as the built-in trainer's does).

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
        >>> small[0].weight.shape, len(small[2].weight.unique()) <= 16
        (torch.Size([4, 1, 3, 3]), True)
        >>> from snncompress import plan_of
        >>> plan_of(small).skipped["2"]
        'it feeds the classifier'
    """
    found = find_adapter(model, adapter)
    chosen = None if criterion is None else _registry.registry().resolve("criterion", criterion, Criterion)
    codec: Quantizer = _registry.registry().resolve("quantizer", quantizer, Quantizer)
    schedule: Scheduler = _registry.registry().resolve("scheduler", scheduler, Scheduler)
    _check_options(chosen, order, finetune, seed, truncate)

    if not weight_layers(model):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer: nothing to prune or quantize.")
    work = private_copy(model, found)
    devices = cuda_devices(model)
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), found.alone(work):
        set_seed(seed, devices)
        if data is None:
            feed = synthetic_feed(work, found, timesteps, forward, needs_labels=_needs_labels(chosen, finetune))
        else:
            feed = Feed(found, data, timesteps, forward, loss)
            feed.check(work, feed.first())
            if (why := _needs_labels(chosen, finetune)) and feed.first().y is None:
                raise DataError(f"The data have no labels, and {why}. Pass (x, y) batches, y being class indices [N].")
        network = trace(work, found, feed.example(), timesteps=feed.timesteps)
        names = weight_layers(work)
        skips = resolve_skip(skip, network, names, chosen.granularity if chosen is not None else "channel")
        widths: dict[str, int | None] = per_layer(bits, names, "bits", check_bits)
        pruning, skipped = _pruning(work, feed, network, chosen, ratio, skips)
        _check_quantizable(work, widths, skips)
        _warn_of_overruled("bits", overruled(bits, skips.quantize))
        if chosen is not None:
            _warn_of_overruled("ratio", overruled(ratio, skipped))

        def quantize(what: str) -> list[Edit]:
            return _quantize(work, codec, widths, skips)

        def prune(step: int, what: str) -> list[Edit]:
            if pruning is None or not (scores := pruning.score(feed, seed + step, progress, what)):
                return []
            return pruning.step(scores, lambda target: schedule.ratio(target, step, schedule.n_steps))

        def redo(edit: Edit) -> None:
            if pruning is not None:
                pruning.redo(edit)
            else:
                edit.apply(work, found)

        def tune(what: str) -> None:
            if callable(finetune):
                result = finetune(work)
                if isinstance(result, nn.Module) and result is not work:
                    raise OptionError("finetune= must train the model that it is handed in place, not return another.")
                found.reset(work)
            elif finetune:
                train(work, feed, finetune, progress=progress, what=what)

        settings = _origin(found, chosen, ratio, bits, codec, schedule, order, finetune, seed, data is None, truncate)
        steps: list[Callable[[str], list[Edit]]] = [partial(prune, n + 1) for n in range(schedule.n_steps)]
        steps.insert(0 if order == "qp" else len(steps), quantize)
        store = None
        if checkpoint is not None:
            functions = {"forward": forward, "loss": loss, "finetune": finetune if callable(finetune) else None}
            asked = {
                "timesteps": timesteps,
                "skip": [dict(skips.prune), dict(skips.quantize)],
                "order of keys": [list(value) if isinstance(value, Mapping) else [] for value in (ratio, bits)],
                "first batch": digest_of(feed.first().raw),
            }
            named = {key: getattr(value, "__qualname__", type(value).__name__) for key, value in functions.items()}
            store = Checkpoint(checkpoint, {**settings, **asked, "functions": named}, model)
        done, edits = store.resume(work, feed, redo) if store else (0, [])
        for number, step in enumerate(steps[done:], done + 1):
            what = f"step {number}/{len(steps)}: "
            if new := step(what):
                edits = _joined(edits, new)
                tune(what)
            if store:
                store.save(number, edits, work, feed)

        if truncate is not None:
            t = analyse(work, feed, progress=progress).t_star if truncate == "auto" else truncate
            if cut := truncation(work, found, feed, t):
                cut.apply(work, found)
                edits.append(cut)

    if not edits and (any(widths.values()) or (chosen is not None and _positive(ratio))):
        left = {**(skips.quantize if any(widths.values()) else {}), **skipped}
        reasons = "; ".join(f"{name!r}: {why}" for name, why in left.items())
        remedy = "skip=[] leaves out nothing that can be compressed"
        warnings.warn(
            f"Nothing was compressed. {reasons}. {remedy}."
            if reasons
            else "Nothing was compressed: no layer has that much left to lose.",
            NothingToDoWarning,
            stacklevel=2,
        )
    found.reset(work)
    found.adopt(work)
    _restore_flags(model, work)
    attach(work, continued(model, Plan(tuple(edits), skipped, settings)))
    return work


def _quantize(model: nn.Module, quantizer: Quantizer, widths: dict[str, int | None], skips: Skips) -> list[Edit]:
    edits: list[Edit] = []
    for name, bits in widths.items():
        if bits is not None and name not in skips.quantize:
            edit = QuantizeWeights.of(name, quantizer, bits)
            edit.check(model)
            quantize_weight(model.get_submodule(name), quantizer, bits)
            edits.append(edit)
    return edits


def _pruning(
    model: nn.Module, feed: Feed, network: Network, criterion: Criterion | None, ratio: Any, skips: Skips
) -> tuple[Pruning | None, dict[str, str]]:
    """What removes channels, weights or blocks, and why which layers stay whole."""
    if criterion is None:
        return None, {}
    if isinstance(criterion, BlockCriterion):
        share = check_ratio(ratio, "ratio", all_may_go=True)
        blocks = BlockPruning(model, feed.adapter, criterion, feed, share)
        return blocks, blocks.skipped
    if criterion.granularity == "channel":
        todo, skipped = targets(network, ratio, skips)
        return ChannelPruning(model, feed.adapter, criterion, network, todo), skipped
    unused = {name: why for name, why in network.skipped.items() if name not in network.layers}
    ratios, skipped = weight_ratios(weight_layers(model), ratio, skips, unused | computed_or_shared(model))
    return WeightPruning(model, feed.adapter, criterion, network, ratios), skipped


def _joined(edits: list[Edit], new: list[Edit]) -> list[Edit]:
    """The edits so far, less those that new ones make superfluous, and the new ones."""
    return [edit for edit in edits if not any(later.supersedes(edit) for later in new)] + new


def _check_options(criterion: Criterion | None, order: str, finetune: Finetune, seed: int, truncate: Any) -> None:
    if order not in ("qp", "pq"):
        raise OptionError(f"order must be 'qp' (quantize, then prune) or 'pq', not {order!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
    if truncate not in (None, "auto") and (isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1):
        raise OptionError(f"truncate must be None, 'auto' or a number of timesteps, not {truncate!r}.")
    if not (finetune is None or callable(finetune)) and (
        isinstance(finetune, bool) or not isinstance(finetune, int) or finetune < 0
    ):
        raise OptionError(f"finetune must be None, a number of epochs or callable(model), not {finetune!r}.")
    known = ("block",) if isinstance(criterion, BlockCriterion) else ("channel", "weight")
    if criterion is not None and criterion.granularity not in known:
        raise OptionError(
            f"Criterion {criterion.name!r} has granularity {criterion.granularity!r}; a Criterion scores a 'channel' "
            f"or a 'weight', a BlockCriterion a 'block'."
        )
    if criterion is not None and criterion.scope not in get_args(Scope):
        raise OptionError(f"Criterion {criterion.name!r}: scope must be 'layer' or 'global', not {criterion.scope!r}.")
    if criterion is not None and (unknown := criterion.needs - {"spikes", "membrane", "gradients"}):
        raise OptionError(
            f"Criterion {criterion.name!r} needs {sorted(unknown)}; known are 'spikes', 'membrane', 'gradients'."
        )


def _positive(ratio: Any) -> bool:
    return any(ratio.values()) if isinstance(ratio, Mapping) else ratio > 0


def _warn_of_overruled(what: str, layers: dict[str, str]) -> None:
    for name, why in layers.items():
        warnings.warn(
            f"{what} names {name!r}, which is left alone: {why}. skip= says which layers to leave alone; skip=[] none.",
            NothingToDoWarning,
            stacklevel=3,
        )


def _needs_labels(criterion: Criterion | None, finetune: Finetune) -> str:
    if criterion is not None and "gradients" in criterion.needs:
        return f"criterion {criterion.name!r} needs labels"
    return "finetune needs labels" if isinstance(finetune, int) and finetune > 0 else ""


def _check_quantizable(model: nn.Module, widths: dict[str, int | None], skips: Skips) -> None:
    for name, bits in widths.items():
        if bits is not None and name not in skips.quantize:
            QuantizeWeights(name, "", bits, {}).check(model)  # before anything takes time


def _restore_flags(original: nn.Module, result: nn.Module) -> None:
    modes = {name: module.training for name, module in original.named_modules()}
    for name, module in result.named_modules():
        parent = name.split(".parametrizations", 1)[0]
        module.training = modes.get(name, modes.get(parent, result.training))


def _origin(
    adapter: Adapter, criterion: Criterion | None, ratio: Any, bits: Any, quantizer: Quantizer, scheduler: Scheduler,
    order: str, finetune: Finetune, seed: int, synthetic: bool, truncate: Any,
) -> dict[str, Any]:  # fmt: skip
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return float(value) if isinstance(value, Real) and not isinstance(value, int) else value

    def named(plugin: Any) -> dict[str, Any] | None:
        return None if plugin is None else {"name": plugin.name, "options": plugin.options()}

    return {
        "snncompress": __version__,
        "torch": torch.__version__,
        "framework": adapter.framework,
        "criterion": named(criterion),
        "ratio": plain(ratio),
        "bits": plain(bits),
        "quantizer": named(quantizer),
        "scheduler": named(scheduler),
        "order": order,
        "finetune": finetune if isinstance(finetune, int) else None if finetune is None else "callable",
        "seed": seed,
        "data": "synthetic" if synthetic else "given",
        "truncate": truncate,
    }
