"""Averages of spikes are additions of folded weights: how many spikes, wherever they are averaged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")

from spikingjelly.activation_based import functional, layer, neuron

from snncompress.measuring.averaged_spikes import AveragedSpikes
from snncompress.measuring.conventions import Conventions
from snncompress.measuring.profiling import profile
from snncompress.measuring.temporal import temporal_analysis
from snncompress.measuring.watching import Watch

T = 2
FOLDED_OUT = Conventions(averaged_spikes="multiplications")


def spikes(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


AVERAGES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "1d": (nn.AvgPool1d(3, 2, 1), (1, 2, 7)),
    "1d without padding in the average": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), (2, 7)),
    "2d": (nn.AvgPool2d(2), (1, 1, 4, 4)),
    "2d overlapping, ninths": (nn.AvgPool2d(3, 1), (1, 1, 4, 5)),
    "2d ceiling": (nn.AvgPool2d((2, 3), (2, 2), (0, 1), ceil_mode=True), (1, 1, 5, 4)),
    "2d without padding in the average": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 1, 5, 5)),
    "2d another divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (1, 1, 4, 4)),
    "3d": (nn.AvgPool3d((1, 2, 2)), (1, 1, 2, 4, 4)),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(3), (1, 2, 7)),
    "adaptive 2d of unequal windows": (nn.AdaptiveAvgPool2d((2, 3)), (1, 1, 5, 7)),
    "adaptive 2d, one side": (nn.AdaptiveAvgPool2d((None, 2)), (1, 1, 2, 5)),
    "global": (nn.AdaptiveAvgPool2d(1), (1, 2, 3, 3)),
    "adaptive 3d": (nn.AdaptiveAvgPool3d((1, 2, 1)), (1, 1, 2, 3, 2)),
    "mean of positions": (lambda x: x.mean((2, 3)), (1, 3, 2, 3)),
    "mean over time": (lambda x: torch.mean(x, dim=0, keepdim=True), (5, 2, 2)),
    "mean of means": (lambda x: F.avg_pool2d(x, 2).flatten(2).mean(-1), (1, 2, 4, 4)),
    "mean of everything": (torch.mean, (2, 3)),
}


@pytest.mark.parametrize(("average", "shape"), AVERAGES.values(), ids=AVERAGES)
def test_as_many_spikes_as_an_average_takes_in(average: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """The spikes at inputs on which the average depends, found by its gradient."""
    averages, x = AveragedSpikes(), spikes(*shape)
    with Watch(lambda *_: None, averages):
        found = averages.of(average(x))
    assert found is not None
    x.requires_grad_()
    for value, count in zip(average(x).flatten(), found.flatten(), strict=True):
        taken = torch.autograd.grad(value, x, retain_graph=True)[0] != 0
        assert count == (x * taken).sum()


def followed(move: Callable[[Tensor], Tensor], x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    averages = AveragedSpikes()
    with Watch(lambda *_: None, averages), torch.no_grad():
        moved = move(F.avg_pool2d(spikes(2, 2, 4, 4) if x is None else x, 2))
        return moved, averages.of(moved)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "shuffle": lambda x: x.view(2, 2, 1, 2, 2).transpose(1, 2).reshape(2, 2, 2, 2)[:, [1, 0]],
    "pad": lambda x: F.pad(x, (1, 1)),
    "beside spikes": lambda x: torch.cat([x, spikes(2, 1, 2, 2)], 1),
    "with spikes added": lambda x: x + spikes(2, 2, 2, 2),
    "split": lambda x: torch.stack(x.chunk(2, 1)),
    "dropout": lambda x: F.dropout(x, training=False).contiguous(),
    "cast": lambda x: x.half().float(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_about_they_are_known_still(move: Callable[[Tensor], Tensor]) -> None:
    moved, found = followed(move)
    whole, _ = followed(move, 4 * spikes(2, 2, 4, 4))  # of which averages are the number of spikes
    assert found is not None
    assert torch.equal(found, whole)
    assert not torch.equal(found, moved)


LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "multiplied value by value": lambda x: x * torch.linspace(0.1, 1, x.numel()).view(x.shape),
    "normalized": lambda x: F.batch_norm(x, torch.zeros(2), torch.ones(2) * 3),
    "written to": lambda x: x.add_(0.3),
    "written to by way of a view": lambda x: (x.flatten().mul_(0.3), x)[1],
    "beside pixels": lambda x: torch.cat([x, torch.full_like(x, 0.3)], 1),
    "pixels added": lambda x: x + torch.full_like(x, 0.3),
    "a number added": lambda x: x + 0.3,
}


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
def test_changed_they_are_analog(change: Callable[[Tensor], Tensor]) -> None:
    assert followed(change)[1] is None


@pytest.mark.parametrize("scale", [lambda x: x * 0.3, lambda x: torch.tensor([2.5]) * x, lambda x: x / 4])
def test_scaled_they_stand_for_as_many_spikes(scale: Callable[[Tensor], Tensor]) -> None:
    _, found = followed(lambda x: x)
    _, scaled = followed(scale)
    assert scaled is not None
    assert found is not None
    assert torch.equal(scaled, found)


class High(nn.Module):
    """Spikes of the height of the threshold, in a loop over timesteps, as in converted networks (QCFS)."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([height]))

    def forward(self, x: Tensor) -> Tensor:  # [T, N, C, H, W]
        v, out = 0.5 * self.threshold, []
        for current in x:
            v = v + current
            spike = (v >= self.threshold).float() * self.threshold
            v = v - spike
            out.append(spike)
        return torch.stack(out)


@pytest.mark.parametrize("height", [1.0, 0.5, 8.0])
def test_a_spike_of_any_height_is_one(height: float) -> None:
    net = nn.Sequential(
        layer.Conv2d(1, 2, 1, bias=False), High(height), layer.Conv2d(2, 3, 1), High(height), layer.AvgPool2d(2),
        layer.Flatten(), layer.Linear(12, 5),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        net[0].weight.fill_(height)  # at each of T steps all 2 · 16 neurons fire
        net[2].weight.fill_(0.5)
        net[2].bias.zero_()  # and so do all 3 · 16, by 2 · θ / 2
    x = torch.ones(T, 1, 1, 4, 4)
    rows = {r.name: r for r in profile(net, x, neurons=High, time_dim=0).layers}
    assert (rows["2"].n_ac, rows["2"].n_mac) == (T * 2 * 16 * 3, 0)
    assert (rows["6"].n_ac, rows["6"].n_mac) == (T * 3 * 16 * 5, 0)
    if height != 1:
        by_values = profile(net, x, neurons=High, time_dim=0, conventions=FOLDED_OUT)
        row = next(row for row in by_values.layers if row.name == "2")
        assert (row.n_ac, row.n_mac) == ((8 * T * 2 * 16 * 3, 0) if height == 8 else (0, 2 * 16 * 3))  # constant


@pytest.mark.parametrize("channel_wise", [False, True])
def test_networks_that_spikingjelly_converts_are_of_spikes(channel_wise: bool) -> None:
    ann2snn = pytest.importorskip("spikingjelly.activation_based.ann2snn")
    if not hasattr(ann2snn, "RateCodingRecipe"):
        pytest.skip("an older SpikingJelly")
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.rand(8, 1, 8, 8)
    recipe = ann2snn.RateCodingRecipe(dataloader=[(x, torch.zeros(8))], mode="max", channel_wise=channel_wise)
    table = profile(ann2snn.FXConverter(recipe).convert(cnn.eval()), x, timesteps=T)
    assert [(layer.n_ac > 0, layer.n_mac > 0) for layer in table.layers if layer.kind == "weight"] == [
        (False, True), (True, False), (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize(("gate", "known"), [
    (lambda net, x: x * net.scale.view(1, -1, 1, 1), True),
    (lambda net, x: net.scale.view(-1, 1, 1) * x, True),
    (lambda net, x: x * net.scale.view(1, -1, 1, 1).exp(), False),  # may depend on the data
    (lambda net, x: x * x.mean((2, 3), keepdim=True), False),
    (lambda net, x: x * net.scale, False),  # a number for each column, which other weights don't hold
])  # fmt: skip
def test_a_factor_for_each_channel_must_be_the_models(gate: Callable[[nn.Module, Tensor], Tensor], known: bool) -> None:
    net = nn.Module()
    net.register_buffer("scale", torch.tensor([0.3, 2.0, 0.7, 1.1]))
    averages, x = AveragedSpikes(net), spikes(1, 4, 4, 4)
    with Watch(lambda *_: None, averages), torch.no_grad():
        found = averages.of(gate(net, x))
    assert (found is not None) == known
    assert found is None or torch.equal(found, x)


def test_batches_behind_the_first_are_counted_alike() -> None:
    net = nn.Sequential(nn.Linear(2, 3), High(0.5), nn.Linear(3, 4))
    torch.manual_seed(0)
    x = torch.rand(T, 6, 2)
    one, parts = (profile(net, data, neurons=High, time_dim=0) for data in (x, [x[:, :2], x[:, 2:4], x[:, 4:]]))
    assert one.n_ac > 0
    assert one.layers[1].n_mac == parts.layers[1].n_mac == 0
    assert one.n_ac == parts.n_ac


def test_pictures_are_no_spikes_though_they_lie_on_a_grid() -> None:
    picture = torch.randint(0, 256, (2, 2, 4, 4)).float() / 255
    assert followed(lambda x: x, picture)[1] is None
    net = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 1), neuron.IFNode(), nn.Flatten(), nn.Linear(12, 2))
    assert profile(net, picture, timesteps=T).layers[0].n_mac == 2 * 3 * 4


def pooled(mode: str, pool: nn.Module | None = None) -> nn.Module:
    """All eight neurons of two maps fire at every step; their averages meet 1 × 1 filters, then a classifier."""
    net = nn.Sequential(
        layer.Conv2d(1, 2, 1, bias=False), neuron.IFNode(), pool or layer.AvgPool2d(2), layer.Conv2d(2, 3, 1),
        neuron.IFNode(), layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(3, 5),
    )  # fmt: skip
    nn.init.ones_(net[0].weight)
    nn.init.constant_(net[3].weight, 0.5)
    nn.init.zeros_(net[3].bias)
    functional.set_step_mode(net, mode)
    return net


@pytest.mark.parametrize("mode", ["s", "m"])
def test_layers_behind_average_pooling_add(mode: str) -> None:
    # A step: 2 · 16 spikes, each in one window, meet 3 filters. Charged by 2 · ½, 3 · 4 neurons fire; all of them are
    # averaged, and each is 5 additions.
    rows = {r.name: r for r in profile(pooled(mode), [torch.ones(n, 1, 4, 4) for n in (2, 2, 1)], timesteps=T).layers}
    assert (rows["3"].n_ac, rows["3"].n_mac) == (T * 2 * 16 * 3, 0)
    assert (rows["7"].n_ac, rows["7"].n_mac) == (T * 12 * 5, 0)
    assert rows["3"].input_rate == 4  # of 4 spikes each
    by_values = profile(pooled(mode), torch.ones(2, 1, 4, 4), timesteps=T, conventions=FOLDED_OUT)
    assert by_values.layers[2].n_ac == T * 2 * 4 * 3  # an average of 1 passes for one spike


@pytest.mark.parametrize("mode", ["s", "m"])
def test_fractions_are_additions_or_multiplications(mode: str) -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = x[..., 3, 1] = 1
    for rules, n_ac, n_mac in ((None, T * 2 * 2 * 3, 0), (FOLDED_OUT, 0, 2 * 4 * 3)):
        row = profile(pooled(mode), x, timesteps=T, conventions=rules).layers[2]
        assert (row.name, row.n_ac, row.n_mac) == ("3", n_ac, n_mac)  # constant, too: multiplied once


def test_an_analysis_over_time_adds_too() -> None:
    class Own(nn.Module):
        """Functions of its own in the place of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fire, self.last = nn.Conv2d(1, 2, 1), neuron.IFNode(), nn.Linear(2, 3)
            self.steps = 3

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.last(self.fire(self.conv(x)).mean((2, 3))) for _ in range(self.steps)])

    torch.manual_seed(0)
    net, x = Own(), 4 * torch.rand(2, 1, 3, 3)
    found, wanted = temporal_analysis(net, x).energy_pj, []
    for net.steps in (1, 2, 3):
        table = profile(net, x)
        assert table.n_mac == 18
        wanted.append(table.energy_pj)
    assert found == pytest.approx(wanted, rel=1e-12)
