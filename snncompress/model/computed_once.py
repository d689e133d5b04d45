"""Compressed weights are computed once for each call of the network, and not at every timestep.

A network that loops over time inside its forward asks for each weight T times, and a quantized weight takes longer to
compute than a small layer to multiply with it. So the compressed network has a hook before and a hook behind its
forward, between which computed weights are kept; :func:`computed_once` does the same for a pass over data.

What is kept is part of the graph of the call that computed it, so gradients are as if it were computed each time. It is
computed anew when the stored weight was written to, gradients were switched on or off, or a backward pass went through
it; and nothing is kept where the graph itself is recorded or replayed (torch.compile, torch.export, checkpointing).

:class:`Remembered` is for what is small, and long to compute: it is kept from call to call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .modules import in_mode


@dataclass
class _Computed:
    """A weight that was computed, what it was computed from, and how often either had been written to."""

    value: Tensor
    sources: tuple[Any, ...]
    versions: tuple[int, ...]

    def holds_for(self, sources: tuple[Any, ...]) -> bool:
        """Whether it would come out the same."""
        same = all(a is b for a, b in zip(self.sources, sources, strict=True))
        return same and self.versions == _versions(self.sources[0], self.value)


class _Kept(threading.local):
    """What is kept in this thread."""

    def __init__(self) -> None:
        self.values: dict[Any, _Computed] = {}
        self.passes = 0
        """How many :func:`computed_once` are open."""
        self.call: int | None = None
        """The network that is being called. One at most: inner calls, and calls that were broken off, end it."""


_KEPT = _Kept()


@contextmanager
def computed_once() -> Iterator[None]:
    """Inside, each compressed weight is computed once, until it is written to."""
    if not _KEPT.passes:
        _close()
    _KEPT.passes += 1
    try:
        yield
    finally:
        _KEPT.passes -= 1
        if not _KEPT.passes:
            _close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for a pass over data: each compressed weight is computed once."""
    with in_mode(model, training=False), torch.no_grad(), computed_once():
        yield


def once_per_call(model: nn.Module, *, wanted: bool) -> None:
    """Let each call of ``model`` compute each compressed weight once, or no longer."""
    for module in model.modules():  # parts that were networks of their own are now called by this one
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_begin, _end)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    if wanted:  # functions of a module, so that copies and pickles of the network keep them
        model.register_forward_pre_hook(_begin, prepend=True)
        model.register_forward_hook(_end, always_call=True)


def kept(owner: nn.Module, sources: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` returns; where it is kept, what it returned before from the same ``sources``, the first of which
    is the stored weight."""
    stored: Tensor = sources[0]
    if not (_KEPT.passes or _KEPT.call is not None) or stored.is_inference() or _recording():
        return compute()
    key = (
        owner, owner.training, stored.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(stored.device.type),
    )  # fmt: skip
    found = _KEPT.values.get(key)
    if found is not None and found.holds_for(sources):
        return found.value
    value = compute()
    made = _KEPT.values[key] = _Computed(value, sources, _versions(stored, value))
    if value.requires_grad and value is not stored:
        _forget_when_differentiated(_KEPT.values, key, made)
    return value


class Remembered:
    """A statistic of the rows of a matrix, which doesn't depend on the order within a row, from call to call.

    It is computed anew when a row holds other numbers, or ``beside`` is another: compared are the sums of the rows'
    bits, read as whole numbers, in one pass over the matrix. Nothing is remembered where a graph is recorded.

    >>> greatest, rows = Remembered(), torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    >>> greatest.of(rows, 0, lambda: rows.amax(1))
    tensor([4., 3.])
    >>> greatest.of(rows.clone(), 0, lambda: print("again"))
    tensor([4., 3.])
    """

    def __init__(self) -> None:
        self._found: tuple[Any, Tensor, Tensor] | None = None

    def of(self, rows: Tensor, beside: Any, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` returns for rows [C, N], without gradient; ``beside`` is all else that counts."""
        if _recording() or rows.is_meta or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            return compute()
        key, bits = (rows.shape, rows.dtype, rows.device, beside), _sums_of_bits(rows)
        if self._found is not None and self._found[0] == key and torch.equal(self._found[1], bits):
            return self._found[2].clone()
        value = compute().detach()
        with torch.inference_mode(False):  # a clone that gradients may meet later
            self._found = key, bits.clone(), value.clone()
        return value


def _sums_of_bits(rows: Tensor) -> Tensor:
    """[C, N] → [C], modulo 2^64; two floats of 32 bits are read as one number, which is faster."""
    rows = rows.detach().contiguous()
    size = rows.element_size()
    if size == 4 and rows.shape[1] % 2 == 0:
        size = 8
    return rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).sum(1)


def _begin(model: nn.Module, args: Any) -> None:
    if not _KEPT.passes and not torch.compiler.is_compiling():
        _close()
        _KEPT.call = id(model)


def _end(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and _KEPT.call == id(model):
        _close()


def _close() -> None:
    _KEPT.call = None
    _KEPT.values.clear()


def _versions(stored: Tensor, value: Tensor) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in (stored, value))


def _recording() -> bool:
    """Whether what is computed is taken down, to be computed again elsewhere, or stands for something else."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, counters of operations
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None)
    )


def _forget_when_differentiated(values: dict[Any, _Computed], key: Any, made: _Computed) -> None:
    """A backward pass frees the graph behind it, which a second one would miss."""
    noted = weakref.ref(made)

    def forget(gradient: Tensor) -> None:
        if values.get(key) is (entry := noted()) and entry is not None:
            del values[key]

    cast(Any, made.value).register_hook(forget)
