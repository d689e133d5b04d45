"""Finds plugins, looks names up, and keeps a record of the plugins that failed.

Each plugin is loaded in a plugin manager of its own, so that a broken one costs nothing but itself: pluggy's own
loader stops at the first failure and lets a later plugin silently take over a name.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

import pluggy

from snncompress.base.tables import Column, Shown, Table
from snncompress.errors import OptionError, PluginError, UnknownNameError
from snncompress.interfaces import Adapter, Criterion, EnergyModel, Quantizer, Scheduler, Target

from . import hookspecs

ENTRY_POINT_GROUP = "snncompress"
P = TypeVar("P", bound=type)

# hook → (what one is called in messages, base class, attribute that holds the name)
_KINDS: dict[str, tuple[str, type, str]] = {
    "register_criteria": ("criterion", Criterion, "name"),
    "register_quantizers": ("quantizer", Quantizer, "name"),
    "register_schedulers": ("scheduler", Scheduler, "name"),
    "register_energy_models": ("energy model", EnergyModel, "name"),
    "register_targets": ("target", Target, "name"),
    "register_adapters": ("adapter", Adapter, "framework"),
}


@dataclass(frozen=True)
class Entry:
    """One thing that a plugin offers: ``cls`` under ``name``, from ``distribution`` (name and version)."""

    name: str
    kind: str
    cls: type
    distribution: str

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0]

    @property
    def plain_summary(self) -> str:
        """The same without a docstring's marks."""
        return re.sub(r"(:\w+:)?`+", "", self.summary)


@dataclass(frozen=True)
class PluginRecord:
    """What became of one plugin: ``error`` says why it failed, and is empty where it loaded."""

    name: str
    distribution: str
    status: Literal["loaded", "failed"]
    error: str = ""


class Entries(list[Entry], Shown):
    """What can be named, as a list that ``print`` and notebooks show as a table."""

    def _parts(self) -> Iterator[str | Table]:
        columns = (
            Column("name"),
            Column("summary", "what it does", left=True),
            Column("distribution", "from", left=True),
        )
        yield Table(columns, [(entry.name, entry.plain_summary, entry.distribution) for entry in self])


class Records(list[PluginRecord], Shown):
    """What became of the plugins, as a list that ``print`` and notebooks show as a table."""

    def _parts(self) -> Iterator[str | Table]:
        columns = [Column(name, left=True) for name in ("name", "distribution", "status", "error")]
        yield Table(columns, [(r.name, r.distribution, r.status, r.error) for r in self])


class Registry:
    """What the given entry points offer."""

    def __init__(self, points: list[EntryPoint]) -> None:
        self.records: list[PluginRecord] = []
        self._entries: dict[tuple[str, str], Entry] = {}
        self._contested: dict[tuple[str, str], list[str]] = {}
        for point in sorted(points, key=lambda p: (_distribution(p) != "snncompress", _distribution(p), p.name)):
            self._load(point)

    def _load(self, point: EntryPoint) -> None:
        distribution = _distribution(point, version=True)
        offered: list[Entry] = []
        try:
            manager = pluggy.PluginManager(hookspecs.PROJECT)
            manager.add_hookspecs(hookspecs)
            manager.register(point.load(), name=point.name)
            manager.check_pending()
            for hook, (kind, base, attribute) in _KINDS.items():
                register = functools.partial(_collect, offered, kind, base, attribute, distribution)
                getattr(manager.hook, hook)(register=register)
            if not offered:
                raise PluginError(
                    "it registers nothing. Likely cause: a hook without @snncompress.extend.hookimpl, or an empty one."
                )
            self._add(offered)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; that must stay its own affair
            text = f"{type(error).__name__}: {error}"
            self.records.append(PluginRecord(point.name, distribution, "failed", text))
        else:
            self.records.append(PluginRecord(point.name, distribution, "loaded"))

    def _add(self, offered: list[Entry]) -> None:
        new: dict[tuple[str, str], Entry] = {}
        clashes = []
        for entry in offered:
            key = (entry.kind, entry.name)
            if key in new:
                clashes.append(f"{entry.kind} {entry.name!r} is registered twice")
            elif key in self._entries:
                owners = self._contested.setdefault(key, [self._entries[key].distribution])
                owners.append(entry.distribution)
                clashes.append(f"{entry.kind} {entry.name!r} is also offered by {owners[0]}")
            new[key] = entry
        if clashes:
            raise PluginError("; ".join(clashes) + ". Uninstall one of the two, or ask its author for another name.")
        self._entries.update(new)

    def entries(self, kind: str) -> Entries:
        """Everything of one kind that can be named, sorted; contested names can't."""
        named = (e for key, e in self._entries.items() if e.kind == kind and key not in self._contested)
        return Entries(sorted(named, key=lambda e: e.name))

    def find(self, kind: str, name: str) -> type[Any]:
        """The class registered under ``name``; raises UnknownNameError or, for a contested name, PluginError."""
        key = (kind, name)
        if key in self._contested:
            raise PluginError(
                f"{kind} {name!r} is claimed by {' and '.join(self._contested[key])}. Uninstall one of them, or pass "
                f"an instance instead of the name."
            )
        if key in self._entries:
            return self._entries[key].cls
        choices = [entry.name for entry in self.entries(kind)]
        nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        message = f"There is no {kind} {name!r}."
        if nearest:
            message += f" Did you mean {nearest[0]!r}?"
        message += f" Available: {', '.join(choices) or 'none'}."
        failed = [f"{r.name} ({r.distribution}: {r.error})" for r in self.records if r.status == "failed"]
        if failed:
            message += f" Plugins that failed to load: {'; '.join(failed)}."
        raise UnknownNameError(message)

    def resolve(self, kind: str, value: Any, base: type[P] | type) -> Any:
        """A name becomes an instance with default options; an instance is returned as it is."""
        if isinstance(value, str):
            return self.find(kind, value)()
        if isinstance(value, base):
            if not isinstance(getattr(value, "name", None), str):
                raise OptionError(f"{type(value).__name__} has no name: give the class one, as in name = 'mine'.")
            return value
        hint = " (a class: add parentheses to make an instance)" if isinstance(value, type) else ""
        raise OptionError(
            f"{kind} must be a name or an instance of snncompress.extend.{base.__name__}, not {value!r}{hint}."
        )


def _distribution(point: EntryPoint, *, version: bool = False) -> str:
    if point.dist is None:
        return "unknown distribution"
    return f"{point.dist.name} {point.dist.version}" if version else point.dist.name


def _collect(offered: list[Entry], kind: str, base: type, attribute: str, distribution: str, cls: type) -> None:
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"register() takes a subclass of snncompress.extend.{base.__name__}, not {cls!r}.")
    name = getattr(cls, attribute, None)
    if not isinstance(name, str) or not name:
        raise PluginError(f"{cls.__name__} has no {attribute!r}: set it to the name that users will write.")
    if missing := ", ".join(sorted(getattr(cls, "__abstractmethods__", ()))):
        raise PluginError(f"{cls.__name__} lacks {missing}.")
    offered.append(Entry(name, kind, cls, distribution))


@functools.cache
def registry() -> Registry:
    """The registry of all installed plugins, loaded at first use."""
    return Registry(_unique(entry_points(group=ENTRY_POINT_GROUP)))


def _unique(points: Any) -> list[EntryPoint]:
    # A distribution that is both installed and on the path (a checkout's own metadata) shows up twice.
    return list({(_distribution(p), p.name, p.value): p for p in points}.values())


def _lister(kind: str) -> Callable[[], Entries]:
    def listing() -> Entries:
        return registry().entries(kind)

    listing.__doc__ = f"Every {kind} that can be named, with the distribution each comes from."
    return listing


criteria = _lister("criterion")
quantizers = _lister("quantizer")
schedulers = _lister("scheduler")
energy_models = _lister("energy model")
targets = _lister("target")


def adapters() -> Iterator[Adapter]:
    """One instance of every adapter."""
    return (entry.cls() for entry in registry().entries("adapter"))


def plugins() -> Records:
    """Every plugin that was found, loaded or failed, with the distribution it comes from and why it failed."""
    return Records(registry().records)
