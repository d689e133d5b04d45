"""What the site has beyond Markdown: included files, benchmark results, pages that the navigation doesn't name."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
INCLUDE = re.compile(r"^( *)# include: (\S+)$", flags=re.M)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Pages that the navigation doesn't name stand at the end of the guides, by their titles."""
    named = set(re.findall(r"[\w/]+\.md", repr(config.nav)))
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    (guides,) = (entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides.extend(page for page in pages if page not in named)
    config.nav.append({"All figures": sorted(results())})
    return config


def results() -> dict[str, Path]:
    """Where the result files of the benchmarks stand in the site."""
    return {f"measurements/results/{path.name}": path for path in sorted((ROOT / RESULTS).glob("*.md"))}


def on_files(files: Any, config: Any) -> Any:
    """The results are pages, and their pictures are there."""
    for name, path in results().items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in (ROOT / RESULTS).glob("*.png"):
        files.append(File.generated(config, f"measurements/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Includes files; a link out of docs/ leads to the results' pages, to the repository, or is plain text."""
    home = posixpath.dirname(page.file.src_uri)
    inside = f"docs/{home}" if "measurements/results" not in home else RESULTS

    def included(match: re.Match[str]) -> str:
        text = (ROOT / match[2]).read_text().rstrip()
        return "\n".join(match[1] + line if line else line for line in text.splitlines())

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if "://" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(inside, path))
        if target.startswith(RESULTS + "/"):
            there = target.replace(RESULTS, "measurements/results", 1)
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        elif config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})"
        else:
            return text
        return f"[{text}]({posixpath.relpath(there, home or '.')}{anchor})"

    return LINK.sub(link, INCLUDE.sub(included, markdown))
