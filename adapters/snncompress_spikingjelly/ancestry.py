"""What a module is: which of SpikingJelly's classes stand in its ancestry, and its step mode."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

_HOME = "spikingjelly.activation_based"


def family(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Names and places of SpikingJelly's classes in the ancestry.

    By name, so that SpikingJelly isn't imported for a model of another framework.
    """
    cls: Any = type(module)
    return _ancestors(cls)


@lru_cache(maxsize=1024)  # it is asked of every module, often
def _ancestors(cls: type) -> tuple[tuple[str, str], ...]:
    return tuple((c.__name__, c.__module__) for c in cls.__mro__ if c.__module__.startswith(_HOME))


def below(place: str, where: str) -> bool:
    """Does a class of this module belong to that part of SpikingJelly? 0.0.0.0.14 has a file where 2.0 has a folder."""
    return f"{place}.".startswith(f"{_HOME}.{where}.")


def lives_in(cls: type, where: str) -> bool:
    """Is it one of SpikingJelly's own, of that part?"""
    return below(cls.__module__, where)


def derives(module: nn.Module, where: str, names: tuple[str, ...]) -> bool:
    """Is it of one of these classes, in that part of SpikingJelly, or of one made of them?"""
    return any(name in names and below(place, where) for name, place in family(module))


def is_multi_step(module: nn.Module) -> bool:
    """Does it take [T, N, ...]?"""
    supported = getattr(module, "supported_step_mode", None)
    return supported is not None and ("s" not in supported() or getattr(module, "step_mode", "s") == "m")
