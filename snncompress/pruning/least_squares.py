"""Least squares from streamed sums: rows of weights that give back, from what is left to read, what is wanted.

For each of G groups, min over θ of Σ ‖y − θ u‖² + ridge · ‖θ − θ₀‖², from H = Σ u uᵀ, B = Σ u yᵀ and Σ y² alone. The
ridge draws towards the weights θ₀ that are there, so that what the data say nothing about stays as it is. How much, the
data say too: what is fitted on one half of them must help on the other.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from snncompress.base.distributed import gathered, summed

_TRIES = 4
_ITERATIONS = 300
_RIDGES, _FIRST = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2), 2
"""Those that are tried, and which of them first."""
_ROWS = 64
"""Of a layer, for which they are tried."""
_AT_ONCE = 1024
"""Rows whose products are taken together: adding a matrix D × D up costs as much as the products of many rows."""
_BLOCK, _BLOCKS = 512, 4
"""H is symmetric, so it is taken in blocks of columns, at least so wide and at most so many."""


class Sums:
    """H [G, D, D], B [G, D, R] and Σ y² [G, R] of what was read, u [n, G, D], and is wanted, y [n, G, R]."""

    def __init__(
        self, groups: int, reads: int, rows: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> None:
        self._gram = torch.zeros(groups, reads, reads, dtype=dtype, device=device)
        self._cross = torch.zeros(groups, reads, rows, dtype=dtype, device=device)
        self._square = torch.zeros(groups, rows, dtype=dtype, device=device)
        self.samples = 0
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._waiting = 0

    def add(self, read: Tensor, wanted: Tensor, *, first: bool = True) -> None:
        """More of it; products in float32 or better. Only what is ``first`` seen says anything new.

        Later timesteps repeat it, more or less.
        """
        self.samples += len(read) if first else 0
        dtype = torch.promote_types(read.dtype, torch.float32)
        self._pending.append((read.to(dtype), wanted.to(dtype)))
        self._waiting += len(read)
        if self._waiting >= _AT_ONCE:
            self._flush()

    @property
    def gram(self) -> Tensor:
        """H."""
        self._flush()
        return self._gram

    @property
    def cross(self) -> Tensor:
        """B."""
        self._flush()
        return self._cross

    @property
    def square(self) -> Tensor:
        """Σ y²."""
        self._flush()
        return self._square

    def _flush(self) -> None:
        if not self._pending:
            return
        u, y = (torch.cat(parts).transpose(0, 1) for parts in zip(*self._pending, strict=True))
        self._pending, self._waiting = [], 0
        starts = range(0, u.shape[2], max(_BLOCK, -(-u.shape[2] // _BLOCKS)))
        for start in starts:  # from the diagonal to the right; the rest mirrors it
            rows = slice(start, start + starts.step)
            self._gram[:, rows, start:] += u[..., rows].transpose(1, 2) @ u[..., start:]
        for start in starts[1:]:
            rows = slice(start, start + starts.step)
            self._gram[:, rows, :start] = self._gram[:, :start, rows].transpose(1, 2)
        self._cross += u.transpose(1, 2) @ y
        self._square += y.double().square().sum(1)

    def absorb(self, other: Sums) -> None:
        """Add another's up, too."""
        self._flush()
        self._gram += other.gram
        self._cross += other.cross
        self._square += other.square
        self.samples += other.samples

    def rows(self, chosen: Tensor) -> Sums:
        """Those of some rows."""
        self._flush()
        some = copy.copy(self)
        some._cross, some._square = self._cross[..., chosen], self._square[:, chosen]
        return some

    def gain(self, theta: Tensor, other: Tensor) -> float:
        """Σ (y − θ' u)² − Σ (y − θ u)²: by how much θ does better than another."""
        change = (theta - other).to(self.gram)
        slope = self.cross.transpose(1, 2) - other.to(self.gram) @ self.gram
        return float((change * (2 * slope - change @ self.gram)).sum())

    def reduce(self) -> None:
        """Add up what all processes have."""
        self._flush()
        self.samples = sum(gathered(self.samples))
        summed([self._gram, self._cross, self._square])

    def scarcity(self) -> float:
        """1 where there are many more samples than unknowns; by how much more the sums must be damped with fewer."""
        return 1 + self.gram.shape[1] / max(1, self.samples)

    def errors(self, theta: Tensor) -> Tensor:
        """Σ (y − θ u)² of every row [G, R] of θ [G, R, D]; never below 0."""
        quadratic = ((theta @ self.gram) * theta).sum(2)
        errors: Tensor = quadratic - 2 * (theta * self.cross.transpose(1, 2)).sum(2) + self.square
        return errors.clamp_min(0)

    def distance(self, theta: Tensor, other: Tensor) -> Tensor:
        """Σ ((θ − θ') u)² of every row [G, R]."""
        change = theta - other
        distance: Tensor = ((change @ self.gram) * change).sum(2)
        return distance.clamp_min(0)


def stretched(sums: Sums, theta: Tensor, most: float = 2.0) -> Tensor:
    """Rows [G, R, D] whose weights are enlarged until θ u varies as much as y, up to ``most`` times.

    Least squares leaves out what can't be explained, so θ u varies less than y, and what is driven by it would fire
    less, all the more the deeper a network is. The last of D is the constant, whose weight keeps the mean.
    """
    ones, count = sums.gram[:, None, -1, :-1], sums.gram[:, None, -1, -1]
    weights = theta[..., :-1]
    spread = sums.square - sums.cross[:, -1] ** 2 / count
    found = ((weights @ sums.gram[:, :-1, :-1]) * weights).sum(2) - (weights * ones).sum(2) ** 2 / count
    factor = (spread / found.clamp_min(torch.finfo(found.dtype).tiny)).clamp(1, most**2).sqrt()
    weights = weights * factor.unsqueeze(2)
    offset = (sums.cross[:, -1] - (weights * ones).sum(2)) / count
    return torch.cat([weights, offset.unsqueeze(2)], 2)


def solved(sums: Sums, start: Tensor, ridge: float, support: Tensor | None = None) -> Tensor:
    """θ [G, R, D], beginning at ``start``; with ``support`` (bool, like θ) it stays 0 elsewhere.

    ``ridge`` is relative to the mean diagonal of H. Where H can't be factorized the ridge grows; where nothing helps,
    the start is returned.
    """
    residual = sums.cross.transpose(1, 2) - start @ sums.gram  # [G, R, D]
    scale = sums.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    if not bool(torch.isfinite(residual).all()):
        return start
    for attempt in range(_TRIES):
        damped = sums.gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_((ridge * 10**attempt * scale)[:, None])
        if support is not None:
            found = start + _conjugate_gradients(damped, residual.where(support, 0.0), support)
        else:
            lower = factorized(damped)
            if lower is None:
                continue
            half = torch.linalg.solve_triangular(lower, residual.mT, upper=False)
            found = start + torch.linalg.solve_triangular(lower.mT, half, upper=True).mT
        if bool(torch.isfinite(found).all()):
            return found
    return start


def chosen_ridge(one: Sums, other: Sums, start: Tensor, support: Tensor | None = None) -> float | None:
    """The ridge with which what is fitted on one half of the data helps most on the other; None where none does.

    Twice the data need half of it. Found on some of the rows, downhill from the middle.
    """
    some = torch.linspace(0, start.shape[1] - 1, min(_ROWS, start.shape[1]), device=start.device).round().long()
    start, one, other = start[:, some], one.rows(some), other.rows(some)
    support = None if support is None else support[:, some]

    def gain(number: int) -> float:
        return other.gain(solved(one, start, _RIDGES[number], support), start)

    best, most = _FIRST, gain(_FIRST)
    for step in (1, -1):
        while 0 <= best + step < len(_RIDGES) and (found := gain(best + step)) > most:
            best, most = best + step, found
        if best != _FIRST:
            break
    return _RIDGES[best] / 2 if most > 0 else None


def factorized(matrix: Tensor) -> Tensor | None:
    """L with L Lᵀ = ``matrix`` [G, D, D], in its place, since it may be the largest thing in memory; None for none."""
    lower = matrix.mT  # what LAPACK works on without a copy
    failed = torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return None if bool(failed.any()) else lower


def _conjugate_gradients(gram: Tensor, wanted: Tensor, support: Tensor) -> Tensor:
    """Rows x with x · gram = wanted on each row's own support, 0 elsewhere: all rows at once."""
    inverse = 1 / gram.diagonal(dim1=1, dim2=2).unsqueeze(1)  # Jacobi
    x, r = torch.zeros_like(wanted), wanted.clone()
    z = inverse * r
    p, rz = z.clone(), (r * z).sum(2, keepdim=True)
    goal = 1e-16 * rz
    for _ in range(_ITERATIONS):
        if bool((rz <= goal).all()):
            break
        q = (p @ gram).where(support, 0.0)
        step = rz / (p * q).sum(2, keepdim=True).clamp_min(1e-300)
        step = step.where(rz > goal, 0.0)  # rows that are done
        x += step * p
        r -= step * q
        z = inverse * r
        after = (r * z).sum(2, keepdim=True)
        p = z + (after / rz.clamp_min(1e-300)) * p
        rz = after
    return x
