"""convert(): what becomes of a CNN's structure, and of its function."""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import snntorch as snn
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import ann2snn, functional, neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.conversion.converting import convert
from snncompress.conversion.rate_coding import CalibratedNeuron, RateMaxPool
from snncompress.measuring.evaluation import accuracy
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores
from tests.equivalence import largest_difference, same, snapshot

FRAMEWORKS = pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
Data = tuple[Tensor, Tensor]


class Functional(nn.Module):
    """The style of PyTorch's own MNIST example: functions, one pooling module for both places, log_softmax."""

    def __init__(self, flat: int = 128) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(flat, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(torch.relu_(self.conv2(x)))
        x = F.dropout(self.fc1(x.flatten(1)).relu(), 0.2, self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Block(nn.Module):
    """A residual block with one ReLU in two places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Fire(nn.Module):
    """SqueezeNet's module: two expansions side by side."""

    def __init__(self, before: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze, self.expand1 = nn.Conv2d(before, squeezed, 1), nn.Conv2d(squeezed, expanded, 1)
        self.expand3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.act, self.act1, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat([self.act1(self.expand1(x)), self.act3(self.expand3(x))], 1)


def sequential(activation: Callable[[], nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), activation(), pool(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), activation(), pool(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 64), activation(), nn.Linear(64, 10),
    )  # fmt: skip


def residual() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Block(16), nn.AvgPool2d(2), Block(16), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def fire() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Fire(16, 8, 16), nn.MaxPool2d(2), Fire(32, 8, 16), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


NETS = {"sequential": sequential, "functional": Functional, "residual": residual, "fire": fire}


@cache
def digits() -> tuple[Data, Data]:
    raw = load_digits()
    x, y = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1300]], y[order[:1300]]), (x[order[1300:]], y[order[1300:]])


def trained(net: nn.Module, data: Data, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for some in torch.randperm(len(data[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(data[0][some]), data[1][some]).backward()
            optimizer.step()
    return net.eval()


@cache
def trained_on_digits(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return trained(NETS[kind](), digits()[0], 10)


def right(cnn: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((cnn(data[0]).argmax(1) == data[1]).double().mean())


def spiking(model: nn.Module, data: Data, timesteps: int) -> float:
    return accuracy(model, Feed(find_adapter(model), data, timesteps))


# ------------------------------------------------------------------------------------------------------------ structure


@FRAMEWORKS
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_activations_become_lif_neurons_and_nothing_else_changes(framework: str, activation: type[nn.Module]) -> None:
    cnn = sequential(activation).eval()
    cnn[5].train()
    before = snapshot(cnn)
    model = convert(cnn, framework, timesteps=4)
    assert same(before, snapshot(cnn))
    assert type(model) is nn.Sequential
    assert [type(m) for i, m in enumerate(model) if i not in (1, 5, 10)] == [
        type(m) for i, m in enumerate(cnn) if i not in (1, 5, 10)
    ]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in cnn.state_dict().items())
    assert [m.training for m in model] == [m.training for m in cnn]
    assert list(find_adapter(model).neurons(model)) == ["1", "5", "10"]
    lif = model[1]
    if framework == "spikingjelly":
        assert isinstance(lif, neuron.LIFNode)
        assert (lif.tau, lif.v_threshold, lif.v_reset) == (2.0, 1.0, 0.0)
        assert isinstance(lif.surrogate_function, surrogate.ATan)
    else:
        assert isinstance(lif, snn.Leaky)
        assert (float(lif.beta), float(lif.threshold), lif.reset_mechanism) == (0.5, 1.0, "zero")
        assert "atan" in lif.spike_grad.__qualname__


@FRAMEWORKS
def test_the_result_learns(framework: str) -> None:
    train, test = digits()
    model = convert(trained_on_digits("sequential"), framework)
    loader = DataLoader(TensorDataset(*train), 50, shuffle=True)
    snncompress.finetune(model.train(), loader, epochs=3, lr=5e-3, timesteps=4, progress=False)
    assert spiking(model, test, 4) > 0.6


@FRAMEWORKS
def test_functions_become_submodules(framework: str) -> None:
    cnn = Functional().eval()
    before = snapshot(cnn)
    model = convert(cnn, framework)
    assert same(before, snapshot(cnn))
    assert isinstance(model, Functional)
    assert list(find_adapter(model).neurons(model)) == ["relu", "relu_1", "relu_2"]
    copied = copy.deepcopy(model)
    assert set(cnn.state_dict()) <= set(copied.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), copied(x))
    with pytest.raises(TypeError, match="scale"):  # optional arguments are held at their defaults
        model(x, scale=2.0)


def test_a_rewritten_forward_still_knows_training_from_eval() -> None:
    cnn = nn.Sequential(nn.Linear(4, 200), Dropping(), nn.Linear(200, 2))
    model = convert(cnn)
    x = 100 * torch.ones(1, 4)
    silent = [float((model.train(mode)[1](model[0](x)) == 0).float().mean()) for mode in (True, False)]
    find_adapter(model).reset(model)
    assert silent[0] > silent[1] + 0.1


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


@FRAMEWORKS
def test_every_use_of_a_shared_activation_gets_its_neuron(framework: str) -> None:
    act = nn.ReLU()
    shared = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 2))
    model = convert(shared, framework)
    assert list(find_adapter(model).neurons(model)) == ["1", "3"]
    model = convert(Block(4), framework)
    assert isinstance(model, Block)
    assert list(find_adapter(model).neurons(model)) == ["relu", "relu_1"]


@FRAMEWORKS
def test_nested_networks(framework: str) -> None:
    cnn = nn.Sequential(OrderedDict(features=residual()[:6], head=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))
    model = convert(cnn, framework)
    expected = ["features.1", "features.2.relu", "features.2.relu_1", "features.4.relu", "features.4.relu_1"]
    assert list(find_adapter(model).neurons(model)) == expected


def test_a_callable_makes_the_neurons() -> None:
    model = convert(sequential(), neuron=lambda: neuron.ParametricLIFNode(init_tau=3.0))
    assert isinstance(model[5], neuron.ParametricLIFNode)
    assert model[5] is not model[1]
    model = convert(sequential(), "snntorch", neuron=lambda: snn.Leaky(beta=0.9, init_hidden=True))
    assert float(model[10].beta) == pytest.approx(0.9)


# -------------------------------------------------------------------------------------------------------- function kept


@FRAMEWORKS
@pytest.mark.parametrize("kind", NETS)
def test_calibrated_networks_keep_the_function(framework: str, kind: str) -> None:
    cnn, (train, test) = trained_on_digits(kind), digits()
    before = snapshot(cnn)
    model = convert(
        cnn, framework, neuron="if", data=DataLoader(TensorDataset(*train), 200, shuffle=True), timesteps=32
    )
    assert same(before, snapshot(cnn))  # the random state among it
    dense = right(cnn, test)
    assert dense > 0.93
    assert spiking(model, test, 32) > dense - 0.02


@cache
def mnist(folder: Path) -> tuple[Data, nn.Module]:
    """Test images, every second pixel, and a CNN trained on a few others."""
    spec = importlib.util.spec_from_file_location("read", folder / "read.py")
    read = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(read)

    def images(split: str, count: int) -> Data:
        x, y = read.mnist(split)
        return torch.tensor(x[:count], dtype=torch.float32)[:, None, ::2, ::2] / 255, torch.tensor(y[:count]).long()

    return images("test", 500), trained(Functional(288), images("train", 2000), 5)


@FRAMEWORKS
def test_mnist(framework: str, data_dir: Path) -> None:
    test, cnn = mnist(data_dir)
    model = convert(cnn, framework, neuron="if", data=test[0][:200], timesteps=32)  # inputs alone: no label is seen
    assert right(cnn, test) > 0.88
    assert spiking(model, test, 32) > right(cnn, test) - 0.02


def test_as_good_as_ann2snn() -> None:
    cnn, (train, test) = trained(sequential(pool=nn.AvgPool2d), digits()[0], 10), digits()
    loader = DataLoader(TensorDataset(*train), 1300)
    theirs = ann2snn.Converter(ann2snn.RateCodingRecipe(loader, mode="99.9%")).convert(copy.deepcopy(cnn)).eval()
    with torch.no_grad():
        outputs = torch.stack([theirs(test[0]) for _ in range(32)])
        functional.reset_net(theirs)
    their_accuracy = float((class_scores(outputs).argmax(1) == test[1]).double().mean())
    plain, rounding = (convert(cnn, neuron="if", data=train, timesteps=t) for t in (None, 32))
    assert spiking(plain, test, 32) == pytest.approx(their_accuracy, abs=0.01)
    assert spiking(rounding, test, 32) > their_accuracy - 0.005
    feed = Feed(find_adapter(plain), test, 32)
    with torch.no_grad():  # the same spikes, but for batch norm, which they fold into the convolution
        torch.testing.assert_close(class_scores(feed(plain, feed.first())), outputs.mean(0), rtol=0, atol=1.0)


def test_spikes_stay_binary_where_their_factor_can_move_on() -> None:
    train, _ = digits()
    # What is added to currents keeps its factor. Averages of spikes are additions, and so are spikes of another height.
    for kind, scaled, macs in (("sequential", 0, 1), ("functional", 0, 1), ("fire", 0, 1), ("residual", 2, 1)):
        model = convert(trained_on_digits(kind), neuron="if", data=train[0], timesteps=8)
        neurons = [m for m in model.modules() if isinstance(m, CalibratedNeuron)]
        assert sum(float(n.scale) != 1 for n in neurons) == scaled, kind
        assert all(float(n.shift) == 1 / 16 for n in neurons)
        layers = snncompress.profile(model, data=(train[0][:4], train[1][:4]), timesteps=8).layers
        assert sum(layer.n_mac > 0 for layer in layers) == macs, kind  # the first layer sees pixels


class AddsOne(nn.Module):
    """torch.fx takes the other branch: its stand-ins are no tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if isinstance(x, Tensor) else x


def test_a_graph_that_is_wrong_moves_no_factor() -> None:
    cnn = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), AddsOne(), nn.Linear(8, 2)).eval()
    x = 5 * torch.rand(30, 4)
    model = convert(cnn, neuron="if", data=x, timesteps=64)
    assert torch.equal(model[3].weight, cnn[3].weight)
    assert float(model[1].scale) == pytest.approx(1 / float(model[1].gain))
    feed = Feed(find_adapter(model), x, 64)
    with torch.no_grad():
        torch.testing.assert_close(class_scores(feed(model, feed.first())), cnn(x), atol=0.1, rtol=0)


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        model = convert(sequential(), neuron="if", data=digits()[0][0][:20])
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def test_the_maximum_is_a_percentile_of_100() -> None:
    cnn = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    nn.init.ones_(cnn[0].weight)
    x = torch.arange(1.0, 101.0)[:, None]
    gains = [float(convert(cnn, neuron="if", data=x, percentile=p)[1].gain) for p in (100, 50)]
    assert gains == pytest.approx([1 / 100, 1 / 50])
    assert float(convert(cnn, neuron="if", data=-x)[1].gain) == 1.0  # never positive


def test_max_pooling_of_rates() -> None:
    pool = RateMaxPool(nn.MaxPool2d(2))
    x = (torch.rand(9, 3, 2, 4, 4) < torch.rand(3, 2, 4, 4)).float()
    y = torch.stack([pool(step) for step in x])
    assert torch.equal(y.sum(0), nn.MaxPool2d(2)(x.sum(0)))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    pool.reset()
    assert torch.equal(pool(x[0]), y[0])


@FRAMEWORKS
def test_resetting_the_network_resets_the_pooling(framework: str) -> None:
    model = convert(trained_on_digits("functional"), framework, neuron="if", data=digits()[0][0], timesteps=4)
    feed = Feed(find_adapter(model), digits()[1][0][:5], 4)
    with torch.no_grad():
        assert torch.equal(feed(model, feed.first()), feed(model, feed.first()))


# --------------------------------------------------------------------------------------------------------- what follows


@FRAMEWORKS
@pytest.mark.parametrize("kind", ["functional", "residual"])
@pytest.mark.parametrize("mode", ["lif", "if"])
def test_converted_networks_can_be_compressed(framework: str, kind: str, mode: str) -> None:
    batch = digits()[0][0][:16], digits()[0][1][:16]
    calibration = {"data": batch, "timesteps": 4} if mode == "if" else {}
    cnn = copy.deepcopy(trained_on_digits(kind))
    with torch.no_grad():
        for layer in cnn.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) and mode == "lif":
                layer.weight.mul_(3)  # so that all neurons fire
    model = convert(cnn, framework, neuron=mode, **calibration)
    options = {"data": batch, "timesteps": 4, "progress": False}
    small = snncompress.apply(model, "svs", 0.5, None, repair=None, **options)
    assert largest_difference(model, small, Feed(find_adapter(model), batch, 4)) < 1e-4
    masked = snncompress.apply(model, "magnitude", 0.5, 4, **options)
    assert snncompress.plan_of(masked).edits
    before, after = (
        sum(layer.n_params for layer in snncompress.profile(m, data=batch, timesteps=4).layers) for m in (model, small)
    )
    assert after < before
