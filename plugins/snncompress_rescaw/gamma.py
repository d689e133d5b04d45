"""γ: the range that ReScaW's grid covers, as a statistic of the weights that exist: an exact 0 is none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Gamma = Literal["l1_mean", "max", "percentile"]


def range_of(weight: Tensor, gamma: Gamma | Literal["one"], channel_dim: int | None, percentile: float) -> Tensor:
    """γ: a 0-dim tensor, or with ``channel_dim`` one value per channel that broadcasts against the weight.

    Without any weight that exists it is 0.
    """
    if gamma == "one":
        return weight.new_ones(())
    if channel_dim is None:
        rows = weight.reshape(1, -1)
    else:
        rows = weight.movedim(channel_dim, 0).reshape(weight.shape[channel_dim], -1)
    size = rows.abs()
    if gamma == "l1_mean":
        result = size.sum(1) / rows.count_nonzero(1).clamp_min(1)
    elif gamma == "max":
        result = size.amax(1)
    else:
        low, high = _percentiles(rows, percentile)
        result = torch.maximum(low.abs(), high.abs()).flatten().where(rows.any(1), 0.0)
    if channel_dim is None:
        return result.reshape(())
    shape = [1] * weight.dim()
    shape[channel_dim] = -1
    return result.reshape(shape)


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
