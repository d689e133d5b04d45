"""Which whole blocks of a network matter: by ablation, or by the schedules of SNN SqueezeNet-P."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from snncompress.extend import BlockCriterion, OptionError

SCHEDULES: dict[str, tuple[int, ...]] = {
    "full": (2, 3, 4, 5, 6, 7, 8, 9),
    "head_1": (2, 3, 4, 5, 9),
    "head_2": (2, 3, 4, 5, 8),
    "tail_1": (2, 5, 6, 7, 8, 9),
    "tail_2": (2, 4, 6, 7, 8, 9),
    "alt_1": (2, 4, 6, 8),
    "alt_2": (3, 5, 7, 9),
    "ref_1": (4, 6, 8, 9),
    "ref_2": (2, 4, 5, 6, 8, 9),
}
"""The fire modules F2 … F9 that each schedule of the paper keeps; ref_1 is its winner."""
_FIRST = 2  # SqueezeNet counts its layers, and its first fire module is the second


@dataclass(frozen=True)
class Ablation(BlockCriterion):
    """score(block) = loss without it - loss: how much the calibration loss rises when the block is a wire.

    Greedy removal with re-scoring is ``scheduler="iterative"``; all at once is ``"one_shot"``. Costs one forward pass
    over the data per block and step, and one for the loss with all of them.

    Args:
        blocks: names or globs of the modules that may go; None: fire modules and residual blocks.

    Shapes:
        → one score per block.

    Example:
        >>> losses = {(): 0.5, ("a",): 0.75, ("b",): 0.5}
        >>> Ablation().score_blocks(["a", "b"], lambda names: losses[tuple(names)])
        [0.25, 0.0]
    """

    name: ClassVar[str] = "ablation"

    blocks: tuple[str, ...] | None = None

    def score_blocks(self, blocks: Sequence[str], loss_without: Callable[[Collection[str]], float]) -> list[float]:
        """The rise of the loss, block by block."""
        whole = loss_without([])
        return [loss_without([block]) - whole for block in blocks]


@dataclass(frozen=True)
class Fire(Ablation):
    """:class:`Ablation` of fire modules alone: those whose squeeze feeds expands that are concatenated.

    Source: Iandola et al., "SqueezeNet", 2016, for the module; "SNN SqueezeNet-P" for their removal.
    """

    name: ClassVar[str] = "fire"
    kinds: ClassVar[frozenset[str]] = frozenset({"fire"})


@dataclass(frozen=True)
class Keep(BlockCriterion):
    """Keeps the blocks at these positions, counted from 0 in order of execution, whatever ratio is asked for.

    :meth:`named` makes the schedules of the paper. Raises OptionError where the network has fewer blocks.
    """

    name: ClassVar[str] = "keep"
    kinds: ClassVar[frozenset[str]] = frozenset({"fire"})

    keep: tuple[int, ...] = ()
    blocks: tuple[str, ...] | None = None

    def score_blocks(self, blocks: Sequence[str], loss_without: Callable[[Collection[str]], float]) -> list[float]:
        """1 for what stays, 0 for what goes."""
        if self.keep and max(self.keep) >= len(blocks):
            raise OptionError(
                f"The schedule keeps block number {max(self.keep) + 1} of a network that has {len(blocks)}: "
                f"{', '.join(blocks)}."
            )
        return [float(number in self.keep) for number in range(len(blocks))]

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Whatever isn't kept."""
        return scores == 0

    @classmethod
    def named(cls, schedule: str) -> Keep:
        """A schedule of the paper, for a network of eight fire modules F2 … F9: "full", "head_1" … "ref_2".

        Raises OptionError for a name that isn't one of :data:`SCHEDULES`.

        >>> Keep.named("ref_1").keep  # F4, F6, F8, F9
        (2, 4, 6, 7)
        """
        if schedule not in SCHEDULES:
            raise OptionError(f"There is no schedule {schedule!r}. The paper's: {', '.join(SCHEDULES)}.")
        return cls(tuple(number - _FIRST for number in SCHEDULES[schedule]))
