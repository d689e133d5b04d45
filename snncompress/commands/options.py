"""Options of a command from the signature of the function behind it; values from a file and from the line."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from snncompress.base.files import writable
from snncompress.contract.registry import registry
from snncompress.errors import OptionError, SNNCompressError

from .importing import built, guarded, imported

_PLAIN = (int, float, str, bool, types.NoneType)
_PLUGINS = {
    "criterion": "criterion", "quantizer": "quantizer", "scheduler": "scheduler", "energy_model": "energy model",
    "target": "target",
}  # fmt: skip
_DATA = {"data", "validation", "test", "model"}
"""What is made by a call where a function is named."""
_PATH = "package.module:name"


class UsageError(Exception):
    """The line, or the file, says what can't be said."""


@dataclass(frozen=True)
class Option:
    """One that only the command line has."""

    name: str
    type: Any
    help: str
    default: Any = None


class Options:
    """A parser for a command: ``function``'s parameters but for ``without``, and the command's ``own`` options before.

    Raises OptionError where jsonargparse isn't installed.
    """

    def __init__(
        self, command: str, about: str, example: str, own: Sequence[Option], function: Callable[..., Any],
        without: Iterable[str],
    ) -> None:  # fmt: skip
        try:
            from jsonargparse import ArgumentParser
        except ImportError as error:
            raise OptionError(
                f"snncompress {command} needs jsonargparse, which isn't installed: pip install 'snncompress[cli]'."
            ) from error
        from argparse import RawDescriptionHelpFormatter

        self._prog = f"snncompress {command}"
        self._parser = ArgumentParser(
            prog=self._prog, usage=f"{self._prog} [FILE] [--option value ...]", description=about,
            epilog=_EPILOG.format(example=example), exit_on_error=False, allow_abbrev=False,
            formatter_class=_formatter(RawDescriptionHelpFormatter),
        )  # fmt: skip
        self.function = function
        self._objects = {option.name for option in own if option.name in _DATA}
        self._parameters: list[str] = []
        for option in own:
            self._add(option.name, option.type, option.default, option.help)
        helps, hints = _documented(function), typing.get_type_hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in without:
                continue
            kind, objects = plain_type(hints[name])
            if name in _PLUGINS:
                kind, objects = kind | Mapping[str, Any], True
            if objects or name in _DATA:
                self._objects.add(name)
            self._parameters.append(name)
            default = None if parameter.default is parameter.empty else parameter.default
            self._add(name, kind, default, helps.get(name, ""))

    def _add(self, name: str, kind: Any, default: Any, text: str) -> None:
        if name in _PLUGINS:
            text += f" Here also {{name: ..., option: value}}, or {_PATH}."
        elif name in self._objects and _PATH not in text:
            text += f" Here {_PATH}."
        self._parser.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=name.upper())

    def parsed(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Values by name; the first argument may be a file of them, and what the line says holds. Raises UsageError."""
        from argparse import ArgumentError

        words = list(arguments)
        try:
            start = None
            if words and not words[0].startswith("-"):
                start = self._file(words.pop(0))
            found = self._parser.parse_args(words, namespace=start)
        except ArgumentError as error:
            raise UsageError(f"{_shortened(str(error))} See {self._prog} --help.") from error
        return {name: _unwrapped(found[name]) for name in found.keys() if name not in ("config", "__path__")}  # noqa: SIM118

    def _file(self, name: str) -> Any:
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{name} can't be read: {error}.") from error
        if path.suffix not in (".toml", ".yaml", ".yml"):
            raise UsageError(f"{name} must be a .toml, .yaml or .yml file.")
        from argparse import ArgumentError

        try:
            if path.suffix == ".toml":
                return self._parser.parse_object(tomllib.loads(text))
            return self._parser.parse_string(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{name} isn't TOML: {error}.") from error
        except (ArgumentError, TypeError) as error:
            raise UsageError(f"{name}: {_shortened(str(error))} See {self._prog} --help.") from error

    def writable(self, values: Mapping[str, Any], *names: str) -> None:
        """Raise UsageError where a file can't be written, as it has no folder, say: before the work, not after it."""
        for name in names:
            try:
                if values[name]:
                    writable(values[name])
            except SNNCompressError as error:
                raise UsageError(f"--{name}: {error}") from error

    def call(self, values: Mapping[str, Any], **more: Any) -> Any:
        """Call the function with what was said; what was named is looked up."""
        given = {name: self.resolved(name, values[name]) for name in self._parameters}
        return self.function(**given, **more)

    def resolved(self, name: str, value: Any) -> Any:
        """The object that a value names, where this option takes one."""
        if name not in self._objects:
            return value
        if isinstance(value, Mapping) and name in _PLUGINS:
            return _plugin(name, dict(value))
        if isinstance(value, str) and ":" in value:
            found = (built if name in _DATA else imported)(f"--{name}", value)
            return _reporting(f"--{name}", value, found) if name == "finetune" else found
        return value


def plain_type(hint: Any) -> tuple[Any, bool]:
    """What of a type can be written in a file, and whether something can't, which is then named by a string.

    >>> from collections.abc import Mapping
    >>> plain_type(int | Mapping[str, float] | None)
    (int | collections.abc.Mapping[str, float] | None, False)
    >>> plain_type(int | Callable[[str], int] | None)
    (int | str | None, True)
    >>> plain_type(Literal["a"] | Literal["b"])
    (typing.Literal['a', 'b'], False)
    """
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    kept: list[Any] = []
    for part in parts:
        if get_origin(part) is Literal:
            part = Literal[tuple(words)]
        elif not (part in _PLAIN or part is Any or get_origin(part) in (Mapping, dict)):
            part = str
        if part not in kept:
            kept.append(part)
    named = any(_is_object(part) for part in parts)
    return functools.reduce(operator.or_, kept), named


def _is_object(part: Any) -> bool:
    plain = part in _PLAIN or part is Any or get_origin(part) in (Literal, Mapping, dict)
    return not plain and getattr(get_origin(part) or part, "__name__", "") != "PathLike"


def _plugin(name: str, value: dict[str, Any]) -> Any:
    kind, chosen = _PLUGINS[name], value.pop("name", None)
    if not isinstance(chosen, str):
        raise OptionError(f"--{name}: a {kind} with options is {{name: ..., option: value}}, not {value}.")
    cls = registry().find(kind, chosen)
    try:
        return cls(**value)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "none"
        raise OptionError(f"--{name}: {kind} {chosen!r} doesn't take {value}: its options are {known}.") from error


def _reporting(option: str, path: str, function: Any) -> Any:
    """The same function; what it raises is told as an error of the option."""
    if not isinstance(function, types.FunctionType):
        return function
    return functools.wraps(function)(lambda *args: guarded(option, path, lambda: function(*args)))


def _unwrapped(value: Any) -> Any:
    """A mapping of one's own, of what jsonargparse keeps mappings in."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """Parameter → what the docstring's ``Args`` say of it."""
    section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", inspect.getdoc(function) or "", flags=re.S)
    entries = re.split(r"^    (\w+): ", section[1], flags=re.M)[1:] if section else []
    texts = [re.sub(r":\w+:|`+", "", re.sub(r"\s+", " ", text)).strip() for text in entries[1::2]]
    return dict(zip(entries[::2], texts, strict=True))


def _shortened(message: str) -> str:
    """jsonargparse tells what every type of a union had against a value; what they are is enough."""
    key, value = re.search(r'key "(\w+)"', message), re.search(r"Given value: (.*)", message)
    types_ = re.search(r"Subtypes: \[(.*)\]", message)
    if key and value and types_:
        kinds = re.sub(r"<class '(\w+)'>", r"\1", types_[1]).replace("typing.", "").replace("collections.abc.", "")
        return f"--{key[1]}: {value[1]!r} is none of: {kinds.replace('NoneType', 'null')}."
    return re.sub(r"\s+", " ", message).strip().rstrip(".") + "."


def _formatter(base: type) -> type:
    """jsonargparse's, which adds types and defaults, but with description and examples as they are written."""
    from jsonargparse import DefaultHelpFormatter

    return type("Formatter", (DefaultHelpFormatter, base), {})


_EPILOG = """\
FILE is TOML or YAML with the options' names as keys; what stands on the line holds. Objects are named by where they
are, package.module:name; models and data by a function without arguments that makes them, or by themselves. Modules
are looked for in the folder where the command is called, too. An example:

{example}

Exit status: 0 all is well, 1 it can't be done (the message says why and what to do), 2 the line or the file can't be
understood, 130 interrupted.
"""
