"""γ: the range that ReScaW's grid covers, as a statistic of the weights that exist: an exact 0 is none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from snncompress.extend import Remembered

Gamma = Literal["mse", "l1_mean", "max", "percentile"]

_COARSE, _FINE, _FITS = 8, 3, 2
_MARGIN = 1e-5  # of the error: more than the rounding of its sum


def range_of(
    weight: Tensor,
    gamma: Gamma | Literal["one"],
    channel_dim: int | None,
    percentile: float,
    steps: Tensor,
    dtype: torch.dtype,
    before: Remembered | None = None,
) -> Tensor:
    """γ: a 0-dim tensor, or with ``channel_dim`` one value per channel that broadcasts against the weight.

    ``steps`` are those of the grid and ``dtype`` is that of the quantized weight, for "mse". Without any weight that
    exists γ is 0. Where ``before`` remembers γ of the same weights, nothing is computed.
    """
    if gamma == "one":
        return weight.new_ones(())
    if channel_dim is None:
        rows = weight.reshape(1, -1)
    else:
        rows = weight.movedim(channel_dim, 0).reshape(weight.shape[channel_dim], -1)

    def of_rows() -> Tensor:
        if gamma == "mse":
            return _least_error(rows, steps, dtype)
        if gamma == "l1_mean":
            return _mean(rows)
        if gamma == "max":
            return rows.abs().amax(1)
        low, high = _percentiles(rows, percentile)
        return torch.maximum(low.abs(), high.abs()).flatten().where(rows.any(1), 0.0)

    result = of_rows() if before is None else before.of(rows, (gamma, percentile, steps, dtype), of_rows)
    if channel_dim is None:
        return result.reshape(())
    shape = [1] * weight.dim()
    shape[channel_dim] = -1
    return result.reshape(shape)


def scale_of(gamma: Tensor, steps: Tensor) -> Tensor:
    """The distance of two grid values, 2γ/s; for γ = 0 the smallest normal number: nothing divides by zero."""
    scale = 2 * gamma / steps
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _mean(rows: Tensor) -> Tensor:
    return rows.abs().sum(1) / rows.count_nonzero(1).clamp_min(1)


def _least_error(rows: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The γ ≤ max|W| of the least squared error ‖W − Ŵ‖² of every row, as nearly as a search finds it.

    It is never below mean|W|: with q = |Ŵ|/γ ≤ 1, which grows with |W|, Σ q|W| ≥ mean|W| · Σ q ≥ mean|W| · Σ q², so
    below the mean a larger γ is better. The error has many local minima between mean and maximum. Tried are

    1. the maximum, the mean, and values between them in geometric progression, because the ratio of the two says
       how far outliers reach;
    2. values between the best of these and its two neighbours;
    3. twice, from the best of all, the γ that fits these numbers of the grid best, Σ q|W| / Σ q².

    The error is that of the values that the quantizer gives, to the last bit, and another γ must be better than the
    maximum by more than the rounding of the sum, so the result is never worse than the maximum.
    """
    largest, mean = rows.abs().amax(1), _mean(rows)
    exists = (rows != 0).to(rows.dtype)
    ratio = (largest / mean.clamp_min(torch.finfo(rows.dtype).tiny)).clamp_min(1.0)
    space = torch.empty_like(rows)
    best, least = largest, _error(rows, largest, steps, dtype, exists, space)
    place = torch.ones_like(best)  # in the progression: 0 is the mean, 1 the maximum

    def attempt(gamma: Tensor, at: Tensor) -> None:
        nonlocal best, least, place
        error = _error(rows, gamma, steps, dtype, exists, space)
        better = error < least * (1 - _MARGIN)
        best, least = gamma.where(better, best), error.where(better, least)
        place = at.where(better, place)

    for k in range(_COARSE):
        at = torch.full_like(place, k / _COARSE)
        attempt((mean * ratio**at).minimum(largest), at)
    around = place
    for k in range(-_FINE, _FINE + 1):
        if k:
            at = (around + k / (_COARSE * (_FINE + 1))).clamp(0, 1)
            attempt((mean * ratio**at).minimum(largest), at)
    for _ in range(_FITS):
        q = _values(rows, scale_of(best, steps)[:, None], steps, space)
        fits = (q * rows).sum(1) / q.mul_(exists).square_().sum(1).clamp_min(torch.finfo(q.dtype).tiny)
        attempt((best * fits).minimum(largest), place)
    return best


def _error(rows: Tensor, gamma: Tensor, steps: Tensor, dtype: torch.dtype, exists: Tensor, out: Tensor) -> Tensor:
    """‖W − Ŵ‖² of every row, over the weights that exist; ``out`` is overwritten."""
    values = _values(rows, scale_of(gamma, steps)[:, None], steps, out)
    if dtype != values.dtype:
        values = values.to(dtype).to(values.dtype)
    return values.sub_(rows).mul_(exists).square_().sum(1)


def _values(rows: Tensor, scale: Tensor, steps: Tensor, out: Tensor) -> Tensor:
    """Ŵ, operation by operation as ``ReScaWIntQuant`` computes it, into ``out``."""
    zero_point = steps / 2
    torch.div(rows, scale, out=out)
    number = out.add_(zero_point).clamp_min_(0.0)
    torch.minimum(number, steps, out=number).round_()  # clamp_ with tensors takes four times as long
    return number.sub_(zero_point).mul_(scale)


def _percentiles(rows: Tensor, x: float) -> tuple[Tensor, Tensor]:
    """P_x and P_{1-x} of every row's weights ≠ 0, interpolated; torch.quantile refuses more than 2^24 elements."""
    exists = rows != 0
    ordered = rows.where(exists, torch.inf).sort(1).values  # those that don't exist behind all others
    last = (exists.sum(1, keepdim=True) - 1).clamp_min(0)
    position = x * last.to(rows.dtype)
    near = position.long()
    far = (near + 1).minimum(last)
    low = torch.lerp(ordered.gather(1, near), ordered.gather(1, far), position - near)
    high = torch.lerp(ordered.gather(1, last - near), ordered.gather(1, last - far), position - near)
    return low, high
