"""`make docs` builds without a warning, and nothing in the site leads nowhere or loads from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow
BASE = "http://site.invalid/"


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found["id"] or ""} if "id" in found else set()
        if tag == "a" and found.get("href"):
            self.links.add(found["href"] or "")
        elif source := found.get("src") or (found.get("href") if tag == "link" else None):
            self.loads.add(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_no_link_is_broken(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): Links(path.read_text()) for path in site.rglob("*.html")}
    broken, checked = [], 0
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in page.links | page.loads:
            target, anchor = urldefrag(urljoin(BASE + name, link))
            if not target.startswith(BASE) or link.startswith(("mailto:", "data:")):
                continue
            path = unquote(target.removeprefix(BASE))
            path += "index.html" if path.endswith("/") or not path else ""
            checked += 1
            if not (site / path).exists() or (anchor and unquote(anchor) not in pages[path].anchors):
                broken.append(f"{name}: {link}")
    assert checked > 3000
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        outside = {source for source in Links(path.read_text()).loads if re.match(r"(https?:)?//", source)}
        assert outside == set(), path
