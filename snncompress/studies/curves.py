"""What ``sensitivity`` and ``threshold_sweep`` return: curves that print as tables and can be drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snncompress.base.display import new_axes
from snncompress.base.tables import Column, Shown, Table, left_out, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Sensitivity(Shown):
    """Accuracy with one layer pruned and all others whole. ``print`` shows a table.

    Fields:
        dense: accuracy of the model as it was handed in, 0 to 1.
        accuracy: layer → [len(ratios)] accuracies, 0 to 1; None where the ratio would leave the layer no channel.
        ratios: shares removed.
        criterion: name of the criterion that chose what goes.
        skipped: layers that were left out, with the reason.
        title: the model's class.
        repair: "membrane" or "current" where the weights that were left were fitted.

    Example:
        >>> print(Sensitivity(0.98, {"conv": (0.97, 0.5), "fc": (0.98, None)}, (0.5, 0.9), "svs"))
        model: accuracy (%) with one layer pruned by svs; 98.0 before
         layer   50 % removed   90 % removed
         ───────────────────────────────────
         conv            97.0           50.0
         fc              98.0
        empty: no channel would be left
    """

    dense: float
    accuracy: Mapping[str, tuple[float | None, ...]]
    ratios: tuple[float, ...]
    criterion: str
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = "model"
    repair: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        accuracies = {name: list(row) for name, row in self.accuracy.items()}
        return {**dataclasses.asdict(self), "accuracy": accuracies, "ratios": list(self.ratios)}

    def plot(self, ax: Axes | None = None) -> Axes:
        """A line per layer, accuracy (%) against the share removed (%), and a dashed one for the dense accuracy.

        Draws on ``ax``, or on a new figure, and returns the axes; showing or saving them is left to you. Raises
        OptionError where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        for name, row in self.accuracy.items():
            drawn = [(100 * r, 100 * a) for r, a in zip(self.ratios, row, strict=True) if a is not None]
            ax.plot([r for r, _ in drawn], [a for _, a in drawn], marker="o", label=name)
        ax.axhline(100 * self.dense, linestyle="--", color="grey", label="dense")
        ax.set(xlabel="removed from the layer (%)", ylabel="accuracy (%)", title=_title(self))
        ax.legend()
        return ax

    def _parts(self) -> Iterator[str | Table]:
        columns = [
            Column("layer"),
            *(Column(f"{ratio:g}", f"{100 * ratio:g} % removed", percent) for ratio in self.ratios),
        ]
        before = f"{_repaired(self)}; {percent(self.dense)} before"
        yield f"{self.title}: accuracy (%) with one layer pruned by {self.criterion}{before}"
        yield Table(columns, [(name, *row) for name, row in self.accuracy.items()])
        if any(None in row for row in self.accuracy.values()):
            yield "empty: no channel would be left"
        yield from left_out(self.skipped)


@dataclass(frozen=True)
class ThresholdSweep(Shown):
    """Accuracy at one sparsity, with more or fewer weights protected. ``print`` shows a table.

    Fields:
        dense: accuracy of the model as it was handed in, 0 to 1.
        taus: thresholds τ.
        accuracy: [len(taus)], 0 to 1.
        protected: [len(taus)], share of the pruned layers' weights whose criticality is above τ. Where it is more
            than 1 - ratio, not all of them can be kept.
        sparsity: [len(taus)], share of the pruned layers' weights that are gone.
        ratio: the share that was asked for, by layer.
        criterion: the criterion's name.
        title: the model's class.
        repair: "membrane" or "current" where the weights that were left were fitted.

    Example:
        >>> print(ThresholdSweep(0.98, (0.5, 1.0), (0.6, 0.9), (0.25, 0.0), (0.9, 0.9), {"fc": 0.9}, "cqp"))
        model: accuracy (%) by the threshold of cqp; 98.0 before
         τ     accuracy   protected   sparsity
         ─────────────────────────────────────
         0.5       60.0        25.0       90.0
         1         90.0         0.0       90.0
        protected and sparsity in % of the weights of fc
    """

    dense: float
    taus: tuple[float, ...]
    accuracy: tuple[float, ...]
    protected: tuple[float, ...]
    sparsity: tuple[float, ...]
    ratio: Mapping[str, float]
    criterion: str
    title: str = "model"
    repair: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy and protected share, both in %, against τ, and a dashed line for the dense accuracy.

        Draws on ``ax``, or on a new figure, and returns the axes; showing or saving them is left to you. Raises
        OptionError where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        ax.plot(self.taus, [100 * a for a in self.accuracy], marker="o", label="accuracy")
        ax.plot(self.taus, [100 * p for p in self.protected], marker="s", label="protected weights")
        ax.axhline(100 * self.dense, linestyle="--", color="grey", label="accuracy, dense")
        ax.set(xlabel="criticality threshold τ", ylabel="accuracy, protected share (%)")
        ax.set_title(_title(self))
        ax.legend()
        return ax

    def _parts(self) -> Iterator[str | Table]:
        shares = ("accuracy", "protected", "sparsity")
        columns = [Column("tau", "τ", "{:g}".format), *(Column(name, show=percent) for name in shares)]
        before = f"{_repaired(self)}; {percent(self.dense)} before"
        yield f"{self.title}: accuracy (%) by the threshold of {self.criterion}{before}"
        yield Table(columns, list(zip(self.taus, self.accuracy, self.protected, self.sparsity, strict=True)))
        yield f"protected and sparsity in % of the weights of {', '.join(self.ratio)}"


def _title(curve: Sensitivity | ThresholdSweep) -> str:
    return f"{curve.title}, {curve.criterion}{_repaired(curve)}"


def _repaired(curve: Sensitivity | ThresholdSweep) -> str:
    return f", repaired on the {curve.repair}" if curve.repair else ""
