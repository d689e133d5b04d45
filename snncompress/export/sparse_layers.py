"""Linear layers that multiply with nothing but the weights that are left, or with the columns that have any.

The first go row by row (CSR) through MKL inside torch, the second are a smaller dense weight. When either pays was
measured on one thread (benchmarks/sparse_linear.py), and is a rule, not a measurement at the time of freezing: two
networks frozen alike then compute alike, to the last bit. Rows without any weight are removed by snncompress.collapse.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snncompress.model.parametrizations import PACKED
from snncompress.model.spikes import in_float

from .mixing import blank, mixed, ways, without

FEWEST_ZEROS = 0.85
FEWEST_EMPTY = 0.3
"""Shares of all weights, and of the columns: where fewer are zeros, the dense layer may be faster."""
FEWEST_WEIGHTS = 2**17
FEWEST_PRODUCTS = 2**20
"""The same of a layer's weights, and of the products in one pass of all inputs, counted in a dense layer."""
BLOCK = 32
"""Rows of an input that are multiplied at once: what these add up to stays in the processor's cache."""


class Rows:
    """What is left of a matrix, row by row; torch's warning that these are in beta is kept from users."""

    form = "CSR"

    def __init__(self, first: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.matrix = torch.sparse_csr_tensor(first, columns, values, shape, check_invariants=False)

    @classmethod
    def of(cls, weight: Tensor) -> Rows:
        """Of a dense weight."""
        left = weight != 0
        counts = left.sum(1, dtype=torch.int32)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
        return cls(first, left.nonzero()[:, 1].int(), weight[left], (len(weight), weight.shape[1]))

    def dense(self) -> Tensor:
        """The whole weight, made anew."""
        return self.matrix.to_dense()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row begins, and of its entries columns and values."""
        return self.matrix.crow_indices(), self.matrix.col_indices(), self.matrix.values()

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[N, C] → [N, C']."""
        if len(x) == 1:
            made = torch.mv(self.matrix, x[0]) if bias is None else torch.addmv(bias, self.matrix, x[0])
            return made.unsqueeze(0)
        blocks = [part.t() for part in torch.split(x, BLOCK)]
        if bias is None:
            return torch.cat([(self.matrix @ block).t() for block in blocks])
        return torch.cat([torch.addmm(bias[:, None], self.matrix, block).t() for block in blocks])

    def __reduce__(self) -> Any:
        return Rows, (*self.parts(), tuple(self.matrix.shape))


class Columns:
    """The columns of a matrix that aren't all zeros."""

    form = "columns"

    def __init__(self, kept: Tensor, values: Tensor, width: int) -> None:
        self.kept, self.values, self.width = kept, values, width

    @classmethod
    def of(cls, weight: Tensor) -> Columns:
        """Of a dense weight."""
        kept = (weight != 0).any(0).nonzero()[:, 0].int()
        return cls(kept, weight.index_select(1, kept), weight.shape[1])

    def dense(self) -> Tensor:
        """The whole weight, made anew."""
        return self.values.new_zeros(len(self.values), self.width).index_copy_(1, self.kept.long(), self.values)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Which columns, and their weights."""
        return self.kept, self.values

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[N, C] → [N, C']."""
        return F.linear(x.index_select(1, self.kept), self.values, bias)


class SparseLayer(nn.Module):
    """What a linear layer becomes that lost many of its weights; mixed into the layer's own class.

    Its ``state_dict`` is that of the layer it was. An input on another device, of another dtype or with a gradient is
    taken all the same, by the dense weight, and one of another width refused, as by the layer it was.
    """

    in_features: int
    bias: Tensor | None
    _left: Rows | Columns

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C'], any number of axes in front."""
        x = in_float(x)
        differentiated = torch.is_grad_enabled() and x.requires_grad
        plain = x.dtype == torch.float32 == self._left.parts()[-1].dtype and x.device.type == "cpu"
        fits = x.numel() > 0 and x.shape[-1:] == (self.in_features,)
        if differentiated or not (plain and fits) or (self.form == "CSR" and unavailable()):
            return F.linear(x, self.weight, self.bias)
        made = self._left.times(x.reshape(-1, x.shape[-1]), self.bias)
        return made.view(*x.shape[:-1], made.shape[1])

    @property
    def form(self) -> str:
        """What it holds: "CSR", or "columns" that have weights."""
        return self._left.form

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew."""
        return self._left.dense()

    @property
    def n_bytes(self) -> int:
        """Of the weights that are left, and where they stand."""
        return sum(part.numel() * part.element_size() for part in self._left.parts())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        parameters = self._parameters
        parameters["weight"] = nn.Parameter(self.weight, requires_grad=False)  # as the layer it was has it
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._left = self._left.of(cast(Tensor, parameters.pop("weight")).detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._left = self._left.of(fn(self.weight))
        return cast(Any, super())._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, ways(type(self)), vars(self)

    def extra_repr(self) -> str:
        """The layer's own, and what is held of its weight."""
        return f"{cast(Any, super()).extra_repr()}, {self.form}"


def best_form(layer: nn.Module, rows: int) -> type[Rows | Columns] | None:
    """What of a layer's weight is held to multiply ``rows`` inputs at once the fastest; None for all of it."""
    if not isinstance(layer, nn.Linear) or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return None
    left, n_weights = layer.weight.detach() != 0, layer.weight.numel()
    if n_weights < FEWEST_WEIGHTS or n_weights * rows < FEWEST_PRODUCTS:
        return None
    if int(left.sum()) <= (1 - FEWEST_ZEROS) * n_weights and not unavailable():
        return Rows
    return Columns if int(left.any(0).sum()) <= (1 - FEWEST_EMPTY) * layer.in_features else None


def make_sparse(layer: nn.Module, form: type[Rows | Columns] = Rows) -> None:
    """Let a linear layer multiply with what is left of its weight, in place."""
    module: Any = layer
    left = form.of(module.weight.detach())
    del module._parameters["weight"]
    vars(module).update({"_left": left, PACKED: None})
    module.__class__ = mixed(SparseLayer, cast(Any, type(module)))


def make_dense(layer: nn.Module) -> None:
    """Turn a sparse layer back into what it was, in place."""
    if isinstance(layer, SparseLayer):
        module: Any = layer
        weight = module.weight
        module.__class__ = without(SparseLayer, type(module))
        for name in ("_left", PACKED):
            del vars(module)[name]
        module.weight = nn.Parameter(weight, requires_grad=False)


@cache
def unavailable() -> str:
    """Why this machine's torch has no products with sparse matrices that compute right; empty where it has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(6, 5, generator=generator) * (torch.rand(6, 5, generator=generator) > 0.7)
    weight[2] = 0
    bias, rows = torch.rand(6, generator=generator), Rows.of(weight)
    try:
        for count in (1, BLOCK + 3):
            x = torch.rand(count, 5, generator=generator)
            for added in (bias, None):
                if not torch.allclose(rows.times(x, added), F.linear(x, weight, added), rtol=1e-5, atol=1e-6):
                    return "torch's products with sparse matrices are something else on this machine"
    except RuntimeError:
        return "this build of torch has no products with sparse matrices (MKL)"
    return ""
