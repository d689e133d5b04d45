"""Networks as chips see them: what is read off autograd's graph, however it is written."""

from __future__ import annotations

import snntorch as snn
import torch
import torch.nn.functional as F
from snncompress_baselines import WeightMagnitude
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.extend import Pooling, Stage
from snncompress.running.bench import bench
from snncompress.structure.stages import stages


def of(model: nn.Module, x: Tensor, timesteps: int | None = None) -> dict[str, Stage]:
    with bench(model, x, timesteps) as tools:
        return {stage.name: stage for stage in stages(tools.model, tools.adapter, tools.feed.example())}


def convolutions(step_mode: str = "m") -> nn.Module:
    model = nn.Sequential(
        layer.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), layer.BatchNorm2d(4), neuron.IFNode(),
        layer.AvgPool2d(2), layer.Conv2d(4, 6, 3, bias=False), neuron.LIFNode(v_reset=None), layer.Flatten(),
        layer.Linear(24, 5, bias=False), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(model, step_mode)
    return model


def test_layers_maps_and_pooling_by_hand() -> None:
    """16 × 16 pixels, stride 2: 8 × 8; pooled 4 × 4; a kernel of 3: 2 × 2."""
    found = of(convolutions(), torch.ones(3, 1, 2, 16, 16))
    window = {"kernel_size": (3, 3), "dilation": (1, 1)}
    pool = Pooling("average", (2, 2), (2, 2), (0, 0))
    assert found["0"] == Stage(
        "0", "convolution", 2, 4, (16, 16), (8, 8), stride=(2, 2), padding=(1, 1), **window,
        feeds=("4",), pooling=(pool,), neuron="if", reset="value", biased=True,
    )  # fmt: skip
    assert found["4"] == Stage(
        "4", "convolution", 4, 6, (4, 4), (2, 2), stride=(1, 1), padding=(0, 0), **window,
        reads=("0",), feeds=("7",), neuron="lif", reset="subtract",
    )  # fmt: skip
    assert found["7"] == Stage(
        "7", "linear", 6, 5, (2, 2), kernel_size=(2, 2), reads=("4",), neuron="if", reset="value"
    )
    assert [stage.fan_in for stage in found.values()] == [18, 36, 24]
    assert [stage.neurons for stage in found.values()] == [256, 24, 5]


def test_it_does_not_matter_how_time_is_driven() -> None:
    steps = of(convolutions("s"), torch.ones(1, 2, 16, 16), 3)
    assert steps == of(convolutions(), torch.ones(3, 1, 2, 16, 16))


class Functional(nn.Module):
    """Pooling as functions, before the neurons and behind them; a shortcut; a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.p, self.q = snn.Leaky(1.0), snn.Leaky(0.9, reset_mechanism="zero")

    def forward(self, x: Tensor) -> Tensor:
        v, w = self.p.init_leaky(), self.q.init_leaky()
        for _ in range(3):
            s, v = self.p(F.max_pool2d(self.a(x), 2), v)
            z, w = self.q(self.b(s) + s, w)
            y = self.c(F.avg_pool2d(z, 2).mean((2, 3)))
        return y


def test_functions_shortcuts_and_loops() -> None:
    found = of(Functional(), torch.ones(1, 1, 8, 8))
    assert found["a"].operations == ("pooling before the neurons",)
    assert (found["a"].neuron, found["a"].reset) == ("if", "subtract")
    assert found["b"].operations == ("sum",)
    assert (found["b"].neuron, found["b"].reset) == ("lif", "value")
    assert found["b"].pooling == (Pooling("average", (2, 2), (2, 2), (0, 0)),) * 2  # 4 × 4 to 2 × 2, and all of it
    assert found["c"].neuron is None
    assert found["a"].feeds == ("b", "c")  # through the shortcut


def test_recurrent_layers_inside_neurons() -> None:
    """A linear layer of 3 × 3 inside the neurons."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), snn.RLeaky(0.9, linear_features=3, init_hidden=True))
    found = of(model, torch.ones(1, 2), 3)["0"]
    assert found.operations == ("recurrence",)
    assert (found.recurrent, found.weights, found.fan_in) == (9, 15, 2)


def test_bits_are_those_of_signed_integers() -> None:
    """7 bits of ReScaW are odd integers from -127 to 127, and need 8."""
    x = torch.ones(3, 1, 2, 16, 16)
    layerwise = ReScaW(per_channel=False)
    small = snncompress.apply(
        convolutions(), None, bits={"4": 7, "7": 3}, quantizer=layerwise, data=x, skip=[], repair=None
    )
    assert [(s.weight_bits, s.scales) for s in of(small, x).values()] == [(32, None), (8, "layer"), (4, "layer")]
    small = snncompress.apply(convolutions(), None, bits={"0": 4, "4": 4}, data=x, skip=[], repair=None)
    assert [(s.weight_bits, s.scales) for s in of(small, x).values()] == [(5, "channel"), (5, "channel"), (32, None)]
    # a batch norm behind it gives each channel a scale
    small = snncompress.apply(convolutions(), None, bits={"0": 4}, quantizer=layerwise, data=x, skip=[], repair=None)
    assert of(small, x)["0"].scales == "channel"


def test_what_is_cut_is_seen_as_it_is() -> None:
    x = torch.ones(3, 1, 2, 16, 16)
    small = snncompress.apply(convolutions(), "magnitude", 0.5, None, data=x, skip=["7"], repair=None)
    found = of(small, x)
    assert [(s.in_channels, s.out_channels) for s in found.values()] == [(2, 2), (2, 3), (3, 5)]
    masked = snncompress.apply(convolutions(), WeightMagnitude(), 0.5, None, data=x, skip=[], repair=None)
    assert of(masked, x) == of(convolutions(), x)
