"""Networks whose forward reads the membrane potential of a neuron: as their output, or for another layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, outputs


class Own(nn.Module):
    """A neuron of the user's own, which keeps its potential."""

    def __init__(self) -> None:
        super().__init__()
        self.mem, self.spikes = torch.zeros(()), torch.zeros(())

    def reset(self) -> None:
        self.mem = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        potential = 0.5 * self.mem + x
        self.spikes = (potential > 0.2).to(x)
        self.mem = potential * (1 - self.spikes)
        return self.spikes


def leaky() -> nn.Module:
    return snn.Leaky(beta=0.9, threshold=0.3, init_hidden=True)


def lif() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.2)


class Net(nn.Module):
    """Three layers. ``hidden``: what the last layer takes in, of the neuron before it and its spikes."""

    def __init__(self, build: Callable[[], nn.Module], name: str, hidden: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.one, self.two, self.three = build(), build(), build()
        self.name, self.hidden = name, hidden

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.two(self.fc2(self.one(self.fc1(x))))
        self.three(self.fc3(self.hidden(self.two, spikes)))
        potential: Tensor = getattr(self.three, self.name)
        return potential


NEURONS = pytest.mark.parametrize(
    ("build", "name", "named"), [(lif, "v", {}), (leaky, "mem", {}), (Own, "mem", {"neurons": Own})]
)


def pruned(build: Callable[[], nn.Module], name: str, named: Any, hidden: Any, *, hooked: bool = True) -> list[int]:
    """Widths of what is left; whether that is the same as silencing by hooks is checked on the way."""
    torch.manual_seed(1)
    model, x = Net(build, name, hidden), 2 * torch.rand(5, 6)
    small = snncompress.apply(model, "magnitude", 0.5, None, data=x, timesteps=4, repair=None, skip=[], **named)
    feed = Feed(snncompress.OwnNeurons(Own) if named else find_adapter(model), x, 4)
    assert not hooked or largest_difference(model, small, feed) < 1e-5
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])
    return [m.out_features for m in small.modules() if isinstance(m, nn.Linear)]


@NEURONS
def test_the_output(build: Callable[[], nn.Module], name: str, named: Any) -> None:
    assert pruned(build, name, named, lambda node, spikes: spikes) == [4, 5, 3]


@NEURONS
@pytest.mark.parametrize("share", [0, 1])
def test_what_a_layer_reads_stays(build: Callable[[], nn.Module], name: str, named: Any, share: int) -> None:
    """A neuron whose spikes are forced to 0 has a potential all the same."""

    def hidden(node: Any, spikes: Tensor) -> Tensor:
        potential: Tensor = getattr(node, name)
        return share * spikes + potential

    assert pruned(build, name, named, hidden) == [4, 10, 3]


def test_spikes_that_a_neuron_keeps_fall_silent_with_it() -> None:
    """A hook on what the neuron returns doesn't reach them."""
    assert pruned(Own, "mem", {"neurons": Own}, lambda node, _: node.spikes, hooked=False) == [4, 5, 3]
