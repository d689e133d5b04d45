"""A shortcut that knows which channel each of its channels is made of, and shrinks with the layers around it."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snncompress
from snncompress import ChannelMap, OptionError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference


def test_what_is_left_is_made_of_the_same_channels() -> None:
    """Of x = (1, 2, 3, 4), y = (0, 1, 2, 3, 4, 0); without x's second channel, and y's first and fifth."""
    channel_map, x = ChannelMap.padding(4, 6, axis=-1), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert channel_map(x).tolist() == [[0, 1, 2, 3, 4, 0]]
    channel_map.remove_channels("in", [1])
    assert channel_map(x[:, [0, 2, 3]]).tolist() == [[0, 1, 0, 3, 4, 0]]
    channel_map.remove_channels("out", [0, 4])
    assert channel_map(x[:, [0, 2, 3]]).tolist() == [[1, 0, 3, 0]]
    assert (channel_map.width("in"), channel_map.width("out")) == (3, 4)
    assert channel_map.state_dict() == {}  # a checkpoint of the same network with F.pad loads


@pytest.mark.parametrize(("source", "axis"), [([0, 2], -1), ([-2, 0], -1), ([], -1), ([0, 1], 1)])
def test_what_no_map_can_be(source: list[int], axis: int) -> None:
    with pytest.raises(OptionError, match="source takes numbers of channels"):
        ChannelMap(2, source, axis)


class Shortcut(nn.Module):
    """Channels of the narrow layer come out in the wide one's order backwards, and one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 10), nn.Linear(10, 3)
        self.lif1, self.lif2 = snn.Leaky(beta=0.9, threshold=0.1), snn.Leaky(beta=0.9, threshold=0.1)
        self.map = ChannelMap(6, [-1, 5, 4, 3, 2, 1, 0, -1, 0, -1], axis=-1)

    def forward(self, x: Tensor) -> Tensor:
        m1, m2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for _ in range(3):
            s1, m1 = self.lif1(self.one(x), m1)
            s2, m2 = self.lif2(self.two(s1) + self.map(s1), m2)
            out.append(self.three(s2))
        return torch.stack(out)


def test_both_sides_are_pruned_each_by_itself() -> None:
    torch.manual_seed(0)
    model, x = Shortcut(), torch.rand(4, 5)
    small = snncompress.apply(model, "firing_rate", {"one": 0.5, "two": 0.3}, None, data=x, skip=[], repair=None)
    plan = snncompress.plan_of(small)
    assert {layer: len(gone) for layer, gone in plan.removed_channels().items()} == {"one": 3, "two": 3, "map": 3}
    assert largest_difference(model, small, Feed(find_adapter(model), x, None)) <= 1e-6
    replayed = snncompress.Plan.from_json(plan.to_json()).apply(Shortcut())
    replayed.load_state_dict(small.state_dict())
    assert torch.equal(replayed.map.source, small.map.source)
    assert torch.equal(replayed(x), small(x))
