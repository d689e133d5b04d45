"""Tables: values in rows, from which text, HTML, CSV and a DataFrame are made; and results that consist of them."""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snncompress.errors import OptionError

from .display import number
from .files import writable, write_whole

if TYPE_CHECKING:
    import pandas


def plain(value: Any) -> str:
    """Text as it is, numbers with four digits.

    >>> plain("conv"), plain(1234.5), plain(2)
    ('conv', '1,234.5', '2')
    """
    return value if isinstance(value, str) else number(value)


def percent(value: float) -> str:
    """A share as a percentage with one digit behind the point.

    >>> percent(0.98)
    '98.0'
    """
    return f"{100 * value:.1f}"


def left_out(skipped: Mapping[str, str]) -> Iterator[str]:
    """A line for each layer that a study leaves out.

    >>> list(left_out({"fc": "it is the classifier"}))
    ['left out: fc: it is the classifier']
    """
    return (f"left out: {name}: {why}" for name, why in skipped.items())


@dataclass(frozen=True)
class Column:
    """A column: its name in CSV and DataFrames, its title and how its values are shown where people read them."""

    key: str
    title: str | None = None
    show: Callable[[Any], str] = plain
    left: bool = False

    def cell(self, value: Any) -> str:
        """Nothing for None."""
        return "" if value is None else self.show(value)


@dataclass(frozen=True)
class Table:
    """Rows of values, None where there is none; ``total`` stands below them for people, and isn't data.

    >>> table = Table((Column("layer"), Column("mac", "MAC")), [("a<b", 1200), ("c", None)], ("total", 1200))
    >>> print(table)
     layer     MAC
     ─────────────
     a<b     1,200
     c
     total   1,200
    >>> print(table.to_csv())
    layer,mac
    a<b,1200
    c,
    <BLANKLINE>
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] | None = None

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as Drawn

        drawn = Drawn(box=SIMPLE_HEAD, pad_edge=False)
        for title, left in self._header():
            drawn.add_column(title, justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            drawn.add_row(*self._cells(row))
        if self.total is not None:
            drawn.add_section()
            drawn.add_row(*self._cells(self.total))
        # Wide enough for any name, and without markup: names may hold brackets.
        console = Console(
            file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False, highlight=False,
            force_jupyter=False,
        )  # fmt: skip
        with console.capture() as capture:
            console.print(drawn)
        return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines() if line.strip())

    def to_html(self) -> str:
        """A ``<table>`` that brings its own alignment and takes all else from the page."""
        sides = ["left" if left else "right" for _, left in self._header()]

        def row(tag: str, cells: Iterable[str]) -> str:
            drawn = (
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f"<tr>{''.join(drawn)}</tr>"

        head = row("th", (title for title, _ in self._header()))
        body = "\n".join(row("td", self._cells(values)) for values in self.rows)
        foot = "" if self.total is None else f"\n<tfoot>{row('th', self._cells(self.total))}</tfoot>"
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>{foot}\n</table>"

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Comma-separated values, as text or into a file; the total is left out."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows(self.rows)
        if path is None:
            return text.getvalue()
        write_whole(writable(path), lambda file: file.write(text.getvalue().encode()))
        return None

    def to_pandas(self) -> pandas.DataFrame:
        """A row per row; the total is left out."""
        try:
            import pandas
        except ImportError as error:
            raise OptionError(
                'to_pandas() needs pandas, which isn\'t installed: pip install "snncompress[pandas]".'
            ) from error
        return pandas.DataFrame([list(row) for row in self.rows], columns=[column.key for column in self.columns])

    def _header(self) -> list[tuple[str, bool]]:
        """Title, and whether the column stands on the left side, of every column; the first one does."""
        return [(c.key if c.title is None else c.title, c.left or not at) for at, c in enumerate(self.columns)]

    def _cells(self, row: Sequence[Any]) -> list[str]:
        return [column.cell(value) for column, value in zip(self.columns, row, strict=True)]


class Shown:
    """A result that consists of lines of text and tables.

    ``print`` shows it as text, a notebook as HTML; its values go out as CSV and as a DataFrame.
    """

    def _parts(self) -> Iterable[str | Table]:
        """What it consists of, in order."""
        raise NotImplementedError

    def to_table(self) -> Table:
        """The table that goes out as CSV and as a DataFrame, as an object."""
        return next(part for part in self._parts() if isinstance(part, Table))

    def __str__(self) -> str:
        return "\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        drawn = (
            part.to_html() if isinstance(part, Table) else f"<p>{html.escape(part).replace(chr(10), '<br>')}</p>"
            for part in self._parts()
        )
        inside = "\n".join(drawn)
        return f'<div class="snncompress" style="overflow-x:auto">\n{inside}\n</div>'

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """The table as comma-separated values: as text, or into the file ``path``.

        Numbers have all their digits, shares go from 0 to 1, an empty field says that there is no value; sums aren't
        in it. Raises StorageError where the file can't be written.
        """
        return self.to_table().to_csv(path)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a ``pandas.DataFrame``, without sums; raises OptionError where pandas isn't installed."""
        return self.to_table().to_pandas()
