"""Objects by where they are: ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from snncompress.errors import OptionError, SNNCompressError

T = TypeVar("T")


def imported(option: str, path: str) -> Any:
    """What ``path`` names; modules are looked for in the folder of the call, too.

    Raises OptionError where there is no such thing.

    >>> imported("--loss", "torch.nn.functional:cross_entropy").__name__
    'cross_entropy'
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise OptionError(f"{option}: {path!r} is no import path: write package.module:name.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = guarded(option, f"importing {module}", lambda: importlib.import_module(module))
    except OptionError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and module.startswith(str(error.__cause__.name)):
            raise OptionError(f"{option}: there is no module {module!r}, neither installed nor in {here}.") from error
        raise
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{option}: {module} has no {name!r}.")
        found = getattr(found, part)
    return found


def built(option: str, path: str) -> Any:
    """The same, called without arguments where it is a function or a class."""
    found = imported(option, path)
    if isinstance(found, type) or (callable(found) and hasattr(found, "__code__")):
        return guarded(option, f"{path}()", found)
    return found


def guarded(option: str, what: str, call: Callable[[], T]) -> T:
    """What the user's code gives; raises OptionError with the line in which it failed."""
    try:
        return call()
    except SNNCompressError:
        raise
    except Exception as error:  # the user's: anything can come out of it
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "importlib" not in f.filename and os.path.dirname(__file__) not in f.filename]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise OptionError(f"{option}: {what} failed: {type(error).__name__}: {error}{where}") from error
