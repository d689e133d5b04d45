"""A rehearsal with an example: where samples stand in the output, and whether the model remembers what it shouldn't."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.errors import KeptStateWarning, ModelError, SNNCompressError
from snncompress.model.chance import seeded
from snncompress.model.modules import in_mode, tensors_in

from .batches import Batch
from .data import Feed
from .sameness import all_same
from .scores import main_tensor
from .unknown import unknown_neurons, warn_of_unknown


def rehearse(model: nn.Module, feed: Feed, *, unknown: bool = False, stacklevel: int = 5) -> None:
    """Run an example on ``model``, a copy for this purpose; tell ``feed`` what was learned, and warn of kept state.

    With ``unknown``, warn of neurons that no adapter knows, too.
    """
    with seeded(model), in_mode(model, training=False), torch.no_grad(), feed.adapter.alone(model):
        before = _attributes(model)
        output, rows, strangers = _first_run(model, feed)
        feed.adapter.reset(model)
        changed = [name for name, tensors in _attributes(model).items() if _others(before.get(name, []), tensors)]
        if changed and not all_same(_floats(output), _floats(_again(model, feed))):
            warnings.warn(
                f"{type(model).__name__} answers the same batch otherwise the second time, although its neurons were "
                f"reset in between: it keeps state from batch to batch, probably in "
                f"{', '.join(map(repr, changed[:3]))}. What is measured then depends on the order of the batches. "
                f"Begin it anew in forward().",
                KeptStateWarning,
                stacklevel=stacklevel,  # the call of the user
            )
        if unknown:
            warn_of_unknown(model, strangers, feed.adapter, stacklevel=stacklevel + 1)
        feed.batch_first = _batch_first(model, feed, output, rows)


def _first_run(model: nn.Module, feed: Feed) -> tuple[Any, set[int], dict[str, str]]:
    """The output, the rows that neurons saw and neurons that no adapter knows, with as few samples as the model takes.

    One, as a rule. Two where a normalization over the batch would have a single value per channel, which torch refuses
    in training. As many as the first batch has where the model counts on them: it fails on fewer, or its neurons see as
    many rows as before. Where nothing says on which axis samples stand, those that the neurons see do.
    """
    batch = feed.first()
    if feed.samples_axis(batch) is None:  # its neurons may tell
        output, rows, strangers, _ = _watched(model, feed)
        sizes = batch.x.shape[:2] if isinstance(batch.x, Tensor) and feed.forward is None else ()
        places = [axis for axis, size in enumerate(sizes) if rows == {size}]
        if len(places) != 1:
            return output, rows, strangers
        feed.samples_on = places[0]
    axis = feed.samples_axis(batch)
    whole = None if axis is None else batch.x.shape[axis]
    for feed.few in (1, 2, None):
        last = feed.few is None or feed.example_batch() is batch
        try:
            output, rows, strangers, lone = _watched(model, feed)
        except SNNCompressError:
            if last:
                raise
            continue
        fixed = whole in rows and whole != feed.timesteps
        if last or not (fixed or (lone and feed.few == 1)):
            break
    return output, rows, strangers


def _watched(model: nn.Module, feed: Feed) -> tuple[Any, set[int], dict[str, str], bool]:
    """The same for an example, and whether a normalization has a single value per channel in each timestep."""
    steps: list[int] = []
    with (
        _rows(model, feed, steps) as rows, unknown_neurons(model, feed.adapter) as strangers,
        _values(model) as values,
    ):  # fmt: skip
        output = feed.example()(model)
    return output, rows, strangers, bool(values) and min(values) <= max(steps, default=1)


@contextmanager
def _values(model: nn.Module) -> Iterator[list[int]]:
    """Inside, notes how many values per channel normalizations over the batch get."""
    found: list[int] = []

    def look(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.append(args[0].numel() // int(cast(Any, norm).num_features))

    with ExitStack() as stack:
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                stack.callback(norm.register_forward_pre_hook(look).remove)
        yield found


@contextmanager
def _rows(model: nn.Module, feed: Feed, steps: list[int] | None = None) -> Iterator[set[int]]:
    """Inside, notes for how many samples at a time the neurons fire, and in how many ``steps``."""
    rows: set[int] = set()

    def listen(spikes: Tensor, _: Tensor | None) -> None:
        rows.add(spikes.shape[1])
        if steps is not None:
            steps.append(len(spikes))

    with ExitStack() as stack:
        for neuron in feed.adapter.neurons(model).values():
            with suppress(ModelError):  # which can't be watched, and says so where it must be
                stack.callback(feed.adapter.observe(neuron, listen, membrane=False))
        yield rows


def _batch_first(model: nn.Module, feed: Feed, output: Any, rows: set[int]) -> bool:
    found, x = main_tensor(output), feed.example_batch().x
    if isinstance(x, Tensor) and x.shape != feed.first().x.shape:
        rows = {feed.few or 1}
    if found is None or found.dim() != 3 or len(rows) != 1:
        return False
    a, b = found.shape[:2]
    (samples,) = rows
    if a != b:
        return bool(a == samples)
    if a == 1 or samples != a or feed.forward is not None or not isinstance(x, Tensor) or x.dim() < 2:
        return False
    try:  # one entry of the input less: is it a sample or a timestep, and where does the output lack it?
        with _rows(model, feed) as fewer:
            less = main_tensor(feed(model, Batch(x[:-1], None, None)))
    except SNNCompressError:  # the number of timesteps, or of samples, is fixed
        return False
    if less is None or less.dim() != 3:
        return False
    return bool((len(less) < a) == (fewer == {samples - 1}))


def _attributes(model: nn.Module) -> dict[str, list[Tensor]]:
    """What modules hold beside their parameters, by attribute."""
    held: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        values = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules", "_buffers")}
        for key, value in {**values, **module._buffers}.items():
            if tensors := list(tensors_in(value)):
                held[f"{name}.{key}".lstrip(".")] = [t.clone() for t in tensors]
    return held


def _others(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) != len(after) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def _again(model: nn.Module, feed: Feed) -> Any:
    with seeded(model):
        return feed.example()(model)


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tensors_in(output) if t.is_floating_point()]
