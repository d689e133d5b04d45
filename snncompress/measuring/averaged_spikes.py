"""Averages of spikes, and spikes of another height than 1: of how many spikes each value of a tensor is made.

An average pooling of spikes gives k/n. With 1/n folded into the weights behind it, that is k additions per synapse; and
a spike of height θ, as converted networks have, of all channels or of each, is one. Values alone don't tell: a picture
scaled to [0, 1] lies on such a grid too. So the spikes are summed up where torch is seen to average them, or to
multiply them with one number, or the model's number for each channel, and the sums go the way of these values, as long
as they are only moved about: reshaped, concatenated, padded, scaled. The number of spikes is thus exact, for windows of
any size and at their borders too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snncompress.model.modules import tensors_in

from .conventions import SpikeValues
from .counting import is_spikes

_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
_ADAPTIVE = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_SCALE = frozenset({"mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"})
_GLANCE = 64  # values, of which most tensors show that they aren't spikes
_IN_PLACE = re.compile(r".*[^_]_|__i[a-z]+__|__setitem__")
_MARK = "_average_of_spikes"
_ADD = frozenset({"add", "__add__", "__radd__"})
_JOIN = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"})
_MOVES = frozenset(
    {
        "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "ravel", "permute", "transpose", "t", "mT",
        "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "contiguous", "clone", "detach",
        "repeat", "repeat_interleave", "expand", "expand_as", "tile", "__getitem__", "select", "narrow", "index_select",
        "chunk", "split", "tensor_split", "unbind", "flip", "roll", "pad", "pixel_shuffle", "pixel_unshuffle",
        "channel_shuffle",
    }
)  # fmt: skip
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"})


class AveragedSpikes:
    """The sums of spikes behind averages, each kept on its tensor, as long as that lives; fed by :meth:`see`."""

    def __init__(self, model: nn.Module | None = None, values: SpikeValues = "integers") -> None:
        self.any = False
        """Whether there are any at all."""
        self.met = False
        """Whether a layer met any."""
        self._values = values
        held = () if model is None else (*model.parameters(), *model.buffers())
        self._constants = {x.untyped_storage().data_ptr() for x in held}

    def of(self, x: Tensor) -> Tensor | None:
        """Of how many spikes each value of ``x``, which a layer takes in, is made; None if of none."""
        sums = self._of(x)
        self.met = self.met or sums is not None
        return sums

    def _of(self, x: Tensor) -> Tensor | None:
        owner, sums, version = vars(x).get(_MARK, (None, None, None))
        return cast(Tensor, sums) if owner is self and version == _version(x) else None

    def see(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """torch's function of that name was called and gave ``output``."""
        if name in _AVERAGES:
            x = args[0] if args else kwargs.get("input", kwargs.get("self"))
            sums = self._spikes(x) if isinstance(x, Tensor) else None
            if sums is not None:
                self.any = True
                self._note(output, _AVERAGES[name](sums, *args[1:], **_without_input(kwargs)))
        elif name in _SCALE and len(args) == 2 and not kwargs:
            x = self._scaled(*args)
            if x is not None and isinstance(output, Tensor) and output.shape == x.shape:
                sums = self._of(x) if self.any else None
                if sums is None and _all_one(x):
                    sums = x.abs().float()
                if sums is not None:
                    self.any = True
                    self._note(output, sums)
        elif not self.any or not args:
            return
        elif name in _CASTS:
            if isinstance(args[0], Tensor) and (sums := self._of(args[0])) is not None and isinstance(output, Tensor):
                self._note(output, sums.to(output.device))
        elif name in _ADD or name in _JOIN or (name in _MOVES and isinstance(args[0], Tensor)):
            self._follow(name, func, args, kwargs, output)
        elif isinstance(args[0], Tensor) and _IN_PLACE.fullmatch(name):
            vars(args[0]).pop(_MARK, None)

    def _scaled(self, a: Any, b: Any) -> Tensor | None:
        """Which of two factors is a tensor, the other being one number, or one of the model's for each channel."""
        for x, factor in ((a, b), (b, a)):
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 1:
                continue
            if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and self._per_channel(factor, x)):
                return x
        return None

    def _per_channel(self, factor: Tensor, x: Tensor) -> bool:
        if factor.numel() == 1:
            return True
        axes = [axis - factor.dim() for axis, size in enumerate(factor.shape) if size > 1]
        if len(axes) > 1 or factor.numel() == x.numel() or (x.dim() > 3 and axes != [-3]):
            return False
        return factor.untyped_storage().data_ptr() in self._constants

    def _follow(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Let the sums go the way that the values went; beside others they must all be spikes."""
        if name not in _MOVES:
            tensors = list(tensors_in([args, kwargs]))
            if all(self._of(x) is None for x in tensors) or (name in _ADD and len(tensors) != len(args) + len(kwargs)):
                return
            sums = {id(x): self._spikes(x) for x in tensors}
            if any(s is None for s in sums.values()):
                return
            args, kwargs = _replaced(args, sums), _replaced(kwargs, sums)
        else:
            first = self._of(args[0])
            if first is None:
                return
            args = (first, *args[1:])
        made = func(*args, **kwargs)
        for value, counted in zip(tensors_in(output), tensors_in(made), strict=True):
            self._note(value, counted)

    def _spikes(self, x: Tensor) -> Tensor | None:
        known = self._of(x)
        if known is None and is_spikes(x, self._values):
            known = x.float() if x.dtype == torch.bool else x.abs().float()
        return known

    def _note(self, x: Tensor, sums: Tensor) -> None:
        vars(x)[_MARK] = self, sums, _version(x)


def _all_one(x: Tensor) -> bool:
    """Whether all values are 0, 1 or −1: whole numbers may be grey levels."""
    return all(is_spikes(part, "ternary") for part in (x[(0,) * (x.dim() - 1)][:_GLANCE], x))


def _version(x: Tensor) -> int | None:
    """Counts what is written to ``x``."""
    return None if x.is_inference() else x._version


def _without_input(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("input", "self", "dtype")}


def _replaced(value: Any, sums: Mapping[int, Tensor | None]) -> Any:
    if isinstance(value, Tensor):
        return sums[id(value)]
    if isinstance(value, Mapping):
        return {key: _replaced(item, sums) for key, item in value.items()}
    return type(value)(_replaced(item, sums) for item in value) if isinstance(value, (list, tuple)) else value


def _pooled(
    sums: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Spikes in every window, in two and three dimensions."""
    wide = isinstance(kernel_size, (list, tuple)) and len(kernel_size) == 3
    pool = F.avg_pool3d if wide else F.avg_pool2d
    return pool(sums, kernel_size, stride or None, padding, ceil_mode, divisor_override=1)


def _pooled_1d(sums: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **more: Any) -> Tensor:
    def flat(value: Any, beside: int) -> tuple[int, int]:
        return beside, int(value[0] if isinstance(value, (list, tuple)) else value)

    return _pooled(
        sums.unsqueeze(-2), flat(kernel_size, 1), flat(stride or kernel_size, 1), flat(padding, 0), *rest, **more
    ).squeeze(-2)


def _pooled_3d(sums: Tensor, kernel_size: Any, *rest: Any, **more: Any) -> Tensor:
    return _pooled(sums, (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size, *rest, **more)


def _adaptive(dims: int) -> Callable[..., Tensor]:
    pool: Any = getattr(F, _ADAPTIVE[dims - 1])

    def pooled(sums: Tensor, output_size: Any) -> Tensor:
        averages: Tensor = pool(sums.double(), output_size)
        for dim in range(-dims, 0):
            sizes = starmap(_window, ((i, sums.shape[dim], averages.shape[dim]) for i in range(averages.shape[dim])))
            scale = torch.tensor(list(sizes), dtype=averages.dtype, device=averages.device)
            averages = averages * scale.view(-1, *[1] * (-dim - 1))
        return averages.round().float()

    return pooled


def _window(i: int, size: int, parts: int) -> int:
    """How many of ``size`` values the i-th of ``parts`` averages covers."""
    return -(-(i + 1) * size // parts) - i * size // parts


_AVERAGES: dict[str, Callable[..., Tensor]] = {
    "avg_pool1d": _pooled_1d,
    "avg_pool2d": _pooled,
    "avg_pool3d": _pooled_3d,
    **{name: _adaptive(dims) for dims, name in enumerate(_ADAPTIVE, 1)},
    "mean": torch.sum,
}
