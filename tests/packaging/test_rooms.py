"""The core is laid out in rooms, one above the other: imports point down, and none hides in a function."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "snncompress"
FLOORS = [
    {"errors", "version"},
    {"interfaces"},
    {"base"},
    {"contract"},
    {"model"},
    {"running"},
    {"structure"},
    {"measuring"},
    {"pruning"},
    {"saving", "export", "conversion", "studies", "reports"},
    {"commands"},
    {"testing", "extend", "__init__", "__main__"},
]
"""From the ground up. Rooms on one floor know nothing of one another."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below snncompress → file; a package counts by its ``__init__``."""
    found = {}
    for path in sorted(CORE.rglob("*.py")):
        parts = path.relative_to(CORE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str) -> Iterator[tuple[str, bool]]:
    """(module below snncompress, whether the import stands at the top of the file) of each import in the house."""
    tree = ast.parse(source)
    top = set(map(id, tree.body))
    package = name.split(".")[:-1] if name not in PACKAGES else name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (a.name.partition(".")[2] or "__init__", id(node) in top) for a in node.names if in_house(a.name)
            )
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")[1:]
            if not node.level and not in_house(node.module or ""):
                continue
            path = ".".join(part for part in module if part)
            for alias in node.names:
                deeper = f"{path}.{alias.name}".strip(".")
                yield (deeper if deeper in MODULES else path or "__init__"), id(node) in top


def in_house(name: str) -> bool:
    return name == "snncompress" or name.startswith("snncompress.")


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py" and path.parent != CORE}
ARROWS = [(name, *arrow) for name, path in MODULES.items() for arrow in imports(name, path.read_text())]


def room(module: str) -> str:
    return module.partition(".")[0]


def arrows_up(arrows: list[tuple[str, str, bool]]) -> list[str]:
    """Imports of a room that isn't below; the shop fronts at the top may take from their own floor."""
    return [
        f"{a} → {b}"
        for a, b, _ in arrows
        if room(a) != room(b) and FLOOR[room(a)] <= FLOOR[room(b)] and FLOOR[room(a)] < len(FLOORS) - 1
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_imports_point_down() -> None:
    assert len(ARROWS) > 200  # they were read
    assert arrows_up(ARROWS) == []


def test_no_import_hides_in_a_function_or_behind_a_condition() -> None:
    assert [f"{a} → {b}" for a, b, top in ARROWS if not top] == []


def test_no_files_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for a, b, _ in ARROWS:
        graph[a].add(b)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_contract_imports_nothing_of_the_house_but_errors() -> None:
    assert {room(b) for a, b, _ in ARROWS if room(a) == "interfaces"} == {"interfaces", "errors"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.grids", "from ..pruning import apply"),
        ("model.grids", "def f():\n    from snncompress.running.data import Feed"),
        ("saving.storage", "import snncompress.export.freezing"),
        ("interfaces.targets", "from ..base import ranking"),
    ],
)
def test_an_arrow_up_is_seen(name: str, source: str) -> None:
    assert arrows_up([(name, *arrow) for arrow in imports(name, source)])


def test_a_hidden_import_is_seen() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from snncompress.model.plan import Plan"
    assert [top for _, top in imports("model.grids", source)] == [False]
