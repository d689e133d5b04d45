"""Training steps of several processes at once: each on its own batch, with the mean of all gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snncompress.base.distributed import gathered, processes
from snncompress.errors import SNNCompressError
from snncompress.model.chance import undisturbed
from snncompress.model.copying import private_copy
from snncompress.model.modules import in_mode
from snncompress.running.batches import Batch

from .objective import Objective

_KEEP_BUFFERS = "forward_sync_buffers"
_OLD_KEEP_BUFFERS = "broadcast_buffers"
"""What neurons remember may stand in buffers, and is each process's own; torch has renamed the option."""


class Parallel:
    """The forward pass of a training step: ``objective(model, batch)``, in DDP where there are several processes.

    What DDP wraps is the model together with its loss: a network may be called once for every timestep, and DDP must
    see one call for every backward pass.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._objective, self._model = objective, model
        self._whole = _Whole(model, objective)
        self._called: nn.Module = self._whole
        if processes() > 1:
            objective.feed.adapter.reset(model)
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            options: dict[str, Any] = {_KEEP_BUFFERS if _KEEP_BUFFERS in known else _OLD_KEEP_BUFFERS: False}
            unused = any(gathered(_some_unused(model, objective)))
            self._called = DistributedDataParallel(self._whole, find_unused_parameters=unused, **options)

    def __call__(self, batch: Batch) -> tuple[Tensor, Any, Tensor | None]:
        """What the objective returns."""
        loss = self._called(batch)
        output, rate = self._whole.beside
        self._whole.beside = None, None
        return loss, output, rate

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around an epoch. A process whose data end before those of others goes on for their sake."""
        with self._objective.watching(self._model):
            if not isinstance(self._called, DistributedDataParallel):
                yield
                return
            with self._called.join():
                yield


class _Whole(nn.Module):
    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.beside: tuple[Any, Tensor | None] = (None, None)

    def forward(self, batch: Batch) -> Tensor:
        loss, output, rate = self.objective(self.model, batch)
        self.beside = output, rate
        return loss


def _some_unused(model: nn.Module, objective: Objective) -> bool:
    """Whether the loss doesn't depend on all parameters, or may not: DDP must look for them then, in every step."""
    adapter, batch = objective.feed.adapter, objective.feed.first()
    with undisturbed(model):
        copied = private_copy(model, adapter)
        copied.zero_grad()
        try:
            with in_mode(copied, training=True), adapter.alone(copied), objective.watching(copied):
                objective(copied, batch)[0].backward()  # type: ignore[no-untyped-call]
        except SNNCompressError:  # a loss that knows the model itself
            return True
    return any(p.requires_grad and p.grad is None for p in copied.parameters())
