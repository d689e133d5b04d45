"""How a pruning target is spread over steps: at once, linearly, or by a cubic ramp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from snncompress.extend import OptionError, Scheduler


def _check_steps(name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"{name}: steps must be a whole number, at least 1, not {steps!r}.")


def check_step(name: str, step: int, steps: int) -> None:
    """Raise OptionError for a step that there isn't."""
    if not 1 <= step <= steps:
        raise OptionError(f"{name}: step must be 1 … {steps}, not {step!r}; the steps are counted from 1.")


@dataclass(frozen=True)
class OneShot(Scheduler):
    """Everything in one step: ratio(t) = target.

    Raises:
        OptionError: ``ratio`` is asked for a step outside 1 … steps.

    Example:
        >>> OneShot().n_steps, OneShot().ratio(0.5, step=1, steps=1)
        (1, 0.5)
    """

    name: ClassVar[str] = "one_shot"

    def ratio(self, target: float, step: int, steps: int) -> float:
        """The share removed after ``step``: all of ``target``."""
        check_step(self.name, step, steps)
        return target


@dataclass(frozen=True)
class Iterative(Scheduler):
    """k linear steps, each to be followed by fine-tuning and a new scoring: ratio(t) = target · t/k.

    Args:
        steps: k, at least 1.

    Raises:
        OptionError: ``steps`` isn't a whole number ≥ 1, or ``ratio`` is asked for a step outside 1 … steps.

    Source: Han et al., NeurIPS 2015 (prune, fine-tune, repeat).

    Example:
        >>> iterative = Iterative(steps=2)
        >>> [iterative.ratio(0.5, step, 2) for step in (1, 2)]
        [0.25, 0.5]
    """

    name: ClassVar[str] = "iterative"
    default_steps: ClassVar[int] = 3

    steps: int = 3

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps)

    def ratio(self, target: float, step: int, steps: int) -> float:
        """The share removed after ``step`` = 1 … ``steps``."""
        check_step(self.name, step, steps)
        return target * (step / steps)


@dataclass(frozen=True)
class Gradual(Scheduler):
    """A cubic ramp, fast at first and slow near the end: ratio(t) = target · (1 − (1 − t/k)³).

    Args:
        steps: k, at least 1.

    Raises:
        OptionError: ``steps`` isn't a whole number ≥ 1, or ``ratio`` is asked for a step outside 1 … steps.

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, Eq. 1 with initial sparsity 0.

    Example:
        >>> gradual = Gradual(steps=2)
        >>> [gradual.ratio(0.5, step, 2) for step in (1, 2)]
        [0.4375, 0.5]
    """

    name: ClassVar[str] = "gradual"
    default_steps: ClassVar[int] = 3

    steps: int = 3

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps)

    def ratio(self, target: float, step: int, steps: int) -> float:
        """The share removed after ``step`` = 1 … ``steps``."""
        check_step(self.name, step, steps)
        return target * (1.0 - (1.0 - step / steps) ** 3)
