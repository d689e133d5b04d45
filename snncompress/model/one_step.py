"""Neurons seen as elementwise operations, for tracing channels: those of all timesteps, and those that hold layers.

Each function is one node of autograd's graph, which torch-pruning takes for an elementwise operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .modules import tensors_in


def first_step(x: Tensor, axis: int) -> Tensor:
    """The first timestep of ``x``, whose time stands on ``axis``: [T, N, ...] → [N, ...]."""
    return cast(Tensor, cast(Any, _First).apply(x, axis))


def all_steps(y: Tensor, steps: int, axis: int) -> Tensor:
    """The same in every timestep: [N, ...] → [T, N, ...], in memory of its own, since models add to it in place.

    >>> all_steps(first_step(torch.rand(2, 5, 3), 1), 5, 1).shape
    torch.Size([2, 5, 3])
    """
    return cast(Tensor, cast(Any, _All).apply(y, steps, axis))


def in_all_steps(axis: int, time: int | None, dims: int) -> int:
    """Where channels stand among ``dims`` dimensions, time on ``time`` of them, that are on ``axis`` < 0 of one step.

    >>> in_all_steps(-3, -1, 5), in_all_steps(-3, 0, 5), in_all_steps(-1, None, 2)
    (-4, -3, -1)
    """
    if time is None:
        return axis
    return axis - 1 if (time - dims if time >= 0 else time) >= axis else axis


def through(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same values, but that the way from the first argument to them can't be looked into.

    >>> layer, x = torch.nn.Linear(2, 3), torch.ones(1, 2, requires_grad=True)
    >>> y = through(layer)(x)
    >>> torch.equal(y, layer(x)), y.grad_fn.next_functions[0][0].variable is x
    (True, True)
    """

    def call(*args: Any, **named: Any) -> Any:
        with torch.no_grad():
            made = forward(*args, **named)
        x = next(tensors_in([args, named]))
        if torch.is_grad_enabled() and not x.requires_grad and x.is_floating_point():  # it is the network's input
            x = x.detach().requires_grad_()
        return _filled(made, iter(cast(Any, _Link).apply(x, *tensors_in(made))))

    return call


def _filled(form: Any, tensors: Iterator[Tensor]) -> Any:
    """These tensors in the place of those in nested tuples."""
    if isinstance(form, Tensor):
        return next(tensors)
    if not isinstance(form, (tuple, list)):
        return form
    parts = [_filled(part, tensors) for part in form]
    return type(form)(*parts) if hasattr(form, "_fields") else type(form)(parts)


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *made: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        return tuple(part.clone() for part in made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), *[None] * len(grads)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        ctx.steps, ctx.axis = x.shape[axis], axis
        return x.select(axis, 0).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rest = grads[0].new_zeros(ctx.steps - 1, *grads[0].shape)
        return torch.cat([grads[0].unsqueeze(0), rest]).movedim(0, ctx.axis), None


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, steps: int, axis: int) -> Tensor:
        ctx.axis = axis
        return torch.stack([y] * steps, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].sum(ctx.axis), None, None
