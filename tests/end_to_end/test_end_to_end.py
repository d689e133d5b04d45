"""The main job on real data: train, compress, fine-tune, and still know the digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import snntorch as snn
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores
from tests.equivalence import PAPER

T = 4


def spikingjelly_net(size: int) -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), lif_sj(), layer.MaxPool2d(2),
        layer.Conv2d(16, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), lif_sj(), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(32 * (size // 4) ** 2, 64), lif_sj(), layer.Linear(64, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def lif_sj() -> nn.Module:
    return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)


def snntorch_net(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), lif_snn(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), lif_snn(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), lif_snn(), nn.Linear(64, 10),
    )  # fmt: skip


def lif_snn() -> nn.Module:
    return snn.Leaky(beta=0.5, init_hidden=True)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    feed = Feed(find_adapter(model), (x, y), T)
    model.eval()
    with torch.no_grad():
        return float((class_scores(feed(model, feed.first())).argmax(1) == y).double().mean())


NETS = pytest.mark.parametrize("build", [spikingjelly_net, snntorch_net])
SLOW = pytest.mark.slow  # of long tests each framework has one in the default run


@pytest.mark.parametrize("build", [pytest.param(spikingjelly_net, marks=SLOW), snntorch_net])
def test_digits(build: object) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))  # the last scans are other writers'
    train, test = order[:1350], order[1350:]
    check(build(8), x[train], y[train], x[test], y[test], epochs=8, tuning=2, dense_floor=0.93, loss=0.1)


@pytest.mark.parametrize("build", [spikingjelly_net, pytest.param(snntorch_net, marks=SLOW)])
def test_mnist(build: object, data_dir: Path) -> None:
    spec = importlib.util.spec_from_file_location("read", data_dir / "read.py")
    read = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(read)
    (x, y), (x_test, y_test) = read.mnist("train"), read.mnist("test")

    def images(array: object, count: int) -> Tensor:
        return torch.tensor(array[:count], dtype=torch.float32)[:, None] / 255

    train = images(x, 600), torch.tensor(y[:600], dtype=torch.long)
    test = images(x_test, 500), torch.tensor(y_test[:500], dtype=torch.long)
    check(build(28), *train, *test, epochs=6, tuning=1, dense_floor=0.8, loss=0.06)


def check(
    dense: nn.Module,
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    epochs: int,
    tuning: int,
    dense_floor: float,
    loss: float,
) -> None:
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    snncompress.finetune(dense, loader, epochs=epochs, timesteps=T, lr=2e-3)
    before = accuracy(dense, x_test, y_test)
    assert before >= dense_floor
    seen: list[str] = []
    small = snncompress.apply(
        dense,
        "svs",
        0.6,
        4,
        data=loader,
        timesteps=T,
        finetune=tuning,
        progress=lambda what, done, total: seen.append(what),
    )
    assert before - accuracy(small, x_test, y_test) <= loss
    assert small[0].out_channels == 6  # 16 - ⌈0.6·16⌉
    assert small[4].out_channels == 12  # 32 - ⌈0.6·32⌉
    assert {s.split(",")[0] for s in seen} == {
        "step 1/2: repairing",
        "step 1/2: fine-tuning",
        "step 2/2: calibrating svs",
        "step 2/2: repairing",
        "step 2/2: fine-tuning",
    }
    a, b = (snncompress.profile(m, x_test[:20], timesteps=T) for m in (dense, small))
    assert b.size_mb < 0.15 * a.size_mb
    assert b.energy_pj < 0.6 * a.energy_pj
    assert accuracy(dense, x_test, y_test) == before


@NETS
def test_finetune_trains_and_keeps_what_was_cut(build: object) -> None:
    """The loss falls, quantized layers stay on their grid, flags are as before, and the call returns the model."""
    torch.manual_seed(0)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 2
    x[y == 1, :, :4] *= 3
    small = snncompress.apply(build(8), "magnitude", 0.5, 4, data=(x, y), timesteps=T, quantizer=PAPER).eval()
    shapes = {k: v.shape for k, v in small.state_dict().items()}
    before = small[4].parametrizations.weight.original.detach().clone()
    assert snncompress.finetune(small, (x, y), epochs=80, timesteps=T, lr=5e-3) is small
    assert accuracy(small, x, y) >= 0.9
    assert not torch.equal(before, small[4].parametrizations.weight.original)
    assert len(small[4].weight.unique()) <= 16
    assert shapes == {k: v.shape for k, v in small.state_dict().items()}
    assert not any(m.training for m in small.modules())
