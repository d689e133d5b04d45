"""How much is gone after each pruning step, as a scheduler says, who isn't believed."""

from __future__ import annotations

from numbers import Real

from snncompress.errors import PluginError, SNNCompressError
from snncompress.interfaces import Scheduler

_MOST_STEPS = 10_000
_SLACK = 1e-6


class Shares:
    """A scheduler's shares for all steps at once, so that one that breaks its contract does so before anything is done.

    Raises PluginError for a number of steps that can't be, and for shares that aren't numbers in [0, 1], decrease, or
    don't end at the target.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._known: dict[float, list[float]] = {}
        try:
            steps = scheduler.n_steps
        except Exception as error:  # it is a plugin's: anything can come out of it
            raise PluginError(
                f"Scheduler {scheduler.name!r}: n_steps failed: {type(error).__name__}: {error}"
            ) from error
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
            raise PluginError(
                f"Scheduler {scheduler.name!r} must take a whole number of steps from 1 to {_MOST_STEPS:,}, not "
                f"{str(steps)[:40]}."
            )
        self.steps = steps

    def after(self, step: int, target: float) -> float:
        """The share gone after ``step`` = 1 … ``steps``."""
        if target not in self._known:
            self._known[target] = self._checked(target)
        return self._known[target][step - 1]

    def back(self, step: int) -> float:
        """The share of what is masked that comes back in this step; nothing does in the last."""
        if step == self.steps:
            return 0.0
        name = self._scheduler.name
        try:
            share = self._scheduler.regrown(step, self.steps)
        except SNNCompressError:
            raise
        except Exception as error:  # it is a plugin's: anything can come out of it
            raise PluginError(
                f"Scheduler {name!r} failed in regrown() at step {step} of {self.steps}: {type(error).__name__}: "
                f"{error}"
            ) from error
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise PluginError(
                f"Scheduler {name!r} says that {share!r} comes back in step {step} of {self.steps}. Shares are numbers "
                f"in [0, 1]."
            )
        return float(share)

    def _checked(self, target: float) -> list[float]:
        name = self._scheduler.name
        shares: list[float] = []
        for step in range(1, self.steps + 1):
            try:
                share = self._scheduler.ratio(target, step, self.steps)
            except SNNCompressError:
                raise
            except Exception as error:  # it is a plugin's: anything can come out of it
                raise PluginError(
                    f"Scheduler {name!r} failed at step {step} of {self.steps}: {type(error).__name__}: {error}"
                ) from error
            before = shares[-1] if shares else 0.0
            if isinstance(share, bool) or not isinstance(share, Real) or not before - _SLACK <= share <= 1:
                raise PluginError(
                    f"Scheduler {name!r} says {share!r} for step {step} of {self.steps} (target {target}, {before} "
                    f"after the step before). Shares are numbers in [0, 1] that don't decrease."
                )
            shares.append(float(share))
        if abs(shares[-1] - target) > _SLACK:
            raise PluginError(
                f"Scheduler {name!r} ends at {shares[-1]} instead of the target {target}: ratio(target, steps, steps) "
                f"must be the target."
            )
        return shares
