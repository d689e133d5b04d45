"""check_scheduler and check_energy_model: functions from numbers to a number."""

from __future__ import annotations

import itertools
import math

from snncompress.interfaces import EnergyModel, OperationCounts, Scheduler

from .common import broken, calling, check_name, check_options

_TARGETS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_COUNTS = (0.0, 0.5, 1.0, 1e3, 1e12)


def check_scheduler(scheduler: Scheduler) -> None:
    """Asks a scheduler for every step of several targets and numbers of steps.

    Checked: the ratio never decreases, lies between 0 and the target, and is exactly the target at the last
    step; what comes back is a share; both depend on their arguments alone; ``n_steps`` is at least 1; the options
    are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the scheduler.

    Example:
        >>> from snncompress_schedules import Gradual
        >>> check_scheduler(Gradual(steps=4))
    """
    check_name(scheduler)
    check_options(scheduler)
    with calling(scheduler, "n_steps"):
        n_steps = scheduler.n_steps
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise broken(scheduler, f"n_steps must be a whole number of at least 1, not {n_steps!r}.")
    for target, steps in itertools.product(_TARGETS, sorted({1, 2, 3, 7, n_steps})):
        where = f"target {target}, steps {steps}"
        with calling(scheduler, f"ratio() for {where}"):
            ratios = [scheduler.ratio(target, step, steps) for step in range(1, steps + 1)]
            backwards = [scheduler.ratio(target, step, steps) for step in range(steps, 0, -1)]
        if not all(map(_is_number, ratios)):
            raise broken(scheduler, f"ratio() must return finite numbers, not {ratios} ({where}).")
        if ratios != backwards[::-1]:
            raise broken(scheduler, f"ratio() must depend on its arguments alone ({where}).")
        if min(ratios) < 0 or max(ratios) > target:
            raise broken(scheduler, f"ratio() must stay between 0 and the target: {ratios} ({where}).")
        if ratios != sorted(ratios):
            raise broken(scheduler, f"ratio() must not decrease: {ratios} ({where}).")
        if ratios[-1] != target:
            last = f"the last step must give exactly the target, not {ratios[-1]!r}"
            raise broken(scheduler, f"{last} ({where}).")
    for steps in (2, 3, 7):
        with calling(scheduler, f"regrown() for steps {steps}"):
            shares = [scheduler.regrown(step, steps) for step in range(1, steps)]
            backwards = [scheduler.regrown(step, steps) for step in range(steps - 1, 0, -1)]
        if not all(_is_number(share) and 0 <= share <= 1 for share in shares) or shares != backwards[::-1]:
            raise broken(
                scheduler, f"regrown() must return shares in [0, 1] that depend on its arguments alone, not {shares}."
            )
    if unknown := set(scheduler.grows) - {"channel", "weight"}:
        raise broken(scheduler, f"grows can name criteria for 'channel' and 'weight', not {sorted(unknown)}.")


def check_energy_model(model: EnergyModel) -> None:
    """Asks an energy model for operation counts from none to 10¹².

    Checked: energies are finite numbers, never negative; no operations cost nothing and some cost something;
    more of one kind never costs less; the options are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the model.

    Example:
        >>> from snncompress_horowitz import Horowitz45nm
        >>> check_energy_model(Horowitz45nm())
    """
    check_name(model)
    check_options(model)
    energy: dict[tuple[float, ...], float] = {}
    for counts in itertools.product(_COUNTS, repeat=3):
        with calling(model, f"energy_pj() of {counts}"):
            energy[counts] = value = model.energy_pj(OperationCounts(counts[0], counts[1], counts[2]))
        if not _is_number(value) or value < 0:
            raise broken(model, f"energy_pj() must return a finite number ≥ 0, not {value!r}, of {counts}.")
    if energy[0.0, 0.0, 0.0] != 0:
        raise broken(model, f"no operations must cost nothing, not {energy[0.0, 0.0, 0.0]!r} pJ.")
    if energy[1e3, 1e3, 1e3] == 0:
        raise broken(model, "a thousand operations of every kind cost nothing.")
    for counts, kind in itertools.product(energy, range(3)):
        if counts[kind] != _COUNTS[-1]:
            more = list(counts)
            more[kind] = _COUNTS[_COUNTS.index(counts[kind]) + 1]
            if energy[tuple(more)] < energy[counts]:
                raise broken(model, f"{tuple(more)} operations cost less than {counts}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
