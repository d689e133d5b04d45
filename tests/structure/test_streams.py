"""Residual streams: of currents that no neuron closes, as in MS-ResNet, or of spikes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.model.copying import private_copy
from snncompress.model.edits import RemoveChannels
from snncompress.model.network import channel_axis, outputs_first
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, outputs


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    norm = layer.BatchNorm2d(after)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return nn.Sequential(layer.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), norm)


class Block(nn.Module):
    """Neurons first, and what is added is a current; ``down`` reads the stream without a neuron."""

    def __init__(self, before: int, after: int, down: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(fire(), conv(before, after, 3, stride), fire(), conv(after, after))
        self.down = down() if down is not nn.Identity else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.down(x)


def ms_resnet() -> nn.Module:
    return nn.Sequential(
        conv(1, 6), Block(6, 6), Block(6, 8, lambda: conv(6, 8, 1, 2)), Block(8, 8), fire(),
        layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(8, 3),
    )  # fmt: skip


def padded_by_a_map() -> nn.Module:
    def shortcut() -> nn.Module:
        return nn.Sequential(layer.AvgPool2d(2), snncompress.ChannelMap.padding(6, 9))

    return nn.Sequential(
        conv(1, 6), Block(6, 6), Block(6, 9, shortcut), Block(9, 9), fire(), layer.Flatten(), layer.Linear(144, 3)
    )


def without_a_neuron_at_the_end() -> nn.Module:
    return nn.Sequential(
        conv(1, 6), Block(6, 6), Block(6, 6), layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 3)
    )


def downsampled_by_a_pool() -> nn.Module:
    return nn.Sequential(
        conv(1, 6), Block(6, 6), layer.AvgPool2d(2), Block(6, 6), fire(), layer.Flatten(), layer.Linear(96, 3)
    )


class Local(nn.Module):
    """A depthwise convolution of spikes is added to the stream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        norm = layer.BatchNorm2d(channels)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        self.body = nn.Sequential(fire(), layer.Conv2d(channels, channels, 3, padding=1, groups=channels), norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def with_depthwise_convolutions() -> nn.Module:
    return nn.Sequential(
        conv(1, 6), Local(6), Block(6, 6), Local(6), layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 3)
    )


@pytest.mark.parametrize("criterion", ["magnitude", "firing_rate"])
def test_depthwise_transposed_convolutions(criterion: str) -> None:
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), fire(), layer.ConvTranspose2d(8, 8, 2, stride=2, groups=8), fire(),
        layer.Conv2d(8, 5, 1),
    ).double()  # fmt: skip
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    small = snncompress.apply(model, criterion, 0.5, None, data=x, timesteps=3, skip=[], repair=None)
    assert small[0].out_channels == small[2].weight.shape[0] == 4
    assert largest_difference(model, small, Feed(find_adapter(model), x, 3)) < 1e-9


@pytest.mark.parametrize(("after", "groups", "left"), [(8, 2, [4, 4]), (12, 4, [4, 4]), (16, 8, [8, 8])])
def test_transposed_convolutions_in_groups(after: int, groups: int, left: list[int]) -> None:
    """Of each group as many go; where each takes in a single channel, that stays."""
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), fire(), layer.ConvTranspose2d(8, after, 2, stride=2, groups=groups), fire(),
        layer.Conv2d(after, 5, 1),
    ).double()  # fmt: skip
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, timesteps=3, skip=[], repair=None)
    assert [small[0].out_channels, small[2].out_channels] == left
    assert small[2].weight.shape == (left[0], left[1] // groups, 2, 2)
    assert largest_difference(model, small, Feed(find_adapter(model), x, 3)) < 1e-9


def test_norms_without_a_bias() -> None:
    """As snnTorch's BNTT has one for each timestep."""
    model = nn.Sequential(layer.Conv2d(1, 8, 3), layer.BatchNorm2d(8), fire(), layer.Conv2d(8, 5, 1)).double().eval()
    model[1].bias = None
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, timesteps=3, skip=[], repair=None)
    assert (small[0].out_channels, len(small[1].weight), small[1].bias) == (4, 4, None)
    assert largest_difference(model, small, Feed(find_adapter(model), x, 3)) < 1e-9


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_outputs_first_and_back(groups: int) -> None:
    convolution = nn.ConvTranspose1d(8, 12, 3, groups=groups)
    weight = outputs_first(convolution.weight, convolution)
    assert weight.shape == (12, 8 // groups, 3)
    assert torch.equal(outputs_first(weight, convolution), convolution.weight)
    with torch.no_grad():  # an output channel's weights are those that reach it alone
        before = convolution(torch.ones(1, 8, 4))
        gone = outputs_first(weight.index_fill(0, torch.tensor([5]), 0.0), convolution)
        convolution.weight.copy_(gone)
        changed = (convolution(torch.ones(1, 8, 4)) != before).any(2).flatten().nonzero().flatten()
    assert changed.tolist() == [5]


def muted(model: nn.Module, plan: snncompress.Plan, feed: Feed) -> nn.Module:
    """A copy in which every layer takes in 0 from what the plan removes."""
    copy = private_copy(model, feed.adapter)
    for edit in plan.edits:
        assert isinstance(edit, RemoveChannels)
        for piece in edit.slices:
            if piece.side == "in":
                module = copy.get_submodule(piece.module)
                module.register_forward_pre_hook(_mute(torch.tensor(piece.indices), channel_axis(module)))
    return copy


def _mute(indices: Tensor, axis: int) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda module, args: args[0].index_fill(axis, indices, 0.0)


@pytest.mark.parametrize(
    "make",
    [ms_resnet, padded_by_a_map, without_a_neuron_at_the_end, downsampled_by_a_pool, with_depthwise_convolutions],
)
@pytest.mark.parametrize("mode", "sm")
def test_a_stream_of_currents_shrinks_exactly(make: Callable[[], nn.Module], mode: str) -> None:
    model = make().double().eval()
    functional.set_step_mode(model, mode)
    x = 2 * torch.rand(3, 1, 8, 8, dtype=torch.float64)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, timesteps=3, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x, 3)
    assert set(plan.skipped) == {max(plan.skipped)}  # the classifier
    assert "classifier" in plan.skipped[max(plan.skipped)]
    before, after = outputs(model, feed), outputs(small, feed)
    assert not torch.allclose(before[0], after[0])
    (wanted,) = outputs(muted(model, plan, feed), feed)
    assert float((wanted - after[0]).abs().max()) < 1e-9
