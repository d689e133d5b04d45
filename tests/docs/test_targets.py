"""docs/targets.md: its code runs, and names every chip that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import snncompress

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "targets.md").read_text()


def test_its_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(compile(block, "docs/targets.md", "exec"), names)
    assert "on speck: doesn't fit" in capsys.readouterr().out


def test_it_names_every_chip() -> None:
    assert [entry.name for entry in snncompress.targets() if f"`{entry.name}`" not in PAGE] == []
