"""docs/targets.md: it names every chip that there is."""

from __future__ import annotations

from pathlib import Path

import snncompress

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "targets.md").read_text()


def test_it_names_every_chip() -> None:
    assert [entry.name for entry in snncompress.targets() if f"`{entry.name}`" not in PAGE] == []
