"""What training minimises: the loss on the labels, and where asked a teacher's, and a penalty on spikes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from snncompress.errors import ModelError, OptionError
from snncompress.model.chance import held, undisturbed
from snncompress.model.copying import private_copy
from snncompress.model.modules import in_mode
from snncompress.running.batches import Batch
from snncompress.running.data import Feed
from snncompress.running.firing import Firing, watched
from snncompress.running.scores import class_scores, loss_of

from .distillation import Teacher
from .recipe import Recipe


class Objective:
    """What training minimises: the loss on the labels, a teacher's, and the penalty on spikes."""

    def __init__(self, model: nn.Module, feed: Feed, recipe: Recipe) -> None:
        self.feed, self.penalty = feed, recipe.rate_penalty
        asked = recipe.distillation
        self.firing: Firing | None = None
        self._rates = bool(self.penalty or (asked is not None and asked.rates))
        if self._rates and not feed.adapter.neurons(model):
            raise OptionError(
                f"{type(model).__name__} has no spiking neurons whose firing could be punished or matched."
            )
        self.teacher: Teacher | None = None
        if asked is not None or self._rates:
            with undisturbed(model), held(feed.generators()):
                self.teacher = None if asked is None else Teacher(asked, model, feed)
                self._try_out(private_copy(model, feed.adapter))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any, Tensor | None]:
        """Loss, the model's output, and the mean firing rate where it is punished."""
        feed, teacher = self.feed, self.teacher
        taught = None if teacher is None else teacher.on(batch)  # before: its forward may reset the framework's neurons
        if self.firing is not None:
            self.firing.restart()
        output = feed(model, batch)
        if teacher is None or taught is None:
            loss = loss_of(feed, output, batch)
        else:
            scores = class_scores(output, batch.samples, batch_first=feed.batch_first)
            w = teacher.asked.weight
            loss = w * teacher.divergence(scores, taught[0])
            if w < 1:
                loss = loss + (1 - w) * loss_of(feed, output, batch)
        if self.firing is None:
            return loss, output, None
        if teacher is not None and taught is not None and teacher.asked.rates:
            loss = loss + teacher.asked.rates * teacher.mismatch(self.firing.rates(), taught[1])
        rate = self.firing.mean()
        if self.penalty and rate is not None:
            loss = loss + self.penalty * rate
        return loss, output, None if rate is None else rate.detach()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Around calls: spikes are watched where they count."""
        if not self._rates:
            yield
            return
        with watched(model, self.feed.adapter) as self.firing:
            yield
        self.firing = None

    def _try_out(self, copied: nn.Module) -> None:
        """Raise what the first batch would, and where spikes come without gradients."""
        with in_mode(copied, training=False), self.feed.adapter.alone(copied), self.watching(copied):
            self(copied, self.feed.first())
            rate = None if self.firing is None else self.firing.mean()
            if self._rates and (rate is None or not rate.requires_grad):
                raise ModelError(
                    f"Firing rates can't be trained here: the spikes that the adapter of "
                    f"{self.feed.adapter.framework!r} shows have no gradient. Likely cause: the neurons have no "
                    f"surrogate gradient, or its observe() detaches spikes."
                )
