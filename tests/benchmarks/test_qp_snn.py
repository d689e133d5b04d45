"""The tables of benchmarks/qp_snn.py, from figures that are given."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for its scripts
from jobs import known, note  # noqa: E402
from qp_snn_study import Case, Prune, Quantize, Tables, cases  # noqa: E402

sys.path.remove(str(BENCHMARKS))

POINTS = {"vanilla": 0, "l1_mean": 4, "max": 1, "percentile": 2, "mse": 3, "sca": -10, "svs": -7}


def figure(case: Case) -> dict[str, float]:
    """70 dense; each step adds its points, repair 0.5, seed 1 two; 20 less before training; PQ costs 1.5."""
    names = [step[0] for step in case.steps]
    accuracy = 70 + sum(POINTS[name] for name in names) + 0.5 * (case.repair is not None) + 2 * case.seed
    accuracy -= 1.5 * (names[:1] == ["svs"])
    return {"accuracy": accuracy, "straight": accuracy - 20, "parameters": 1000 - 100 * len(names), "megabytes": 0.25}


TABLES = Tables(figure, [4, 2], [0, 1])


def test_ablation() -> None:
    text = TABLES.text("ablation")
    assert (
        text[0]
        == "| quantizer, criterion | paper | 4 bits, bare | 4 bits, repaired | 2 bits, bare | 2 bits, repaired |"
    )
    same = "55.0 → **75.0 ± 1.0**", "55.5 → **75.5 ± 1.0**"  # seeds 74 and 76
    assert text[3] == f"| ReScaW, not pruned | 79.16 | {' | '.join(2 * same)} |"
    assert "| vanilla uniform, sca | 69.16 | 41.0 → **61.0 ± 1.0** |" in text[4]
    assert text[-4:] == [
        "| ReScaW − vanilla, sca | +4.24 | +4.0 ± 0.0 | +4.0 ± 0.0 | +4.0 ± 0.0 | +4.0 ± 0.0 |",
        "| ReScaW − vanilla, svs | +0.57 | +4.0 ± 0.0 | +4.0 ± 0.0 | +4.0 ± 0.0 | +4.0 ± 0.0 |",
        "| svs − sca, vanilla uniform | +4.16 | +3.0 ± 0.0 | +3.0 ± 0.0 | +3.0 ± 0.0 | +3.0 ± 0.0 |",
        "| svs − sca, ReScaW | +0.49 | +3.0 ± 0.0 | +3.0 ± 0.0 | +3.0 ± 0.0 | +3.0 ± 0.0 |",
    ]


def test_order_and_gamma() -> None:
    qp, pq, difference = TABLES.text("order")[2:]
    assert "| 48.0 → **68.0 ± 1.0** | 48.5 → **68.5 ± 1.0** |" in qp
    assert "| 46.5 → **66.5 ± 1.0** |" in pq
    assert difference == "| difference after training | 1.39 | +1.5 ± 0.0 | +1.5 ± 0.0 | +1.5 ± 0.0 | +1.5 ± 0.0 |"
    assert [row.split(" | ")[2] for row in TABLES.text("gamma")[2:]] == [
        f"{52 + more:.1f} → **{72 + more:.1f} ± 1.0**" for more in (0, 1, 3, 2)
    ]
    assert TABLES.dense() == "71.0 ± 1.0"
    assert TABLES.sizes() == (
        "dense 1,000 parameters, 0.2500 MB; pruned, 4 bits: 800, 0.2500 MB; pruned, 2 bits: 800, 0.2500 MB"
    )


def test_repair_of_the_last_step_alone() -> None:
    rows = TABLES.text("last")
    assert rows[0] == "| repaired | 4 bits, sca | 4 bits, svs | 2 bits, sca | 2 bits, svs |"
    assert [row.split(" | ")[1] for row in rows[2:]] == [
        f"{45 + more} → **{65 + more} ± 1.0**" for more in (0.0, 0.5, 0.5)
    ]
    chain = Quantize("l1_mean", 4), Prune("svs")
    last = Case(chain, "membrane", 1, first_bare=True)
    assert last.before() == Case(chain[:1], None, 1)
    assert last.key() != Case(chain, "membrane", 1).key()
    assert last.stem() != Case(chain, "membrane", 1).stem()
    assert len(cases(["last"], [4, 2], [0])) == 2 * 2 * 3


def test_cases_share_what_they_start_from() -> None:
    """Two bits, two repairs, two seeds: six of the ablation, of which QP is one; PQ; three other γ."""
    found = cases(["ablation", "order", "gamma"], [4, 2], [0, 1])
    assert len(found) == 8 * (6 + 1 + 3)
    pq = Case((Prune("svs"), Quantize("l1_mean", 2)), "membrane", 1)
    assert pq in found
    assert pq.before() == Case((Prune("svs"),), "membrane", 1)
    assert pq.before().before() == Case(seed=1)
    everything = {*found, *(c.before() for c in found), *(c.before().before() for c in found if len(c.steps) == 2)}
    assert len(everything) == len({case.stem() for case in everything}) == 80 + 4 + 2  # pruned alone, dense


def test_figures_are_kept_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    assert known(path) == {}
    for accuracy in (1.0, 2.0):
        note(path, Case(seed=3).key(), {"accuracy": accuracy}, "cpu")
    assert known(path)[Case(seed=3).key()]["figures"] == {"accuracy": 2.0}
