"""Class scores of an output, and the loss of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snncompress.errors import DataError

from .data import Batch, Feed


def class_scores(output: Any) -> Tensor:
    """Scores per class, [N, K]: the time average of a model's output.

    A tuple or list (snnTorch's ``spikes, membrane``) counts by its first tensor; [T, N, K] is averaged over time,
    [N, K] is taken as it is. Raises DataError for anything else.

    >>> class_scores((torch.ones(4, 2, 10), None)).shape
    torch.Size([2, 10])
    """
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 3:
        output = output.mean(0)
    if not (isinstance(output, Tensor) and output.dim() == 2):
        what = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"Class scores are read from an output of shape [T, N, K] or [N, K]; this model returned {what}. Pass "
            f"forward=lambda model, batch: ... that returns such a tensor."
        )
    return output


def cross_entropy(output: Any, y: Tensor | None) -> Tensor:
    """Cross-entropy of the time-averaged output [T, N, K], or of [N, K], against labels: what ``finetune`` minimizes.

    Labels are class indices [N] or class probabilities [N, K]; raises DataError for anything else, or without labels.

    >>> cross_entropy(torch.zeros(4, 2, 2), torch.tensor([0, 1]))  # ln 2
    tensor(0.6931)
    """
    return F.cross_entropy(*scores_and_labels(output, y))


def scores_and_labels(output: Any, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores [N, K] and the labels that fit them: indices [N] in int64, or probabilities [N, K]."""
    if y is None:
        raise DataError("These data have no labels. Pass (x, y) batches, y being class indices [N] in a tensor.")
    scores = class_scores(output)
    if len(y) != len(scores):
        raise DataError(
            f"{len(y)} labels for {len(scores)} samples: output {list(scores.shape)}. Likely cause: the batch "
            f"and the time dimension are swapped; multi-step models take [T, N, ...]."
        )
    if y.device != scores.device:
        raise DataError(f"The labels are on {y.device}, the model on {scores.device}. Move one.")
    classes = scores.shape[1]
    if y.is_floating_point():
        if y.shape != scores.shape:
            raise DataError(
                f"Labels {list(y.shape)} in {y.dtype} must be class indices [N] or probabilities [N, {classes}]."
            )
        return scores, y.to(scores.dtype)
    if y.dim() != 1:
        raise DataError(f"Class indices must have shape [N], not {list(y.shape)}. y.squeeze() may be what is missing.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise DataError(f"Labels range from {low} to {high}, but the model has {classes} classes (0 … {classes - 1}).")
    return scores, y.long()


def loss_of(feed: Feed, output: Any, batch: Batch) -> Tensor:
    """The loss that the feed was given, or cross-entropy; raises DataError where it can't be a loss."""
    if feed.loss is None:
        return cross_entropy(output, batch.y)
    if batch.y is None:
        raise DataError("loss(output, y) needs labels, and these data have none. Pass (x, y) batches.")
    try:
        loss = feed.loss(output, batch.y)
    except Exception as error:  # the loss is the user's: anything can come out of it
        raise DataError(f"loss(output, y) failed: {type(error).__name__}: {error}") from error
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad == torch.is_grad_enabled()):
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"loss(output, y) must return a scalar that depends on the model's weights, not {what}. Likely cause: it "
            f"isn't averaged over the samples, or was detached."
        )
    return loss.reshape(())
