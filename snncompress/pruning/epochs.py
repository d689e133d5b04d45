"""What the epochs of a training come to, and the network as it was after the best of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import added, gathered
from snncompress.errors import DataError
from snncompress.interfaces import Adapter
from snncompress.measuring.evaluation import classified
from snncompress.running.batches import Batch
from snncompress.running.data import Feed


@dataclass(frozen=True)
class Epoch:
    """What an epoch of ``finetune`` came to.

    Fields:
        epoch: its number, from 1.
        loss: mean over samples of the loss that was minimised, while weights changed.
        accuracy: share of the training samples that were classified right meanwhile, 0 to 1; None where the labels
            aren't classes.
        learning_rate: of the optimizer's first group, when the epoch began.
        validation_accuracy: after it, on ``validation``; None without.
        firing_rate: spikes per neuron and timestep in training, with ``rate_penalty``; None without.
        seconds: how long it took, without validation.
    """

    epoch: int
    loss: float
    accuracy: float | None
    learning_rate: float
    validation_accuracy: float | None = None
    firing_rate: float | None = None
    seconds: float = 0.0


class Tally:
    """Loss, accuracy and firing rate of an epoch so far; they stay on the device until they are asked for."""

    def __init__(self, feed: Feed) -> None:
        self._batch_first, self._began = feed.batch_first, time.perf_counter()
        self._sums: dict[str, Tensor | float] = {}
        self._samples = 0
        self._classes = True

    def add(self, output: Any, batch: Batch, loss: Tensor, rate: Tensor | None) -> None:
        """A batch."""
        samples = batch.samples or 1
        try:
            predicted, labels = classified(output, batch.y, batch_first=self._batch_first)
        except DataError:  # the loss takes labels of another kind
            self._classes = False
        else:
            samples = len(labels)
            self._add("right", (predicted == labels).sum())
        self._add("loss", loss * samples)
        if rate is not None:
            self._add("rate", rate * samples)
        self._samples += samples

    def epoch(self, number: int, lr: float) -> Epoch:
        """All of it, at its end, and of all processes."""
        own = {name: float(value) for name, value in self._sums.items()}, self._samples, self._classes
        sums, self._samples, self._classes = functools.reduce(added, gathered(own))
        self._sums = dict(sums)
        right = self._mean("right") if self._classes else None
        seconds = time.perf_counter() - self._began
        return Epoch(number, self._mean("loss") or 0.0, right, lr, firing_rate=self._mean("rate"), seconds=seconds)

    def __str__(self) -> str:
        if not self._samples:
            return ""
        right = f", accuracy {self._mean('right'):.1%}" if self._classes else ""
        return f": loss {self._mean('loss'):.4g}{right}"

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _mean(self, name: str) -> float | None:
        return float(self._sums[name]) / self._samples if name in self._sums else None


class Best:
    """The network as it was when it was best on validation data."""

    def __init__(self) -> None:
        self._accuracy = -1.0
        self._state: dict[str, Tensor] = {}

    def offer(self, model: nn.Module, adapter: Adapter, measured: float | None) -> None:
        """Keep it, where it is better than all before."""
        if measured is not None and measured > self._accuracy:
            adapter.reset(model)
            self._accuracy = measured
            self._state = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    def restore(self, model: nn.Module, adapter: Adapter) -> None:
        """Put it back, where one was kept."""
        adapter.reset(model)
        with torch.no_grad():
            for name, tensor in _tensors(model):
                if name in self._state:
                    tensor.copy_(self._state[name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
