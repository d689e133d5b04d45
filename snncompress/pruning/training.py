"""Class scores, the loss, and the built-in trainer for fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.model.chance import held
from snncompress.model.copying import private_copy
from snncompress.model.modules import in_mode
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.running.data import Feed
from snncompress.running.rehearsal import rehearse
from snncompress.running.scores import loss_of


def finetune(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a network, spiking or not, in place: Adam, a cosine schedule, cross-entropy on the time-averaged output.

    ``loss(output, y)`` takes the place of cross-entropy, as torch's and snnTorch's losses do.

    Removed channels and weights are gone, so nothing can bring them back; quantized weights are trained through the
    straight-through estimator. ``data`` yields (x, y) batches; ``timesteps``, ``forward``, ``neurons`` and
    ``time_dim`` as in :func:`snncompress.apply`. Batch order comes from torch's global generator: call
    ``torch.manual_seed`` for a repeatable run. The train/eval flags are as before afterwards. Returns the model. Raises
    DataError without labels or where the output isn't one of class scores, OptionError for a wrong number of epochs.

    >>> from spikingjelly.activation_based import neuron
    >>> model = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2))
    >>> x, y = torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> finetune(model, (x, y), epochs=2, timesteps=4) is model
    True
    """
    check_training(epochs, lr, weight_decay)
    found = find_adapter(model, named_neurons(adapter, neurons, time_dim), plain=True)
    feed = Feed(found, data, timesteps, forward, loss, on=model)
    with held(feed.generators()):
        rehearse(private_copy(model, found), feed, stacklevel=3)
    train(model, feed, epochs, lr, weight_decay, progress)
    return model


def check_training(epochs: Any, lr: Any, weight_decay: Any = 0.0) -> None:
    """Raise OptionError for what :func:`finetune` can't train with."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise OptionError(f"epochs must be a whole number of at least 0, not {epochs!r}.")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise OptionError(f"{name} must be a number of at least 0, not {value!r}.")


def train(
    model: nn.Module,
    feed: Feed,
    epochs: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    progress: Progress | None = None,
    what: str = "",
) -> None:
    """The loop behind :func:`finetune`; ``what`` begins the progress text."""
    if epochs == 0:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("Nothing to train: no parameter of this model requires a gradient.")
    optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    try:
        with in_mode(model, training=True), torch.inference_mode(False), torch.enable_grad():
            for epoch in range(epochs):
                for batch in tracked(feed, progress, f"{what}fine-tuning, epoch {epoch + 1}/{epochs}"):
                    optimizer.zero_grad()
                    loss_of(feed, feed(model, batch), batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                schedule.step()
    finally:
        optimizer.zero_grad()
        feed.adapter.reset(model)
