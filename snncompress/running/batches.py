"""What users hand in as data: which of it is a batch, what in a batch are inputs and labels, and copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from snncompress.errors import DataError
from snncompress.model.modules import tensors_in

_SAMPLES = 64
"""In a batch of a Dataset."""
_LABELS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class Batch:
    """One batch: inputs ``x`` and, where given, labels ``y``; ``raw`` is what the user's iterable yielded."""

    x: Any
    y: Any
    raw: Any

    @property
    def samples(self) -> int | None:
        """How many samples the labels say there are: one entry each. None where they can't tell.

        Labels of more dimensions may be [N, ...] or [T, N, ...]; tensors of one length may be several targets.

        >>> [Batch(None, y, None).samples for y in (torch.zeros(3), [[1, 2], []], torch.zeros(3, 4), None)]
        [3, 2, None, None]
        >>> Batch(torch.zeros(5, 4), (torch.zeros(5), torch.zeros(5, 2)), None).samples is None
        True
        """
        if isinstance(self.y, Tensor):
            return len(self.y) if self.y.dim() == 1 else None
        return len(self.y) if isinstance(self.y, (list, tuple)) and not self._several_targets() else None

    def _several_targets(self) -> bool:
        """May the labels be as many tensors, each with an entry for every sample of the input?"""
        lengths = {len(y) if isinstance(y, Tensor) and y.dim() else None for y in self.y}
        return isinstance(self.x, Tensor) and len(lengths) == 1 and bool(lengths & {*self.x.shape[:2]} - {len(self.y)})


def split(raw: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch as a data loader yields it.

    (x, y) is a pair whatever y is. Of what ``forward=`` takes, labels are what goes by a name such as "y", "labels" or
    "target" in a mapping or an object, and the last of three parts or more; the input is then the whole batch.

    >>> [split(raw) for raw in (("x", "y"), ("x",), ("x", "more", "y"), {"image": "x", "label": "y"})]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('x', 'y'), ('x', None), (('x', 'more', 'y'), 'y'), ({'image': 'x', 'label': 'y'}, 'y')]
    """
    if isinstance(raw, Tensor):
        return raw, None
    if isinstance(raw, Mapping):
        return raw, _plain(next((raw[name] for name in _LABELS if name in raw), None))
    named = next((getattr(raw, name) for name in _LABELS if hasattr(raw, name)), None)
    if not isinstance(raw, (tuple, list)):
        return raw, _plain(named)
    if len(raw) == 1:  # TensorDataset without labels
        return raw[0], None
    if len(raw) == 2:
        return raw[0], _plain(raw[1])
    samples = all(isinstance(part, (tuple, list, Mapping)) for part in raw)  # as they were, not stacked
    return raw, _plain(named if named is not None or samples or not raw else raw[-1])


def _plain(labels: Any) -> Any:
    return torch.from_numpy(labels) if isinstance(labels, np.ndarray) and labels.dtype.kind in "iufb" else labels


def as_iterable(data: Any, *, whole: bool) -> Iterable[Any]:
    """Batches, to be gone through more than once; with ``whole``, a mapping is a batch too."""
    if isinstance(data, Tensor) or _is_pair(data) or (whole and isinstance(data, Mapping)):
        return [data]
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, (Iterable, Dataset)):
        raise DataError(
            f"data must be a tensor, an (x, y) batch, a DataLoader or an iterable of either, or a Dataset, not "
            f"{type(data).__name__}."
        )
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=_SAMPLES, collate_fn=_together)
    # Several passes are made (tracing, every pruning step), so a one-shot iterator is kept.
    return list(data) if isinstance(data, Iterator) else data


def _is_pair(data: Any) -> bool:
    """(x, y) rather than two batches: a tuple with a tensor in it that isn't a batch (x, y) itself.

    A list of two tensors that could follow each other as batches is two batches.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    x, y = data
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return isinstance(data, tuple) or not _alike(x, y)
    return isinstance(x, Tensor) or (isinstance(data, tuple) and isinstance(y, Tensor))


def _alike(a: Tensor, b: Tensor) -> bool:
    return (
        a.is_floating_point() == b.is_floating_point()
        and a.dim() == b.dim()
        and a.dim() > 1
        and sum(m != n for m, n in zip(a.shape, b.shape, strict=True)) <= 1
    )


def _together(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:  # torch's own texts speak of its internals
        what = samples[0][0] if isinstance(samples[0], (tuple, list)) and samples[0] else samples[0]
        raise DataError(
            f"Samples of this dataset, such as a {type(what).__name__}, can't be stacked to a batch. Let it yield "
            f"tensors of one shape (a transform), or pass a DataLoader with a collate_fn of its own."
        ) from error


def moved(value: Any, device: torch.device) -> Any:
    """The same on a device; containers without a tensor elsewhere are handed on as they are."""
    if isinstance(value, Tensor):
        if value.is_meta and device.type != "meta":
            raise DataError(f"The data are on meta, the model on {device}. Move one; tensors on meta hold no values.")
        return value.to(device)
    if all(tensor.device == device for tensor in tensors_in(value)):
        return value
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    items = [moved(item, device) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def own_copy(value: Any) -> Any:
    """The same in memory of its own, for a model that may write to it; what can't be copied is handed on."""
    if isinstance(value, Tensor):
        return value.clone()
    try:
        return copy.deepcopy(value, {id(tensor): tensor.clone() for tensor in tensors_in(value)})
    except Exception:  # locks, generators, handles: anything may be in a user's batch
        return value


def refuse_unusual(x: Tensor, what: str) -> None:
    """Raise DataError for a tensor that no network takes: without dimensions, empty, not dense, NaN."""
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "quantized" if x.is_quantized else "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise DataError(f"{what} is a tensor of layout {kind}. Make it dense: x.to_dense(), x.dequantize().")
    if x.dim() == 0:
        raise DataError(f"{what} is a single number, not samples [N, ...]. Likely cause: a tensor was iterated over.")
    if x.numel() == 0:
        raise DataError(f"{what} is empty: shape {list(x.shape)}.")
    if (x.is_floating_point() or x.is_complex()) and not x.is_meta and not bool(torch.isfinite(x).all()):
        raise DataError(f"{what} holds NaN or infinite values. Clean the data first.")
