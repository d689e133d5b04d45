"""The README is short, and its figures and those of docs/measurements are what the benchmarks wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, name_of

README = (ROOT / "README.md").read_text()
MEASURED = sorted((DOCS / "measurements").glob("*.md"))
RESULTS = {path.name: path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.md")}


def rows(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("|")]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_figures_of_the_readme_stand_in_the_results() -> None:
    """Every number with a decimal point."""
    written = "\n".join(RESULTS.values())
    gain = [row for row in rows(README) if not row.startswith(("| network", "| ---"))]
    assert len(gain) == 5
    for row in gain:
        figures = re.findall(r"\d+\.\d+", row)
        assert len(figures) >= 3
        assert [figure for figure in figures if figure not in written] == []


@pytest.mark.parametrize("page", [p for p in MEASURED if p.name != "index.md"], ids=name_of)
def test_tables_are_what_the_benchmarks_wrote(page: Path) -> None:
    """Every row, or every figure of one, stands in a result file; and the page names the script that wrote it."""
    text = page.read_text()
    written = {row for result in RESULTS.values() for row in rows(result)}
    for row in rows(text):
        figures = re.findall(r"\d+\.\d+", row)
        one_file = any(all(figure in result for figure in figures) for result in RESULTS.values())
        assert row in written or (one_file if figures else re.search("images in a batch|^[| :-]+$", row)), row
    assert re.search(r"`benchmarks/\w+\.py`", text)
