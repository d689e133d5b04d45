"""Linear layers that multiply with nothing but the weights that are left, row by row (CSR), through MKL inside torch.

When that pays was measured on one thread (benchmarks/sparse_linear.py), and is a rule, not a measurement at the time
of freezing: two networks frozen alike then compute alike, to the last bit.
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
FEWEST_WEIGHTS = 2**17
FEWEST_PRODUCTS = 2**20
"""For one pass of all rows, counted in a dense layer: where any of the three is fewer, it may be slower than that."""
BLOCK = 32
"""Rows of an input that are multiplied at once: what these add up to stays in the processor's cache."""


class _Rows:
    """What is left of a matrix, row by row; torch's warning that these are in beta is kept from users."""

    def __init__(self, first: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.matrix = torch.sparse_csr_tensor(first, columns, values, shape, check_invariants=False)

    @classmethod
    def of(cls, weight: Tensor) -> _Rows:
        left = weight != 0
        counts = left.sum(1, dtype=torch.int32)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
        return cls(first, left.nonzero()[:, 1].int(), weight[left], (len(weight), weight.shape[1]))

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
        return _Rows, (*self.parts(), tuple(self.matrix.shape))


class SparseLayer(nn.Module):
    """What a linear layer becomes that lost most of its weights; mixed into the layer's own class.

    Its ``state_dict`` is that of the layer it was. An input on another device, of another dtype or with a gradient is
    taken all the same, by the dense weight.
    """

    bias: Tensor | None
    _rows: _Rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C'], any number of axes in front."""
        matrix, x = self._rows.matrix, in_float(x)
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if differentiated or x.dtype != torch.float32 or matrix.dtype != x.dtype or not x.numel() or unavailable():
            return F.linear(x, self.weight, self.bias)
        made = self._rows.times(x.reshape(-1, matrix.shape[1]), self.bias)
        return made.view(*x.shape[:-1], matrix.shape[0])

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew."""
        return self._rows.matrix.to_dense()

    @property
    def n_bytes(self) -> int:
        """Of the weights that are left, and where they stand."""
        return sum(part.numel() * part.element_size() for part in self._rows.parts())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        parameters = self._parameters
        parameters["weight"] = nn.Parameter(self.weight, requires_grad=False)  # as the layer it was has it
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._rows = _Rows.of(cast(Tensor, parameters.pop("weight")).detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._rows = _Rows.of(fn(self.weight))
        return cast(Any, super())._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, ways(type(self)), vars(self)

    def extra_repr(self) -> str:
        """The layer's own, and that it is sparse."""
        return f"{cast(Any, super()).extra_repr()}, CSR"


def pays(layer: nn.Module, rows: int) -> bool:
    """Is it faster to multiply ``rows`` inputs at once with what is left of a layer's weight?"""
    if not isinstance(layer, nn.Linear) or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return False
    n_weights = layer.weight.numel()
    if n_weights < FEWEST_WEIGHTS or n_weights * rows < FEWEST_PRODUCTS:
        return False
    return int(layer.weight.count_nonzero()) <= (1 - FEWEST_ZEROS) * n_weights and not unavailable()


def make_sparse(layer: nn.Module) -> None:
    """Let a linear layer multiply with what is left of its weight, in place."""
    module: Any = layer
    rows = _Rows.of(module.weight.detach())
    del module._parameters["weight"]
    vars(module).update({"_rows": rows, PACKED: None})
    module.__class__ = mixed(SparseLayer, cast(Any, type(module)))


def make_dense(layer: nn.Module) -> None:
    """Turn a sparse layer back into what it was, in place."""
    if isinstance(layer, SparseLayer):
        module: Any = layer
        weight = module.weight
        module.__class__ = without(SparseLayer, type(module))
        for name in ("_rows", PACKED):
            del vars(module)[name]
        module.weight = nn.Parameter(weight, requires_grad=False)


@cache
def unavailable() -> str:
    """Why this machine's torch has no products with sparse matrices that compute right; empty where it has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(6, 5, generator=generator) * (torch.rand(6, 5, generator=generator) > 0.7)
    weight[2] = 0
    bias, rows = torch.rand(6, generator=generator), _Rows.of(weight)
    try:
        for count in (1, BLOCK + 3):
            x = torch.rand(count, 5, generator=generator)
            for added in (bias, None):
                if not torch.allclose(rows.times(x, added), F.linear(x, weight, added), rtol=1e-5, atol=1e-6):
                    return "torch's products with sparse matrices are something else on this machine"
    except RuntimeError:
        return "this build of torch has no products with sparse matrices (MKL)"
    return ""
