"""γ: the range that ReScaW's grid covers, as a statistic of the weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Gamma = Literal["l1_mean", "max", "percentile"]


def range_of(weight: Tensor, gamma: Gamma | Literal["one"], channel_dim: int | None, percentile: float) -> Tensor:
    """γ: a 0-dim tensor, or with ``channel_dim`` one value per channel that broadcasts against the weight."""
    if gamma == "one":
        return weight.new_ones(())
    if channel_dim is None:
        rows = weight.reshape(1, -1)
    else:
        rows = weight.movedim(channel_dim, 0).reshape(weight.shape[channel_dim], -1)
    size = rows.abs()
    if gamma == "l1_mean":
        result = size.mean(1)
    elif gamma == "max":
        result = size.amax(1)
    else:
        low, high = _percentiles(rows, percentile)
        result = torch.maximum(low.abs(), high.abs())
        result = torch.where(result > 0, result, size.amax(1))
    if channel_dim is None:
        return result.reshape(())
    shape = [1] * weight.dim()
    shape[channel_dim] = -1
    return result.reshape(shape)


def _percentiles(rows: Tensor, x: float) -> tuple[Tensor, Tensor]:
    """P_x and P_{1-x} of every row, interpolated; torch.quantile refuses more than 2^24 elements."""
    ordered = rows.sort(1).values
    position = x * (rows.shape[1] - 1)
    near = int(position)
    far = min(near + 1, rows.shape[1] - 1)
    weight = position - near
    low = torch.lerp(ordered[:, near], ordered[:, far], weight)
    high = torch.lerp(ordered[:, -1 - near], ordered[:, -1 - far], weight)
    return low, high
