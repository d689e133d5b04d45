"""A shortcut between layers of different width that has nothing to learn: which channel each channel is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from snncompress.errors import OptionError


class ChannelMap(nn.Module):
    """Channels put in other places, with zeros between them: what pads the shortcut of a CIFAR ResNet.

        y[c] = x[source[c]], or 0 where source[c] = -1;    x [..., C, H, W] → y [..., C', H, W]

    Padding that is written in ``forward`` ties the channels of two layers together, since its numbers can't follow
    what is removed. This map follows: where channel j of x goes, what it made is 0 from then on; where channel c of y
    goes, its entry does. So the layers on both sides are pruned each by itself, exactly. Nothing is added to the
    model's ``state_dict``; a plan's replay restores the map.

    Args:
        channels: C, the number of channels of x.
        source: for each of the C' channels of y one of x, or -1.
        axis: where the channels stand, counted from the end: -3 in [N, C, H, W], -1 in [N, C].

    Raises:
        OptionError: ``source`` names a channel that x doesn't have, or ``axis`` isn't negative.

    >>> ChannelMap(2, [-1, 0, 1, -1], axis=-1)(torch.tensor([[5.0, 7.0]]))
    tensor([[0., 5., 7., 0.]])
    """

    source: Tensor

    def __init__(self, channels: int, source: Iterable[int], axis: int = -3) -> None:
        super().__init__()
        entries = list(source)
        if axis >= 0 or not entries or not all(-1 <= entry < channels for entry in entries):
            raise OptionError(
                f"ChannelMap({channels}, {entries[:8]}…, axis={axis}): source takes numbers of channels from -1 "
                f"(zeros) to {channels - 1}, axis a place counted from the end."
            )
        self.channels, self.axis = channels, axis
        self.register_buffer("source", torch.tensor(entries), persistent=False)

    @classmethod
    def padding(cls, channels: int, width: int, axis: int = -3) -> ChannelMap:
        """From ``channels`` to ``width``, with half of the zeros in front and half behind (option A of He et al.).

        >>> ChannelMap.padding(2, 5).source
        tensor([-1,  0,  1, -1, -1])
        """
        front = (width - channels) // 2
        return cls(channels, [-1] * front + list(range(channels)) + [-1] * (width - channels - front), axis)

    def forward(self, x: Tensor) -> Tensor:
        """y of x."""
        there = (self.source >= 0).to(x.dtype).view(-1, *[1] * (-1 - self.axis))
        return x.index_select(self.axis, self.source.clamp_min(0)) * there

    def extra_repr(self) -> str:
        """Both widths, and how many channels are zeros."""
        return f"{self.channels}, {len(self.source)}, zeros={int((self.source < 0).sum())}"

    def width(self, side: Literal["out", "in", "neuron"]) -> int:
        """Channels on one side."""
        return len(self.source) if side == "out" else self.channels

    def remove_channels(self, side: Literal["out", "in", "neuron"], indices: list[int]) -> None:
        """Do without some of y's channels, or go on as if some of x's were silent; in place."""
        width = self.width(side)
        gone = torch.zeros(width, dtype=torch.bool, device=self.source.device)
        gone[indices] = True
        if side == "out":
            self.source = self.source[~gone]
            return
        places = torch.where(gone, -1, (~gone).cumsum(0) - 1)
        self.source = torch.where(self.source < 0, -1, places[self.source.clamp_min(0)])
        self.channels = width - len(indices)
