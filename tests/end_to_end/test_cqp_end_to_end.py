"""Single weights on real data: 80 % of them go, the digits stay known, energy falls, timesteps can go too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import snntorch
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores

T = 6


class OwnLoop(nn.Module):
    """As snnTorch's tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(64, 64), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(64, 10), snntorch.Leaky(beta=0.9)
        self.num_steps = T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(self.num_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


def multi_step() -> nn.Module:
    net = nn.Sequential(layer.Linear(64, 64), neuron.LIFNode(), layer.Linear(64, 10), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    return net


def accuracy(model: nn.Module, x: Tensor, y: Tensor, timesteps: int | None) -> float:
    feed = Feed(find_adapter(model), (x, y), timesteps)
    model.eval()
    with torch.no_grad():
        right = class_scores(feed(model, feed.first())).argmax(1) == y
    feed.adapter.reset(model)
    return float(right.double().mean())


@pytest.mark.parametrize(
    ("build", "timesteps", "bits"),
    [
        (OwnLoop, None, None),
        (multi_step, T, 4),
        pytest.param(OwnLoop, None, 4, marks=pytest.mark.slow),
        pytest.param(multi_step, T, None, marks=pytest.mark.slow),
    ],
)
def test_digits(build: object, timesteps: int | None, bits: int | None) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1350], order[1350:]
    loader = DataLoader(TensorDataset(x[train], y[train]), 50, shuffle=True)
    dense = build()
    snncompress.finetune(dense, loader, epochs=12, lr=5e-3, timesteps=timesteps)
    before = accuracy(dense, x[test], y[test], timesteps)
    assert before >= 0.9

    def tune(model: nn.Module) -> None:
        snncompress.finetune(model, loader, epochs=3, lr=5e-3, timesteps=timesteps)

    small = snncompress.apply(
        dense, "cqp", 0.8, bits, data=loader, timesteps=timesteps, scheduler="iterative", finetune=tune,
        skip={"quantize": []}, truncate=4,
    )  # fmt: skip
    plan = snncompress.plan_of(small)
    assert plan.timesteps == 4
    masks = {e.layer: e.mask() for e in plan.edits if isinstance(e, snncompress.MaskWeights)}
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(0.8 * (64 * 64 + 64 * 10))
    assert not any(small.get_submodule(name).weight[~mask].any() for name, mask in masks.items())
    assert accuracy(small, x[test], y[test], timesteps) >= before - 0.2
    a, b = (snncompress.profile(m, x[test][:50], timesteps=timesteps) for m in (dense, small))
    assert b.energy_pj < 0.25 * a.energy_pj  # a fifth of the synapses, four of six steps


@pytest.mark.parametrize(
    ("truncate", "said"), [(0, "truncate must be"), (True, "truncate must be"), ("half", "truncate"), (7, "runs 6")]
)
def test_a_number_of_timesteps_that_cannot_be(truncate: object, said: str) -> None:
    with pytest.raises(snncompress.OptionError, match=said):
        snncompress.apply(OwnLoop(), None, bits=None, data=torch.rand(2, 64), truncate=truncate)


def test_events_with_a_convolutional_network(data_dir: Path) -> None:
    """N-MNIST: recordings of an event camera, [T, N, 2, 34, 34]."""
    spec = importlib.util.spec_from_file_location("read", data_dir / "read.py")
    read = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(read)
    events, labels = read.nmnist("train", timesteps=T)
    x = nn.functional.max_pool3d(torch.tensor(events[:400]), (1, 2, 2)).transpose(0, 1)  # [T, N, 2, 17, 17]
    y = torch.tensor(labels[:400]).long()
    train = [(x[:, i : i + 40], y[i : i + 40]) for i in range(0, 320, 40)]
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(), layer.MaxPool2d(2),
        layer.Conv2d(8, 16, 3, bias=False), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(16 * 25, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    snncompress.finetune(net, train, epochs=8, lr=5e-3)
    before = accuracy(net, x[:, 320:], y[320:], None)
    assert before >= 0.65

    def tune(model: nn.Module) -> None:
        snncompress.finetune(model, train, epochs=3, lr=5e-3)

    small = snncompress.apply(net, "cqp", 0.7, None, data=train, scheduler="iterative", finetune=tune)
    assert accuracy(small, x[:, 320:], y[320:], None) >= before - 0.2
    dense, sparse = (snncompress.profile(m, train[:1]) for m in (net, small))
    assert sparse.n_ac < 0.85 * dense.n_ac  # few weights go from the convolutions, which most spikes reach
