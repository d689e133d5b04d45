"""How results are shown: numbers, tables of text, and axes to draw on."""

from __future__ import annotations

import io
from collections.abc import Sequence
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """Rows of text under a header, as wide as they need, the first column to the left."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(header):
        text = position == 0 or title in ("kind", "quantizer")
        drawn.add_column(title, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    if total is not None:
        drawn.add_section()
        drawn.add_row(*total)
    # Wide enough for any name, and without markup: names may hold brackets.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines() if line.strip())


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
