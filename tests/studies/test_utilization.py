"""R_utilize: the paper's figures, grids by hand, and quantizers of others."""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar

import pytest
import snntorch as snn
import torch
from snncompress_rescaw import ReScaW, Uniform
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, PluginError, UnknownNameError
from snncompress.extend import Quantizer


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.float()
    return layer


@pytest.mark.parametrize(("a", "paper", "used"), [(0.14, 14.33, 36), (0.32, 32.26, 82)])
def test_the_papers_figures(a: float, paper: float, used: int) -> None:
    # At 8 bits s = 255 and (s·a + 1)/(s + 1) is 36.7/256 = 14.3359 % and 82.6/256 = 32.2656 %: the paper's figures with
    # what comes behind two digits cut off, not rounded. Measured: weight w is number round(127.5 · (w + 1)), which goes
    # from round(109.65) = 110 to round(145.35) = 145 for ±0.14, so 36 values, and from 87 to 168 for ±0.32, so 82.
    net = nn.Sequential(linear(torch.linspace(-a, a, 5001).reshape(3, -1)))
    (use,) = snncompress.utilization(net, "uniform", 8).uses["0"]
    assert use.estimate == pytest.approx((255 * a + 1) / 256, rel=1e-6)
    assert int(1e4 * use.estimate) / 100 == paper
    assert use.measured == used / 256
    assert abs(use.measured - use.estimate) <= 1 / 256
    assert int(use.counts.sum()) == 5001


def test_a_grid_by_hand() -> None:
    # γ = max|W| = 1 at 2 bits: -1, -1/3, 1/3, 1; 0.2 → 1/3, -0.9 → -1, 1 → 1. γ = mean|W| = 0.7: -0.7 … 0.7.
    net = nn.Sequential(linear(torch.tensor([[0.2, -0.9, 1.0]])))
    most, average = snncompress.utilization(net, [ReScaW("max", False), ReScaW("l1_mean", False)], 2).uses["0"]
    assert (most.quantizer, average.quantizer) == (
        "rescaw(gamma='max', per_channel=False)",
        "rescaw(gamma='l1_mean', per_channel=False)",
    )
    assert most.counts.tolist() == [1, 0, 1, 1]
    assert most.values.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert average.values.tolist() == pytest.approx([-0.7, -0.7 / 3, 0.7 / 3, 0.7])
    assert (most.measured, average.measured, most.estimate, average.estimate) == pytest.approx((0.75, 0.75, 1, 1))


def test_a_scale_per_channel_and_channels_without_weights() -> None:
    # γ = max of each channel: 0.1 and 10 are both the last number; the channel of zeros has no grid.
    net = nn.Sequential(linear(torch.tensor([[0.1, -0.1], [10.0, 3.0], [0.0, 0.0]])))
    (use,) = snncompress.utilization(net, ReScaW("max"), 2).uses["0"]
    assert use.counts.tolist() == [1, 0, 1, 2]


def test_removed_weights_do_not_count_and_a_quantized_network_is_taken_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.5, init_hidden=True), nn.ConvTranspose1d(1, 2, 3))
    plain = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.5, init_hidden=True), nn.Linear(8, 3))
    whole = snncompress.utilization(plain, "rescaw", 4)
    x = torch.rand(4, 6)
    small = snncompress.apply(plain, "weight_random", 0.5, 4, data=x, timesteps=2, skip=[], repair=None)
    half = snncompress.utilization(small, "rescaw", 4)
    assert sum(int(uses[0].counts.sum()) for uses in half.uses.values()) == 36
    assert float(half.weights["0"].counts.sum()) < float(whole.weights["0"].counts.sum()) == 48
    assert snncompress.utilization(net, "rescaw", 4, layers="2").uses["2"][0].counts.sum() == 6


class Signed(Quantizer):
    """Whole numbers -1, 0, 1 (and 2, which no weight reaches): a grid with a zero."""

    name: ClassVar[str] = "signed"

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def tensor_quant(self, bits: int) -> nn.Module:
        off = self.off

        class Quant(nn.Module):
            def forward(self, w: Tensor) -> tuple[Tensor, ...]:
                if off < 0:
                    raise RuntimeError("broken")
                return w.round().clamp(-1, 2) + off, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(float(bits))

        return Quant()


def test_a_plugins_own_grid() -> None:
    # -a and a are the numbers 1 ± 0.8: (1.6 + 1) / 4.
    net = nn.Sequential(linear(torch.tensor([[0.8, -0.7, 0.2]])))
    (use,) = snncompress.utilization(net, Signed(), 2).uses["0"]
    assert (use.values.tolist(), use.counts.tolist()) == ([-1, 0, 1, 2], [1, 1, 1, 0])
    assert (use.measured, use.estimate) == (0.75, pytest.approx(0.65))


def test_errors() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert "weight is computed" in snncompress.utilization(net, bits=2).skipped["1"]
    with pytest.raises(OptionError, match="layers names '1', which can't be quantized: its weight is computed"):
        snncompress.utilization(net, bits=2, layers="1")
    with pytest.raises(OptionError, match="matches no weight layer"):
        snncompress.utilization(net, layers=["conv*"])
    with pytest.raises(UnknownNameError, match="Did you mean 'rescaw'"):
        snncompress.utilization(net, "rescale")
    with pytest.raises(OptionError, match="quantizer uniform stands there twice"):
        snncompress.utilization(net, ["uniform", Uniform()])
    for bits in (0, 17, None, "4", True, [4, 2.5], []):
        with pytest.raises(OptionError, match="bits must be"):
            snncompress.utilization(net, bits=bits)
    with pytest.raises(PluginError, match="Quantizer signed, layer 0: values aren't on the grid"):
        snncompress.utilization(net, Signed(0.3), 2)
    with pytest.raises(PluginError, match="Quantizer signed failed at 1 bit on layer 0: RuntimeError: broken"):
        snncompress.utilization(net, Signed(-1.0), 1)
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        snncompress.utilization(nn.ReLU())
    with pytest.raises(ModelError, match=r"no layer to quantize\. '0': all its weights are 0"):
        snncompress.utilization(nn.Sequential(linear(torch.zeros(2, 2))))


def test_table_values_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(linear(torch.tensor([[0.5, -0.2]])) for _ in range(6)))
    result = snncompress.utilization(net, ["uniform", "rescaw"], [2, 1])
    lines = [line.split() for line in str(result).splitlines()]
    assert lines[1] == ["layer", "max|W|", "quantizer", "2", "bits", "1", "bit"]
    assert lines[3] == ["0", "0.5", "uniform", "50.00", "(62.50)", "100.00", "(75.00)"]
    assert lines[-2][:2] == ["mean", "uniform"]
    plain: Any = json.loads(json.dumps(result.to_dict()))
    assert plain["uses"]["0"][0]["counts"] == [0, 1, 1, 0]
    module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    panels = result.plot(figure=module.Figure(layout="constrained")).axes
    assert len(panels) == 4 * 5
    assert panels[1].get_title() == "uniform, 2 bits: 2 of 4 (50 %)"
    assert panels[1].patches[0].get_data().values.tolist() == [0, 50, 50, 0]
    assert [line.get_xdata()[0] for line in panels[1].get_lines()] == pytest.approx([-0.193, 0.493])
    assert len(result.plot(["0", "5"], module.Figure()).axes) == 2 * 5
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r'pip install "snncompress\[plots\]"'):
        result.plot()
