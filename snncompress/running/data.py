"""What users hand in as data, and how a model is run on it.

A ``Feed`` turns a tensor, an (x, y) batch, a Dataset, a DataLoader or any iterable of batches into batches that were
checked at the door, and runs a model on one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import shared, together
from snncompress.errors import DataError, SNNCompressError
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.model.chance import among
from snncompress.model.computed_once import computed_once
from snncompress.model.modules import timestep_limit

from .batches import Batch, as_iterable, moved, own_copy, refuse_unusual, split

__all__ = ["Batch", "Feed", "Run", "time_as_samples"]

Run = Callable[[nn.Module], Any]
"""Runs a model on an example batch."""


class Feed:
    """Batches, and the way to run a model on one.

    ``timesteps`` = T feeds static samples [N, ...] as constant current for T steps; None feeds a batch as it is;
    ``forward(model, batch)`` runs anything else and gets the batch as the user's iterable yields it. Where gradients
    are needed, ``loss(output, y)`` takes the place of cross-entropy. Batches come on the device of the model ``on``,
    where one is given. Models get a copy of every batch, so that one that writes to its input changes nothing.
    """

    batch_first = False
    """Whether an output [n, n, K] is [N, T, K] and not [T, N, K], as a rehearsal found."""
    few: int | None = 1
    """Samples in an example, as a rehearsal found; None for as many as the first batch holds."""
    samples_on: int | None = None
    """The axis of the input on which samples stand, as a rehearsal found where labels don't tell."""

    def __init__(
        self,
        adapter: Adapter,
        data: Any,
        timesteps: int | None = None,
        forward: Forward | None = None,
        loss: Loss | None = None,
        *,
        on: nn.Module | None = None,
    ) -> None:
        if timesteps is not None and (isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1):
            raise DataError(f"timesteps must be None or a whole number of at least 1, not {timesteps!r}.")
        if timesteps is not None and forward is not None:
            raise DataError("Give timesteps or forward, not both: forward drives the steps itself.")
        if forward is not None and not callable(forward):
            raise DataError(f"forward must be callable as forward(model, batch), not {forward!r}.")
        if loss is not None and not callable(loss):
            raise DataError(f"loss must be callable as loss(output, y), not {loss!r}.")
        self.adapter, self.timesteps, self.forward, self.loss = adapter, timesteps, forward, loss
        self._device = None if on is None else next((t.device for t in (*on.parameters(), *on.buffers())), None)
        self._data = as_iterable(data, whole=forward is not None)
        self._first: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for number, raw in enumerate(self._data):
            empty = False
            yield self._checked(raw if self._device is None else moved(raw, self._device), number)
        if empty:
            raise DataError(
                "The data hold no batch. If this is an iterator that was used up, pass a list or a DataLoader."
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """Reset the neurons, run the batch, return the model's output."""
        self.adapter.reset(model)
        self.check(model, batch)
        try:
            with self.adapter.differentiable(model), computed_once():
                if self.forward is not None:
                    return self.forward(model, own_copy(batch.raw))
                return self.adapter.run(model, own_copy(batch.x), self.steps(model))
        except SNNCompressError:
            raise
        except Exception as error:  # the model is the user's: anything can come out of it
            what = f"shape {list(batch.x.shape)}" if isinstance(batch.x, Tensor) else f"type {type(batch.x).__name__}"
            how = "as it is (timesteps=None)" if self.timesteps is None else f"with timesteps={self.timesteps}"
            where = f"fed {how}" if self.forward is None else "in forward="
            raise DataError(
                f"{type(model).__name__} failed on a batch of {what}, {where}: {type(error).__name__}: {error}. "
                f"Likely cause: {self._cause(batch, error)}"
            ) from error

    def _cause(self, batch: Batch, error: Exception) -> str:
        """Why a model may have failed on a batch."""
        if memory_ran_out(error):
            return "the batch is too large for what is free of the device's memory. Pass the data in smaller batches."
        first, x = self._first, batch.x
        whole = first is not None and self.example_batch() is first  # and it went through
        if (
            first is not None
            and whole
            and isinstance(first.x, Tensor)
            and isinstance(x, Tensor)
            and first.x.dim() == x.dim()
        ):
            unlike = [axis for axis in range(x.dim()) if x.shape[axis] != first.x.shape[axis]]
            if unlike in ([0], [1]):
                size = first.x.shape[unlike[0]]
                return (
                    f"forward has a batch size written in it; the first batch, of {size} samples, went through. Leave "
                    f"out the last, smaller one: DataLoader(..., batch_size={size}, drop_last=True)."
                )
        if self.forward is not None:
            return "forward= doesn't fit the model or the batch."
        cause = (
            "the shape isn't what the model takes, or the number of samples not what forward has written in it; a "
            "signature of its own wants forward=lambda model, batch: …"
        )
        return cause if self.timesteps is not None else f"static samples [N, ...] without timesteps=T; or {cause}"

    def steps(self, model: nn.Module) -> int | None:
        """For how many timesteps the model is fed: ``timesteps``, or the fewer that it was truncated to."""
        if self.timesteps is None:
            return None
        return min(self.timesteps, timestep_limit(model) or self.timesteps)

    def __len__(self) -> int:
        """Number of batches; TypeError where the data do not tell."""
        return len(self._data)  # type: ignore[arg-type]

    def first(self) -> Batch:
        """The first batch, remembered: a DataLoader would start its workers for it again.

        Of several processes it is that of rank 0, so that all see the same of the network's structure.
        """
        if self._first is None:
            with together():
                first = next(iter(self))
            self._first = self._checked(shared(first.raw, self._device), 0)
        return self._first

    def parted(self) -> tuple[Feed, Feed]:
        """Data to work with and data held out: every fifth batch, or the last fifth of each where there are fewer.

        The batches are gone through once and kept. Raises DataError where they can't be taken apart.
        """
        with together():
            batches = list(self._data)
            kept, out = [raw for number, raw in enumerate(batches, 1) if number % 5], batches[4::5]
            if not out:
                cut = [self._cut(raw, number) for number, raw in enumerate(batches)]
                kept, out = [part for part, _ in cut], [part for _, part in cut]
        return self._of(kept), self._of(out)

    def _cut(self, raw: Any, number: int) -> tuple[Any, Any]:
        batch = self._checked(raw, number)
        axis, y = self.samples_axis(batch), batch.y
        count = None if axis is None else batch.x.shape[axis]
        if count is None or count < 2 or not isinstance(y, (Tensor, list)) or len(y) != count:
            raise DataError(
                f"No samples of these data can be held out: there are fewer than five batches, and batch {number} "
                f"isn't two or more samples with a label each. Pass more batches, or other data as validation=."
            )
        left = count - max(1, count // 5)
        x = batch.x
        return (x.narrow(axis, 0, left), y[:left]), (x.narrow(axis, left, count - left), y[left:])

    def _of(self, batches: list[Any]) -> Feed:
        feed = copy.copy(self)
        feed._data, feed._first = batches, None
        return feed

    def labels(self, batch: Batch) -> Any:
        """What a loss is handed as ``y``, or None: of a batch that names no labels, the user's loss gets all of it."""
        unnamed = batch.y is None and self.forward is not None and self.loss is not None
        return batch.raw if unnamed and not isinstance(batch.raw, Tensor) else batch.y

    def generators(self) -> list[Any]:
        """The random generators of the user's data: those that decide on the order of batches, and a Dataset's own."""
        whole = getattr(self._data, "dataset", None)
        return among(*self._samplers(), whole, getattr(whole, "dataset", None))  # of a Subset all of it

    @contextmanager
    def in_epoch(self, number: int) -> Iterator[None]:
        """Inside, a DistributedSampler of the user's shuffles as in this epoch; it doesn't know of epochs by itself."""
        told = {id(s): s for s in self._samplers() if hasattr(s, "set_epoch") and hasattr(s, "epoch")}.values()
        before = [sampler.epoch for sampler in told]
        try:
            for sampler in told:
                sampler.set_epoch(number)
            yield
        finally:
            for sampler, epoch in zip(told, before, strict=True):
                sampler.set_epoch(epoch)

    def _samplers(self) -> list[Any]:
        """The user's data loader and what decides on its order."""
        batch_sampler = getattr(self._data, "batch_sampler", None)
        samplers = getattr(self._data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
        return [self._data, *samplers]

    def example_batch(self) -> Batch:
        """The first batch, or a ``few`` samples of it where it tells on which axis samples stand."""
        batch = self.first()
        axis = self.samples_axis(batch)
        if axis is None or self.few is None or self.few >= batch.x.shape[axis]:
            return batch
        return Batch(batch.x.narrow(axis, 0, self.few), batch.y, batch.raw)

    def samples_axis(self, batch: Batch) -> int | None:
        """The axis of the input on which samples stand; None where nothing tells, or ``forward`` takes it apart."""
        x = batch.x
        if self.forward is not None or not isinstance(x, Tensor):
            return None
        if self.timesteps is not None:
            return 0
        axes = [axis for axis, size in enumerate(x.shape[:2]) if size == batch.samples]
        return axes[0] if len(axes) == 1 else self.samples_on  # where T = N, either may be time

    @property
    def telling_timesteps(self) -> int | None:
        """``timesteps``; None where an example has as many samples, so that one could be taken for the other."""
        x = self.example_batch().x
        return None if isinstance(x, Tensor) and len(x) == self.timesteps else self.timesteps

    def example(self) -> Run:
        """Runs an :meth:`example_batch` through all timesteps: enough to see a network's structure."""
        batch = self.example_batch()
        return lambda model: self(model, batch)

    def _checked(self, raw: Any, number: int) -> Batch:
        x, y = split(raw)
        if self.forward is None and not isinstance(x, Tensor):
            raise DataError(
                f"Batch {number} is a {type(raw).__name__}, not a tensor or an (x, y) pair. Convert it, or say how to "
                f"run it: forward=lambda model, batch: ..."
            )
        if isinstance(x, Tensor):
            refuse_unusual(x, f"Batch {number}")
        batch = Batch(x, y, raw)
        indices = isinstance(y, Tensor) and not y.is_floating_point() and self.loss is None
        if self.timesteps is not None and indices and batch.samples not in (None, len(x)):
            raise DataError(
                f"Batch {number} has {batch.samples} labels for {len(x)} samples: x {list(x.shape)}. With timesteps= x "
                f"must be [N, ...], without an axis of time."
            )
        return batch

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Compare dtype and device of a batch with the model's parameters; raises DataError."""
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        x = batch.x
        if parameter is None or self.forward is not None or not isinstance(x, Tensor):
            return
        indices = not x.is_floating_point() and any(
            isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules()
        )
        if x.dtype != parameter.dtype and not indices:
            raise DataError(
                f"The data are {x.dtype}, the model's weights {parameter.dtype}. Convert the data: "
                f"x.to({parameter.dtype}), and scale bytes to [0, 1]."
            )
        if x.device != parameter.device:
            raise DataError(
                f"The data are on {x.device}, the model on {parameter.device}. Move one: "
                f"x.to({str(parameter.device)!r})."
            )


def time_as_samples(timesteps: int) -> str:
    """The message for a model that loops over time itself and was handed T steps of constant current."""
    return (
        f"With timesteps={timesteps} the neurons saw {timesteps} rows, not one for each sample: time was taken for "
        f"samples. Likely cause: the model loops over time itself; leave timesteps=None."
    )


def memory_ran_out(error: BaseException | None) -> bool:
    """Is it that, or was it raised for that? What a model does with less memory says nothing about its structure."""
    if isinstance(error, DataError):
        error = error.__cause__
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # on a CPU
    )
