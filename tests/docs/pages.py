"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", flags=re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands behind it, its code and the line it begins in."""

    page: Path
    language: str
    info: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        """Python is run, unless its title says ``not run: why``."""
        return self.language == "python" and 'title="not run:' not in self.info


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, _, info = match["info"].strip().partition(" ")
        line = text[: match.start()].count("\n") + 2
        found.append(Block(page, language, info, textwrap.dedent(match["code"]), line))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
