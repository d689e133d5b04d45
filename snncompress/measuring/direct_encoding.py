"""Direct encoding: a layer whose analog input is the same at every timestep needs its multiplications once.

Found by comparing what the layer is given, whatever repeats it: the library, the network's own forward, a [T, N, ...]
made of one image. Nothing is kept but the first call's input, and that only as long as nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """What the neurons saw in a batch: T timesteps of N samples, ``at_once`` where they got several in one call.

    N is 0 where there are none.
    """

    steps: int = 1
    samples: int = 0
    at_once: bool = False

    def rows(self, shape: Sequence[int]) -> int:
        """How many samples of single timesteps a tensor of this shape holds.

        >>> clock = Clock(4, 3)
        >>> clock.rows((4, 3, 7)), clock.rows((12, 7)), clock.rows((3, 7))
        (12, 12, 3)
        """
        every, both = self.steps * self.samples, {(self.steps, self.samples), (self.samples, self.steps)}
        return every if tuple(shape[:2]) in both else int(shape[0])


class Repetition:
    """Whether one layer's input was the same at every timestep of every batch so far: :attr:`holds`.

    A layer that is called several times in a timestep must be given the same in all of them.
    """

    def __init__(self) -> None:
        self.holds = True
        self._first: Tensor | None = None
        self._calls, self._alike = 0, True
        self._shapes: list[tuple[Sequence[int], int, int, bool]] = []

    def add(self, x: Tensor, sums: Tensor | None = None) -> None:
        """One call with ``x`` [N, ...], [T, N, ...], [T·N, ...], [N, T, ...] or [N·T, ...].

        Of spikes, which cost additions at every step, their ``sums`` per position are compared instead: they matter
        only where another batch of the same layer isn't spikes.
        """
        if not self.holds:
            return
        self._calls += 1
        along_second = x.dim() > 2 and _same_along_second(x[:1]) and _same_along_second(x)
        self._shapes.append((x.shape, _period(x), _run(x), along_second))
        seen = x if sums is None else sums
        if self._first is None:
            self._first = seen.clone()
        elif self._alike:
            self._alike = self._first.dtype == seen.dtype and torch.equal(self._first, seen)

    def end_batch(self, clock: Clock) -> int:
        """For how many timesteps each multiplication of the batch served: all of them, or one."""
        steps, calls, shapes, alike = clock.steps, self._calls, self._shapes, self._alike
        self._first, self._calls, self._alike, self._shapes = None, 0, True, []
        if not calls or steps == 1:
            return 1
        in_order = calls % steps == 0
        at_once = [_constant(*shape, clock) for shape in shapes]
        if None not in at_once and (clock.at_once or not in_order):
            self.holds = self.holds and all(at_once)
            return steps if self.holds else 1
        if in_order:
            self.holds = self.holds and alike
            return steps if self.holds else 1
        return 1  # called once for the whole batch, before time begins, or otherwise than time goes


def _constant(shape: Sequence[int], period: int, run: int, along_second: bool, clock: Clock) -> bool | None:
    """Whether a call that holds all timesteps is constant over them; None if it doesn't hold them."""
    lead = tuple(shape[:2])
    if lead == (clock.steps, clock.samples):
        return shape[0] // clock.steps % period == 0
    if shape[0] == clock.steps * clock.samples:  # time first, or samples first
        return clock.samples % period == 0 or run % clock.steps == 0
    return along_second if lead == (clock.samples, clock.steps) else None


def _same_along_second(x: Tensor) -> bool:
    return bool(x.eq(x[:, :1]).all())


def _period(x: Tensor) -> int:
    """The smallest p that divides len(x) and for which x[i] = x[i - p] for all i.

    >>> _period(torch.tensor([1.0, 2, 1, 2])), _period(torch.ones(3, 2)), _period(torch.tensor([1.0, 2, 1]))
    (2, 1, 3)
    """
    rows = len(x)
    ahead = x.reshape(rows, -1)[:, :64]
    again = ahead.eq(ahead[:1]).all(1).nonzero().flatten().tolist()[1:]  # few enough to be tried
    return next((p for p in again if rows % p == 0 and torch.equal(x[p:], x[:-p])), max(rows, 1))


def _run(x: Tensor) -> int:
    """The largest r for which x consists of runs of r rows that are alike.

    >>> _run(torch.tensor([1.0, 1, 2, 2, 2, 2])), _run(torch.ones(3, 2)), _run(torch.tensor([1.0, 2, 1]))
    (2, 3, 1)
    """
    rows = x.reshape(len(x), -1)
    for part in rows[:, :64], rows:  # a few numbers tell, as a rule
        changes = part[1:].ne(part[:-1]).any(1).nonzero().flatten() + 1
        if (run := math.gcd(len(x), *changes.tolist())) == 1:
            break
    return run


def clock_of(neurons: Collection[Sequence[tuple[int, int]]], timesteps: int | None) -> Clock:
    """T and N of a batch, from (T', N) of the calls of every neuron, as most of them saw it.

    T is at most ``timesteps``, for which the network was fed: one neuron may serve several layers.

    >>> clock_of([[(1, 5)] * 4, [(1, 5)] * 4], None)
    Clock(steps=4, samples=5, at_once=False)
    """
    seen = [
        Clock(min(total := sum(steps for steps, _ in calls), timesteps or total), calls[0][1], calls[0][0] > 1)
        for calls in neurons
        if calls
    ]
    return max(seen, key=seen.count) if seen else Clock()
