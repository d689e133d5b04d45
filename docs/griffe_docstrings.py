"""Docstrings as the site wants them: their roles become links, their examples and fields sections of their kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?\.?([\w.]+)`")
SECTIONS = {"Example:": "Examples:", "Fields:": "Attributes:"}


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def __init__(self) -> None:
        pages = (Path(__file__).resolve().parent / "reference").glob("*.md")
        self.listed = {
            name for page in pages for name in re.findall(r"^::: snncompress\.(\w+)$", page.read_text(), re.M)
        }

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = ROLE.sub(self._linked, obj.docstring.value)
        text = re.sub(r"::$", ":", text, flags=re.M)
        text = re.sub(r"^>>> (?:.+\n?)+", lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text, flags=re.M)
        for word, section in SECTIONS.items():
            text = re.sub(rf"^{word}$", section, text, flags=re.M)
        obj.docstring.value = text

    def _linked(self, match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        if match[1] in (name, f"snncompress.{name}") and name in self.listed:
            return f"[`{name}`][snncompress.{name}]"
        return f"`{match[1]}`"
