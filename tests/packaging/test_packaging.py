"""Folders, entry points, the wheel and what is installed say the same."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import snncompress

ROOT = Path(__file__).resolve().parents[2]
GROUP = "snncompress"


def folders() -> set[str]:
    """Names under plugins/ and adapters/, whatever they are."""
    return {
        path.name
        for home in ("plugins", "adapters")
        for path in (ROOT / home).iterdir()
        if path.name != "__pycache__" and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file)


def test_every_folder_is_one_importable_package() -> None:
    for home in ("plugins", "adapters"):
        for name in folders():
            path = ROOT / home / name
            if path.exists():
                assert name.startswith("snncompress_"), path
                assert (path / "__init__.py").is_file(), path


def test_every_folder_has_its_entry_point_and_no_other_is_declared(project: dict) -> None:
    expected = {name.removeprefix("snncompress_"): name for name in folders()}
    assert project["entry-points"][GROUP] == expected


def test_the_wheel_holds_the_packages_at_its_top_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    info = f"snncompress-{snncompress.__version__}.dist-info"
    assert {name.partition("/")[0] for name in wheel.namelist()} == {"snncompress", info} | folders()


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    packages = [
        ROOT / "snncompress",
        *(p for h in ("plugins", "adapters") for p in (ROOT / h).glob("snncompress_*")),
    ]
    sources = {file.relative_to(p.parent).as_posix() for p in packages for file in p.rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


def test_the_wheel_is_typed_and_licensed(wheel: zipfile.ZipFile) -> None:
    assert "snncompress/py.typed" in wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_carries_the_entry_points(wheel: zipfile.ZipFile, project: dict) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser[GROUP]) == project["entry-points"][GROUP]


def test_what_is_installed_is_what_pyproject_says(project: dict) -> None:
    installed = importlib.metadata.distribution("snncompress")
    points = {p.name: p.value for p in installed.entry_points if p.group == GROUP}
    assert points == project["entry-points"][GROUP], "the installation is old: pip install -e ."
    assert installed.version == snncompress.__version__
    assert f"\nversion: {snncompress.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_plugin_of_ours_loads(project: dict) -> None:
    ours = {r.name: (r.status, r.error) for r in snncompress.plugins() if r.distribution.startswith("snncompress 0")}
    assert ours == dict.fromkeys(project["entry-points"][GROUP], ("loaded", ""))


def test_the_license_is_there(project: dict) -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"


def test_links_of_the_long_description_lead_somewhere(wheel: zipfile.ZipFile) -> None:
    """What an index of packages shows is the README without links into a repository that it doesn't know."""
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    text = wheel.read(name).decode().partition("\n\n")[2]
    assert text.startswith("# snncompress")
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []
