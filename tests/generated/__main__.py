"""Goes through many generated networks, and says what came of them.

    python -m tests.generated --count 10000 --seed 0 --workers 2 --keep results.jsonl

Findings are kept as they come, one a line, and a run with the same file goes on where it was. ``--only 17 40`` looks at
these networks again, and prints them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checks import BAD, Finding, check
from .networks import generate


def main() -> int:
    """1 where anything is wrong."""
    asked = argparse.ArgumentParser(prog="python -m tests.generated", description=(__doc__ or "").partition("\n")[0])
    asked.add_argument("--count", type=int, default=100)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--workers", type=int, default=1)
    asked.add_argument("--keep", type=Path, help="a file of findings, one a line")
    asked.add_argument("--only", type=int, nargs="*", help="indices to look at again")
    asked = asked.parse_args()
    if asked.only is not None:
        findings = [check(asked.seed, index) for index in asked.only]
        for finding in findings:
            print(generate(finding.seed, finding.index).model)
            print(finding.to_json())
        return report(findings)
    known = [f for f in kept(asked.keep) if f.seed == asked.seed and f.index < asked.count]
    done = {f.index for f in known}
    todo = [index for index in range(asked.count) if index not in done]
    with open(asked.keep or os.devnull, "a") as file:
        file.write("\n" if known else "")  # the last line may have been cut short
        for number, finding in enumerate(checked(asked.seed, todo, asked.workers), len(known) + 1):
            known.append(finding)
            file.write(finding.to_json() + "\n")
            file.flush()
            if finding.status in BAD:
                print(f"{finding.index}: {finding.status}: {finding.detail} [{' '.join(finding.stages)}]", flush=True)
            if number % 100 == 0:
                print(f"{number} of {asked.count}", file=sys.stderr, flush=True)
    return report(known)


def kept(path: Path | None) -> Iterator[Finding]:
    """Findings of a run before; a line that was cut short is dropped."""
    for line in path.read_text().splitlines() if path and path.exists() else ():
        try:
            yield Finding(**json.loads(line))
        except (ValueError, TypeError):
            continue


def checked(seed: int, indices: list[int], workers: int) -> Iterator[Finding]:
    """In as many processes."""
    if workers < 2:
        torch.set_num_threads(1)
        yield from map(partial(check, seed), indices)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(partial(check, seed), indices, chunksize=4)


def report(findings: list[Finding]) -> int:
    """A table of what came out; 1 where anything is wrong, or too few outputs react for that to say much."""
    count = Counter(f.status for f in findings)
    reacting = sum(f.reacts for f in findings)
    print(f"\n{len(findings)} networks, {sum(f.seconds for f in findings) / max(1, len(findings)):.2f} s each")
    for status in ("shrunk", "whole", "refused", *BAD):
        print(f"  {status:<10} {count[status]:>6}")
    print(f"  output reacts to what was silenced: {reacting} ({reacting / max(1, len(findings)):.1%} of all)")
    shrunk = sorted(f.left for f in findings if f.status == "shrunk")
    if shrunk:
        print(f"  parameters left where it shrank, median: {shrunk[len(shrunk) // 2]:.2f}")
    _table("refused", (f.detail for f in findings if f.status == "refused"))
    _table("refused further compression", (f.more for f in findings if f.more))
    _table("nothing went", (reason for f in findings if f.status == "whole" for reason in f.reasons))
    _table("layers whole", (reason for f in findings if f.status == "shrunk" for reason in f.reasons))
    for finding in sorted((f for f in findings if f.status in BAD), key=lambda f: (f.status, f.index)):
        print(f"{finding.status} {finding.index}: {finding.detail} [{' '.join(finding.stages)}]")
    few = len(findings) >= 100 and reacting < 2 / 3 * len(findings)
    return int(few or any(f.status in BAD for f in findings))


def _table(title: str, texts: Iterable[Any]) -> None:
    alike = Counter(re.sub(r"\d+", "N", re.sub(r"'?\b(stages|head)(\.\w+)*'?", "…", str(t)))[:170] for t in texts)
    if alike:
        print(f"  {title}:")
    for text, number in alike.most_common(12):
        print(f"    {number:>5}  {text}")


if __name__ == "__main__":
    raise SystemExit(main())
