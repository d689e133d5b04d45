"""Distillation: a small network learns what the one that it was made from, or another, makes of the same batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter
from snncompress.model.copying import private_copy
from snncompress.model.plan import has_plan, plan_of
from snncompress.running.batches import Batch
from snncompress.running.data import Feed
from snncompress.running.firing import watched
from snncompress.running.rehearsal import rehearse
from snncompress.running.scores import class_scores


@dataclass(frozen=True)
class Distillation:
    """What ``finetune(..., teacher=)`` learns from a teacher, and how much that counts.

        L = (1 - w) · L_y + w · τ² · KL(softmax(z' / τ) ‖ softmax(z / τ)) + ρ · mean over layers of mean (r - r')²

    L_y is the loss on the labels; z, z' [N, K] are the time-averaged class scores of the network and of the teacher;
    r, r' [N, C, ...] are their neurons' spikes per timestep, matched where a neuron of the same name is in both. Of
    channels that the network's plan removed, the teacher's are left out; what doesn't fit then isn't matched. (Inside
    ``apply(..., finetune=callable)`` the network holds no plan yet, so only neurons that are whole are.)

    Args:
        teacher: a network with the same classes, spiking or not, of either framework. It runs in eval mode, on a copy,
            and isn't trained.
        weight: w, 0 to 1. With 1 labels aren't used, and not needed.
        temperature: τ > 0; the higher, the more the classes count that the teacher finds unlikely.
        rates: ρ ≥ 0; 0 matches no firing rates.

    Raises:
        OptionError: a number out of range, or a teacher that is no network.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, on time-averaged scores.

    Example:
        >>> Distillation(nn.Linear(2, 2), weight=0.9).temperature
        2.0
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0
    rates: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise OptionError(f"teacher must be a network, or Distillation(network, …), not {self.teacher!r}.")
        for name, said in (("weight", "from 0 to 1"), ("temperature", "above 0"), ("rates", "of at least 0")):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            if not good or (value > 1 and name == "weight") or (value == 0 and name == "temperature"):
                raise OptionError(f"Distillation: {name} must be a number {said}, not {value!r}.")


class Teacher:
    """A teacher at work on the batches of ``feed``; raises OptionError where it can't teach ``student``."""

    def __init__(self, asked: Distillation, student: nn.Module, feed: Feed) -> None:
        self.asked = asked
        adapter = _adapter(asked.teacher, feed.adapter)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.model = private_copy(asked.teacher, adapter).to(device).eval().requires_grad_(False)
        self._feed = copy.copy(feed)  # the same batches, run as its framework has it
        self._feed.adapter = adapter
        rehearse(private_copy(self.model, adapter), self._feed)
        self._removed = plan_of(student).removed_channels("neuron") if has_plan(student) else {}

    def on(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Class scores [N, K], and where they are matched the firing rates of its neurons."""
        adapter = self._feed.adapter
        with torch.no_grad(), adapter.alone(self.model), self._watched() as rates:
            scores = class_scores(self._feed(self.model, batch), batch.samples, batch_first=self._feed.batch_first)
            return scores, dict(rates())

    @contextmanager
    def _watched(self) -> Iterator[Any]:
        if not self.asked.rates:
            yield dict
            return
        with watched(self.model, self._feed.adapter) as firing:
            yield firing.rates

    def divergence(self, scores: Tensor, taught: Tensor) -> Tensor:
        """τ² · KL, a mean over samples."""
        if scores.shape != taught.shape:
            raise OptionError(
                f"The teacher's class scores are {list(taught.shape)}, the network's {list(scores.shape)}. Take a "
                f"teacher with the same classes that answers for as many samples."
            )
        dtype = torch.promote_types(scores.dtype, torch.float32)
        own, other = (F.log_softmax(z.to(dtype) / self.asked.temperature, 1) for z in (scores, taught))
        return F.kl_div(own, other, reduction="batchmean", log_target=True) * self.asked.temperature**2

    def mismatch(self, rates: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
        """Mean over matched neurons of the mean squared difference of firing rates."""
        pairs = ((rate, self._fitting(name, rate, taught[name])) for name, rate in rates.items() if name in taught)
        found = [F.mse_loss(rate, other) for rate, other in pairs if other is not None]
        if not found:
            raise OptionError(
                f"Distillation(rates=…) matches neurons of the same name, and none of the network's ({_names(rates)}) "
                f"fits one of the teacher's ({_names(taught)}). Take the network that it was compressed from, "
                f"or rates=0."
            )
        return torch.stack(found).mean()

    def _fitting(self, name: str, rate: Tensor, taught: Tensor) -> Tensor | None:
        """The teacher's rates of the channels that the network still has."""
        if rate.shape == taught.shape:
            return taught
        gone = self._removed.get(name, [])
        axes = [axis for axis in range(1, min(rate.dim(), taught.dim())) if rate.shape[axis] != taught.shape[axis]]
        if rate.dim() != taught.dim() or len(axes) != 1 or taught.shape[axes[0]] != rate.shape[axes[0]] + len(gone):
            return None
        kept = torch.ones(taught.shape[axes[0]], dtype=torch.bool, device=taught.device)
        kept[gone] = False
        fitting = taught.movedim(axes[0], 0)[kept].movedim(0, axes[0])
        return fitting if fitting.shape == rate.shape else None


def _adapter(teacher: nn.Module, known: Adapter) -> Adapter:
    """The network's, where that knows the teacher's neurons; it may as well be of another framework, or of none."""
    try:
        return find_adapter(teacher, known)
    except ModelError:
        return find_adapter(teacher, plain=True)


def _names(rates: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name!r} {list(rate.shape[1:])}" for name, rate in rates.items()) or "none"
