"""CQP's network for MNIST: 784-256-128-10 of Leaky neurons (β = 0.9), T = 10, in snnTorch."""

from __future__ import annotations

import snntorch
import torch
from torch import Tensor, nn

TIMESTEPS = 10
NOISE = 0.05  # standard deviation of what is added to the pixels at every step of training


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(784, 256), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(256, 128), snntorch.Leaky(beta=0.9)
        self.fc3, self.lif3 = nn.Linear(128, 10), snntorch.Leaky(beta=0.9)
        self.dropout = nn.Dropout(0.2)
        self.num_steps = TIMESTEPS

    def forward(self, x: Tensor) -> Tensor:
        """[N, 784] in [0, 1], the same current at every step → output spikes [T, N, 10]."""
        x = x.expand(self.num_steps, *x.shape)
        if self.training:
            x = x + NOISE * torch.randn_like(x)
        x = _through_time(self.lif1, self.fc1(x))
        x = _through_time(self.lif2, self.fc2(self.dropout(x)))
        return _through_time(self.lif3, self.fc3(self.dropout(x)))


def _through_time(neurons: snntorch.Leaky, currents: Tensor) -> Tensor:
    """Currents [T, N, C] → spikes [T, N, C]. Layer by layer, so that a linear layer sees all steps at once."""
    membrane, spikes = neurons.init_leaky(), []
    for current in currents:
        spike, membrane = neurons(current, membrane)
        spikes.append(spike)
    return torch.stack(spikes)


def mlp() -> MLP:
    return MLP()
