"""Verdicts on whole networks, and what would make them fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import snntorch as snn
import torch
from snncompress_chips import FPGA, Speck
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snncompress
from snncompress import ModelError, Plan, QuantizeStates, UnknownNameError
from snncompress.measuring.fits import narrowed
from snncompress.running.bench import bench
from snncompress.structure.stages import stages


def wide() -> nn.Module:
    """On 32 × 32 maps, 96 channels are 96 Ki neurons, and 96 · 256 kernels of 9 words 384 Ki words."""
    model = nn.Sequential(
        layer.Conv2d(2, 96, 3, padding=1, bias=False), neuron.IFNode(), layer.AvgPool2d(2),
        layer.Conv2d(96, 256, 3, padding=1, bias=False), neuron.IFNode(), layer.AvgPool2d(2), layer.Flatten(),
        layer.Linear(256 * 64, 10, bias=False), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    return model


EVENTS = torch.ones(2, 1, 2, 32, 32)


def test_what_would_make_it_fit_fits_and_no_more_would() -> None:
    """Of the second layer's channels 64 fit the last core's 64 Ki words, behind 64 channels of 1 Ki neurons each."""
    found = snncompress.fits(wide(), "speck", data=EVENTS)
    assert not found
    assert not found.ok
    assert found.widths == {"0": 64, "3": 64}
    assert found.first.startswith("'0', '3', '7': bits of a weight 32, the chip has 8: quantize it")
    assert found.steps[1:] == (
        "leave '0' 64 of its 96 output channels", "leave '3' 64 of its 256 output channels",
    )  # fmt: skip
    assert {row.layer for row in found.missed if row.limit.what == "words of kernel memory"} == {"3", "7"}
    needs = {(row.layer, row.limit.what): row.limit for row in found.rows}
    assert needs["3", "words of kernel memory"].slack == 64 * 1024 - 96 * 256 * 16
    assert needs["0", "input"].met


def test_a_verdict_is_a_table_and_plain_values() -> None:
    found = snncompress.fits(wide(), "speck", data=EVENTS)
    text = str(found)
    assert "Sequential on speck: doesn't fit: 9 of" in text
    assert "words of neuron memory        98,304   65,536    -32,768   ✗" in text
    assert "note: states aren't on a grid yet (floats); the chip has 16 bits" in text
    assert json.loads(json.dumps(found.to_dict()))["widths"] == {"0": 64, "3": 64}


def test_an_input_of_pictures_is_none_of_events() -> None:
    pictures = torch.full((1, 2, 32, 32), 0.5)
    found = snncompress.fits(wide(), "speck", data=pictures, timesteps=2)
    assert any(row.limit.what == "input" and row.layer == "0" for row in found.missed)
    unknown = snncompress.fits(wide(), Speck(), timesteps=2)  # noise tells nothing
    assert not any(row.limit.what == "input" for row in unknown.rows)


class Hearing(nn.Module):
    """A snnTorch network for Xylo, with a loop of its own."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, hidden, bias=False), nn.Linear(hidden, 4, bias=False)
        self.p, self.q = snn.Leaky(0.9), snn.Leaky(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, w = self.p.init_leaky(), self.q.init_leaky()
        for step in x:
            s, v = self.p(self.a(step), v)
            z, w = self.q(self.b(s), w)
        return z


def test_a_network_of_snntorch_compressed_for_xylo() -> None:
    x = torch.ones(3, 1, 16)
    dense = snncompress.fits(Hearing(130), "xylo_audio3", data=x)
    assert dense.widths == {"a": 128}
    held = snncompress.fits(snncompress.apply(Hearing(100), None, data=x, target="xylo_audio3"), "xylo_audio3", data=x)
    assert {row.limit.needs for row in held.rows if row.limit.what == "bits of a state"} == {16}
    small = snncompress.apply(Hearing(100), None, bits=7, data=x, skip=[], repair=None)
    found = snncompress.fits(small, "xylo_audio3", data=x)
    assert found.ok, str(found)
    assert found.steps == ()
    assert found.cores == {"a": (0,), "b": (0,)}


def test_figures_of_ones_own() -> None:
    net = nn.Sequential(layer.Linear(10, 20, bias=False), neuron.IFNode())
    assert snncompress.fits(net, FPGA(fan_in=10), data=torch.ones(1, 10), timesteps=1)
    assert not snncompress.fits(net, FPGA(fan_in=9), data=torch.ones(1, 10), timesteps=1)


def test_readers_get_narrower_in_proportion() -> None:
    with bench(wide(), EVENTS) as tools:
        found = narrowed(stages(tools.model, tools.adapter, tools.feed.example()), {"0": 48})
    assert [(s.in_channels, s.out_channels) for s in found] == [(2, 48), (48, 256), (256, 10)]


def test_an_unknown_chip() -> None:
    with pytest.raises(UnknownNameError, match=r"There is no target 'spek'\. Did you mean 'speck'"):
        snncompress.fits(wide(), "spek")


@pytest.mark.parametrize("integer", [False, "full"])
def test_of_a_frozen_network_the_bits_are_gone(integer: Any) -> None:
    net, x = nn.Sequential(nn.Linear(3, 2), neuron.IFNode()), torch.ones(1, 3)
    small = Plan((QuantizeStates("1", 8, (0.125,)),)).apply(net)
    frozen = snncompress.freeze(small, x, timesteps=2, integer=integer)
    with pytest.raises(ModelError, match=r"held against a chip: it is frozen, so its weights aren't .* made from"):
        snncompress.fits(frozen, "loihi2", data=x, timesteps=2)
    held = {row.limit.what: row.limit.needs for row in snncompress.fits(small, "loihi2", data=x, timesteps=2).rows}
    assert held["bits of a state"] == 8
