"""The networks and data that benchmarks/repair.py compresses; each network is trained once per seed, and kept."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import mlp
import nmnist
import torch
from mnist_models import NETS
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import snncompress

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
Split = tuple[Tensor, Tensor]


class Task:
    """A network, its data, how it is trained, and how it is fine-tuned for one epoch."""

    name = title = ""
    timesteps: int | None = None
    images = 512
    """For calibration."""
    epoch = 10_000
    """Images in the epoch of fine-tuning."""
    folder, device = Path(), "cpu"

    def network(self) -> nn.Module:
        raise NotImplementedError

    def read(self, split: str) -> Split:
        """Samples first, and labels."""
        raise NotImplementedError

    def train(self, seed: int) -> None:
        """Train from scratch and keep the weights."""
        torch.manual_seed(seed)
        net = self.network().to(self.device)
        self.fit(net, seed)
        torch.save(net.state_dict(), self.weights(seed))

    def fit(self, net: nn.Module, seed: int) -> None:
        raise NotImplementedError

    def weights(self, seed: int) -> Path:
        return CACHE / f"repair-{self.name}-{seed}.pt"

    def dense(self, seed: int) -> nn.Module:
        net = self.network()
        net.load_state_dict(torch.load(self.weights(seed), map_location="cpu", weights_only=True))
        return net.to(self.device).eval()

    def calibration(self, count: int, seed: int) -> Any:
        x, y = self.some("train", count, seed)
        return DataLoader(TensorDataset(x, y), 64)

    def some(self, split: str, count: int, seed: int) -> Split:
        x, y = self.data[split]
        picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
        return x[picked], y[picked]

    @cached_property
    def data(self) -> dict[str, Split]:
        return {split: self.read(split) for split in ("train", "test")}

    def accuracy(self, net: nn.Module, seed: int) -> float:
        """In %, on the test split."""
        return 100 * snncompress.evaluate(net, self.test(seed), timesteps=self.timesteps).accuracy

    def test(self, seed: int) -> Any:
        return DataLoader(TensorDataset(*self.data["test"]), 250)

    def tune(self, net: nn.Module, lr: float, seed: int) -> None:
        """One epoch, on what the network of this seed was trained on."""
        loader = DataLoader(TensorDataset(*self.some("train", self.epoch, 0)), 64, shuffle=True)
        snncompress.finetune(net, loader, epochs=1, lr=lr, timesteps=self.timesteps, progress=False)


class Mnist(Task):
    timesteps = 4

    def __init__(self, framework: str) -> None:
        self.framework, self.name = framework, f"mnist-{framework}"
        self.title = (
            f"Conv(1, 16) - Conv(16, 32) - Linear(128) - Linear(10), batch norm, LIF, {framework}, T = 4, two epochs "
            f"of training; 512 calibration images, every fourth test image."
        )

    def network(self) -> nn.Module:
        return NETS[self.framework]()

    def read(self, split: str) -> Split:
        x, y = datasets.mnist(self.folder, split)
        every = 4 if split == "test" else 1
        return torch.tensor(x[::every]).unsqueeze(1) / 255, torch.tensor(y[::every]).long()

    def fit(self, net: nn.Module, seed: int) -> None:
        loader = DataLoader(TensorDataset(*self.data["train"]), 64, shuffle=True)
        snncompress.finetune(net, loader, epochs=2, lr=1e-3, timesteps=4, progress=False)


class Mlp(Task):
    name, images = "mlp", 1_000
    title = (
        "784-256-128-10 of snnTorch's Leaky(β = 0.9), T = 10, eight epochs of training; single weights of all layers; "
        "1,000 calibration images, all test images."
    )

    def network(self) -> nn.Module:
        return mlp.mlp()

    def read(self, split: str) -> Split:
        x, y = datasets.mnist(self.folder, split)
        return torch.tensor(x).flatten(1) / 255, torch.tensor(y).long()

    def fit(self, net: nn.Module, seed: int) -> None:
        loader = DataLoader(TensorDataset(*self.data["train"]), 512, shuffle=True)
        snncompress.finetune(net, loader, epochs=8, lr=2e-3, progress=False)


class NMnist(Task):
    name, images = "nmnist", 256
    title = (
        "Events of a camera, T = 10; Conv(2, 16) - Conv(16, 32) - Linear(128) - Linear(10) as in benchmarks/nmnist.py; "
        "1,100 recordings in three folds, each tested by a network trained on the others; 256 recordings calibrate."
    )

    def network(self) -> nn.Module:
        return nmnist.network()

    @cached_property
    def recordings(self) -> Split:
        return nmnist.read(self.folder)

    def fold(self, seed: int) -> tuple[Tensor, Tensor]:
        """The recordings of a fold: for training, for testing."""
        order = torch.randperm(len(self.recordings[1]), generator=torch.Generator().manual_seed(0))
        held = order.chunk(3)[seed]
        return order[~torch.isin(order, held)], held

    def fit(self, net: nn.Module, seed: int) -> None:
        batches = nmnist.Batches(*self.recordings, self.fold(seed)[0])
        snncompress.finetune(net, batches, epochs=nmnist.TRAIN_EPOCHS, lr=nmnist.TRAIN_LR, progress=False)

    def calibration(self, count: int, seed: int) -> Any:
        return nmnist.Batches(*self.recordings, self.fold(seed)[0][:count], shuffle=False)

    def test(self, seed: int) -> Any:
        return nmnist.Batches(*self.recordings, self.fold(seed)[1], shuffle=False)

    def tune(self, net: nn.Module, lr: float, seed: int) -> None:
        batches = nmnist.Batches(*self.recordings, self.fold(seed)[0])
        snncompress.finetune(net, batches, epochs=1, lr=lr, progress=False)


class Cifar(Task):
    """Seven convolutions of 32 to 128 channels, trained for eight epochs."""

    name, timesteps, epoch = "cifar", 2, 5_000
    title = (
        "Seven convolutions of 32 to 128 channels, batch norm, LIF (decay_input=False), T = 2, eight epochs "
        "(the weights of the run reported here came from another script with the same recipe); "
        "512 calibration images, every tenth test image."
    )

    def network(self) -> nn.Module:
        parts: list[nn.Module] = []
        before = 3
        for width in (32, 32, 0, 64, 64, 0, 128, 128, 0, 128):
            if not width:
                parts.append(layer.MaxPool2d(2))
                continue
            fire = neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(), detach_reset=True)
            parts += [layer.Conv2d(before, width, 3, padding=1, bias=False), layer.BatchNorm2d(width), fire]
            before = width
        net = nn.Sequential(*parts, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(128, 10))
        functional.set_step_mode(net, "m")
        return net

    def read(self, split: str) -> Split:
        x, y = datasets.cifar10(self.folder, split)
        every = 10 if split == "test" else 1
        x = (torch.tensor(x[::every]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        return x.contiguous(), torch.tensor(y[::every]).long()

    def fit(self, net: nn.Module, seed: int) -> None:
        """SGD under one cycle, images flipped and shifted; 40 minutes of two cores."""
        x, y = self.data["train"]
        epochs, batch = 8, 128
        steps = len(x) // batch
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, total_steps=epochs * steps)
        net.train()
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(batch)[:steps]:
                images = x[part].to(self.device)
                images = images.flip(3) if torch.rand(()) < 0.5 else images
                down, right = torch.randint(0, 9, (2,)).tolist()
                images = F.pad(images, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
                functional.reset_net(net)
                loss = F.cross_entropy(net(images.expand(2, *images.shape)).mean(0), y[part].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        functional.reset_net(net)


_ALL: tuple[Task, ...] = (Mnist("spikingjelly"), Mnist("snntorch"), Mlp(), NMnist(), Cifar())
TASKS = {task.name: task for task in _ALL}
