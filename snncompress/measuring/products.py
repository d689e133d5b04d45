"""Products of tensors outside layers, as in spiking attention: what they are called with, and what they cost.

    Σ |s| · [o ≠ 0]   over all pairs (s, o) that a product multiplies, s of the operand that is spikes: accumulates

of q·kᵀ the pairs in which both fire, of attn·v the spikes of v that meet a count other than 0. It is the same product,
of |s| and [o ≠ 0]. Of two operands that are whole numbers the one of smaller numbers is taken for the spikes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .conventions import Conventions
from .counting import is_spikes

_PLAIN = frozenset({"matmul", "__matmul__", "mm", "bmm", "mv", "dot", "inner"})
_ADDING = frozenset({"addmm", "addmm_", "baddbmm", "addmv"})


@dataclass(frozen=True)
class Product:
    """``multiply(a, b)``, bilinear."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    a: Tensor
    b: Tensor

    def operations(self, rules: Conventions, analog: bool = False) -> tuple[float, float]:
        """(accumulates, multiply-accumulates); whether an operand is spikes is decided anew at each product.

        >>> q, k = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> Product(torch.matmul, q, k.t()).operations(Conventions())
        (1.0, 0)
        >>> Product(torch.matmul, q / 2, k.t() / 2).operations(Conventions())
        (0, 3.0)
        """
        a, b = self.a.detach(), self.b.detach()
        spiking = [not analog and is_spikes(x, rules.spike_values) for x in (a, b)]
        if not any(spiking):
            return 0, self._total(*(torch.ones_like(x) if rules.zero_inputs else x.ne(0) for x in (a, b)))
        numbers = torch.ones_like if rules.zero_weights and not all(spiking) else partial(torch.ne, other=0)
        if not spiking[1] or (spiking[0] and _largest(a) <= _largest(b)):
            return self._total(_drive(a, rules), numbers(b)), 0
        return self._total(numbers(a), _drive(b, rules)), 0

    def _total(self, a: Tensor, b: Tensor) -> float:
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        made = self.multiply(a.to(torch.float32), b.to(torch.float32))
        return float(made.sum(dtype=wide))

    def piece(self, steps: int, step: int, axis: int) -> Product:
        """The part of one of several timesteps that stand on an axis of the operands."""
        size = self.lead[axis]
        a, b = (
            x.chunk(steps, axis)[step] if x.dim() > axis and x.shape[axis] == size and x.dim() > 2 else x
            for x in (self.a, self.b)
        )
        return Product(self.multiply, a, b)

    @property
    def lead(self) -> tuple[int, ...]:
        """The first two sizes of the operand with more dimensions."""
        return tuple(max(self.a, self.b, key=Tensor.dim).shape[:2])


def product_of(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
    """What a function of torch multiplies, or None for one that isn't a product of two tensors.

    >>> product_of("einsum", torch.einsum, ("ij,kj->ik", torch.ones(2, 3), torch.ones(4, 3)), {}).lead
    (2, 3)
    """
    values = [*args, *kwargs.values()]
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    if name in _PLAIN:
        operands, multiply = values[:2], func
    elif name == "__rmatmul__":
        operands = values[1::-1]
    elif name in _ADDING:
        operands = values[1:3]
    elif name == "einsum" and isinstance(values[0], str):
        operands = list(values[1]) if isinstance(values[1], (list, tuple)) else values[1:]
        multiply = partial(torch.einsum, values[0])
    elif name == "tensordot":
        operands, dims = values[:2], kwargs.get("dims", args[2] if len(args) > 2 else 2)
        multiply = partial(torch.tensordot, dims=dims)
    else:
        return None
    if len(operands) != 2 or not all(isinstance(x, Tensor) and x.layout == torch.strided for x in operands):
        return None
    return None if any(x.is_complex() for x in operands) else Product(multiply, *operands)


def _drive(spikes: Tensor, rules: Conventions) -> Tensor:
    """How many additions each spike causes, or all as many as on average."""
    size = spikes.float() if spikes.dtype == torch.bool else spikes.abs()
    return size.float().mean().expand_as(size) if rules.counting == "rate" else size


def _largest(x: Tensor) -> float:
    return float(x.float().abs().amax()) if x.numel() else 0.0
