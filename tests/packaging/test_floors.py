"""The lower bounds in pyproject.toml are the versions that `make test-floors` installs, and says it installs."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"ruff", "mypy", "pre-commit", "hatchling", "editables", "pytest", "pytest-xdist", "hypothesis"}
TOOLS |= {"mkdocs-material", "mkdocstrings", "twine", "check-wheel-contents"}
"""Nothing of theirs is in the library, so no lowest version is looked for."""


def bounds() -> dict[str, set[str]]:
    """Distribution → lower bounds, over the dependencies and all extras."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    found: dict[str, set[str]] = {}
    for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, operator, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:(>=)([\d.]+))?", requirement).groups()
        if operator:
            found.setdefault(name, set()).add(version)
    return found


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_a_distribution_has_one_bound() -> None:
    assert len(bounds()) > 15  # they were read
    assert {name: versions for name, versions in bounds().items() if len(versions) > 1} == {}


def test_the_floors_are_the_lower_bounds() -> None:
    floors = pins("constraints-floors.txt")
    wanted = {name: version for name, (version,) in bounds().items() if name not in TOOLS}
    assert {name: floors.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-floors.txt"])
def test_what_is_pinned_is_high_enough(file: str) -> None:
    def parts(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    low = {name: version for name, (version,) in bounds().items()}
    assert {n: v for n, v in pins(file).items() if n in low and parts(v) < parts(low[n])} == {}
