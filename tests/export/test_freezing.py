"""The inference form: plain weights, folded batch norms, the same function."""

from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from examples.networks.sew_resnet18 import sew_resnet18
from examples.networks.squeezenet import squeezenet
from snncompress import DataError, PlanError, evaluate, freeze, plan_of, profile
from snncompress.contract.detection import find_adapter
from snncompress.export.quickening import ConstantInput
from snncompress.running.data import Feed
from tests.equivalence import PAPER, same, snapshot


def trained_norms(net: nn.Module) -> nn.Module:
    """Batch norms as if trained: nothing is 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight.data, 2.0), (module.bias.data, 0.2), (module.running_mean, -0.1),
                                (module.running_var, 0.3)):  # fmt: skip
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return net


def network(framework: str) -> nn.Module:
    torch.manual_seed(0)
    if framework == "snntorch":

        def fire() -> nn.Module:
            return snn.Leaky(beta=0.5, init_hidden=True)

        parts: Any = nn
    else:
        fire, parts = neuron.LIFNode, layer
    net = nn.Sequential(
        parts.Conv2d(2, 8, 3, padding=1, bias=False), parts.BatchNorm2d(8), fire(), parts.MaxPool2d(2),
        parts.Conv2d(8, 12, 3, padding=1), parts.BatchNorm2d(12), fire(), parts.Flatten(),
        parts.Linear(12 * 9, 20), parts.BatchNorm1d(20), fire(), parts.Linear(20, 5),
    )  # fmt: skip
    if framework == "multi-step":
        functional.set_step_mode(net, "m")
    return trained_norms(net)


FRAMEWORKS = pytest.mark.parametrize("framework", ["spikingjelly", "multi-step", "snntorch"])
X = 5 * torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
DATA = X, torch.arange(16) % 5


def scores(model: nn.Module, x: Tensor = X, timesteps: int = 4) -> Tensor:
    feed = Feed(find_adapter(model, plain=True), x, timesteps)
    with torch.no_grad():
        return feed(model, feed.first())


def agree(a: Tensor, b: Tensor) -> bool:
    """Scores [T, N, K] that differ from sample to sample, equal up to rounding, but where it moved a spike."""
    close = torch.isclose(a, b, rtol=1e-4, atol=1e-4).flatten(2).all(2).all(0)
    assert len(b.unique(dim=1)) > 2, "these neurons are silent, or always fire"
    return int((~close).sum()) <= b.shape[1] // 8


@FRAMEWORKS
def test_a_fold_by_itself(framework: str) -> None:
    """The folded layer puts out what layer and norm did: of a convolution, a linear layer, with and without bias."""
    net = network(framework).eval()
    frozen = freeze(net, X, timesteps=4)
    for layer_, norm, x in ((0, 1, X), (4, 5, torch.rand(3, 8, 3, 3)), (8, 9, torch.rand(4, 108))):
        x = x.unsqueeze(0) if framework == "multi-step" else x
        assert torch.allclose(frozen[layer_](x), net[norm](net[layer_](x)), atol=1e-5)
        assert not torch.allclose(frozen[layer_](x), net[layer_](x), atol=1e-1)


@FRAMEWORKS
def test_the_same_function_without_norms_and_parametrizations(framework: str) -> None:
    net = network(framework)
    options = {"data": DATA, "timesteps": 4, "progress": False}
    small = snncompress.apply(net, "magnitude", 0.4, None, **options)
    small = snncompress.apply(small, "weight_magnitude", 0.5, 4, **options).eval()
    before = snapshot(small)
    frozen = freeze(small, X, timesteps=4)
    assert same(before, snapshot(small))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in frozen.modules())
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in frozen.parameters())
    kinds = [nn.Identity if isinstance(m, nn.modules.batchnorm._BatchNorm) else type(m) for m in net]
    assert all(map(isinstance, frozen, kinds))
    assert agree(scores(frozen), scores(small))
    assert not frozen.training
    assert float((frozen[4].weight == 0).float().mean()) > 0.3  # removed weights are plain zeros


@FRAMEWORKS
def test_a_quantized_layer_without_norm_keeps_its_very_weights(framework: str) -> None:
    small = snncompress.apply(network(framework), None, bits=3, data=DATA, timesteps=4, skip=[], quantizer=PAPER)
    frozen = freeze(small, X, timesteps=4)
    assert torch.equal(frozen[11].weight, small[11].weight)
    assert len(frozen[11].weight.unique()) <= 8


@FRAMEWORKS
def test_without_data(framework: str) -> None:
    """No batch, no warning: the noise is looked at for structure alone."""
    net = network(framework)
    frozen = freeze(net, timesteps=4) if framework == "multi-step" else freeze(net)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())


class Branched(nn.Module):
    """Norms that can't be folded: of a sum, of an output that is used again, shared by two layers, after a neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(5))
        self.of_sum, self.used_again, self.shared, self.after_neuron, self.own = (nn.BatchNorm2d(2) for _ in range(5))
        self.fire1, self.fire2, self.fire3, self.fire4 = (neuron.IFNode() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        one = self.conv1(x)
        x = self.fire1(self.used_again(one) + one)
        x = self.fire2(self.of_sum(self.conv2(x) + self.shared(self.conv3(x))))
        x = self.fire3(self.shared(self.conv4(x)))
        return self.own(self.conv5(self.after_neuron(x)))


def test_norms_that_must_stay() -> None:
    torch.manual_seed(0)
    net = trained_norms(Branched()).eval()
    frozen = freeze(net, X, timesteps=3)
    left = {name for name, m in frozen.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"of_sum", "used_again", "shared", "after_neuron"}
    assert agree(scores(frozen, timesteps=3), scores(net, timesteps=3))


@pytest.mark.parametrize("build", [squeezenet, sew_resnet18])
def test_networks_of_the_papers(build: Any) -> None:
    torch.manual_seed(0)
    net = build(norm=True, width=0.25) if build is squeezenet else build()
    if build is squeezenet:
        net.after_conv10 = nn.Identity()
    functional.set_step_mode(net, "m")
    x = torch.randn(8, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # at the statistics of these images, so that neurons fire
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 2.5, 3.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        net.train()(x.expand(4, -1, -1, -1, -1))
    functional.reset_net(net)
    frozen = freeze(net, x, timesteps=4)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    assert agree(scores(frozen, x, 4), scores(net.eval(), x, 4))


@pytest.mark.parametrize(
    "parts",
    [
        (nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)),
        (nn.ConvTranspose2d(2, 4, 2), nn.BatchNorm2d(4)),
        (nn.Conv2d(2, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4, affine=False)),
    ],
)
def test_other_layers_and_norms(parts: tuple[nn.Module, nn.Module]) -> None:
    net = nn.Sequential(*parts).eval()
    nn.init.uniform_(net[1].running_var, 2, 3)
    x = torch.rand(5, 6) if isinstance(net[0], nn.Linear) else X
    frozen = freeze(net, x)
    assert isinstance(frozen[1], nn.Identity)
    assert torch.allclose(frozen(x), net(x), atol=1e-5)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(4)), torch.rand(5, 4, 6)),  # over tokens, not features
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.rand(5, 4, 6)),
        (nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.BatchNorm2d(4)), X),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 2)), nn.BatchNorm2d(4)), X),
    ],
)
def test_other_norms_stay_or_keep_the_function(net: nn.Module, x: Tensor) -> None:
    trained_norms(net).eval()
    frozen = freeze(net, x)
    assert torch.allclose(frozen(x), net(x), atol=1e-4)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        frozen = freeze(network("spikingjelly"), X, timesteps=2)
    assert not any(p.is_inference() for p in frozen.parameters())


def test_what_a_frozen_network_is_not() -> None:
    net = network("multi-step")
    frozen = freeze(snncompress.apply(net, "magnitude", 0.4, 4, data=DATA, timesteps=4), X, timesteps=4)
    with pytest.raises(PlanError, match="holds no plan"):
        plan_of(frozen)
    assert evaluate(frozen, DATA, timesteps=4).n_samples == 16
    assert profile(frozen, X, timesteps=4).n_ac > 0
    with pytest.raises(DataError, match="failed on a batch"):
        freeze(net, torch.rand(2, 7, 6, 6), timesteps=4)


@FRAMEWORKS
def test_what_is_silent_in_the_example_is_not_taken_for_constant(framework: str) -> None:
    """The first layer reads the same in every timestep; the second would, if the first neurons never fired."""
    net = network(framework)
    net[1].bias.data.fill_(-1e3)
    frozen = freeze(net.eval(), X, timesteps=4)
    assert [isinstance(frozen[at], ConstantInput) for at in (0, 4, 8)] == [True, False, False]


def test_an_ordinary_network() -> None:
    torch.manual_seed(0)
    net = trained_norms(nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU())).eval()
    frozen = freeze(net, X)
    assert isinstance(frozen[1], nn.Identity)
    assert torch.allclose(frozen(X), net(X), atol=1e-5)


def test_an_ordinary_network_needs_no_data() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(snncompress.freeze(net.eval())(x), net(x), rtol=1e-4, atol=1e-5)
