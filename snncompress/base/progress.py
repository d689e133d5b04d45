"""Progress of long loops: a bar on a terminal, a callable of the user's, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .distributed import rank

Progress = bool | Callable[[str, int, int | None], None]
"""True (or None): a bar where stderr is a terminal, of several processes in that of rank 0; False: nothing; a callable
gets (what, done, total or None)."""
T = TypeVar("T")


def tracked(items: Iterable[T], progress: Progress | None, what: str | Callable[[], str]) -> Iterator[T]:
    """Yield the items and report on the way; ``what`` is asked before each of them, and only where it is shown."""
    total = _length(items)
    if callable(progress):
        for done, item in enumerate(items):
            progress(_text(what), done, total)
            yield item
        return
    if progress is False or not sys.stderr.isatty() or rank():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(_text(what), total=total)
        for item in items:
            bar.update(task, description=_text(what))
            yield item
            bar.advance(task)


def _text(what: str | Callable[[], str]) -> str:
    return what if isinstance(what, str) else what()


def _length(items: object) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
