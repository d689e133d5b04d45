"""Spikes of frozen networks: as floats, or a byte each behind a tensor that passes for floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from snncompress.errors import DataError

MOST = 127
"""The largest number that a byte is trusted with: pairs of products with 8-bit weights then fit 16 bits, in which
processors without instructions for neural networks add them up."""

_T: Any = Tensor
_SAME = {
    _T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.unflatten, torch.unflatten, _T.squeeze,
    torch.squeeze, _T.unsqueeze, torch.unsqueeze, _T.permute, torch.permute, _T.transpose, torch.transpose, _T.movedim,
    torch.movedim, _T.t, torch.t, _T.contiguous, _T.clone, torch.clone, _T.detach, torch.detach, _T.__getitem__,
    _T.select, torch.select, _T.narrow, torch.narrow, _T.chunk, torch.chunk, _T.split, torch.split, _T.unbind,
    torch.unbind, _T.__iter__, _T.expand, _T.expand_as, _T.repeat, _T.flip, torch.flip, _T.roll, torch.roll,
    _T.index_select, torch.index_select, torch.cat, torch.concat, torch.stack, F.pixel_unshuffle, F.pixel_shuffle,
}  # fmt: skip
"""Functions that move numbers about, and do so whatever their type is."""
_ABOUT = {
    _T.dim, _T.size, _T.numel, _T.nelement, _T.__len__, _T.is_floating_point, torch.is_floating_point, torch.numel,
    _T.is_complex, torch.is_complex, _T.stride, _T.is_contiguous, _T.get_device, _T.ndimension, _T.element_size,
    *(getattr(_T, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
        "is_sparse", "is_quantized", "is_mkldnn", "is_meta", "grad", "is_nested",
    )),
}  # fmt: skip
"""What is asked of a tensor besides its numbers."""


class Spikes(Tensor):
    """Whole numbers from 0 to 127 in ``counts`` (uint8), to all the world a tensor of float32.

    What moves numbers about, takes maxima, or adds or multiplies two of the kind, is done on the bytes; anything else
    on a float32 copy. ``most`` is a bound of the numbers, shared by all views of them. To write into one in another way
    than by adding a second raises DataError, since views would not see it.

    >>> spikes = Spikes(torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8))
    >>> spikes.dtype, type(spikes.flatten()).__name__, spikes * 0.5
    (torch.float32, 'Spikes', tensor([[0.0000, 0.5000],
            [0.5000, 0.5000]]))
    """

    counts: Tensor
    most: list[int]

    @staticmethod
    def __new__(cls, counts: Tensor, most: list[int] | None = None) -> Spikes:
        """Around the bytes; ``most`` is 1 if no other bound is given."""
        make: Any = Tensor._make_wrapper_subclass
        with torch._C.DisableTorchFunctionSubclass():
            made: Spikes = make(cls, counts.shape, strides=counts.stride(), dtype=torch.float32, device=counts.device)
        made.counts, made.most = counts, [1] if most is None else most
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own: Callable[..., Any] | None = _moved if func in _SAME else _OWN.get(func)
        if own is not None:
            made = own(func, args, kwargs)
            if made is not NotImplemented:
                return made
        if _writes(func, args, kwargs):
            raise DataError(
                "A module writes into the spikes of a neuron in place, which integer inference can't follow. Write "
                "y = f(x) instead of f_(x), or freeze the network with integer=False."
            )
        return func(*in_float(args), **in_float(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable and args and isinstance(args[0], Spikes):
            raise DataError("Spikes of integer inference can't be written into. Freeze the network with integer=False.")
        return func(*in_float(args), **in_float(kwargs or {}))


def in_float(value: Any) -> Any:
    """Spikes in nested tuples, lists and dicts as plain tensors of float32; all else as it is."""
    if isinstance(value, Spikes):
        return value.counts.to(torch.float32)
    if isinstance(value, dict):
        if not any(map(_holds, value.values())):
            return value
        made = {key: in_float(item) for key, item in value.items()}
        return made if type(value) is dict else type(value)(made)
    if isinstance(value, (tuple, list)) and any(map(_holds, value)):
        parts = [in_float(item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _holds(value: Any) -> bool:
    """Are there Spikes in it?"""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds, value))
    return isinstance(value, Spikes)


def counts_of(x: Tensor) -> Tensor | None:
    """The numbers of ``x`` as uint8 where it holds nothing but whole ones from 0 to 127, else None.

    >>> counts_of(torch.tensor([0.0, 3.0])), counts_of(torch.tensor([0.5])), counts_of(torch.tensor([128.0]))
    (tensor([0, 3], dtype=torch.uint8), None, None)
    """
    if isinstance(x, Spikes):
        return x.counts if x.most[0] <= MOST else None
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return None
    low, high = torch.aminmax(x)
    if not (low >= 0 and high <= MOST):  # nor is NaN
        return None
    counts = x.to(torch.int8)  # many times as fast as to uint8
    return counts.view(torch.uint8) if bool((counts.to(x.dtype) - x).abs_().amax() == 0) else None


class Emitted:
    """The spikes of consecutive timesteps, for an adapter's ``make_fast`` to fill.

    ``steps`` gives each timestep's input with a tensor of floats like it, which must be set to 1 where the neuron fires
    and to 0 elsewhere before the next is taken; ``spikes`` is then all of them, [T, N, ...], as the network wants them.
    """

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor = in_float(x)
        self._out = _like(self.x, self.x.dtype)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x[t], where to write s[t]) for each timestep."""
        yield from zip(self.x, self._out, strict=True)

    @property
    def spikes(self) -> Tensor:
        """All timesteps, [T, N, ...]."""
        return self._out


class EmittedBytes(Emitted):
    """The same as :class:`Spikes`."""

    def __init__(self, x: Tensor) -> None:
        self.x = in_float(x)
        self._out = _like(self.x, torch.int8)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One tensor of floats serves all timesteps."""
        fired = torch.empty_like(self.x[0]) if len(self.x) else self.x
        for x, out in zip(self.x, self._out, strict=True):
            yield x, fired
            out.copy_(fired)

    @property
    def spikes(self) -> Tensor:
        """All timesteps, [T, N, ...]."""
        return Spikes(self._out.view(torch.uint8))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, N, ...] in memory of its own, each timestep laid out as those of ``x``, which may all be the same."""
    if not len(x):
        return torch.empty_like(x, dtype=dtype)
    step = torch.empty_like(x[0], dtype=dtype, device="meta")
    return torch.empty_strided(x.shape, (step.numel(), *step.stride()), dtype=dtype, device=x.device)


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    """The function on the bytes; where it joins several, all must be of the kind."""
    bounds: list[list[int]] = []

    def bare(value: Any) -> Any:
        if isinstance(value, Spikes):
            bounds.append(value.most)
            return value.counts
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(bare(v) for v in value)
        return value

    if isinstance(args[0], (tuple, list)) and not all(isinstance(v, Spikes) for v in args[0]):
        return NotImplemented
    if func is Tensor.view:  # spikes may lie otherwise in memory than those that the network was written for
        func = Tensor.reshape
    made = func(*map(bare, args), **{key: bare(value) for key, value in kwargs.items()})
    most = bounds[0] if len(bounds) == 1 else [max(bound[0] for bound in bounds)]
    return _wrapped(made, most)


def _wrapped(made: Any, most: list[int]) -> Any:
    if isinstance(made, Tensor):
        return Spikes(made, most)
    if isinstance(made, (tuple, list)):
        return type(made)(_wrapped(part, most) for part in made)
    return (_wrapped(part, most) for part in made)  # of an iterator


def _sum(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs or not all(isinstance(a, Spikes) for a in args):
        return NotImplemented
    a, b = cast("tuple[Spikes, Spikes]", args)
    most = a.most[0] + b.most[0]
    return Spikes(a.counts + b.counts, [most]) if most <= MOST else NotImplemented


def _sum_in_place(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs or not all(isinstance(a, Spikes) for a in args):
        return NotImplemented
    a, b = cast("tuple[Spikes, Spikes]", args)
    if a.most[0] + b.most[0] > MOST:
        return NotImplemented
    a.counts.add_(b.counts)
    a.most[0] += b.most[0]
    return a


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs or not all(isinstance(a, Spikes) for a in args):
        return NotImplemented
    a, b = cast("tuple[Spikes, Spikes]", args)
    most = a.most[0] * b.most[0]
    return Spikes(a.counts * b.counts, [most]) if most <= MOST else NotImplemented


def _dropped(func: Any, args: Any, kwargs: Any) -> Any:
    named = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    return NotImplemented if named.get("training", True) else named["input"]


def _pooled(func: Any, args: Any, kwargs: Any) -> Any:
    """Max-pooling as maxima of slices: torch's own takes no large maps of bytes, and is slow on the others."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    named = dict(zip(names, args, strict=False)) | kwargs
    x, axes = named["input"], _POOLS[func]
    if not isinstance(x, Spikes) or x.dim() <= axes:
        return NotImplemented
    kernel = _each(named["kernel_size"], axes)
    stride = _each(named.get("stride") or kernel, axes)
    padding = _each(named.get("padding", 0), axes)
    dilation = _each(named.get("dilation", 1), axes)
    if named.get("ceil_mode") or named.get("return_indices"):
        return NotImplemented
    counts = x.counts
    if any(padding):
        counts = F.pad(counts, [p for pad in reversed(padding) for p in (pad, pad)])  # zeros: no number is less
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=x.dim() - axes):
        length = (counts.shape[axis] - d * (k - 1) - 1) // s + 1
        if length < 1:
            return NotImplemented  # for torch's own message
        slices = [counts[(slice(None),) * axis + (slice(d * i, d * i + (length - 1) * s + 1, s),)] for i in range(k)]
        counts = slices[0]
        for other in slices[1:]:
            counts = torch.maximum(counts, other)
    return Spikes(counts, x.most)


def _each(value: Any, axes: int) -> list[int]:
    return [int(v) for v in value] * (axes // len(value)) if isinstance(value, (tuple, list)) else [int(value)] * axes


_POOLS = {
    F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3, torch.max_pool1d: 1, torch.max_pool2d: 2, torch.max_pool3d: 3,
}  # fmt: skip
_OWN: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_T.add, torch.add, _T.__add__, _T.__radd__), _sum),
    **dict.fromkeys((_T.add_, _T.__iadd__), _sum_in_place),
    **dict.fromkeys((_T.mul, torch.mul, _T.__mul__, _T.__rmul__), _product),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropped),
    **dict.fromkeys(_POOLS, _pooled),
}


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Does a function write into Spikes?"""
    name = getattr(func, "__name__", "").partition(".")[0]  # an overload: mul_.Tensor
    inside = name == "__setitem__" or (
        name.startswith("__i") and name.endswith("__") and hasattr(Tensor, name[:2] + name[3:])
    )
    inside = inside or (name.endswith("_") and not name.startswith("_"))
    if (inside or kwargs.get("inplace")) and args and isinstance(args[0], Spikes):
        return True
    return isinstance(kwargs.get("out"), Spikes) or name == "__set__"
