"""What a search found: its trials, the Pareto front, as a table and a picture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from snncompress.base.display import new_axes, number
from snncompress.base.tables import Column, Shown, Table
from snncompress.errors import OptionError
from snncompress.model.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 16
_MOST_REASONS = 3


@dataclass(frozen=True)
class Trial:
    """One network that a search tried.

    Fields:
        number: from 0.
        state: "complete", "pruned" (stopped early), "failed" (with a reason), "running" or "waiting".
        values: the objectives, in their order; empty where it isn't complete.
        settings: what was chosen, by parameter.
        figures: all that was measured: accuracy, energy_pj, size_mb, n_params, n_ac, n_mac.
        reason: why it failed.
        plan_json: the plan, as :meth:`Plan.from_json` reads it.
        warned: what ``apply`` warned of.
        seconds: how long it took.
    """

    number: int
    state: str
    values: tuple[float, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    plan_json: str = field(default="", repr=False)
    warned: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def plan(self) -> Plan:
        """What was done to the network: ``plan.apply(fresh)`` gives another one of its structure."""
        if not self.plan_json:
            raise OptionError(
                f"Trial {self.number} is {self.state}, and has no plan.{self.reason and ' ' + self.reason}"
            )
        return Plan.from_json(self.plan_json)


@dataclass(frozen=True)
class Search(Shown):
    """What :func:`search` found. ``print`` shows a table: the Pareto front, or all trials where they are few.

    Fields:
        trials: all of them, by number.
        objectives: what was looked for.
        maximized: per objective, whether more is better.
        title: the model's class.

    Example:
        >>> good, cheap = (0.9, 200.0), (0.8, 100.0)
        >>> trials = [Trial(n, "complete", v, {"bits": 4 - n}) for n, v in enumerate([good, cheap, (0.7, 150.0)])]
        >>> found = Search((*trials, Trial(3, "failed", reason="too much")), ("accuracy", "energy"), (True, False))
        >>> [trial.number for trial in found.front], found.best.number
        ([1, 0], 0)
        >>> print(found)
        model: 4 trials: 3 complete, 1 failed
         trial   accuracy (%)   energy (pJ)   bits   Pareto front
         ────────────────────────────────────────────────────────
         1               80.0           100      3              *
         2               70.0           150      2
         0               90.0           200      4              *
        failed: 1 × too much
    """

    trials: tuple[Trial, ...]
    objectives: tuple[str, ...]
    maximized: tuple[bool, ...]
    title: str = "model"
    maker: Callable[[Trial], nn.Module] | None = field(default=None, repr=False, compare=False)
    """Makes a trial's network again."""

    @property
    def complete(self) -> tuple[Trial, ...]:
        """Those that came to their end."""
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front, by the last objective: trials that none beats in one objective and equals in the others.

        Of trials that are equal in all, the first.
        """
        better = {trial.number: self._lower(trial) for trial in self.complete}
        found = [
            trial
            for trial in self.complete
            if not any(
                all(a <= b for a, b in zip(other, better[trial.number], strict=True))
                and (other != better[trial.number] or number < trial.number)
                for number, other in better.items()
                if number != trial.number
            )
        ]
        return tuple(sorted(found, key=self._by_last))

    @property
    def best(self) -> Trial:
        """Of the front, the one that is best in the first objective; raises OptionError where no trial is complete."""
        if not self.front:
            raise OptionError(f"No trial is complete. {self._states()}{self._reasons()}")
        return min(self.front, key=self._lower)

    def model(self, trial: Trial | None = None) -> nn.Module:
        """The network of a trial, by default of the best: compressed, repaired and trained again, as it was then.

        Same model, data, seed, versions and threads give bitwise the same network. ``trial.plan.apply(fresh)`` gives
        its structure alone, with the weights that are left of ``fresh``. Raises OptionError for a trial that isn't
        complete, PlanError where it comes out otherwise.
        """
        if self.maker is None:
            raise OptionError("This result doesn't hold the model and the data. Take what search() returned.")
        return self.maker(self.best if trial is None else trial)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        return {"trials": trials, "objectives": list(self.objectives), "maximized": list(self.maximized),
                "title": self.title}  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first objective against the second, one point per trial; a line marks the Pareto front.

        A third objective is the points' colour. With one objective: its value by trial, and the best so far. Draws on
        ``ax``, or on a new figure, and returns the axes; showing or saving them is left to you. Raises OptionError
        where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        scaled = {trial.number: [_SCALES.get(o, 1) * v for o, v in zip(self.objectives, trial.values, strict=True)]
                  for trial in self.complete}  # fmt: skip
        names = [_titled(objective) for objective in self.objectives]
        if len(self.objectives) == 1:
            values = [v for (v,) in scaled.values()]
            choose = max if self.maximized[0] else min
            ax.plot(list(scaled), values, "o", ms=4, label="trials")
            ax.step(list(scaled), [choose(values[: n + 1]) for n in range(len(values))], "k--", where="post",
                    label="best so far")  # fmt: skip
            ax.set(xlabel="trial", ylabel=names[0], title=self._title())
        else:
            x, y = [v[1] for v in scaled.values()], [v[0] for v in scaled.values()]
            if len(self.objectives) > 2:
                points = ax.scatter(x, y, c=[v[2] for v in scaled.values()], cmap="viridis", s=18)
                ax.figure.colorbar(points, ax=ax, label=names[2])
            else:
                ax.scatter(x, y, s=18, label="trials")
            line = sorted((scaled[trial.number][1], scaled[trial.number][0]) for trial in self.front)
            style = "k--o" if len(self.objectives) == 2 else "ko"
            ax.plot([a for a, _ in line], [b for _, b in line], style, mfc="none", ms=9, label="Pareto front")
            ax.set(xlabel=names[1], ylabel=names[0], title=self._title())
        ax.legend(loc="lower right")
        return ax

    def to_table(self) -> Table:
        """Every trial that is complete, not the Pareto front alone."""
        return self._table(self.complete)

    def _parts(self) -> Iterator[str | Table]:
        few = len(self.complete) <= MOST_ROWS
        yield self._title()
        if self.complete:
            yield self._table(self.complete if few else self.front)
        if not few:
            yield "shown: the Pareto front"
        if reasons := self._reasons():
            yield reasons.removeprefix("\n")

    def _table(self, trials: Sequence[Trial]) -> Table:
        front = self.front
        varied = list(dict.fromkeys(name for trial in self.complete for name in trial.settings))
        columns = (
            Column("trial"), *(Column(o, _titled(o), partial(_shown, o)) for o in self.objectives),
            *(Column(name, show=_setting) for name in varied),
            Column("pareto", "Pareto front", lambda best: "*" if best else ""),
        )  # fmt: skip
        rows = [
            (trial.number, *trial.values, *(trial.settings.get(name) for name in varied), trial in front)
            for trial in sorted(trials, key=self._by_last)
        ]
        return Table(columns, rows)

    def _title(self) -> str:
        return f"{self.title}: {self._states()}"

    def _states(self) -> str:
        counts = Counter(trial.state for trial in self.trials)
        said = ", ".join(f"{counts[state]} {state}" for state in STATES.values() if counts[state])
        return f"{len(self.trials)} trials{said and ': ' + said}"

    def _reasons(self) -> str:
        """Why trials failed, and what others were warned of: the first sentence of each, the most frequent first."""
        said = [("failed", trial.reason) for trial in self.trials if trial.state == "failed"]
        said += [("warned", text) for trial in self.trials for text in trial.warned]
        counts = Counter((kind, text.partition(". ")[0]) for kind, text in said).most_common()
        told = "".join(f"\n{kind}: {count} × {text}" for (kind, text), count in counts[:_MOST_REASONS])
        return f"{told}\nand {len(counts) - _MOST_REASONS} other reasons" if counts[_MOST_REASONS:] else told

    def _lower(self, trial: Trial) -> tuple[float, ...]:
        """Less is better."""
        return tuple(-v if up else v for v, up in zip(trial.values, self.maximized, strict=True))

    def _by_last(self, trial: Trial) -> tuple[float, ...]:
        return self._lower(trial)[::-1]


STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
"""Optuna's → ours."""
_SCALES = {"accuracy": 100.0}
_UNITS = {"accuracy": "%", "energy": "pJ", "size": "MB"}


def _titled(objective: str) -> str:
    if "_" in objective:  # energy_nj
        kind, unit = objective.split("_")
        return f"{kind} ({ {'nj': 'nJ', 'pj': 'pJ', 'uj': 'µJ', 'mj': 'mJ', 'mb': 'MB', 'kb': 'kB'}[unit] })"
    return f"{objective} ({_UNITS[objective]})" if objective in _UNITS else objective


def _shown(objective: str, value: float) -> str:
    return f"{100 * value:.1f}" if objective == "accuracy" else number(value)


def _setting(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def from_optuna(frozen: Any) -> Trial:
    """One of Optuna's trials."""
    kept = frozen.user_attrs
    state = STATES[frozen.state.name]
    return Trial(
        frozen.number, state, tuple(frozen.values or ()) if state == "complete" else (), dict(frozen.params),
        kept.get("figures", {}), kept.get("reason", ""), kept.get("plan", ""), tuple(kept.get("warned", ())),
        kept.get("seconds", 0.0),
    )  # fmt: skip
