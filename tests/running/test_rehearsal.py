"""How many samples an example holds: as few as the model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import DataError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.running.rehearsal import rehearse
from tests.equivalence import largest_difference

BATCH = 6


class Viewed(nn.Module):
    """The batch size is written in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lif = nn.Conv2d(1, 4, 3, padding=1), neuron.LIFNode(v_threshold=0.2)
        self.hidden, self.lif2, self.out = nn.Linear(4 * 16, 8), neuron.LIFNode(v_threshold=0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lif2(self.hidden(self.lif(self.conv(x.view(BATCH, 1, 4, 4))).view(BATCH, -1))))


class Summed(nn.Module):
    """The batch size is written in what a sum begins with: one sample runs too, broadcast to as many."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.lif = nn.Linear(16, 8), snn.Leaky(beta=0.9, threshold=0.2)
        self.out, self.lif2 = nn.Linear(8, 3), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        a, b, out = self.lif.init_leaky(), self.lif2.init_leaky(), []
        for _ in range(2):
            spikes, a = self.lif(torch.zeros(BATCH, 1) + self.hidden(x.flatten(1)), a)
            spikes, b = self.lif2(self.out(spikes), b)
            out.append(spikes)
        return torch.stack(out, 1)


def normalized(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), norm, neuron.LIFNode(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("build", "timesteps", "few"),
    [
        (lambda: normalized(nn.Identity()), 2, 1),
        (Viewed, 2, None),
        (Summed, None, None),
        (lambda: normalized(nn.BatchNorm1d(8)), 2, 2),  # in training torch refuses one value per channel
        (lambda: normalized(nn.BatchNorm1d(8, track_running_stats=False)), 2, 2),  # always
        (lambda: normalized(nn.GroupNorm(8, 8)), 2, 2),
    ],
)
def test_an_example_holds_as_few_samples_as_the_model_takes(
    build: Callable[[], nn.Module], timesteps: int | None, few: int | None
) -> None:
    model = build()
    data = torch.rand(BATCH, 1, 4, 4), torch.arange(BATCH) % 3
    feed = Feed(find_adapter(model), data, timesteps)
    rehearse(model, feed)
    assert feed.few == few
    assert len(feed.example_batch().x) == (few or BATCH)
    assert feed.batch_first is (build is Summed)


def multi(*middle: nn.Module) -> nn.Module:
    net = nn.Sequential(layer.Linear(5, 8), *middle, neuron.LIFNode(), layer.Linear(8, 3))
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize(
    ("build", "shape", "example"),
    [
        (multi, [3, 6, 5], [3, 1, 5]),
        (multi, [6, 6, 5], [6, 6, 5]),  # where T = N, either may be time
        (lambda: multi(layer.BatchNorm1d(8)), [3, 6, 5], [3, 2, 5]),  # of three steps, each has a single value
        (Summed, [BATCH, 16], [BATCH, 16]),
        (lambda: normalized(nn.Identity()), [6, 4, 4], [1, 4, 4]),
    ],
)
def test_neurons_tell_where_samples_stand_if_labels_do_not(
    build: Callable[[], nn.Module], shape: list[int], example: list[int]
) -> None:
    model = build()
    feed = Feed(find_adapter(model), torch.rand(shape))
    rehearse(model, feed)
    assert list(feed.example_batch().x.shape) == example


@pytest.mark.parametrize(("build", "timesteps"), [(Viewed, 2), (Summed, None)])
def test_batch_sizes_written_in_forward(build: Callable[[], nn.Module], timesteps: int | None) -> None:
    torch.manual_seed(0)
    model, x, y = build().eval(), torch.rand(2 * BATCH, 1, 4, 4), torch.arange(2 * BATCH) % 3
    options: dict[str, Any] = {"data": DataLoader(TensorDataset(x, y), BATCH), "timesteps": timesteps}
    small = snncompress.apply(model, "firing_rate", 0.5, None, skip=[], repair=None, **options)
    assert small.hidden.out_features == 4
    assert largest_difference(model, small, Feed(find_adapter(model), **options)) < 1e-6
    assert snncompress.profile(small, **options).n_samples == 2 * BATCH
    repaired = snncompress.apply(model, "taylor", 0.5, 4, skip=[], repair="membrane", **options)
    assert snncompress.evaluate(snncompress.freeze(repaired, **options), **options).n_samples == 2 * BATCH


def test_a_last_smaller_batch_is_named() -> None:
    x, y = torch.rand(BATCH + 1, 1, 4, 4), torch.zeros(BATCH + 1, dtype=torch.long)
    with pytest.raises(DataError, match=r"of shape \[1, 1, 4, 4\].*batch size written.*batch_size=6, drop_last=True"):
        snncompress.profile(Viewed(), DataLoader(TensorDataset(x, y), BATCH), timesteps=2)
    with pytest.raises(DataError, match=r"of shape \[4, 1, 4, 4\].*or the number of samples"):
        snncompress.profile(Viewed(), x[:4], timesteps=2)
