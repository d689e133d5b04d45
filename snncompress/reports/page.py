"""One page of HTML that needs nothing beside it: no script, no style sheet, no picture from elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import ClassVar

from snncompress.base.tables import Table

from .pictures import bars

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --pale: #667; --line: #d8dce2; --box: #f5f6f8;
  --s0: #a9afb8; --s1: #1f77b4; --s2: #e07b16; --s3: #2a9a50; --s4: #b0428a; --s5: #7a5cc0; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e8eb; --pale: #9aa2ad; --line: #343a43;
  --box: #1f2329; --s0: #767e89; --s1: #4b9fdb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
a { color: var(--s1); }
p.note { color: var(--pale); font-size: .85rem; }
ul.gains { padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem .25rem 0; vertical-align: top; }
thead th, tfoot th { white-space: nowrap; }
thead th { border-bottom: 1px solid var(--line); } tfoot th { border-top: 1px solid var(--line); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 2.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
.legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -.08rem; }
svg { display: block; font: 12px system-ui, sans-serif; fill: var(--ink); } svg .name { fill: var(--pale); }
.s0 { fill: var(--s0); background: var(--s0); } .s1 { fill: var(--s1); background: var(--s1); }
.s2 { fill: var(--s2); background: var(--s2); } .s3 { fill: var(--s3); background: var(--s3); }
.s4 { fill: var(--s4); background: var(--s4); } .s5 { fill: var(--s5); background: var(--s5); }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; margin: .6rem 0; }
@media (max-width: 40rem) { td { min-width: 5.5rem; padding-right: .5rem; } }
@media print { details { display: block; } nav { display: none; } }
"""


@dataclass(frozen=True)
class Picture:
    """Bars by layer."""

    title: str
    series: Sequence[str]
    values: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class _Text:
    text: str

    form: ClassVar[str]


class Code(_Text):
    """Something to copy."""

    form = "<pre><code>{}</code></pre>"


class Heading(_Text):
    """Of a part of a section."""

    form = "<h3>{}</h3>"


class Note(_Text):
    """A paragraph in small print."""

    form = '<p class="note">{}</p>'


@dataclass(frozen=True)
class Folded:
    """What is shown when its title is clicked."""

    title: str
    parts: Sequence[Part]


Part = str | list[str] | Table | Picture | Code | Folded | Heading | Note
"""A paragraph, a list of them, or one of the rest."""


def page(title: str, sections: Mapping[str, Sequence[Part]]) -> str:
    """The page: a heading, links to the sections, and those, each with its title."""
    anchors = {name: f"section-{number}" for number, name in enumerate(sections, 1)}
    links = "\n".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor in anchors.items())
    body = "\n".join(
        f'<section id="{anchors[name]}">\n<h2>{escape(name)}</h2>\n{_drawn(parts)}\n</section>'
        for name, parts in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav>
{links}
</nav>
{body}
</body>
</html>
"""


def _drawn(parts: Iterable[Part]) -> str:
    """Pictures that follow one another stand side by side, under one legend."""
    pieces: list[str] = []
    for _, run in itertools.groupby(parts, lambda part: isinstance(part, Picture)):
        alike = list(run)
        pictures = [part for part in alike if isinstance(part, Picture)]
        pieces += [_gallery(pictures)] if pictures else map(_part, alike)
    return "\n".join(pieces)


def _gallery(pictures: Sequence[Picture]) -> str:
    series = pictures[0].series
    keys = "".join(f'<span><i class="s{at % 6}"></i>{escape(name)}</span>' for at, name in enumerate(series))
    figures = "\n".join(
        f"<figure>\n<figcaption>{escape(picture.title)}</figcaption>\n"
        f"{bars(picture.title, picture.series, picture.values)}\n</figure>"
        for picture in pictures
    )
    return f'<p class="legend">{keys}</p>\n<div class="pictures">\n{figures}\n</div>'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, _Text):
        return part.form.format(escape(part.text))
    if isinstance(part, Table):
        return f'<div class="scroll" tabindex="0">\n{part.to_html()}\n</div>'
    if isinstance(part, Folded):
        return f"<details>\n<summary>{escape(part.title)}</summary>\n{_drawn(part.parts)}\n</details>"
    if isinstance(part, Picture):
        return _gallery([part])
    items = "\n".join(f"<li>{escape(line)}</li>" for line in part)
    return f'<ul class="gains">\n{items}\n</ul>'
