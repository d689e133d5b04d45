"""A snnTorch class with its own time loop and explicit membranes, as in snnTorch's tutorials.

Nothing in the class changes for compression: what is needed is a way to run it on a batch.
"""

import snntorch as snn
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from snntorch import surrogate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress


class Net(nn.Module):
    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 100)
        self.lif1 = snn.Leaky(beta=beta, spike_grad=surrogate.atan())
        self.fc2 = nn.Linear(100, 100)
        self.lif2 = snn.Leaky(beta=beta, spike_grad=surrogate.atan())
        self.fc3 = nn.Linear(100, 10)
        self.lif3 = snn.Leaky(beta=beta, spike_grad=surrogate.atan())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mem1, mem2, mem3 = (lif.reset_mem() for lif in (self.lif1, self.lif2, self.lif3))
        spikes, membrane = [], []
        for _ in range(8):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk3, mem3 = self.lif3(self.fc3(spk2), mem3)
            spikes.append(spk3)
            membrane.append(mem3)
        return torch.stack(spikes), torch.stack(membrane)


def run(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(batch[0])[1]  # scores are the output membranes, [T, N, 10]: they say more than few spikes


torch.set_num_threads(1)
torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
train = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

dense = snncompress.finetune(Net(), train, epochs=10, lr=1e-2, forward=run)
# skip=None would keep fc2 whole, the classifier's input. Here only the classifier stays as it is.
small = snncompress.apply(dense, "svs", ratio=0.5, bits=4, data=train, forward=run, skip=["fc3"])
snncompress.finetune(small, train, epochs=10, lr=1e-2, forward=run)

print(snncompress.compare({"dense": dense, "small": small}, (x_test, y_test), forward=run))
for name, net in (("dense", dense), ("small", small)):
    with torch.no_grad():
        right = run(net.eval(), (x_test, y_test)).mean(0).argmax(1) == y_test
    print(f"{name}: {right.float().mean():.1%} right, {net.fc1.out_features} and {net.fc2.out_features} hidden neurons")
