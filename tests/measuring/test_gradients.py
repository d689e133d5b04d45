"""The gradient-aware loss, and gradient flow."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import snntorch as snn
import torch
from snncompress_baselines import WeightMagnitude
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, GradientAwareLoss, GradientFlow, ModelError, OptionError, cross_entropy
from snncompress.contract.detection import find_adapter
from snncompress.measuring.gradients import gradient_flow
from snncompress.running.data import Feed
from tests.equivalence import same, snapshot


def flat(*values: float) -> nn.Linear:
    """One input, two classes, weights as given."""
    linear = nn.Linear(1, len(values), bias=False)
    linear.weight.data = torch.tensor(values).unsqueeze(1)
    return linear


ONE = torch.ones(1, 1), torch.tensor([0])


def spiking(framework: str) -> nn.Module:
    torch.manual_seed(0)
    if framework == "snntorch":
        parts = [(nn.Linear(a, b), snn.Leaky(beta=0.5, init_hidden=True)) for a, b in ((6, 10), (10, 10), (10, 10))]
    else:
        parts = [(layer.Linear(a, b), neuron.LIFNode()) for a, b in ((6, 10), (10, 10), (10, 10))]
    net = nn.Sequential(*(m for pair in parts for m in pair), nn.Linear(10, 3))
    if framework == "multi-step":
        functional.set_step_mode(net, "m")
    return net


def data(framework: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.rand(12, 6, generator=generator)
    return x, torch.arange(12) % 3


FRAMEWORKS = pytest.mark.parametrize("framework", ["spikingjelly", "multi-step", "snntorch"])


def test_the_loss_by_hand() -> None:
    """Scores (0, 0): p = (½, ½), so L_CE = ln 2 and g = (p - (1, 0))·1 = (-½, ½), ‖g‖ = 1/√2.

    1 - ‖g‖ / (‖g‖ + ε) with ε = 1/√2 is ½; λ = 3 adds 1.5.
    """
    loss = GradientAwareLoss(net := flat(0.0, 0.0), weight=3, eps=math.sqrt(0.5))
    assert float(loss(net(ONE[0]), ONE[1]).detach()) == pytest.approx(math.log(2) + 1.5)
    assert float(GradientAwareLoss(net, weight=0)(net(ONE[0]), ONE[1]).detach()) == pytest.approx(math.log(2))


def test_a_layer_that_no_gradient_reaches_costs_the_whole_weight() -> None:
    net = nn.ModuleDict({"used": flat(0.0, 0.0), "unused": flat(1.0)})
    loss = GradientAwareLoss(net, weight=1, eps=math.sqrt(0.5))
    assert float(loss(net["used"](ONE[0]), ONE[1]).detach()) == pytest.approx(math.log(2) + 0.5 + 1)
    net["unused"].requires_grad_(False)  # frozen: no business of the loss
    assert float(loss(net["used"](ONE[0]), ONE[1]).detach()) == pytest.approx(math.log(2) + 0.5)


def test_its_gradient_is_the_derivative() -> None:
    """Against central differences, in float64, through smooth activations."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    loss = GradientAwareLoss(net, weight=2.0, eps=0.3)
    loss(net(x), y).backward()
    weight, h = net[0].weight, 1e-5
    for i, j in ((0, 0), (1, 2), (3, 1)):
        values = []
        for step in (h, -h):
            with torch.no_grad():
                weight[i, j] += step
            values.append(float(loss(net(x), y).detach()))
            with torch.no_grad():
                weight[i, j] -= step
        assert float(weight.grad[i, j]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@FRAMEWORKS
def test_it_brings_gradients_back(framework: str) -> None:
    """A first layer whose gradient is next to nothing: with the penalty it comes back, with cross-entropy less so.

    ε far above the norms makes the penalty their negative sum, λ/ε·Σ‖g‖ up to a constant: training raises them.
    """
    x, y = data(framework)
    norms = {}
    for weight in (0.0, 10.0):
        net = spiking(framework)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.Linear):
                    module.weight *= 0.05
        loss = GradientAwareLoss(net, weight=weight, eps=1e-2)
        before = gradient_flow(net, (x, y), timesteps=4).norms["0"]
        snncompress.finetune(net, [(x, y)], epochs=20, lr=5e-3, timesteps=4, loss=loss)
        norms[weight] = gradient_flow(net, (x, y), timesteps=4).norms["0"] / before
    assert norms[10.0] > 3 * norms[0.0]


@FRAMEWORKS
def test_in_a_loop_of_ones_own_on_a_compressed_network(framework: str) -> None:
    x, y = data(framework)
    options: dict[str, Any] = {"data": (x, y), "timesteps": 4, "progress": False}
    small = snncompress.apply(spiking(framework), "magnitude", 0.4, 4, skip=[], **options)
    masked = snncompress.apply(small, WeightMagnitude("layer"), 0.5, None, **options)
    loss = GradientAwareLoss(masked, weight=10.0, eps=1e-2)
    feed = Feed(find_adapter(masked), (x, y), 4)
    optimizer = torch.optim.Adam(masked.parameters(), lr=5e-3)
    gone, totals = masked[2].weight == 0, []
    for _ in range(15):
        optimizer.zero_grad()
        total = loss(feed(masked, feed.first()), y)
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < totals[0]
    assert torch.equal(masked[2].weight == 0, gone)
    assert 0.4 < float(gone.float().mean()) < 0.9


def test_cross_entropy_where_no_gradient_is_recorded() -> None:
    net = spiking("multi-step")
    x, y = data("multi-step")
    with torch.no_grad():
        output = net(x.expand(4, -1, -1))
        assert torch.equal(GradientAwareLoss(net, weight=5)(output, y), cross_entropy(output, y))


def test_another_loss_in_its_place() -> None:
    net = flat(0.0, 0.0)
    loss = GradientAwareLoss(net, weight=0.0, loss=lambda output, y: nn.functional.mse_loss(output, y))
    assert float(loss(net(ONE[0]), torch.tensor([[1.0, 0.0]])).detach()) == 0.5


def test_errors_of_the_loss() -> None:
    net = flat(0.0, 0.0)
    with pytest.raises(OptionError, match=r"weight must be a number of at least 0, not -1"):
        GradientAwareLoss(net, weight=-1)
    with pytest.raises(OptionError, match=r"eps must be a number of more than 0, not 0"):
        GradientAwareLoss(net, eps=0)
    for wrong in ({"weight": "x"}, {"eps": None}, {"weight": True}, {"model": 3}):
        with pytest.raises(OptionError):
            GradientAwareLoss(**{"model": net, **wrong})
    with pytest.raises(DataError, match=r"scalar, not shape \[2\]"):
        GradientAwareLoss(net, loss=nn.CrossEntropyLoss(reduction="none"))(net(torch.ones(2, 1)), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="another model"):
        GradientAwareLoss(copy.deepcopy(net))(net(ONE[0]), ONE[1])
    output = (torch.zeros(1, 2, requires_grad=True) * 1.0, ONE[1])
    with pytest.raises(ModelError, match="no convolution or linear layer whose weight requires a gradient"):
        GradientAwareLoss(nn.Identity())(*output)


def test_flow_by_hand() -> None:
    """Two batches, of one and of three samples: the norm of the mean gradient, not the mean of the norms.

    Scores are 0, so g of a sample x is x·(p - onehot) = ±x/2·(1, -1). Samples (1, class 0), (1, 0), (1, 0), (1, 1):
    the mean is (-½ - ½ - ½ + ½)/4·(1, -1) = -¼·(1, -1), of norm √2/4.
    """
    x, y = torch.ones(4, 1), torch.tensor([0, 0, 0, 1])
    flow = gradient_flow(flat(0.0, 0.0), [(x[:1], y[:1]), (x[1:], y[1:])])
    assert flow.norms[""] == pytest.approx(math.sqrt(2) / 4)


@FRAMEWORKS
def test_flow_is_that_of_autograd_and_leaves_the_model_alone(framework: str) -> None:
    net, (x, y) = spiking(framework), data(framework)
    before = snapshot(net)
    state = torch.get_rng_state()
    flow = gradient_flow(net, (x, y), timesteps=4)
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), state)
    if framework == "multi-step":
        cross_entropy(net(x.expand(4, -1, -1)), y).backward()
    else:
        cross_entropy(torch.stack([net(x) for _ in range(4)]), y).backward()
    expected = {name: float(m.weight.grad.norm()) for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert flow.norms == pytest.approx(expected, rel=1e-5)
    assert flow.to_dict() == {"norms": flow.norms, "title": "Sequential"}


def test_flow_of_what_is_frozen_or_has_no_labels() -> None:
    net = spiking("spikingjelly")
    net[0].requires_grad_(False)
    x, y = data("spikingjelly")
    assert list(gradient_flow(net, (x, y), timesteps=2).norms) == ["2", "4", "6"]
    with pytest.raises(DataError, match="no labels"):
        gradient_flow(net, x, timesteps=2)
    with pytest.raises(ModelError, match="requires a gradient"):
        gradient_flow(net.requires_grad_(False), (x, y), timesteps=2)


def test_before_and_after_in_one_picture() -> None:
    before = GradientFlow({"conv1": 0.5, "fire2": 0.0, "fc": 2.0}, "before")
    ax = GradientFlow({"conv1": 0.25, "fc": 1.0}, "after").plot(before.plot())
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert lines == {"before": [0.5, 0.0, 2.0], "after": [0.25, 1.0]}
    assert [float(x) for x in ax.get_lines()[1].get_xdata(orig=False)] == [0, 2]  # fc stands under fc
    assert ax.get_yscale() == "symlog"
    assert "fire2      0" in str(before)
