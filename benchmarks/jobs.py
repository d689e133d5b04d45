"""Figures of jobs, kept as they come: a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


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
