"""How many channels each group, and how many bits each layer, may lose for a budget.

What goes is compared by how much of the signal it takes with it. With v the scores of a group's channels, and e(b) the
quantization error ‖W − Ŵ‖² / ‖W‖² of a layer at b bits,

    loss of the next channels   log(Σ v² left before / Σ v² left after)
    loss of the next bit        log((1 − e(b)) / (1 − e(b − 1)))

add up to −log of the product, over all groups and layers, of the shares that are left: a signal has to pass them in
turn. For single channels this ranks as LAMP does (Lee et al., ICLR 2021, Eq. 1). What is cheapest goes first,

    price = loss / √saving

until every budget is met; then what was taken too much comes back, the dearest first. With the savings as they are,
layers that cost much are emptied and the network suffers; without them, they are spared. The exponent was measured
(benchmarks/budgets.py, part "exponent").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_STEPS = 48
"""At most so many steps down in a group, that it doesn't take long; what is taken too much comes back one by one."""

_WEIGHT = 0.5


@dataclass
class Part:
    """What can go step by step: so many of each group's channels (``sizes``), or a bit of a layer's weights.

    ``losses`` [steps] are those of each step, ``row`` is the layer's among the costs, ``gone`` how many steps went.
    """

    losses: Tensor
    sizes: Mapping[int, int] = field(default_factory=dict)
    row: int = -1
    gone: int = 0


class Costs:
    """What a network costs [kinds] when r [groups] channels are gone, and layers have fewer bits.

    A row's share of it goes with the output channels and with the input channels that are left:

        c · (1 − A r) · (1 − B r)        A, B [rows, groups]: the share of the row's outputs, inputs that a channel is

    Args:
        table: c [kinds, rows] of the network as it is.
        out, into: A and B.
        by_bit: [rows], what a bit of the row's weights adds to the cost of the kind number ``sized``.
    """

    def __init__(self, table: Tensor, out: Tensor, into: Tensor, by_bit: Tensor | None = None, sized: int = 0) -> None:
        self.table, self.out, self.into, self.sized = table.clone(), out, into, sized
        self.by_bit = torch.zeros(table.shape[1], dtype=torch.float64) if by_bit is None else by_bit
        self.gone = torch.zeros(out.shape[1], dtype=torch.float64)
        self._left()

    def take(self, part: Part, steps: int = 1) -> None:
        """So many steps of the part go, or come back where ``steps`` are fewer than none."""
        part.gone += steps
        if part.row >= 0:
            self.table[self.sized, part.row] -= steps * self.by_bit[part.row]
            return
        for group, size in part.sizes.items():
            self.gone[group] += steps * size
        self._left()

    def total(self) -> Tensor:
        """[kinds]."""
        return self.table @ (self._outs * self._ins)

    def saved(self, parts: Sequence[Part]) -> Tensor:
        """[parts, kinds]: what the next step of each saves, to first order."""
        by_out, by_in = self.table * self._ins, self.table * self._outs
        channel = by_out @ self.out + by_in @ self.into  # [kinds, groups]
        shares = self._outs * self._ins
        found = torch.zeros(len(parts), len(self.table), dtype=torch.float64)
        for number, part in enumerate(parts):
            if part.row >= 0:
                found[number, self.sized] = self.by_bit[part.row] * shares[part.row]
            for group, size in part.sizes.items():
                found[number] += size * channel[:, group]
        return found

    def _left(self) -> None:
        self._outs, self._ins = 1 - self.out @ self.gone, 1 - self.into @ self.gone


def losses_of(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """The loss of each step, where so many of the lowest of v [channels] go one after another.

    >>> losses_of(torch.tensor([2.0, 1.0, 3.0]), [1, 1]).exp()  # 14/13, 13/9
    tensor([1.0769, 1.4444], dtype=torch.float64)
    """
    v = scores.double()
    power = (v - v.min().clamp_max(0)).sort().values.square()  # nothing below 0
    ends = torch.tensor([0, *sizes]).cumsum(0)
    left = power.flip(0).cumsum(0).flip(0)
    left = torch.cat([left, left.new_zeros(1)])[ends.clamp_max(len(power))]
    tiny = torch.finfo(torch.float64).tiny
    return (left[:-1].clamp_min(tiny) / left[1:].clamp_min(tiny)).log()


def allocate(parts: Sequence[Part], costs: Costs, most: Tensor) -> bool:
    """Take from the parts what is cheapest until the costs are within ``most`` [kinds]; False if all isn't enough."""
    open_ = [part for part in parts if len(part.losses)]
    while bool((costs.total() > most).any()):
        able = [part for part in open_ if part.gone < len(part.losses)]
        if not able:
            return False
        over = costs.total() > most
        saving = (costs.saved(able)[:, over] / most[over].clamp_min(1e-300)).sum(1)
        chunks = [max(1, len(part.losses) // _STEPS) for part in able]
        loss = torch.stack([p.losses[p.gone : p.gone + n].mean() for p, n in zip(able, chunks, strict=True)])
        price = (loss / saving**_WEIGHT).where(saving > 0, torch.inf)
        best = int(price.argmin())
        if math.isinf(float(price[best])):
            return False
        part = able[best]
        costs.take(part, min(chunks[best], len(part.losses) - part.gone))
    _give_back(parts, costs, most)
    return True


def _give_back(parts: Sequence[Part], costs: Costs, most: Tensor) -> None:
    """Undo steps, the dearest first, as long as the costs stay within ``most``."""
    stuck: set[int] = set()
    while True:
        able = [n for n, part in enumerate(parts) if part.gone and n not in stuck]
        if not able:
            return
        dearest = max(able, key=lambda n: float(parts[n].losses[parts[n].gone - 1]))
        costs.take(parts[dearest], -1)
        if bool((costs.total() > most).any()):
            costs.take(parts[dearest], 1)
            stuck.add(dearest)
