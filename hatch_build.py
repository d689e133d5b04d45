"""The long description is the README, with links that lead somewhere where it is read on its own.

Links into the repository become absolute where ``[project.urls]`` names a Repository, as pictures do; where it names
none, a link is its text, and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?://)[^)\s]+)\)")


def long_description(readme: str, repository: str | None) -> str:
    """The README as an index of packages shows it."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, path = match["picture"], match["text"], match["path"]
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"

    return LINK.sub(absolute, readme)


class LongDescription(MetadataHookInterface):
    """Called by hatchling for the wheel and the source distribution."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what ``dynamic`` names."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text, repository)}
