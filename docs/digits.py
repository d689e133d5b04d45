import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress

torch.set_num_threads(1)  # small networks train fastest in one thread
torch.manual_seed(0)
digits = load_digits()  # 1,797 scans of handwritten digits
x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)  # [1797, 1, 8, 8]
train = DataLoader(TensorDataset(x[0::2], y[0::2]), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(x[1::2], y[1::2]), batch_size=256)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.lif1 = layer.Conv2d(1, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode()
        self.conv2, self.bn2, self.lif2 = layer.Conv2d(16, 32, 3, padding=1), layer.BatchNorm2d(32), neuron.LIFNode()
        self.fc1, self.lif3 = layer.Linear(128, 64), neuron.LIFNode()
        self.fc2 = layer.Linear(64, 10)
        self.pool, self.flatten = layer.MaxPool2d(2), layer.Flatten()
        functional.set_step_mode(self, "m")

    def forward(self, x):  # [T, N, 1, 8, 8] -> [T, N, 10]
        x = self.pool(self.lif1(self.bn1(self.conv1(x))))
        x = self.pool(self.lif2(self.bn2(self.conv2(x))))
        return self.fc2(self.lif3(self.fc1(self.flatten(x))))


model = snncompress.finetune(Net(), train, epochs=3, timesteps=4, lr=1e-2)
batch = x[:512:2], y[:512:2]  # 256 labelled samples: enough to calibrate with
