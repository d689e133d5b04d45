"""What users hand in as data, and how a model is run on it.

A ``Feed`` turns a tensor, an (x, y) batch, a Dataset, a DataLoader or any iterable of batches into batches that were
checked at the door, and runs a model on one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, default_collate

from snncompress.errors import DataError, SNNCompressError
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.model.modules import tensors_in, timestep_limit

Run = Callable[[nn.Module], Any]
"""Runs a model on an example batch."""
_SAMPLES = 64
"""In a batch of a Dataset."""


@dataclass(frozen=True)
class Batch:
    """One batch: inputs ``x`` and, where given, labels ``y`` [N]; ``raw`` is what the user's iterable yielded."""

    x: Any
    y: Tensor | None
    raw: Any


class Feed:
    """Batches, and the way to run a model on one.

    ``timesteps`` = T feeds static samples [N, ...] as constant current for T steps; None feeds a batch as it is;
    ``forward(model, batch)`` runs anything else and gets the batch as the user's iterable yields it. Where gradients
    are needed, ``loss(output, y)`` takes the place of cross-entropy. Batches come on the device of the model ``on``,
    where one is given.
    """

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
        self._data = _as_iterable(data)
        self._first: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for number, raw in enumerate(self._data):
            empty = False
            yield self._checked(raw if self._device is None else _moved(raw, self._device), number)
        if empty:
            raise DataError(
                "The data hold no batch. If this is an iterator that was used up, pass a list or a DataLoader."
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """Reset the neurons, run the batch, return the model's output."""
        self.adapter.reset(model)
        self.check(model, batch)
        try:
            with parametrize.cached():  # a masked or quantized weight is computed once, not at every timestep
                if self.forward is not None:
                    return self.forward(model, batch.raw)
                return self.adapter.run(model, batch.x, self.steps(model))
        except SNNCompressError:
            raise
        except Exception as error:  # the model is the user's: anything can come out of it
            what = f"shape {list(batch.x.shape)}" if isinstance(batch.x, Tensor) else f"type {type(batch.x).__name__}"
            if self.forward is not None:
                where, cause = "in forward=", "forward= doesn't fit the model or the batch."
            else:
                how = "as it is (timesteps=None)" if self.timesteps is None else f"with timesteps={self.timesteps}"
                where = f"fed {how}"
                cause = (
                    "the shape isn't what the model takes; a signature of its own wants forward=lambda model, batch: …"
                )
                if self.timesteps is None:
                    cause = f"static samples [N, ...] without timesteps=T; or {cause}"
            raise DataError(
                f"{type(model).__name__} failed on a batch of {what}, {where}: {type(error).__name__}: {error}. "
                f"Likely cause: {cause}"
            ) from error

    def steps(self, model: nn.Module) -> int | None:
        """For how many timesteps the model is fed: ``timesteps``, or the fewer that it was truncated to."""
        if self.timesteps is None:
            return None
        return min(self.timesteps, timestep_limit(model) or self.timesteps)

    def __len__(self) -> int:
        """Number of batches; TypeError where the data do not tell."""
        return len(self._data)  # type: ignore[arg-type]

    def first(self) -> Batch:
        """The first batch, remembered: a DataLoader would start its workers for it again."""
        if self._first is None:
            self._first = next(iter(self))
        return self._first

    def generators(self) -> list[torch.Generator]:
        """The random generators of the user's own data loader, which decide on the order of its batches."""
        batch_sampler = getattr(self._data, "batch_sampler", None)
        holders = (
            self._data,
            getattr(self._data, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        found = (getattr(holder, "generator", None) for holder in holders)
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def example(self) -> Run:
        """Runs one sample of the first batch through all timesteps: enough to see a network's structure."""
        batch = self.first()
        x = batch.x
        if self.forward is None and isinstance(x, Tensor):
            if self.timesteps is not None:
                x = x[:1]
            elif batch.y is not None:
                axes = [axis for axis, size in enumerate(x.shape[:2]) if size == len(batch.y)]
                x = x.narrow(axes[0], 0, 1) if len(axes) == 1 else x  # where T = N, either may be time
        return lambda model: self(model, Batch(x, batch.y, batch.raw))

    def _checked(self, raw: Any, number: int) -> Batch:
        x, y = _split(raw)
        if self.forward is None and not isinstance(x, Tensor):
            raise DataError(
                f"Batch {number} is a {type(raw).__name__}, not a tensor or an (x, y) pair. Convert it, or say how to "
                f"run it: forward=lambda model, batch: ..."
            )
        if isinstance(x, Tensor):
            if x.numel() == 0:
                raise DataError(f"Batch {number} is empty: shape {list(x.shape)}.")
            if x.is_floating_point() and not x.is_meta and not bool(torch.isfinite(x).all()):
                raise DataError(f"Batch {number} holds NaN or infinite values. Clean the data first.")
        return Batch(x, y, raw)

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Compare dtype and device of a batch with the model's parameters; raises DataError."""
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        x = batch.x
        if parameter is None or self.forward is not None or not isinstance(x, Tensor):
            return
        if x.dtype != parameter.dtype:
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


def _split(raw: Any) -> tuple[Any, Tensor | None]:
    if isinstance(raw, (tuple, list)) and len(raw) == 2 and isinstance(raw[1], Tensor):
        return raw[0], raw[1]
    if isinstance(raw, (tuple, list)) and len(raw) == 1:  # TensorDataset without labels
        return raw[0], None
    return raw, None


def _as_iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, Tensor) or _is_pair(data):
        return [data]
    if isinstance(data, (str, bytes, dict)) or not isinstance(data, (Iterable, Dataset)):
        raise DataError(
            f"data must be a tensor, an (x, y) batch, a DataLoader or an iterable of either, or a Dataset, not "
            f"{type(data).__name__}."
        )
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=_SAMPLES, collate_fn=_together)
    # Several passes are made (tracing, every pruning step), so a one-shot iterator is kept.
    return list(data) if isinstance(data, Iterator) else data


def _together(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:  # torch's own texts speak of its internals
        what = samples[0][0] if isinstance(samples[0], (tuple, list)) and samples[0] else samples[0]
        raise DataError(
            f"Samples of this dataset, such as a {type(what).__name__}, can't be stacked to a batch. Let it yield "
            f"tensors of one shape (a transform), or pass a DataLoader with a collate_fn of its own."
        ) from error


def _moved(value: Any, device: torch.device) -> Any:
    """The same on a device; containers without a tensor elsewhere are handed on as they are."""
    if isinstance(value, Tensor):
        if value.is_meta and device.type != "meta":
            raise DataError(f"The data are on meta, the model on {device}. Move one; tensors on meta hold no values.")
        return value.to(device)
    if all(tensor.device == device for tensor in tensors_in(value)):
        return value
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    items = [_moved(item, device) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _is_pair(data: Any) -> bool:
    """(x, y) rather than a list of two batches: y has no more than two dimensions, and fewer than x."""
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
        and data[1].dim() <= 2
        and (data[1].dim() < data[0].dim() or not data[1].is_floating_point())
    )
