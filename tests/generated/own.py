"""Spiking neurons as users write them: each class takes time in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Spike(torch.autograd.Function):
    """A step with a rectangle for a gradient; keeps the type of what it is given."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] * (v.abs() < 0.5).to(v.dtype)


class OwnFire(nn.Module):
    """Leaky; ``v`` is kept from call to call."""

    def __init__(self, decay: float, threshold: float | Tensor, *, learn: bool = False) -> None:
        super().__init__()
        self.decay = decay
        self.thresh: Any = threshold
        if isinstance(threshold, Tensor):
            if learn:
                self.thresh = nn.Parameter(threshold)
            else:
                del self.thresh
                self.register_buffer("thresh", threshold)
        self.v: Any = 0.0

    def reset(self) -> None:
        self.v = 0.0

    def forward(self, x: Tensor) -> Tensor:
        v = self.decay * self.v + x
        spikes = Spike.apply(v - self.thresh)
        self.v = v * (1 - spikes)
        return spikes


class OwnFireSoft(OwnFire):
    """All timesteps at once, [N, T, ...]; reset by subtraction."""

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[:, 0]), []
        for t in range(x.size(1)):
            v = v * self.decay + x[:, t]
            spikes.append(Spike.apply(v - self.thresh))
            v = v - spikes[-1] * self.thresh
        return torch.stack(spikes, dim=1)


class OwnFireFirst(OwnFire):
    """All timesteps at once, [T, N, ...], written into a tensor; no reset, but a refractory step."""

    def forward(self, x: Tensor) -> Tensor:
        spikes = torch.empty_like(x)
        v = tired = torch.zeros_like(x[0])
        for t, current in enumerate(x):
            v = self.decay * v + current
            spike = Spike.apply(v - self.thresh) * (1 - tired)
            tired = spike.detach()
            spikes[t] = spike
        return spikes
