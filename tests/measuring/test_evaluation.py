"""Accuracy and F1, and an ordinary network beside its spiking twin."""

from __future__ import annotations

import sys

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import snncompress
from snncompress import DataError, OptionError, compare, evaluate, profile
from tests.equivalence import same, snapshot


def reader() -> nn.Module:
    """Scores are the input: what is predicted stands in the data."""
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = torch.eye(3)
    return nn.Sequential(linear)


def onehot(*classes: int) -> torch.Tensor:
    return torch.eye(3)[list(classes)]


def test_f1_by_hand() -> None:
    """Labels 0 0 0 1 2 2, predictions 0 0 1 1 2 0.

    Class 0: TP 2, FP 1, FN 1: 4/6. Class 1: TP 1, FP 1, FN 0: 2/3. Class 2: TP 1, FP 0, FN 1: 2/3. Mean 2/3.
    Accuracy 4/6. With the last prediction right: 4/5, 2/3, 1, mean 37/45; accuracy 5/6.
    """
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    result = evaluate(reader(), (onehot(0, 0, 1, 1, 2, 0), y))
    assert (result.accuracy, result.f1, result.n_samples) == (pytest.approx(4 / 6), pytest.approx(2 / 3), 6)
    right = evaluate(reader(), [(onehot(0, 0, 1), y[:3]), (onehot(1, 2, 2), y[3:])])  # in two batches
    assert (right.accuracy, right.f1) == (pytest.approx(5 / 6), pytest.approx(37 / 45))


def test_a_class_that_is_nowhere_is_left_out() -> None:
    assert evaluate(reader(), (onehot(0, 1), torch.tensor([0, 1]))).f1 == 1.0
    """Predicted but never a label: class 2 counts with 0; the others have 1 and 0."""
    assert evaluate(reader(), (onehot(0, 2), torch.tensor([0, 1]))).f1 == pytest.approx(1 / 3)


def test_spiking_networks_and_soft_labels() -> None:
    net = nn.Sequential(*reader(), neuron.IFNode()).train()
    before = snapshot(net)
    soft = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.2, 0.2]])
    assert evaluate(net, [(onehot(1, 0), soft)], timesteps=3).accuracy == 1.0
    assert same(snapshot(net), before)
    assert net.training


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no labels"):
        evaluate(reader(), onehot(0))
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(OptionError, match=r"snncompress\[metrics\]"):
        evaluate(reader(), (onehot(0), torch.tensor([0])))


def cnn(spikes: bool = False) -> nn.Module:
    """Conv(1→2, 3×3) on 4×4, neuron, linear 8 → 2."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), neuron.IFNode() if spikes else nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    return net


def test_an_ordinary_network_costs_multiply_accumulates_once() -> None:
    """4 output positions · 2 channels · 9 weights = 72, and 8 · 2 = 16: 88 MACs, 4.6 pJ each, also on binary pixels."""
    x = torch.ones(3, 1, 4, 4)
    for timesteps in (None, 5):
        result = profile(cnn(), x, timesteps=timesteps)
        assert (result.n_mac, result.n_ac) == (88, 0)
        assert result.energy_pj == pytest.approx(88 * 4.6)
        assert not result.is_spiking
        assert "no spiking neurons in Sequential: an ordinary network" in str(result)
    for preset in ("neurobench", "spikingjelly", "syops"):
        assert profile(cnn(), x, conventions=preset).n_ac == 0, preset


def test_the_ratio_of_energies_is_one_call() -> None:
    """On pixels of ½, T = 2: the input costs 72 MACs, once. 9/2 ≥ 1, so all 8 neurons fire in both steps: 2·8·2 AC."""
    both = compare({"cnn": cnn(), "snn": cnn(spikes=True)}, torch.full((1, 1, 4, 4), 0.5), timesteps=2)
    assert both.ratios["snn"]["energy_pj"] == pytest.approx((72 * 4.6 + 32 * 0.9) / (88 * 4.6))
    assert "no spiking neurons in cnn: an ordinary network" in str(both)


def test_an_ordinary_network_is_trained_by_the_same_trainer() -> None:
    x, y = onehot(0, 1, 2), torch.tensor([1, 2, 0])
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    snncompress.finetune(net, [(x, y)] * 20, epochs=5, lr=0.1)
    assert evaluate(net, (x, y)).accuracy == 1.0
