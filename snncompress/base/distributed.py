"""Several processes, each on its part of the data, as torchrun starts them: what they tell one another.

Every process goes through its own batches and adds up; at the end of the pass the sums are brought together, once, and
all go on from the same numbers. Where ``torch.distributed`` isn't initialized, each function returns what it is handed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from snncompress.errors import SNNCompressError

T = TypeVar("T")

_alone = ContextVar("_alone", default=False)


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside, this process sees its own data alone, and waits for no other.

    Under torchrun, what snncompress measures is brought together over all processes, so all must make the same calls.
    What one of them does for itself belongs in here, as what it does without gradients of others belongs in
    DistributedDataParallel's context manager of this name.

    >>> with no_sync():
    ...     processes()
    1
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def processes() -> int:
    """How many work together."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Which of them this is, from 0; the first decides where one must."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """Around what every process does for itself: where it fails in one of them, all raise, and none waits for it."""
    if processes() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gathered(None if failure is None else _told(failure))
    if failure is not None:
        raise failure
    for number, said in enumerate(told):
        if said is not None:
            kind, text = said
            raise kind(f"The process of rank {number} failed: {text}")


def _told(error: Exception) -> tuple[type[SNNCompressError], str]:
    if isinstance(error, SNNCompressError) and type(error).__module__ == SNNCompressError.__module__:
        return type(error), str(error)
    return SNNCompressError, f"{type(error).__name__}: {error}"


def gathered(value: T, device: torch.device | None = None) -> list[T]:
    """What each process has, in the order of their ranks; what was on a GPU comes on ``device``."""
    if processes() == 1:
        return [value]
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, _packed(value))
    mine = rank()
    return [value if number == mine else _unpacked(part, device) for number, part in enumerate(parts)]


def shared(value: T, device: torch.device | None = None) -> T:
    """What the process of rank 0 has."""
    if processes() == 1:
        return value
    first = rank() == 0
    parts: list[Any] = [_packed(value) if first else None]
    dist.broadcast_object_list(parts, src=0)
    return value if first else _unpacked(parts[0], device)


def summed(tensors: Sequence[Tensor]) -> None:
    """In place, the sums over all processes: of tensors of the same shapes everywhere."""
    if processes() == 1:
        return
    for tensor in tensors:
        there = _reachable(tensor.contiguous())
        dist.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)


def spread(tensors: Sequence[Tensor]) -> None:
    """In place, the values that they have in the process of rank 0: of tensors of the same shapes everywhere."""
    if processes() == 1 or not tensors:
        return
    with torch.no_grad():
        # as bytes, since not every backend knows every dtype
        flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        there = _reachable(torch.cat([part.to(flat[0].device) for part in flat]))
        dist.broadcast(there, src=0)
        if rank() == 0:
            return
        for tensor, part in zip(tensors, torch.split(there, [len(part) for part in flat]), strict=True):
            own = part.to(tensor.device).clone()  # where its dtype may begin
            tensor.detach().copy_(own.view(tensor.dtype).view(tensor.shape))


def added(one: Any, other: Any) -> Any:
    """The sum of two results: numbers and tensors are added, flags hold where both do, containers part by part.

    >>> added({"spikes": 3.0, "whole": True, "steps": [1, None]}, {"spikes": 2.0, "whole": False, "steps": [4, 2]})
    {'spikes': 5.0, 'whole': False, 'steps': [5, 2]}
    """
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, bool):
        return one and other
    if isinstance(one, dict):
        return {key: added(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, (list, tuple)):
        return type(one)(added(a, b) for a, b in zip(one, other, strict=True))
    return one + other


def _reachable(tensor: Tensor) -> Tensor:
    """Where the processes can exchange it: NCCL knows GPUs only."""
    backend = dist.get_backend()
    return tensor.cuda() if backend == "nccl" and tensor.device.type == "cpu" else tensor


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes, device: torch.device | None) -> Any:
    restored: Any = torch.serialization.default_restore_location
    place = str(device or "cpu")

    def there(storage: Any, where: str) -> Any:
        return storage if where == "cpu" else restored(storage, place)

    return torch.load(io.BytesIO(data), map_location=there, weights_only=False)  # of this very program
