"""Refresh: the statistics of batch norms are those of the data, and nothing else moves."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snncompress
from snncompress import DataError, ModelError, OptionError, plan_of, refresh
from tests.equivalence import same, snapshot


def net(mode: str = "s") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 8, 3, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(), layer.Conv2d(8, 6, 3),
        layer.BatchNorm2d(6, momentum=0.3), neuron.LIFNode(), layer.Flatten(), layer.Linear(96, 5),
    )  # fmt: skip
    functional.set_step_mode(model, mode)
    return model.eval()


@pytest.mark.parametrize("mode", ["s", "m"])
def test_the_first_norm_has_the_mean_and_variance_of_what_reaches_it(mode: str) -> None:
    model, x = net(mode), torch.rand(40, 2, 8, 8)
    before = snapshot(model)
    fresh = refresh(model, [x[:20], x[20:]], timesteps=3)
    assert same(before, snapshot(model))
    y = nn.functional.conv2d(x, model[0].weight.detach())
    halves = [part.transpose(0, 1).flatten(1) for part in (y[:20], y[20:])]
    assert torch.allclose(fresh[1].running_mean, sum(h.mean(1) for h in halves) / 2, atol=1e-5)
    # every timestep shows the same; in single-step mode a batch is seen three times, with the same statistics
    copies = 3 if mode == "m" else 1
    repeated = [h.repeat(1, copies) for h in halves]
    assert torch.allclose(fresh[1].running_var, sum(h.var(1) for h in repeated) / 2, rtol=1e-4)
    assert fresh[4].momentum == 0.3
    assert not any(m.training for m in fresh.modules())
    moved = {"running_mean", "running_var", "num_batches_tracked"}
    for name, value in model.state_dict().items():
        assert name.rsplit(".", 1)[-1] in moved or torch.equal(value, fresh.state_dict()[name])


def test_a_network_without_norms_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 6), snn.Leaky(0.9, init_hidden=True), nn.Linear(6, 2))
    fresh = refresh(model, torch.rand(8, 4), timesteps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_apply_does_it_in_every_step_and_says_so() -> None:
    x = 3 * torch.rand(40, 2, 8, 8)
    bare, fresh = (
        snncompress.apply(net(), "magnitude", 0.5, None, data=x, timesteps=3, repair=None, refresh=again)
        for again in (False, True)
    )
    assert torch.equal(bare[0].weight, fresh[0].weight)
    assert not torch.equal(bare[4].running_var, fresh[4].running_var)
    again = refresh(bare, x, timesteps=3)
    assert torch.allclose(again[4].running_var, fresh[4].running_var)
    assert plan_of(fresh).origin["refresh"] is True
    assert plan_of(again).origin["refreshed"] is True


def test_noise_has_no_statistics_to_take() -> None:
    with pytest.raises(OptionError, match=r"refresh=True.*data="):
        snncompress.apply(net(), "magnitude", 0.5, None, refresh=True)


def test_a_single_value_has_no_variance() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), snn.Leaky(0.9, init_hidden=True), nn.Linear(6, 2))
    with pytest.raises(DataError, match="batch"):
        refresh(model, torch.rand(1, 4), timesteps=2)


def test_frozen_networks_are_refused() -> None:
    with pytest.raises(ModelError, match="frozen"):
        refresh(snncompress.freeze(net()), torch.rand(4, 2, 8, 8), timesteps=2)
