"""How results are shown: numbers, and axes to draw on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snncompress.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def number(value: float | None) -> str:
    """Four digits, thousands with commas; nothing for None."""
    if value is None:
        return ""
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


ENERGY = ((1.0, "pJ"), (1e3, "nJ"), (1e6, "µJ"), (1e9, "mJ"))
"""How many pJ a unit is."""
SIZE = ((1e-6, "bytes"), (1e-3, "kB"), (1.0, "MB"))
"""How many MB = 10⁶ bytes a unit is."""


def unit(values: Iterable[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that the largest of the values fills, or the smallest one.

    >>> unit([12.0, 3400.0], ENERGY), unit([0.0], SIZE)
    ((1000.0, 'nJ'), (1e-06, 'bytes'))
    """
    largest = max(values, default=0.0)
    return next((entry for entry in reversed(units) if largest >= entry[0]), units[0])


def bars(panel: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str) -> None:
    """Draw horizontal bars with their numbers, a group for each label from top to bottom, one for each series in it."""
    thick = 0.8 / len(series)
    for at, (name, values) in enumerate(series.items()):
        places = [group + (at - (len(series) - 1) / 2) * thick for group in range(len(labels))]
        color = "0.7" if at == 0 and len(series) > 1 else f"C{at - 1 if len(series) > 1 else 0}"
        drawn = panel.barh(places, [value or 0.0 for value in values], thick, label=name, color=color)
        panel.bar_label(drawn, [number(value) for value in values], padding=3, fontsize=7)
    panel.set_yticks(range(len(labels)), labels)
    panel.tick_params(labelsize=8)
    panel.set_ylim(len(labels) - 0.4, -0.6)  # the first one on top
    panel.margins(x=0.15)
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


def bars_figure(panels: int, groups: int, series: int) -> Figure:
    """A new figure that has room for that many panels side by side, each with :func:`bars`."""
    return new_figure(4.6 * panels + 0.8, 0.2 * groups * (series + 0.6) + 1.4)


def new_axes() -> Axes:
    """Axes of a new matplotlib figure; raises OptionError where matplotlib isn't installed."""
    axes: Axes = _pyplot().subplots()[1]
    return axes


def new_figure(width: float, height: float) -> Figure:
    """A new, empty matplotlib figure of this size in inches; raises OptionError where matplotlib isn't installed."""
    figure: Figure = _pyplot().figure(figsize=(width, height), layout="constrained")
    return figure


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError(
            'plot() needs matplotlib, which isn\'t installed: pip install "snncompress[plots]".'
        ) from error
    return pyplot
