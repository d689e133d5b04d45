"""Classes of layers that compute in another way: mixed in before a layer's own class, which stays one of its bases."""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

from torch import nn


@cache
def mixed(way: type, kind: type) -> type:
    """The class of ``kind`` whose forward is that of ``way``, named after both.

    >>> class Loud(nn.Module): ...
    >>> mixed(Loud, nn.Linear).__name__, issubclass(mixed(Loud, nn.Linear), nn.Linear)
    ('LoudLinear', True)
    """
    name = way.__name__.removesuffix("Layer") + kind.__name__
    return type(name, (way, kind), {"__module__": way.__module__, "__doc__": kind.__doc__, "_mixed": True})


def ways(kind: Any) -> tuple[type, ...]:
    """What a class was mixed of, the layer's own last.

    >>> class Loud(nn.Module): ...
    >>> class Late(nn.Module): ...
    >>> ways(mixed(Loud, mixed(Late, nn.Linear))) == (Loud, Late, nn.Linear)
    True
    """
    if "_mixed" not in vars(kind):
        return (kind,)
    way, inner = kind.__bases__
    return (way, *ways(inner))


def without(way: type, kind: type) -> type:
    """The class of ``kind`` with all ways but one.

    >>> class Loud(nn.Module): ...
    >>> class Late(nn.Module): ...
    >>> without(Late, mixed(Loud, mixed(Late, nn.Linear))) is mixed(Loud, nn.Linear)
    True
    """
    return _joined(*(other for other in ways(kind) if other is not way))


def blank(*classes: type) -> nn.Module:
    """One without contents, into which pickle puts the state: a class made at run time can't be found by its name."""
    made: nn.Module = object.__new__(_joined(*classes))
    return made


def _joined(*classes: type) -> type:
    """The class that :func:`ways` tells apart into these."""
    return reduce(lambda kind, way: mixed(way, kind), reversed(classes))
