"""A training recipe: what ``finetune`` was asked for, checked, and the optimizer and schedule that it comes to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from snncompress.errors import OptionError

from .distillation import Distillation
from .epochs import Epoch

LR = 1e-3


OnEpoch = Callable[[Sequence[Epoch]], object]
"""Called after every epoch with all epochs so far; returns True to stop."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the fields are arguments of :func:`snncompress.finetune`.

    Raises OptionError for what can't be.
    """

    epochs: int = 1
    lr: float | None = None
    weight_decay: float | None = None
    optimizer: Optimizer | type[Optimizer] | MakeOptimizer | None = None
    scheduler: MakeScheduler | None = None
    clip: float | None = None
    amp: bool = False
    teacher: nn.Module | Distillation | None = None
    rate_penalty: float = 0.0
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 0:
            raise OptionError(f"epochs must be a whole number of at least 0, not {self.epochs!r}.")
        for name in ("lr", "weight_decay", "rate_penalty", "clip"):
            value = getattr(self, name)
            if value is None and name != "rate_penalty":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise OptionError(f"{name} must be a number of at least 0, not {value!r}.")
        if self.clip == 0:
            raise OptionError("clip is the largest norm that gradients may have, so it must be above 0; None: any.")
        if not isinstance(self.amp, bool):
            raise OptionError(f"amp must be True or False, not {self.amp!r}.")
        for name, form in (("scheduler", "scheduler(optimizer)"), ("on_epoch", "on_epoch(epochs)")):
            value = getattr(self, name)
            if value is not None and (not callable(value) or isinstance(value, LRScheduler)):
                raise OptionError(f"{name} must be callable as {form}, not {value!r}.")
        self._check_optimizer()
        if not (self.teacher is None or isinstance(self.teacher, (nn.Module, Distillation))):
            raise OptionError(f"teacher must be a network, or Distillation(network, …), not {self.teacher!r}.")

    def _check_optimizer(self) -> None:
        asked = self.optimizer
        if not (asked is None or isinstance(asked, Optimizer) or callable(asked)):
            raise OptionError(
                f"optimizer must be one of torch's classes, callable(parameters), or an optimizer, not {asked!r}."
            )
        named = [name for name in ("lr", "weight_decay") if getattr(self, name) is not None]
        if named and not (asked is None or _is_class(asked)):
            raise OptionError(
                f"{named[0]}={getattr(self, named[0])!r} says nothing to an optimizer that is made elsewhere. Pass a "
                f"class, optimizer=torch.optim.SGD, or give the optimizer the number."
            )

    @property
    def distillation(self) -> Distillation | None:
        """Of a network alone with the default weights."""
        return Distillation(self.teacher) if isinstance(self.teacher, nn.Module) else self.teacher

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Adam, or what was asked for; raises OptionError where it can't train these parameters in a plain loop."""
        asked = torch.optim.Adam if self.optimizer is None else self.optimizer
        options = {"lr": LR if self.lr is None else self.lr}
        if self.weight_decay is not None:
            options["weight_decay"] = self.weight_decay
        if not isinstance(asked, Optimizer):
            asked = _made("optimizer", asked, parameters, Optimizer, **(options if _is_class(asked) else {}))
        made: Optimizer = asked
        known = {id(p) for p in parameters}
        if not any(id(p) in known for group in made.param_groups for p in group["params"]):
            raise OptionError(
                "The optimizer holds none of this model's parameters. Likely cause: it was built for the network "
                "before compression, or for a copy. Pass optimizer=callable(parameters)."
            )
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise OptionError(
                f"{type(made).__name__} wants to compute the loss several times in a step. Take another optimizer, or "
                f"your own training loop: a compressed network trains like any other."
            )
        return made

    def make_schedule(self, optimizer: Optimizer) -> Schedule:
        """A cosine down to 0, or what was asked for; none where the user holds the optimizer."""
        if self.scheduler is not None:
            return Schedule(_made("scheduler", self.scheduler, optimizer, LRScheduler))
        if optimizer is self.optimizer:
            return Schedule(None)
        return Schedule(CosineAnnealingLR(optimizer, T_max=self.epochs))


class Schedule:
    """A learning rate's schedule, each kind stepped when it wants to be."""

    def __init__(self, inner: LRScheduler | None) -> None:
        self.inner = inner

    def after_batch(self) -> None:
        """OneCycleLR and CyclicLR count batches."""
        if isinstance(self.inner, (OneCycleLR, CyclicLR)):
            self._step()

    def after_epoch(self, epoch: Epoch) -> None:
        """All others count epochs. ReduceLROnPlateau is told the loss, or the accuracy where that is to grow."""
        if isinstance(self.inner, ReduceLROnPlateau):
            seen = epoch.accuracy if epoch.validation_accuracy is None else epoch.validation_accuracy
            if self.inner.mode == "max" and seen is None:
                raise OptionError("ReduceLROnPlateau(mode='max') wants an accuracy, and the labels aren't classes.")
            self._step(epoch.loss if self.inner.mode == "min" or seen is None else seen)
        elif self.inner is not None and not isinstance(self.inner, (OneCycleLR, CyclicLR)):
            self._step()

    def _step(self, *figures: float) -> None:
        inner: Any = self.inner
        try:
            inner.step(*figures)
        except Exception as error:  # the user's: OneCycleLR ends after as many steps as it was told
            raise OptionError(f"{type(self.inner).__name__} failed: {type(error).__name__}: {error}") from error


def _made(name: str, make: Any, what: Any, kind: type, **options: Any) -> Any:
    try:
        made = make(what, **options)
    except Exception as error:  # the user's: anything can come out of it
        raise OptionError(f"{name}= failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise OptionError(f"{name}= must return a torch {kind.__name__}, not {type(made).__name__}.")
    return made


def _is_class(optimizer: Any) -> bool:
    return isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
