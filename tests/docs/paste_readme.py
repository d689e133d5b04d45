"""The README's blocks, pasted one after the other, for the frameworks that are installed: needs nothing else.

python tests/docs/paste_readme.py
"""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def main() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S):
        framework = next((name for name in ("spikingjelly", "snntorch") if name in block), None)
        if framework and not importlib.util.find_spec(framework):
            print(f"-- {framework} is not installed")
            continue
        start = time.perf_counter()
        exec(block, names)
        print(f"-- {framework or 'data'}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
