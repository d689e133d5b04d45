"""Weights of zeros, behind quantizers whose grids have no number for 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import neuron
from torch import nn

import snncompress
from snncompress.export.chip_graph import whole_numbers
from snncompress.saving.container import Container

X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).round()


def build(zeros: slice = slice(1, 2)) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), neuron.IFNode(), nn.Linear(5, 3, bias=False), neuron.IFNode())
    with torch.no_grad():
        net[0].weight[zeros] = 0
    return net


def compressed(zeros: slice, per_channel: bool, bits: int) -> nn.Sequential:
    quantizer = ReScaW("max", per_channel)
    return snncompress.apply(
        build(zeros), None, bits=bits, quantizer=quantizer, data=X, timesteps=2, skip=[], repair=None
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("zeros", "per_channel"), [(slice(1, 2), True), (slice(None), True), (slice(None), False)])
def test_zeros_are_on_the_grid(zeros: slice, per_channel: bool, bits: int, tmp_path: Path) -> None:
    """The file holds codes, not floats; in whole numbers, too, zeros are 0, and nothing else is."""
    small = compressed(zeros, per_channel, bits)
    weight = small[0].weight.detach()
    assert not bool(weight[zeros].any())
    snncompress.save(small, tmp_path / "small")
    assert Container.read(tmp_path / "small").tensors["0.weight.codes"].dtype == torch.uint8
    assert torch.equal(snncompress.load(tmp_path / "small", into=build())[0].weight, weight)
    whole = whole_numbers(small[0])
    assert whole is not None
    assert torch.equal(whole != 0, weight != 0)
    with torch.no_grad():
        assert torch.equal(snncompress.freeze(small, X, timesteps=2, integer=True)(X), small(X))
