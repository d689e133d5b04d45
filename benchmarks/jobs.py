"""Jobs side by side, their figures kept as they come: a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.progress import track


class _Case(Protocol):
    def key(self) -> str: ...


Case = TypeVar("Case", bound=_Case)


def compute(
    todo: Sequence[Case], work: Callable[[Case], Mapping[str, Any]], path: Path, workers: int, device: str
) -> None:
    """A row for each case, in processes of one thread each; those that stand first begin first."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start) as pool:
        futures = {pool.submit(work, case): case for case in todo}
        for future in track(as_completed(futures), description="jobs", total=len(futures)):
            note(path, futures[future].key(), future.result(), device)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def known(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their cases: the figures, and where they were measured."""
    if not path.exists():
        return {}
    return {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}


def note(path: Path, case: str, figures: Mapping[str, Any], device: str) -> None:
    """Append a row."""
    row = {"case": case, "figures": dict(figures), "where": here(device)}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def here(device: str) -> str:
    machine = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{machine}, one thread per job, torch {torch.__version__}, {datetime.date.today()}"
