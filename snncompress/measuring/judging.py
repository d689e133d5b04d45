"""What a network costs and how well it classifies, in one pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from snncompress.interfaces import EnergyModel
from snncompress.running.data import Batch, Feed

from .conventions import resolve_conventions
from .evaluation import classified
from .profiling import measure
from .reporting import Profile


def judge(model: nn.Module, feed: Feed, energy: EnergyModel) -> tuple[Profile, float]:
    """Its profile and its accuracy (0 to 1) on labelled data."""
    right = 0

    def watch(output: Any, batch: Batch) -> None:
        nonlocal right
        predicted, labels = classified(output, batch.y, batch_first=feed.batch_first)
        right += int((predicted == labels).sum())

    found = measure(model, feed, energy, resolve_conventions(None), watch)
    return found, right / found.n_samples
