"""Repair of what was repaired before, and behind batch norms that aren't those of the original any more."""

from __future__ import annotations

import copy

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snncompress
from snncompress import repair

X = torch.rand(48, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 12, 3, bias=False), layer.BatchNorm2d(12), neuron.LIFNode(),
        layer.Conv2d(12, 10, 3, bias=False), layer.BatchNorm2d(10), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(160, 5),
    )  # fmt: skip
    model.train()
    with torch.no_grad():
        for _ in range(40):  # statistics that fit
            snncompress.contract.detection.find_adapter(model).run(model, X, 3)
            snncompress.contract.detection.find_adapter(model).reset(model)
    return model.eval()


def output(model: nn.Module, number: int = 4) -> torch.Tensor:
    """Of a layer, by default the last batch norm, in every timestep."""
    seen: list[torch.Tensor] = []
    handle = model[number].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    snncompress.evaluate(model, (X, torch.zeros(len(X), dtype=torch.long)), timesteps=3)
    handle.remove()
    return torch.stack(seen[-3:])  # before that the call looked at a sample


def test_the_second_time_changes_little() -> None:
    dense = net()
    small = snncompress.apply(dense, "random", 0.5, None, data=X, timesteps=3, repair=None)
    once = repair(small, dense, X, timesteps=3)
    twice = repair(once, dense, X, timesteps=3)
    assert not torch.allclose(small[4].running_mean, once[4].running_mean, atol=1e-3)  # it holds the intercept
    assert float((once[4].running_mean - twice[4].running_mean).abs().median()) < 2e-3
    wanted = output(dense)
    first, second = ((output(net) - wanted).square().mean() for net in (once, twice))
    assert float(second) == pytest.approx(float(first), rel=0.05)


def test_steps_end_where_one_step_does() -> None:
    dense = net()
    wanted = output(dense)

    def loss(**options: object) -> float:
        small = snncompress.apply(dense, "magnitude", 0.5, 8, data=X, timesteps=3, repair="membrane", **options)
        return float((output(small) - wanted).square().mean())

    assert loss(scheduler="iterative") < 1.2 * loss()
    assert loss(order="pq") < 1.2 * loss()


@pytest.mark.parametrize("change", ["gain", "shift", "variance", "none"])
def test_another_norm_is_made_up_for(change: str) -> None:
    dense = net()
    wanted = output(dense)
    small = snncompress.apply(dense, "random", 0.5, None, data=X, timesteps=3, repair=None)
    plain = output(repair(small, dense, X, timesteps=3)) - wanted
    other = copy.deepcopy(small)
    with torch.no_grad():
        if change == "gain":
            other[4].weight.mul_(-3.0)
        elif change == "shift":
            other[4].bias.add_(5.0)
        elif change == "variance":
            other[4].running_var.mul_(0.1)
        else:
            other[4].weight[0] = 0.0  # nothing passes this channel, whatever its weights are
    found = output(repair(other, dense, X, timesteps=3)) - wanted
    assert bool(torch.isfinite(found).all())
    if change == "none":
        found, plain = found[:, :, 1:], plain[:, :, 1:]
    assert float(found.square().mean()) == pytest.approx(float(plain.square().mean()), rel=0.02)


def test_a_map_that_is_read_out_is_not_drawn_to_its_mean() -> None:
    """The readout's weights stay where nothing went from what it reads; its bias gives the means back."""
    parts = layer.Conv2d(10, 5, 1), layer.AdaptiveAvgPool2d(1), layer.Flatten()
    dense = nn.Sequential(*net()[:6], *parts).eval()
    bare = snncompress.apply(dense, None, bits={"3": 2}, data=X, timesteps=3, repair=None)
    small = repair(bare, dense, X, timesteps=3)
    assert torch.equal(small[6].weight, dense[6].weight)
    wanted, before, after = (output(model, 6).mean((0, 1, 3, 4)) for model in (dense, bare, small))
    assert (after - wanted).abs().max() < 0.2 * (before - wanted).abs().max()
    narrow = snncompress.apply(dense, "random", 0.5, None, data=X, timesteps=3, skip=[])
    left = [c for c in range(10) if c not in snncompress.plan_of(narrow).removed_channels()["3"]]
    assert not torch.equal(narrow[6].weight, dense[6].weight[:, left])
