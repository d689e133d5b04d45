from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snncompress_schedules import Gradual, Iterative, OneShot, PruneRegrow

from snncompress import OptionError
from snncompress.extend import Scheduler


def test_golden_ratios() -> None:
    # target 0.6: linear thirds; cubic 0.6·(1 − (2/3)³) = 0.6·19/27, 0.6·(1 − (1/3)³) = 0.6·26/27
    assert [Iterative().ratio(0.6, t, 3) for t in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])
    assert [Gradual().ratio(0.6, t, 3) for t in (1, 2, 3)] == pytest.approx([0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])
    assert OneShot().ratio(0.6, 1, 1) == 0.6


def test_numbers_of_steps() -> None:
    assert (OneShot().n_steps, Iterative().n_steps, Gradual().n_steps) == (1, 3, 3)
    assert Iterative(steps=5).n_steps == 5
    assert Gradual(steps=5).options() == {"steps": 5}
    assert OneShot().options() == {}


@given(st.sampled_from([OneShot, Iterative, Gradual, PruneRegrow]), st.floats(0, 1), st.integers(1, 30))
def test_non_decreasing_and_exact_at_the_end(kind: type[Scheduler], target: float, steps: int) -> None:
    ratios = [kind().ratio(target, step, steps) for step in range(1, steps + 1)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == target
    assert ratios[0] >= 0


@pytest.mark.parametrize("kind", [Iterative, Gradual, PruneRegrow])
@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_steps_that_cannot_be(kind: type[Scheduler], steps: object) -> None:
    with pytest.raises(OptionError, match="steps must be a whole number"):
        kind(steps=steps)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [OneShot, Iterative, Gradual, PruneRegrow])
@pytest.mark.parametrize("step", [0, 4])
def test_step_outside(kind: type[Scheduler], step: int) -> None:
    with pytest.raises(OptionError, match="counted from 1"):
        kind().ratio(0.5, step, 3)


def test_golden_regrowth() -> None:
    # 0.3/2 · (1 + cos(π/3)) = 0.15 · 1.5, 0.3/2 · (1 + cos(2π/3)) = 0.15 · 0.5, and nothing in the last step
    assert [PruneRegrow().regrown(t, 3) for t in (1, 2, 3)] == pytest.approx([0.225, 0.075, 0.0])
    assert [PruneRegrow(decay="constant").regrown(t, 3) for t in (1, 2, 3)] == [0.3, 0.3, 0.0]
    assert PruneRegrow().options() == {"steps": 3, "regrow": 0.3, "decay": "cosine"}
    assert Gradual().regrown(1, 3) == 0.0
    with pytest.raises(OptionError, match="counted from 1"):
        PruneRegrow().regrown(0, 3)


@pytest.mark.parametrize("options", [{"regrow": 1.1}, {"regrow": True}, {"regrow": None}, {"decay": "linear"}])
def test_regrowth_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=rf"prune_regrow: {next(iter(options))} must be"):
        PruneRegrow(**options)  # type: ignore[arg-type]
