"""Tensors with an entry for each channel, in modules of the user's own, shrink with the channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import snntorch
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference


class Gain(nn.Module):
    """A number for each channel: a parameter, a buffer, or a tensor that nobody registered."""

    def __init__(self, channels: int, kind: str, *, checks: bool) -> None:
        super().__init__()
        values = torch.rand(channels) + 0.5
        if kind == "buffer":
            self.register_buffer("gain", values)
        else:
            self.gain = nn.Parameter(values) if kind == "parameter" else values
        self.checks = checks

    def forward(self, x: Tensor) -> Tensor:
        if self.checks and x.shape[1] != self.gain.numel():
            raise ValueError("as many channels as gains, please")
        return x * self.gain.view(1, -1, 1, 1)


class Norm(nn.Module):
    """A batch norm by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(1, channels, 1, 1)) for _ in range(2))
        self.register_buffer("mean", torch.rand(channels, 1, 1))
        self.register_buffer("var", torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.var.sqrt() * self.weight + self.bias


class Block(nn.Module):
    """A residual block whose way is scaled channel by channel (LayerScale)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = Norm(channels), Norm(channels)
        self.lif1, self.lif2 = neuron.IFNode(), neuron.IFNode()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(x + self.scale * self.norm2(self.conv2(self.lif1(self.norm1(self.conv1(x))))))


class Loop(nn.Module):
    """Gains of the network itself, in a loop over timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 3)
        self.lif1, self.lif2 = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.8)
        self.first, self.second = nn.Parameter(torch.rand(6) + 0.5), torch.rand(8, 1, 1) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, out = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for _ in range(3):
            spikes, mem1 = self.lif1(self.conv1(x) * self.first[None, :, None, None], mem1)
            spikes, mem2 = self.lif2(self.conv2(spikes) * self.second, mem2)
            out.append(self.fc(spikes.mean((2, 3))))
        return torch.stack(out)


def gains(kind: str, *, checks: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), Gain(6, kind, checks=checks), neuron.IFNode(), Gain(6, kind, checks=checks),
        nn.Conv2d(6, 6, 3, padding=1), Gain(6, kind, checks=checks), neuron.IFNode(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def blocks() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), Norm(8), neuron.IFNode(), Block(8), Block(8), nn.Flatten(), nn.Linear(128, 3)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    **{f"{kind}, {checks}": lambda kind=kind, checks=checks: gains(kind, checks=checks)
       for kind in ("parameter", "buffer", "plain") for checks in (False, True)},
    "blocks": blocks,
    "loop": Loop,
}  # fmt: skip


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_they_go_with_the_channels(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = make(), 3 * torch.rand(3, 2, 4, 4)
    steps = None if isinstance(net, Loop) else 2
    small = snncompress.apply(net, "magnitude", 0.5, None, data=x, timesteps=steps, repair=None, skip=[])
    assert list(snncompress.plan_of(small).skipped) == ["fc" if isinstance(net, Loop) else str(len(net) - 1)]
    for before, after in zip(net.parameters(), small.parameters(), strict=True):
        assert after.numel() <= (before.numel() / 2 if before.numel() > 3 else 3)
        assert after.requires_grad == before.requires_grad
    assert largest_difference(net, small, Feed(find_adapter(net), x, steps)) < 1e-6
    path = tmp_path / "small.safetensors"
    snncompress.save(small, path)
    torch.manual_seed(1)
    loaded = snncompress.load(path, into=make())
    for name, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_what_is_added_to_silent_channels_keeps_them() -> None:
    class Added(Gain):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain.view(1, -1, 1, 1)

    torch.manual_seed(0)
    net = gains("parameter", checks=False)
    net[3] = Added(6, "parameter", checks=False)
    small = snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(3, 2, 4, 4), timesteps=2, skip=[])
    assert small[0].out_channels == 6
    assert "adds to silent channels" in snncompress.plan_of(small).skipped["0"]
    assert (small[4].out_channels, len(small[5].gain), len(small[3].gain)) == (3, 3, 6)


def test_a_plan_for_other_tensors_is_refused() -> None:
    torch.manual_seed(0)
    net = gains("buffer", checks=False)
    plan = snncompress.plan_of(
        snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(3, 2, 4, 4), timesteps=2, skip=[], repair=None)
    )
    net[1].gain = torch.rand(5)
    with pytest.raises(snncompress.PlanError, match=r"1 has gain = \[5\], where the plan expects a width of 6"):
        plan.apply(net)
