"""examples/external_adapter: a third framework's adapter, built, installed beside, and put to its own test."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.lines import code_lines

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "external_adapter"
SOURCE = EXAMPLE / "snncompress_sinabs" / "__init__.py"

FOUND = """
import json, sys
import snncompress
records = [[r.name, r.distribution, r.status, r.error] for r in snncompress.plugins()]
from snncompress_sinabs import SinabsAdapter
print(json.dumps({"records": records, "imported": "sinabs" in sys.modules, "framework": SinabsAdapter.framework}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed from a wheel that was built without the network."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = run(["-m", "pip", "install", *options, "--target", str(target), str(EXAMPLE)])
    assert done.returncode == 0, done.stderr
    return target


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def beside(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def test_the_adapter_is_found_and_imports_no_framework(site: Path) -> None:
    done = run(["-c", FOUND], env=beside(site))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert ["sinabs", "snncompress-sinabs 0.1.0", "loaded", ""] in seen["records"]
    assert (seen["imported"], seen["framework"]) == (False, "sinabs")


@pytest.mark.skipif(importlib.util.find_spec("sinabs") is None, reason="sinabs is not installed")
def test_its_own_test_passes(site: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "test_sinabs.py", tmp_path)  # away from the source, which it would import
    command = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."]
    done = run([*command, "test_sinabs.py"], env=beside(site), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_it_imports_from_the_authors_namespace_only() -> None:
    imports = [n for n in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports} == {
        "contextlib", "snncompress.extend",
    }  # fmt: skip


def test_the_adapter_is_short() -> None:
    code = code_lines(SOURCE.read_text())
    assert len(code) <= 75, "\n".join(code)
