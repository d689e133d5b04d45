"""Class scores of an output, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snncompress.errors import DataError

from .batches import Batch, own_copy
from .data import Feed

_SCORES = ("logits", "scores", "output", "out")


def main_tensor(output: Any) -> Tensor | None:
    """The tensor of an output that class scores are read from, or None.

    Of a tuple or list (snnTorch's ``spikes, membrane``) the first; of a mapping what is called "logits", "scores",
    "output" or "out", else the first.
    """
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping) and output:
            name = next((name for name in _SCORES if name in output), next(iter(output)))
            output = output[name]
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            return None
    return output


def class_scores(output: Any, samples: int | None = None, *, batch_first: bool = False) -> Tensor:
    """Scores per class, [N, K]: the time average of a model's output.

    [T, N, K] and [N, T, K] are averaged over time, [N, K] is taken as it is; of several tensors the
    :func:`main_tensor` counts. Where the number of ``samples`` doesn't tell N from T, ``batch_first`` does. Raises
    DataError for anything else.

    >>> class_scores((torch.ones(4, 2, 10), None)).shape, class_scores(torch.ones(2, 4, 10), samples=2).shape
    (torch.Size([2, 10]), torch.Size([2, 10]))
    """
    found = main_tensor(output)
    if found is not None and found.dim() == 3:
        found = found.mean(0 if samples_axis(found, samples, batch_first=batch_first) else 1)
    if found is None or found.dim() != 2:
        what = type(output).__name__ if found is None else f"shape {list(found.shape)}"
        raise DataError(
            f"Class scores are read from an output of shape [T, N, K], [N, T, K] or [N, K]; this model returned "
            f"{what}. Pass forward=lambda model, batch: ... that returns such a tensor."
        )
    return found


def samples_axis(output: Tensor, samples: int | None, *, batch_first: bool) -> int:
    """0 for [N, T, K], 1 for [T, N, K]."""
    sizes = list(output.shape[:2])
    if samples is not None and sizes.count(samples) == 1:
        return sizes.index(samples)
    return 0 if batch_first else 1


def count_samples(feed: Feed, output: Any, batch: Batch, rows: Collection[int] = ()) -> int:
    """How many samples a batch holds.

    In order of trust: one label each; what is fed as constant current; the ``rows`` that neurons saw at a time, where
    the input has an axis of that size; the output; labels of more dimensions; the input's first axis. Raises DataError
    where nothing tells.
    """
    x, y = batch.x, batch.y
    if batch.samples is not None:
        return batch.samples
    if isinstance(x, Tensor) and feed.timesteps is not None:
        return len(x)
    if isinstance(x, Tensor) and len(rows) == 1 and (row := next(iter(rows))) in x.shape[:2]:
        return row
    found = main_tensor(output)
    if found is not None and found.dim() in (2, 3):
        return len(class_scores(found, batch_first=feed.batch_first))
    for tensor in (y, x):
        if isinstance(tensor, Tensor) and tensor.dim():
            return len(tensor)
    raise DataError(
        "Neither the output nor the batch tells how many samples it holds. Yield (x, y) batches, or pass a forward "
        "that returns class scores [N, K], [T, N, K] or [N, T, K]."
    )


def cross_entropy(output: Any, y: Tensor | None) -> Tensor:
    """Cross-entropy of the time-averaged output [T, N, K] or [N, T, K], or of [N, K]: what ``finetune`` minimizes.

    Labels are class indices [N] or class probabilities [N, K]; raises DataError for anything else, or without labels.
    Where T = N, the output is taken for [T, N, K].

    >>> cross_entropy(torch.zeros(4, 2, 2), torch.tensor([0, 1]))  # ln 2
    tensor(0.6931)
    """
    return F.cross_entropy(*scores_and_labels(output, y))


def scores_and_labels(output: Any, y: Any, *, batch_first: bool = False) -> tuple[Tensor, Tensor]:
    """Scores [N, K] and the labels that fit them: indices [N] in int64, or probabilities [N, K]."""
    if y is None:
        raise DataError("These data have no labels. Pass (x, y) batches, y being class indices [N] in a tensor.")
    y = _tensor(y, output)
    scores = class_scores(output, len(y), batch_first=batch_first)
    if len(y) != len(scores):
        raise DataError(
            f"{len(y)} labels for {len(scores)} samples: output {list(scores.shape)}. Likely cause: the batch "
            f"and the time dimension are swapped; multi-step models take [T, N, ...]."
        )
    if y.device != scores.device:
        raise DataError(f"The labels are on {y.device}, the model on {scores.device}. Move one.")
    classes = scores.shape[1]
    if y.is_floating_point():
        if y.shape != scores.shape or not _probabilities(y):
            raise DataError(
                f"Labels {list(y.shape)} in {y.dtype} must be class indices [N] or probabilities [N, {classes}], which "
                f"add up to 1; for targets of another kind pass loss=lambda output, y: …"
            )
        return scores, y.to(scores.dtype)
    if y.dim() != 1:
        what = "y.float(), if they are one-hot," if y.shape == scores.shape else "y.squeeze()"
        raise DataError(f"Class indices must have shape [N], not {list(y.shape)}. {what} may be what is missing.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise DataError(f"Labels range from {low} to {high}, but the model has {classes} classes (0 … {classes - 1}).")
    return scores, y.long()


def _probabilities(y: Tensor) -> bool:
    """Is every row a distribution over classes, up to what half precision rounds? Targets of a regression are not."""
    return bool((y >= 0).all()) and bool(((y.sum(1, dtype=torch.float64) - 1).abs() < 0.01).all())


def _tensor(y: Any, output: Any) -> Tensor:
    """Labels as a tensor with at least one entry."""
    if isinstance(y, (list, tuple)) and y and all(type(label) in (int, float) for label in y):
        found = main_tensor(output)
        y = torch.tensor(y, device=None if found is None else found.device)
    if not isinstance(y, Tensor) or y.layout != torch.strided or y.is_complex() or y.dim() == 0 or not len(y):
        what = f"{y.dtype} {y.layout} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(
            f"Labels must be class indices [N] or probabilities [N, K] in a dense tensor, not {what}. For targets of "
            f"another kind pass loss=lambda output, y: …, which gets them as they are."
        )
    return y


def loss_of(feed: Feed, output: Any, batch: Batch) -> Tensor:
    """The loss that the feed was given, or cross-entropy; raises DataError where it can't be a loss."""
    y = feed.labels(batch)
    if feed.loss is None:
        return F.cross_entropy(*scores_and_labels(output, y, batch_first=feed.batch_first))
    if y is None:
        raise DataError("loss(output, y) needs labels, and these data have none. Pass (x, y) batches.")
    try:
        loss = feed.loss(output, own_copy(y))
    except Exception as error:  # the loss is the user's: anything can come out of it
        raise DataError(f"loss(output, y) failed: {type(error).__name__}: {error}") from error
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad == torch.is_grad_enabled()):
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"loss(output, y) must return a scalar that depends on the model's weights, not {what}. Likely cause: it "
            f"isn't averaged over the samples, or was detached."
        )
    return loss.reshape(())
