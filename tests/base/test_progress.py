"""Progress: in a notebook an element that follows the loop and is gone at the end; elsewhere as it is asked for."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from snncompress.base import progress
from snncompress.base.progress import tracked


class FrontEnd:
    """What a notebook's front end has on its page: an output per ``display``, replaced by its handle's updates."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, what: Any, *, display_id: bool) -> SimpleNamespace:
        assert display_id
        self.outputs.append([what.data])
        return SimpleNamespace(update=lambda new, output=self.outputs[-1]: output.append(new.data))


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> FrontEnd:
    """A kernel's IPython, as far as it is asked for, and stderr that is no terminal, as in a kernel."""
    page, ipython, display = FrontEnd(), ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython, ipython.display = lambda: SimpleNamespace(kernel=object()), display
    display.display, display.HTML = page.display, lambda data: SimpleNamespace(data=data)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    return page


def bars(output: list[str]) -> list[tuple[dict[str, str | None], str]]:
    """Attributes of the element ``progress``, and the text beside it, of each picture."""
    found = []
    for picture in output:
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs: found.append([dict(attrs), ""])
        parser.handle_data = lambda text: found[-1].__setitem__(1, found[-1][1] + text)
        parser.feed(picture)
    return [tuple(bar) for bar in found]


def test_a_notebook_shows_one_bar_that_moves_and_goes(front_end: FrontEnd, capsys: pytest.CaptureFixture[str]) -> None:
    seen = [(item, len(front_end.outputs[0])) for item in tracked(["a", "b", "c"], None, lambda: "step <x>")]
    (output,) = front_end.outputs
    assert seen == [("a", 2), ("b", 3), ("c", 4)]  # at the start, and before every item
    assert [(bar["value"], bar["max"]) for bar, _ in bars(output)] == [("0", "3"), ("0", "3"), ("1", "3"), ("2", "3")]
    assert all("step <x>" in text for _, text in bars(output))  # as text, not as an element
    assert output[-1] == ""
    assert capsys.readouterr() == ("", "")


def test_the_bar_goes_where_the_loop_is_left(front_end: FrontEnd) -> None:
    loop = tracked(iter(range(9)), True, "reading")
    next(loop)
    loop.close()
    assert "max" not in bars(front_end.outputs[0])[-1][0]  # of an unknown number
    assert front_end.outputs[0][-1] == ""


def test_a_fast_loop_is_not_drawn_at_every_step(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE", 3600.0)
    assert list(tracked(range(100), None, "fast")) == list(range(100))
    assert len(front_end.outputs[0]) == 2  # the start, and gone


def test_false_shows_nothing_and_a_callable_is_told(front_end: FrontEnd) -> None:
    told: list[tuple[str, int, int | None]] = []
    assert list(tracked("ab", False, "x")) == ["a", "b"]
    assert list(tracked("ab", lambda *news: told.append(news), "x")) == ["a", "b"]
    assert told == [("x", 0, 2), ("x", 1, 2)]
    assert front_end.outputs == []


def test_ipython_on_a_terminal_is_no_notebook(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert list(tracked("ab", None, "x")) == ["a", "b"]
    assert front_end.outputs == []


@pytest.mark.slow
def test_a_real_kernel_sends_the_bar() -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = (
        "import time\nfrom snncompress.base.progress import tracked\n"
        "for _ in tracked(range(3), None, 'slow'):\n    time.sleep(0.15)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    sent: list[str] = []
    kernel = client.NotebookClient(notebook, timeout=120)
    keep = kernel.process_message

    def process(message: Any, *rest: Any) -> Any:
        if message["msg_type"] in ("display_data", "update_display_data"):
            sent.append(message["content"]["data"]["text/html"])
        return keep(message, *rest)

    kernel.process_message = process
    kernel.execute()
    assert [bar["value"] for bar, _ in bars(sent)] == ["0", "1", "2"]
    assert sent[-1] == ""
