"""Progress of long loops: a bar on a terminal or in a notebook, a callable of the user's, or nothing."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from .distributed import rank

Progress = bool | Callable[[str, int, int | None], None]
"""True (or None): a bar in a notebook and where stderr is a terminal, of several processes in that of rank 0; False:
nothing; a callable gets (what, done, total or None)."""
T = TypeVar("T")
Show = Callable[[str, int], None]

_PAUSE = 0.1
"""Seconds between two pictures of a notebook's bar: each goes over the net."""


def tracked(items: Iterable[T], progress: Progress | None, what: str | Callable[[], str]) -> Iterator[T]:
    """Yield the items and report on the way; ``what`` is asked before each of them, and only where it is shown."""
    total = _length(items)
    if callable(progress):
        for done, item in enumerate(items):
            progress(_text(what), done, total)
            yield item
        return
    bar = None if progress is False or rank() else _bar(total)
    if bar is None:
        yield from items
        return
    with bar as show:
        show(_text(what), 0)  # the first item may take its time
        for done, item in enumerate(items):
            show(_text(what), done)
            yield item


def _bar(total: int | None) -> AbstractContextManager[Show] | None:
    # IPython isn't imported here: who works in a notebook has it.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is not None:
        return _in_notebook(total)
    return _on_terminal(total) if sys.stderr.isatty() else None


@contextmanager
def _on_terminal(total: int | None) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)


@contextmanager
def _in_notebook(total: int | None) -> Iterator[Show]:
    """An element of HTML, and not rich's bar, which needs ipywidgets and a front end that has them."""
    from IPython import display

    handle: Any = None
    began = time.monotonic()
    drawn = 0.0

    def show(what: str, done: int) -> None:
        nonlocal handle, drawn
        now = time.monotonic() - began
        if handle is not None and now - drawn < _PAUSE:
            return
        picture, drawn = display.HTML(_element(what, done, total, now)), now
        if handle is None:
            handle = display.display(picture, display_id=True)
        else:
            handle.update(picture)

    try:
        yield show
    finally:
        if handle is not None:
            handle.update(display.HTML(""))  # as on a terminal, what is over takes no room


def _element(what: str, done: int, total: int | None, seconds: float) -> str:
    """A bar, and beside it what is done, how much of it, and how long it still takes.

    >>> _element("step <1>", 2, 8, 10.0)
    '<progress value="2" max="8"></progress> step &lt;1&gt; 2/8, 0:30 left'
    >>> _element("reading", 2, None, 10.0)
    '<progress></progress> reading 2'
    """
    text = html.escape(what)
    if total is None:
        return f"<progress></progress> {text} {done}"
    left = round(seconds / done * (total - done)) if done else None
    told = "" if left is None else f", {left // 60}:{left % 60:02} left"
    return f'<progress value="{done}" max="{total}"></progress> {text} {done}/{total}{told}'


def _text(what: str | Callable[[], str]) -> str:
    return what if isinstance(what, str) else what()


def _length(items: object) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
