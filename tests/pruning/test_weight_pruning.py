"""Pruning of single weights where something is amiss, or asked for layer by layer."""

from __future__ import annotations

import pytest
import torch
from snncompress_baselines import WeightGradient
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, NothingToDoWarning, SilentNeuronsWarning
from snncompress.extend import Layer


def test_a_ratio_of_its_own_holds_for_each_layer_though_weights_are_compared_globally() -> None:
    net = nn.Sequential(
        layer.Linear(10, 20), neuron.IFNode(), layer.Linear(20, 30), neuron.IFNode(), layer.Linear(30, 5)
    )
    ratios = {"0": 0.9, "2": 0.3, "4": 0.3}
    small = snncompress.apply(net, "lamp", ratios, None, data=torch.rand(4, 10), timesteps=2)
    gone = {name: int((small.get_submodule(name).weight == 0).sum()) for name in ratios}
    assert gone["0"] == 180
    assert gone["2"] + gone["4"] == 225  # 0.3 of 600 + 150, wherever they count least
    assert gone["2"] != 180


def test_a_layer_that_never_runs_takes_no_part() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fire, self.head, self.aux = nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 3), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            spikes = self.fire(self.fc(x))
            return self.head(self.attention(spikes, spikes, spikes)[0])

    data = 3 * torch.rand(6, 4), torch.arange(6) % 3
    for criterion in ("weight_magnitude", "cqp"):
        small = snncompress.apply(Auxiliary(), criterion, 0.5, None, data=data, timesteps=4)
        assert not (small.aux.weight == 0).any()
        assert "never calls it" in snncompress.plan_of(small).skipped["aux"]
        assert "without the layer being called" in snncompress.plan_of(small).skipped["attention.out_proj"]


def test_no_gradient_is_warned_about() -> None:
    net = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(v_threshold=1e9), nn.Linear(8, 3))
    data = torch.rand(6, 4), torch.arange(6) % 3
    with pytest.warns(SilentNeuronsWarning, match="No gradient but 0 reached '0', '2' in calibration"):
        snncompress.apply(net, "cqp", 0.5, None, data=data, timesteps=4)


@pytest.mark.parametrize("criterion", ["cqp", "lamp", "snip", "weight_magnitude"])
def test_nan_weights_are_named(criterion: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"2\.weight of this Sequential holds 1 NaN"):
        snncompress.apply(net, criterion, 0.5, None, data=(torch.rand(6, 4), torch.arange(6) % 3), timesteps=4)


def test_nothing_left_to_remove_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 3))
    once = snncompress.apply(net, "weight_magnitude", 0.5, None, data=torch.rand(6, 4), timesteps=4)
    with pytest.warns(NothingToDoWarning, match="no layer has that much left to lose"):
        snncompress.apply(once, "weight_magnitude", 0.4, None, data=torch.rand(6, 4), timesteps=4)


def test_gradients_add_up_in_half_precision() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    shown = Layer("fc", nn.Identity(), weight, weight, None, (), torch.Generator())
    criterion = WeightGradient()
    state = criterion.begin(shown)
    for _ in range(1000):  # bfloat16 can't count beyond 256
        state = criterion.end_batch(shown, state)
    assert criterion.score(shown, state).tolist() == [[1, 1], [1, 1]]
