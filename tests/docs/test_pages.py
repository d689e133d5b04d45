"""Every code block of README and docs/ runs as it is written, the blocks of one page in order, in a fresh namespace."""

from __future__ import annotations

import copy
import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import snncompress
from tests.docs.pages import DOCS, PAGES, ROOT, Block, blocks, name_of

NOT_RUN = 0
"""Blocks that can't be run here; their titles say why."""
ELSEWHERE = {"docs/distributed.md": "tests/docs/test_distributed.py"}
"""Pages whose blocks another test runs: this one imports Lightning, which takes long."""
SETUP = "# include: docs/digits.py"


@functools.cache
def setup() -> dict[str, Any]:
    """What docs/digits.py makes, which most pages begin with: it is run once, and each page gets a copy."""
    module = sys.modules["digits"] = types.ModuleType("digits")  # pickle wants to find its class
    exec(compile((DOCS / "digits.py").read_text(), str(DOCS / "digits.py"), "exec"), vars(module))
    return vars(module)


def run(block: Block, names: dict[str, Any]) -> None:
    if block.code.strip() == SETUP:
        made = setup()
        names.update(made, model=copy.deepcopy(made["model"]), __name__="page")
        torch.manual_seed(0)
        return
    included = re.fullmatch("# include: (.*)", block.code.strip())
    code = (ROOT / included[1]).read_text() if included else block.code
    exec(compile("\n" * (0 if included else block.line - 1) + code, str(block.page), "exec"), names)


def told(code: str) -> list[str]:
    """What comments behind a print say that it prints, where that is a number, a list of them, True or False."""
    return re.findall(r"print\(.*\)  # (True|False|\d[\d.]*|\[[\d, ]+\])(?=$|:)", code, flags=re.M)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks(p)) and name_of(p) not in ELSEWHERE], ids=name_of
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # as dataclasses want to find one
    monkeypatch.setitem(sys.modules, "page", module)
    threads, names = torch.get_num_threads(), vars(module)
    try:
        for block in blocks(page):
            if block.runs:
                run(block, names)
                printed = capsys.readouterr().out
                assert [value for value in told(block.code) if value not in printed] == []
        if page.name == "README.md":  # what it trains, works
            assert names["dense"] > 0.95
            assert names["straight"] > 0.9
    finally:
        torch.set_num_threads(threads)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close("all")


def test_blocks_that_are_not_run() -> None:
    """What isn't Python is a shell's line, a file or a drawing; of Python as many blocks are left out as are known."""
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in found} <= {"python", "bash", "text", "json", "toml", "yaml", "mermaid"}
    assert all((ROOT / test).exists() and name in (ROOT / test).read_text() for name, test in ELSEWHERE.items())
    left = [f"{name_of(b.page)}:{b.line}" for b in found if b.language == "python" and not b.runs]
    assert len(left) == NOT_RUN, left
    assert sum(block.runs for block in found) > 60


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]*)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    for path in re.findall(r"`((?:examples|tests|benchmarks|adapters|plugins|docs)/[\w/.]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_reference_has_every_public_name() -> None:
    listed = [
        name for page in (DOCS / "reference").glob("*.md") for name in re.findall(r"^::: (.*)$", page.read_text(), re.M)
    ]
    public = {f"snncompress.{name}" for name in snncompress.__all__ if name != "__version__"}
    assert sorted(listed) == sorted(public | {"snncompress.extend", "snncompress.testing"})
