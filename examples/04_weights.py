"""Single weights: prune them by criticality, train with a loop of your own, and see which timesteps matter.

    python examples/04_weights.py [--plots FOLDER]

The masks hold under any optimizer, so the training loop knows nothing of them.
"""

import argparse
from pathlib import Path

import snntorch as snn
import snntorch.functional as SF
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import snncompress

parser = argparse.ArgumentParser()
parser.add_argument("--plots", type=Path, help="where to save the pictures")
options = parser.parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(64, 100), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(100, 10), snn.Leaky(beta=0.9)
        self.num_steps = 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes = []
        for _ in range(self.num_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


loss = SF.ce_count_loss()


def train(model: nn.Module, epochs: int = 5) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for picked in torch.randperm(len(x_train)).split(64):
            optimizer.zero_grad()
            loss(model(x_train[picked]), y_train[picked]).backward()
            optimizer.step()


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(x_test).sum(0).argmax(1) == y_test).float().mean())


torch.set_num_threads(1)
torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
data, test = (x_train, y_train), (x_test, y_test)

dense = Net()
train(dense, epochs=15)

pruning = {"criterion": "cqp", "ratio": 0.9, "bits": None, "data": data, "loss": loss}
small = snncompress.apply(dense, **pruning, scheduler="gradual", finetune=train)
small = snncompress.collapse(small, data)  # neurons that nothing reads, or that nothing makes fire, go altogether
train(small, epochs=5)
short = snncompress.apply(small, None, bits=None, data=data, truncate="auto")
print(snncompress.plan_of(short))
print(snncompress.compare({"dense": dense, "pruned": small, "and cut": short}, test))
for name, net in (("dense", dense), ("pruned", small), ("and cut", short)):
    print(f"{name}: {accuracy(net):.1%} right, {len(net.fc1.weight)} hidden neurons, {net.num_steps} timesteps")

analysis = snncompress.temporal_analysis(small, test)
layers = snncompress.sensitivity(dense, data, "cqp", test=test, loss=loss)
thresholds = snncompress.threshold_sweep(dense, data, ratio=0.7, test=test, loss=loss)
print(analysis, layers, thresholds, sep="\n\n")
if options.plots:
    options.plots.mkdir(parents=True, exist_ok=True)
    for name, found in (("timesteps", analysis), ("sensitivity", layers), ("thresholds", thresholds)):
        found.plot().figure.savefig(options.plots / f"{name}.png")
