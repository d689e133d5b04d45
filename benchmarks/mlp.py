"""CQP's network for MNIST: 784-256-128-10 of Leaky neurons (β = 0.9), T = 10, written as snnTorch users write it."""

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
        """[N, 784] in [0, 1] → output spikes [T, N, 10]."""
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spikes = []
        for _ in range(self.num_steps):
            current = x + NOISE * torch.randn_like(x) if self.training else x
            spk1, mem1 = self.lif1(self.fc1(current), mem1)
            spk2, mem2 = self.lif2(self.fc2(self.dropout(spk1)), mem2)
            spk3, mem3 = self.lif3(self.fc3(self.dropout(spk2)), mem3)
            spikes.append(spk3)
        return torch.stack(spikes)


def mlp() -> MLP:
    return MLP()
