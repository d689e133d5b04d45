"""Makes scores of several layers comparable."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 17  # weights at a time: what a processor's caches hold
_LEAST = 5e-324  # float64 has no smaller number


def layer_adaptive(importance: Tensor) -> Tensor:
    """Make the importances v ≥ 0 of one layer's weights comparable with those of other layers; float64, in [0, 1].

    score(u) = v_u² / Σ_{w ≥ u} v_w², over the weights no less important than u (LAMP): the share of what is left of the
    layer that would be lost with u. The order within the layer stays, and the most important weight of every layer has
    score 1, so that no layer is emptied before all others are. In linear time: the sum is taken from the lower end of
    u's bin, of 65,536 bins under 1 % wide. Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based
    pruning", ICLR 2021, Eq. 1.

    >>> layer_adaptive(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))  # 1/14, 9/9, 0, 4/13
    tensor([[0.0714, 1.0000],
            [0.0000, 0.3077]], dtype=torch.float64)
    """
    flat = importance.detach().flatten()
    share = torch.empty(flat.shape, dtype=torch.float64, device=flat.device)
    at_least = torch.zeros(1 << 16, dtype=torch.float64, device=flat.device)
    chunks = torch.split(flat, _CHUNK if flat.device.type == "cpu" else max(1, len(flat)))
    for chunk in chunks:
        at_least.scatter_add_(0, _bins(chunk).long(), chunk.double().square())
    at_least = at_least.flip(0).cumsum(0).flip(0).clamp_min(_LEAST)  # 0 / 0 would be NaN
    for chunk, out in zip(chunks, torch.split(share, len(chunks[0])), strict=True):
        torch.div(chunk.double().square(), at_least.index_select(0, _bins(chunk)), out=out)  # NaN stays, to be seen
    share[-1 - flat.float().abs().flip(0).argmax()] = 1.0  # of equal ones the last, since the first go first
    return share.view(importance.shape)


def _bins(importance: Tensor) -> Tensor:
    """Bits of floats ≥ 0 are in their order: exponent, then upper mantissa. And -0.0 has other bits than 0.0."""
    return importance.float().abs().view(torch.int32) >> 15
