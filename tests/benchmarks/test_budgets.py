"""The tables of benchmarks/budgets.py and benchmarks/qp_snn_sizes.py, from figures that are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for its scripts
import budgets  # noqa: E402
import qp_snn_sizes  # noqa: E402
from budget_studies import TASKS, jobs, of_seed  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def rows(figures: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {json.dumps(case): {"figures": found, "where": "here"} for case, found in figures.items()}


def test_means_over_seeds_and_what_is_not_known() -> None:
    figures = {
        ("bits", "net", "", "2", "0", "2"): {"accuracy": 90.0, "left": 0.0625},
        ("bits", "net", "", "2", "1", "2"): {"accuracy": 91.0, "left": 0.0625},
        ("bits", "net", "", "2", "0", "0"): {"accuracy": 92.0, "left": 0.0615},
        ("bits", "net", "magnitude", "0.05", "0", "0"): {"accuracy": 80.0, "left": 0.05},
        ("met", "net", "energy", "0.3"): {"used": float("nan"), "seconds": 2.0},
    }
    text = budgets.report(rows(figures)).splitlines()
    assert "| net | one width | 90.5 (0.062) | — | — | — |" in text
    assert "| net | bits per layer | 92.0 (0.061) | — | — | — |" in text
    assert "| net | size 0.05 | — | — | — | — | 80.0 (0.050) |" in text
    assert "| net | energy | — | — | can't be (2 s) | — |" in text


def test_networks_of_several_seeds_are_measured_with_each() -> None:
    found = [job for job, _ in jobs(["equal", "bits"], [0, 1])]
    assert len(found) == len(set(found))
    seeds = {(part, name): {job[4] for job in found if job[:2] == (part, name)} for part, name, *_ in found}
    assert seeds["equal", "nmnist"] == seeds["equal", "cifar"] == seeds["bits", "mnist-snntorch"] == {"0", "1"}
    assert seeds["bits", "cifar"] == {"0"}
    assert [of_seed(TASKS[name], 1) for name in ("nmnist", "cifar")] == [1, 0]  # of which there is one network


def test_sizes_of_two_seeds() -> None:
    here = {"megabytes": 0.0252, "seconds": 9.0, "widths": [4, 8], "bits": [32, 8], "straight": 30.0, "trained": 40.0}
    figures = {
        ("dense", "", "0"): {"accuracy": 50.0},
        ("8", "hand-made ratios", "0"): here,
        ("8", "hand-made ratios", "1"): here | {"straight": 31.0},
    }
    text = list(qp_snn_sizes.report(rows(figures)))
    assert "Dense: 50.0." in text
    assert "| 1.45 | 8 | hand-made ratios | 0.0252 | 30.5 (30.0, 31.0) | 40.0 (40.0, 40.0) | 9 |" in text
    assert "| 1.45 | hand-made ratios | 4, 8 | 32, 8 |" in text
