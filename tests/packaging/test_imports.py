"""Who may import whom, and what `import snncompress` costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import snncompress
from snncompress import errors, extend

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "snncompress").rglob("*.py"))
PACKAGES = sorted([*(ROOT / "plugins").glob("snncompress_*"), *(ROOT / "adapters").glob("snncompress_*")])
FRAMEWORKS = {"spikingjelly", "snntorch"}
HEAVY = FRAMEWORKS | {
    "brevitas",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "torchvision",
    "torchaudio",
    "optuna",
    "ray",
}
ALL_PLUGINS = "; ".join(f"import {path.name}" for path in PACKAGES)


def imported_by(statements: str, *, absent: set[str] = frozenset()) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded; those in ``absent`` can't be imported there."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)!r}))\n{statements}\n"
        "print(' '.join({n.partition('.')[0] for n, m in sys.modules.items() if m is not None}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_loads_neither_frameworks_nor_anything_heavy() -> None:
    """Nor does loading all plugins, or looking a name up."""
    assert imported_by(f"import snncompress; snncompress.criteria(); {ALL_PLUGINS}") & HEAVY == set()


def test_everything_imports_and_loads_where_the_frameworks_are_missing() -> None:
    check = "import snncompress; assert all(p.status == 'loaded' for p in snncompress.plugins()), snncompress.plugins()"
    imported_by(
        f"{ALL_PLUGINS}; {check}", absent=FRAMEWORKS | {"torchvision", "torchaudio", "sklearn", "matplotlib", "optuna"}
    )


def test_the_probe_sees_what_is_loaded() -> None:
    assert "sqlite3" in imported_by("import sqlite3.dbapi2")


def imports(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import, wherever in the source; names is empty for ``import module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def core_trespasses(source: str) -> list[str]:
    """Imports that the core must not have: a framework or a plugin."""
    tops = [module.partition(".")[0] for module, _ in imports(source)]
    return [top for top in tops if top in FRAMEWORKS or top.startswith("snncompress_")]


def plugin_trespasses(source: str, package: str) -> list[str]:
    """Imports that a plugin must not have: any other part of snncompress, another plugin, a parent folder."""
    wrong = []
    for module, names in imports(source):
        top = module.partition(".")[0]
        if module == "snncompress.extend":
            wrong += [f"{module}.{name}" for name in names if name not in extend.__all__]
        elif top == "snncompress" or module.startswith("..") or (top.startswith("snncompress_") and top != package):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_core_knows_no_framework_and_no_plugin(path: Path) -> None:
    assert core_trespasses(path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: p.name)
def test_a_plugin_takes_only_the_public_road(path: Path) -> None:
    for file in sorted(path.rglob("*.py")):
        assert plugin_trespasses(file.read_text(), path.name) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "import snntorch",
        "def f():\n    from spikingjelly.activation_based import neuron",
        "import snncompress_svs as s",
    ],
)
def test_a_trespass_of_the_core_is_seen(source: str) -> None:
    assert core_trespasses(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "from snncompress.network import trace",
        "import snncompress.model.plan",
        "from snncompress import apply",
        "def f():\n    from snncompress import recording",
        "from snncompress_sca import SCA",
        "from ..snncompress_sca import SCA",
    ],
)
def test_a_trespass_of_a_plugin_is_seen(source: str) -> None:
    assert plugin_trespasses(source, "snncompress_svs") != []


@pytest.mark.parametrize("namespace", [snncompress, extend], ids=["users", "authors"])
def test_what_is_exported_is_what_is_there(namespace: ModuleType) -> None:
    public = {
        name
        for name, value in vars(namespace).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert len(set(namespace.__all__)) == len(namespace.__all__)
    assert set(namespace.__all__) - {"__version__"} == public


def test_users_and_authors_have_a_namespace_each() -> None:
    """They share the errors alone."""
    shared = set(snncompress.__all__) & set(extend.__all__)
    assert all(issubclass(getattr(snncompress, name), Exception) for name in shared)


def test_every_error_and_warning_is_exported() -> None:
    raised = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert raised <= set(snncompress.__all__)
    assert all(getattr(snncompress, name) is getattr(errors, name) for name in raised)


def test_every_error_has_one_base_and_its_natural_one() -> None:
    own = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, Exception)]
    assert all(issubclass(e, snncompress.SNNCompressError) != issubclass(e, Warning) for e in own)
    assert issubclass(snncompress.OptionError, ValueError)
    assert issubclass(snncompress.UnknownNameError, LookupError)


def test_what_is_exported_is_documented() -> None:
    exported = [(name, getattr(space, name)) for space in (snncompress, extend) for name in space.__all__]
    things = [(name, thing) for name, thing in exported if inspect.isclass(thing) or inspect.isfunction(thing)]
    assert [name for name, thing in things if not inspect.getdoc(thing)] == []
