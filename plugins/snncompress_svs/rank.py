"""How many singular values of a matrix exceed a bound, for many small matrices at once and without decomposing them.

With G = B Bᵀ, [n, n], on the smaller side, #{σ_i(B) > ε} is #{λ_i(G) > δ}, δ = ε². Gaussian elimination writes
G = L D Lᵀ, and Sylvester's law of inertia says that as many eigenvalues are positive as pivots in D. Here pivots up to
δ/2 are passed over, so that what is left is r pivots of a submatrix G_K and a remainder E, G = L D Lᵀ + E, both up to
rounding errors e. Two bounds then say whether r is the number of eigenvalues above δ:

    at most r   λ_{r+1}(G) ≤ ‖E‖_F + e ≤ δ                                                    (Weyl)
    at least r  λ_r(G) ≥ λ_min(G_K) ≥ 1 / Σ_k x_k²/d_k − e > δ,  x_k = 1 + Σ_j<k |l_kj| x_j    (Cauchy, and x ≥ Σ|L⁻¹|)

e being the backward error of elimination, (r + 8) u tr(G) (Higham, *Accuracy and stability of numerical algorithms*,
2002, ch. 10). Maps of whole numbers of spikes have an exact Gram matrix; of others its error is added to e. Few
matrices are left that neither bound decides, and those are decomposed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_U = torch.finfo(torch.float64).eps / 2
_EXACT = 2.0**16  # squared norms of rows up to which products of whole numbers are exact in float32, even by bfloat16
_SMALL = 16  # matrices up to this size aren't worth ordering
_CHUNK = 1 << 19  # elements of Gram matrices at a time: what a processor's caches hold
_CHUNK_ELSEWHERE = 1 << 24
_LEAST = 64  # matrices at a time, however large


def rank_and_square(maps: Tensor, least: float, *, whole: bool) -> tuple[Tensor, Tensor]:
    """#{σ_i > least} and Σ σ_i² of every matrix, [M, h, w] → two of [M], in float64.

    The counts are those of a singular value decomposition in float64; ``whole`` says that all entries are whole
    numbers, whose products are exact in float32 as long as they are small.

    >>> maps = torch.stack((torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3))).double()
    >>> rank_and_square(maps, 1e-6, whole=True)
    (tensor([3., 1., 0.], dtype=torch.float64), tensor([3., 9., 0.], dtype=torch.float64))
    """
    if maps.shape[1] > maps.shape[2]:
        maps = maps.mT
    given, maps = maps, maps.float() if whole else maps.double()
    rows = (maps * maps).sum(2)  # [M, n], the diagonals of the Gram matrices
    if whole and float(rows.amax()) > _EXACT:
        return rank_and_square(given, least, whole=False)
    square = rows.sum(1, dtype=torch.float64)
    rank = torch.empty_like(square)
    for chosen, chunk in _chunks(maps, rows):
        rank[chosen] = _rank(chunk, least, exact=whole)
    return rank, square


def _chunks(maps: Tensor, rows: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Which matrices, and those: of large ones those with equally many rows that aren't 0, without the others.

    The longest rows go first, which keeps the l small.
    """
    count, n, width = maps.shape
    limit = _CHUNK if maps.device.type == "cpu" else _CHUNK_ELSEWHERE
    if n <= _SMALL:
        size = max(1, limit // n**2)
        yield from ((slice(at, at + size), maps[at : at + size]) for at in range(0, count, size))
        return
    sizes, order = (rows > 0).sum(1).sort()
    longest = rows.argsort(1, descending=True)
    left, start = sizes.clamp_min(1).tolist(), 0
    while start < count:
        stop = min(count, start + max(_LEAST, limit // left[start] ** 2))
        stop = min(stop, start + max(_LEAST, limit // left[stop - 1] ** 2))
        size, chosen = left[stop - 1], order[start:stop]
        wanted = chosen[:, None] * n + longest.index_select(0, chosen)[:, :size]
        yield chosen, maps.view(count * n, width).index_select(0, wanted.flatten()).view(-1, size, width)
        start = stop


def _rank(maps: Tensor, least: float, *, exact: bool) -> Tensor:
    """The counts of matrices [M, n, w], n ≤ w; ``exact``: their Gram matrices have no rounding errors."""
    n, width = maps.shape[1:]
    gram = (maps @ maps.mT).flatten(1).T.contiguous().double().view(n, n, -1)
    threshold = least**2
    trace = gram.diagonal().sum(1)
    rank, remainder, inverse = _eliminate(gram, threshold / 2)
    error = (rank + 8 + (0 if exact else width)) * _U * trace
    sure = ((remainder + error <= threshold) | (rank == n)) & ((threshold + error) * inverse < 1)
    unsure = (~sure).nonzero().squeeze(1)
    if len(unsure):
        sigma = torch.linalg.svdvals(maps[unsure].double().cpu()).to(rank.device)  # not all converge on a GPU
        rank[unsure] = (sigma > least).sum(1).double()
    return rank


def _eliminate(gram: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """How many pivots are above ``least``, ‖E‖_F and Σ x²/d of matrices [n, n, M], which are overwritten; each [M].

    The matrices stand last, so that every operation runs over all of them.
    """
    n = len(gram)
    x, off = torch.ones_like(gram[0]), torch.zeros_like(gram[0])
    for k in range(n - 1):
        pivot, row = gram[k, k], gram[k, k + 1 :]
        multiplier = row * torch.where(pivot > least, pivot, math.inf).reciprocal_()  # 0 where it is passed over
        gram[k + 1 :, k + 1 :].addcmul_(row[:, None], multiplier[None], value=-1)
        x[k + 1 :].addcmul_(multiplier.abs_(), x[k])
        torch.sum(row * row, 0, out=off[k])
    pivots = gram.diagonal().T
    taken = pivots > least
    remainder = torch.where(taken, 0.0, pivots * pivots + 2 * off).sum(0).sqrt()
    inverse = torch.where(taken, x * x / pivots, 0.0).sum(0)
    return taken.sum(0).double(), remainder, inverse
