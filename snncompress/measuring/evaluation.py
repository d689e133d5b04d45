"""How well a network classifies: accuracy and F1 on labelled data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, together
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, Forward
from snncompress.model.computed_once import evaluating
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.running.bench import bench
from snncompress.running.data import Feed
from snncompress.running.scores import scores_and_labels


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Fields:
        accuracy: share of the samples whose highest class score is that of their label, 0 to 1.
        f1: macro F1, 0 to 1: the mean over classes of 2·TP / (2·TP + FP + FN); classes that are neither labels nor
            predictions are left out.
        n_samples: how many samples were classified.
    """

    accuracy: float
    f1: float
    n_samples: int


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
) -> Evaluation:
    """Accuracy and macro F1 of a network, spiking or not, on labelled data; scores are averaged over time.

    One pass in eval mode without gradients; train/eval flags are as before afterwards, neurons reset. Of several
    processes (torchrun) each classifies its own data, and all get the figures of all data. ``data`` yields
    (x, y) batches, y being class indices [N] or probabilities [N, K]; ``timesteps``, ``forward``, ``neurons`` and
    ``time_dim`` as in :func:`snncompress.apply`. Operations and energy: :func:`snncompress.profile`. F1 is that of
    scikit-learn.

    Raises DataError where the data have no labels or don't fit the model, ModelError for neurons of two frameworks,
    OptionError where scikit-learn isn't installed.

    >>> from spikingjelly.activation_based import neuron
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode())
    >>> net[0].weight.data = torch.eye(2)
    >>> evaluate(net, (torch.eye(2), torch.tensor([0, 1])), timesteps=1)
    Evaluation(accuracy=1.0, f1=1.0, n_samples=2)
    """
    named = named_neurons(adapter, neurons, time_dim)
    with bench(model, data, timesteps, forward, adapter=named, plain=True, mixed=True) as table:
        try:  # on the bench, since importing scikit-learn draws from Python's generator
            from sklearn.metrics import accuracy_score, f1_score
        except ImportError as error:
            raise OptionError(
                'evaluate() needs scikit-learn, which isn\'t installed: pip install "snncompress[metrics]".'
            ) from error
        with together():
            parts = zip(*_classified(table.model, table.feed), strict=True)
            own = [torch.cat(part).cpu() for part in parts]
        predicted, labels = (torch.cat(part).numpy() for part in zip(*gathered(own), strict=True))
    f1 = f1_score(labels, predicted, average="macro", zero_division=0.0)
    return Evaluation(float(accuracy_score(labels, predicted)), float(f1), len(labels))


def accuracy(model: nn.Module, feed: Feed) -> float:
    """Share of the samples whose highest class score is that of their label (or of their most probable class).

    One pass, in which memory doesn't grow with the number of batches; over what all processes have where there are
    several. Errors as for :func:`evaluate`.
    """
    right = total = 0
    with together():
        for predicted, labels in _classified(model, feed):
            right += int((predicted == labels).sum())
            total += len(labels)
    found = gathered((right, total))
    return sum(right for right, _ in found) / sum(total for _, total in found)


def classified(output: Any, y: Any, *, batch_first: bool = False) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels [N] of one batch; of labels that are probabilities, the most probable class."""
    scores, labels = scores_and_labels(output, y, batch_first=batch_first)
    return scores.argmax(1), labels.argmax(1) if labels.dim() == 2 else labels


def _classified(model: nn.Module, feed: Feed) -> Iterator[tuple[Tensor, Tensor]]:
    """Predicted classes and labels [N], batch by batch."""
    try:
        with evaluating(model):
            for batch in feed:
                yield classified(feed(model, batch), batch.y, batch_first=feed.batch_first)
    finally:
        feed.adapter.reset(model)
