"""Bars as SVG: as wide as the page, with text that keeps its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from snncompress.base.display import number

LABEL, BAR, GAP = 19, 14, 9
"""Heights in pixels: of a name, of a bar, of what is between two groups."""
WIDEST = 78.0
"""Per cent of the width that the longest bar takes; the rest is for its number."""


def bars(title: str, series: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> str:
    """A group of bars for each name in ``values``, one for each of the ``series``, from top to bottom.

    Places along the width are percentages, and there is no viewBox: on a narrow page bars get shorter, and text keeps
    its size.

    >>> from html.parser import HTMLParser
    >>> drawn = bars("a < b", ["dense", "small"], {"conv": [4.0, 2.0], "fc": [None, 1.0]})
    >>> [part.split('"')[0] for part in drawn.split('<rect x="0" width="')[1:]]
    ['78.00%', '39.00%', '19.50%']
    """
    largest = max((value for group in values.values() for value in group if value), default=1.0)
    drawn, y = [], 0
    for name, group in values.items():
        drawn.append(f'<text x="0" y="{y + LABEL - 5}" class="name">{escape(name)}</text>')
        y += LABEL
        for at, (which, value) in enumerate(zip(series, group, strict=True)):
            if value is not None:
                share = WIDEST * value / largest
                drawn.append(
                    f'<rect x="0" width="{share:.2f}%" y="{y}" height="{BAR - 2}" class="s{at % 6}">'
                    f"<title>{escape(f'{which}, {name}: {number(value)}')}</title></rect>"
                    f'<text x="{share:.2f}%" dx="5" y="{y + BAR - 4}">{number(value)}</text>'
                )
            y += BAR
        y += GAP
    inside = "\n".join(drawn)
    return f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{y}">\n{inside}\n</svg>'
