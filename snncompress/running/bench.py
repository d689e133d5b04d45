"""Where a model that isn't ours is worked on: a private copy with its data, in a room that lets nothing out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from snncompress.base.distributed import together
from snncompress.contract.detection import find_adapter
from snncompress.errors import DataError, SyntheticDataWarning
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.model.chance import cuda_devices, held, set_seed, undisturbed
from snncompress.model.copying import private_copy, refuse_broken, refuse_compiled, refuse_wrapped, same_everywhere

from .data import Feed
from .precision import full_precision
from .rehearsal import rehearse
from .synthetic import synthetic_feed

M = TypeVar("M", bound=nn.Module)


@dataclass
class Bench(Generic[M]):
    """A private copy of a model, the data that it runs on, and those that it is measured on (the same, if no other)."""

    model: M
    feed: Feed
    test: Feed
    seed: int = 0

    @property
    def adapter(self) -> Adapter:
        """Of the model's framework."""
        return self.feed.adapter

    def copy(self) -> M:
        """Another private copy."""
        return private_copy(self.model, self.adapter)

    def reseed(self) -> None:
        """Back to the first random state, so that noise inside the model is the same in runs that are compared."""
        set_seed(self.seed, cuda_devices(self.model))


@contextmanager
def bench(
    model: M,
    data: Any,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    *,
    test: Any = None,
    plain: bool = False,
    noise: Literal["scores", "structure"] | None = None,
    labels: str = "",
    seed: int = 0,
    gradients: bool = False,
    unknown: bool = False,
    mixed: bool = False,
) -> Iterator[Bench[M]]:
    """Inside, a copy of the model can be run, changed and trained.

    The model, torch's, numpy's and Python's global generators and the generators of the user's data loaders stay as
    they are; gradients are on or off, and inference mode, autocast and TensorFloat-32 are left, whatever holds outside:
    what is solved and compared wants the precision that the network has. Batches come on the model's device; everything
    random begins at ``seed``. Of several processes, all have the model of rank 0 on their benches.

    Args:
        model: anything that :func:`find_adapter` takes.
        data: what a :class:`Feed` takes.
        timesteps: as for a Feed.
        forward: as for a Feed.
        loss: as for a Feed.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        test: other data to measure on.
        plain: admits networks without spiking neurons.
        noise: what synthetic data may stand in for where ``data`` is None: "scores" warns the user of them,
            "structure" looks at shapes alone.
        labels: why labels are needed, "" where they aren't.
        seed: of all that is random.
        gradients: whether autograd records.
        unknown: whether to warn of neurons that no adapter knows.
        mixed: whether autocast and TensorFloat-32, where they hold outside, hold here too: where networks are measured
            as they would run.

    Raises:
        ModelError: no framework knows the model, or its weights hold NaN.
        DataError: the data don't fit it, or have no labels.
    """
    refuse_wrapped(model)
    with together():
        found = find_adapter(model, adapter, plain=plain)
        refuse_compiled(model)
        refuse_broken(model, found)
    precision = nullcontext() if mixed else full_precision()
    with undisturbed(model), precision, torch.inference_mode(False), torch.set_grad_enabled(gradients):
        with together():
            given = None if data is None and noise else Feed(found, data, timesteps, forward, loss, on=model)
            tested = None if test is None else Feed(found, test, timesteps, forward, on=model)
            work = private_copy(model, found)
        same_everywhere(work)
        generators = [g for feed in (given, tested) if feed is not None for g in feed.generators()]
        with held(generators), found.alone(work):
            set_seed(seed, cuda_devices(model))
            feed = given
            if feed is None:
                feed = _synthetic(work, found, timesteps, forward, labels, warn=noise == "scores")
            measured = feed if tested is None else tested
            for own in dict.fromkeys((feed, measured)):
                own.check(work, own.first())
            if labels and measured.labels(measured.first()) is None:
                raise DataError(
                    f"The data have no labels, and {labels}. Pass (x, y) batches, y being class indices [N]."
                )
            rehearse(private_copy(work, found), feed, unknown=unknown)
            measured.batch_first, measured.few, measured.samples_on = feed.batch_first, feed.few, feed.samples_on
            yield Bench(work, feed, measured, seed)


def _synthetic(
    model: nn.Module, adapter: Adapter, timesteps: int | None, forward: Forward | None, labels: str, *, warn: bool
) -> Feed:
    with warnings.catch_warnings():
        if not warn:  # nothing is scored
            warnings.simplefilter("ignore", SyntheticDataWarning)
        return synthetic_feed(model, adapter, timesteps, forward, labels)
