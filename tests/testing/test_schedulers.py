"""The checks of schedulers: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import snncompress
from snncompress.contract.registry import Entry
from snncompress.extend import Scheduler
from snncompress.testing import (
    check_scheduler,
)
from tests.testing.common import broken, named


@pytest.mark.parametrize("entry", snncompress.schedulers(), ids=named)
def test_our_schedulers(entry: Entry) -> None:
    check_scheduler(entry.cls())
    if "steps" in entry.cls().options():
        check_scheduler(entry.cls(steps=5))


def scheduler(ratio: Callable[[float, int, int], Any], **attributes: Any) -> Scheduler:
    body = {"name": "made", "ratio": staticmethod(ratio), **attributes}
    return type("Made", (Scheduler,), body)()


def added(numbers: list[float]) -> float:
    """With a rounding error per addition, which ``sum`` makes up for from Python 3.12 on."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def test_a_right_scheduler_passes() -> None:
    check_scheduler(scheduler(lambda target, step, steps: target * (step / steps)))


_calls = iter(range(1, 10**9))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (scheduler(lambda target, step, steps: target, name=None), "'name' must be"),
        (scheduler(lambda target, step, steps: target, options=lambda self: {"f": min}), "as JSON"),
        (scheduler(lambda target, step, steps: target, steps=0), "n_steps must be"),
        (scheduler(lambda target, step, steps: target, n_steps=2.0), "n_steps must be"),
        (scheduler(lambda target, step, steps: target, n_steps=property(lambda s: 1 / 0)), "n_steps failed"),
        (scheduler(lambda target, step, steps: target / (steps - step)), "ratio() for target 0.0, steps 1"),
        (scheduler(lambda target, step, steps: None), "finite numbers"),
        (scheduler(lambda target, step, steps: float("nan")), "finite numbers"),
        (scheduler(lambda target, step, steps: target * step / steps + next(_calls)), "arguments alone"),
        (scheduler(lambda target, step, steps: 2 * target - target * step / steps), "between 0 and the target"),
        (scheduler(lambda target, step, steps: target - (steps - step)), "between 0 and the target"),
        (scheduler(lambda target, step, steps: target * (1 - 0.5 * ((steps - step) % 2))), "decrease"),
        (scheduler(lambda target, step, steps: target * step / (steps + 1)), "must give exactly the target"),
        (scheduler(lambda target, step, steps: target * added([1 / steps] * step)), "must give exactly the target"),
        (scheduler(lambda target, step, steps: target, regrown=lambda self, step, steps: 2.0), "regrown() must return"),
        (scheduler(lambda target, step, steps: target, regrown=lambda *_: next(_calls) / 10**9), "arguments alone"),
        (scheduler(lambda target, step, steps: target, regrown=lambda *_: 1 / 0), "regrown() for steps 2"),
        (scheduler(lambda target, step, steps: target, grows={"block": "fire"}), "not ['block']"),
    ],
)  # fmt: skip
def test_a_broken_scheduler(made: Scheduler, said: str) -> None:
    assert said in broken(check_scheduler, made)
