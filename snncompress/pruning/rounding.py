"""Rounding to a grid with the error passed on: what one weight loses, those that are rounded after it make up for.

Column by column of W, with H = Σ u uᵀ of what the rows read and Uᵀ U = H⁻¹, U upper triangular:

    e = (w_j − round(w_j)) / U_jj;    w_k ← w_k − e · U_jk  for all k behind j

which is the exact least-squares answer of the columns that aren't rounded yet. Those that read most go first, and an
intercept, which is never rounded, takes what is left. Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", ICLR 2023,
Algorithm 1; with masks Frantar and Alistarh, "SparseGPT", ICML 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snncompress.model.grids import Grid

from .least_squares import factorized

_BLOCK = 128


def passed_on(
    theta: Tensor, gram: Tensor, reads: int, scale: Tensor, grid: Grid, kept: Tensor | None, damping: float = 1e-2
) -> Tensor | None:
    """The numbers on the grid of the first ``reads`` columns of θ [G, R, D], for the second moments [G, D, D].

    ``scale`` [G, R, 1] is that of each row. Where ``kept`` (bool [G, R, reads]) is False a weight is gone: its value is
    0. The largest weight of all that share a scale keeps its number, so that a range taken from it stays what it is.
    ``damping`` is relative to the mean diagonal of the moments. None where they can't be factorized.
    """
    work, numbers = theta.clone(), torch.empty_like(theta[..., :reads])
    order, factor = _ordered(gram, reads, damping)
    if factor is None:
        return None
    work = work.gather(2, order[:, None, :].expand_as(work))
    at = order[:, None, :reads].expand_as(numbers)
    pinned = _largest(theta[..., :reads], scale, grid, kept).gather(2, at)
    exists = torch.ones_like(pinned) if kept is None else kept.gather(2, at)
    top = 2.0**grid.bits - 1
    lone = torch.clamp(torch.round(work[..., :reads] / scale + grid.zero_point), 0, top)  # nearest, nothing passed on
    scale, rounded = scale.squeeze(2), torch.empty_like(numbers)
    for start in range(0, reads, _BLOCK):
        end = min(start + _BLOCK, reads)
        errors = work.new_zeros(*work.shape[:2], end - start)
        for j in range(start, end):
            w = work[..., j]
            number = torch.clamp(torch.round(w / scale + grid.zero_point), 0, top)
            number = torch.where(pinned[..., j], lone[..., j], number)
            value = ((number - grid.zero_point) * scale).where(exists[..., j], 0.0)
            rounded[..., j] = number
            error = (w - value) / factor[:, j, j, None]
            errors[..., j - start] = error
            work[..., j + 1 : end] -= error.unsqueeze(2) * factor[:, None, j, j + 1 : end]
        work[..., end:] -= errors @ factor[:, start:end, end:]
    return numbers.scatter_(2, at, rounded)


def _ordered(gram: Tensor, reads: int, damping: float) -> tuple[Tensor, Tensor | None]:
    """The order of the columns [G, D], and U of the columns in it."""
    power = gram.diagonal(dim1=1, dim2=2)
    behind = torch.arange(reads, gram.shape[1], device=gram.device).expand(len(gram), -1)
    order = torch.cat([power[:, :reads].argsort(stable=True, dim=1, descending=True), behind], 1)
    group = torch.arange(len(gram), device=gram.device)[:, None, None]
    turned = gram[group, order[:, :, None], order[:, None, :]]
    ridge = damping * power[:, :reads].mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    turned.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    lower = factorized(turned)
    if lower is None:
        return order, None
    inverse = torch.cholesky_inverse(lower, out=lower)
    upper = factorized(inverse.mT)  # its own transpose
    return order, None if upper is None or not bool(torch.isfinite(upper).all()) else upper.mT


def _largest(weights: Tensor, scale: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
    size = weights.abs() if kept is None else weights.abs().where(kept, 0.0)
    if grid.scale.dim():
        return size == size.amax(2, keepdim=True)
    return size == size.amax()
