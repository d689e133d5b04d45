"""The smallest network whose accuracy on data that were held out stays near the original's: bisection over budgets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from snncompress.base.progress import Progress
from snncompress.errors import OptionError
from snncompress.measuring.evaluation import accuracy
from snncompress.model.chance import held
from snncompress.running.bench import Bench

from .budgets import KINDS, UNITS, Budget
from .meeting import Meeting, measured, not_met
from .run import Run
from .settings import Settings

_FINE, _MOST = 0.05, 12
"""How near to the least share the one that is found should be, relative to it; and the most trials."""
M = TypeVar("M", bound=nn.Module)


@dataclass
class Smallest(Generic[M]):
    """The run that made it, where it came from, as a plan's origin has it, and what its run warned of."""

    run: Run[M]
    origin: dict[str, Any]
    warned: list[Warning]


def check_max_drop(max_drop: Any, validation: Any, data: Any, checkpoint: Any) -> None:
    """Raise OptionError for what can't be."""
    if max_drop is None:
        if validation is not None:
            raise OptionError("validation= is what max_drop= measures accuracy on, and there is none.")
        return
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not 0 <= max_drop < 1:
        raise OptionError(
            f"max_drop is the accuracy that may be lost, a number in [0, 1) such as 0.01 for a point, not {max_drop!r}."
        )
    if data is None and validation is None:
        raise OptionError("max_drop compares accuracies: pass labelled data=, or validation=.")
    if checkpoint is not None:
        raise OptionError(
            "max_drop= tries several networks, and checkpoint= keeps the steps of one. Find the budget first: it "
            "stands in plan_of(small).origin['budget']."
        )


def smallest(
    max_drop: float, asked: Mapping[str, float] | None, table: Bench[M], settings: Settings, skip: Any,
    progress: Progress | None,
) -> Smallest[M]:  # fmt: skip
    """Compress as far as accuracy on ``table.test`` allows, and within what was ``asked`` besides.

    The first kind of cost that a budget names is what becomes small, energy where it names none. All trials begin at
    the same random state, and each is the whole run, with repair and fine-tuning. Accuracy is taken to fall with the
    share that is left; where it doesn't, a smaller network may be missed.

    A trial says which share was asked for, which was reached, and the accuracy; None where no network is that small,
    and the share is then the least.

    Raises OptionError where the mildest budget costs more accuracy already.
    """
    kinds = {UNITS[key][0] if key in UNITS else key: key for key in asked or {}}
    kind = next((kind for kind in kinds if kind in KINDS), "energy")
    budget = Budget.of({**(asked or {}), **({} if kind in kinds else {kind: 1.0})})
    dense = accuracy(table.copy(), table.test)
    meeting = Meeting(budget, table, settings, skip, progress)
    whole, most = KINDS[kind](meeting.before), budget.most(meeting.before)
    trials: list[dict[str, float | None]] = []

    def tried(share: float) -> Smallest[M] | None:
        """What comes of it, where that is near enough."""
        table.reseed()
        with held(table.feed.generators()), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            limits = {**most, kind: min(most[kind], share * whole)}
            found, used = meeting.meet(limits)
            if used > 1:
                if not trials:
                    raise not_met(limits, used)
                trials.append({"asked": share, "reached": used * share, "accuracy": None})
                return None
            run = Run(table.copy(), table.feed, found.settled(), skip, progress)
            run.carry_out()
        reached = KINDS[kind](measured(run.model, table)) / whole
        table.reseed()
        right = accuracy(run.model, table.test)
        trials.append({"asked": share, "reached": reached, "accuracy": right})
        if right < dense - max_drop - 1e-9:
            return None
        origin = {"budget": {**(asked or {}), kind: share}, "max_drop": max_drop, "dense_accuracy": dense}
        return Smallest(run, origin, [said.message for said in warned if isinstance(said.message, Warning)])

    if not whole:
        raise OptionError(
            f"max_drop lowers the {kind}, and there is none. Name another kind: budget={{'params': 1.0}}."
        )
    low, least, high = 0.0, 0.0, min(1.0, most[kind] / whole)
    best = tried(high)
    if best is None:
        right = trials[0]["accuracy"] or 0.0
        raise OptionError(
            f"The mildest budget, {high:.3g} of the {kind}, loses more than max_drop={max_drop:g} already: accuracy is "
            f"{right:.4f} and was {dense:.4f}. Take more bits=, or None, let finetune= train, or allow more."
        )
    high = min(high, trials[0]["reached"] or high)
    while high - max(low, least) > _FINE * high and len(trials) < _MOST:
        share = max((low + high) / 2, least)
        smaller, trial = tried(share), trials[-1]
        reached = trial["reached"] or share
        if smaller is not None:
            best, high = smaller, min(share, reached)
        elif trial["accuracy"] is None:
            least = reached
        else:
            low = share
    best.origin["trials"] = trials
    return best
