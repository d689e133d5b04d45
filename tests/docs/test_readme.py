"""The README says what is: its code is the code in the repo, its tables are what the scripts wrote."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import snncompress
from tests.packaging.lines import code_lines

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = [
    "mnist.md", "performance.md", "cqp_mnist.md", "nmnist.md", "unstructured.md",
    "squeezenet_cifar10.md", "conversion.md", "storage.md", "exports.md",
]  # fmt: skip
PLUGIN = ROOT / "examples" / "external_plugin" / "snncompress_peak" / "__init__.py"


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_plugin_is_the_one_that_is_tested() -> None:
    assert PLUGIN.read_text().strip() in README


def test_the_plugin_takes_at_most_twenty_lines() -> None:
    assert len(code_lines(PLUGIN.read_text())) <= 20


@pytest.mark.parametrize("block", code_blocks())
def test_code_parses_and_names_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "snncompress":
            assert hasattr(snncompress, node.attr), node.attr


@pytest.mark.parametrize("result", RESULTS)
def test_tables_are_what_the_benchmarks_wrote(result: str) -> None:
    """Every table row of the README's measured section stands in a result file."""
    measured = README.split("## What it is worth, measured")[1].split("\n## ")[0]
    written = {
        line.strip() for f in (ROOT / "benchmarks" / "results").glob("*.md") for line in f.read_text().splitlines()
    }
    rows = [line.strip() for line in measured.splitlines() if line.startswith("|")]
    assert rows
    assert [row for row in rows if row not in written] == []
    assert f"benchmarks/{result.removesuffix('.md')}.py" in measured


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:examples|tests|benchmarks|adapters)/[\w/.]*)`", README))))
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()
