"""docs/papers.md: its commands can be run, its links lead somewhere, and its figures stand where it says."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "papers.md"
TEXT = PAGE.read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S) for line in block.splitlines()]
BENCHMARKS = [command for command in COMMANDS if "benchmarks/" in command]
TESTS = [command for command in COMMANDS if " pytest " in command]


class Parsed(Exception):  # noqa: N818 - it ends a script where it would begin to work
    pass


@pytest.fixture
def script_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a script of benchmarks/ is run; what it imports from there is forgotten."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def options_of(command: str) -> tuple[Path, list[str]]:
    words = shlex.split(command)
    number = next(n for n, word in enumerate(words) if word.startswith("benchmarks/"))
    return ROOT / words[number], words[number + 1 :]


@pytest.mark.usefixtures("script_imports")
@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_take_these_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, options = options_of(command)
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser) -> None:
        parse(self, options)  # SystemExit where one isn't known, or isn't a choice
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("command", TESTS)
def test_tests_exist(command: str) -> None:
    words = shlex.split(command)
    text = (ROOT / next(word for word in words if word.startswith("tests/"))).read_text()
    if "-k" in words:
        assert re.search(rf"def test_\w*{words[words.index('-k') + 1]}", text)


def test_all_commands_are_of_these_kinds() -> None:
    assert [c for c in COMMANDS if c not in BENCHMARKS and c not in TESTS] == []
    assert len(BENCHMARKS) > 10 < len(COMMANDS)


def test_figures_stand_where_it_says() -> None:
    """What has a decimal point, in the column "here", stands in the file that the row links to; else it has none."""
    checked = 0
    for row in re.findall(r"^\|(.*)\|$", TEXT, flags=re.M):
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) != 4 or cells[0].startswith("---") or cells[3] == "where":
            continue
        figures = re.findall(r"\d[\d,]*\.?\d*(?: ± [\d.]+)?", cells[2])
        figures = [figure.rstrip(",") for figure in figures]
        if not cells[3]:
            assert cells[2] == "not measured yet", row
            continue
        path = re.search(r"\]\(([^)#]*)", cells[3])
        assert path, row
        written = (PAGE.parent / path[1]).read_text()
        assert [figure for figure in figures if figure not in written] == [], row
        checked += len(figures)
    assert checked > 60


def test_the_readme_leads_here() -> None:
    assert "(docs/papers.md)" in (ROOT / "README.md").read_text()
