"""One table, four forms: what stands in text, HTML, CSV and a DataFrame is the same."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser

import pandas
import pytest
import torch

import snncompress
from snncompress import (
    BlockSearch,
    Candidate,
    Comparison,
    Conventions,
    Fit,
    GradientFlow,
    GridUse,
    LayerProfile,
    MaskWeights,
    Plan,
    Profile,
    QuantizeWeights,
    RemoveChannels,
    Robustness,
    Scores,
    Sensitivity,
    TemporalAnalysis,
    ThresholdSweep,
    Utilization,
    WeightRange,
)
from snncompress.base.tables import Column, Shown, Table, percent
from snncompress.interfaces import Limit
from snncompress.measuring.fits import Row
from snncompress.model.edits.slices import Slice
from snncompress.studies.search.result import Search, Trial


class Reader(HTMLParser):
    """Rows of cells, and the lines of text between tables; raises where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def results() -> Iterator[Shown]:
    """One of everything that is shown."""
    weight = LayerProfile("fc<1>", "weight", 12, 48e-6, 0, 24, 21.6, bits=32, sparsity=0.5, n_weights=12)
    neuron = LayerProfile("lif", "neuron", 0, 0, 0, 0, 0, firing_rate=0.25, n_neuron_updates=6)
    profile = Profile((weight, neuron), Conventions(), "horowitz_45nm", 2, 1, title="a & b")
    yield profile
    yield Comparison({"dense": profile, "small": profile})
    yield plan()
    yield Sensitivity(0.98, {"conv": (0.97, 0.5), "fc": (0.98, None)}, (0.5, 0.9), "svs", {"x": "why"})
    yield ThresholdSweep(0.98, (0.5, 1.0), (0.6, 0.9), (0.25, 0.0), (0.9, 0.9), {"fc": 0.9}, "cqp")
    yield TemporalAnalysis((3.0, 1.0), (0.75, 1.0), None, (9.0, 18.0, 27.0), 2, 3, "cumulative", 0.7)
    yield GradientFlow({"conv": 0.25})
    yield BlockSearch((Candidate((), 0.9, 200.0, 40, 222.2, 0.0),), ("a",), "none")
    yield Scores({"conv": torch.tensor([[1.0, 4.0], [2.0, 4.0]])}, "svs")
    yield Robustness({"svs": {"conv": 0.99, "fc": 1.0}}, {"svs": {"conv": 0.75, "fc": None}}, 0.5, 4)
    grid = GridUse("uniform", 2, 0.5, 0.625, torch.arange(4.0), torch.tensor([0, 2, 2, 0]))
    yield Utilization({"fc": (grid,)}, {"fc": WeightRange(0.5, (-0.5, 0.5), torch.arange(3.0), torch.ones(2))})
    yield snncompress.frozen_layers(torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)}))
    yield Search((Trial(0, "complete", (0.9, 200.0), {"bits": 4}),), ("accuracy", "energy"), (True, False))
    yield Fit("chip", (Row("conv", Limit.most("channels", 1500, 1024)),), {}, steps=("cut it",), notes=("a < b",))
    yield snncompress.criteria()
    yield snncompress.plugins()


def plan() -> Plan:
    return Plan(
        (
            QuantizeWeights("conv", "uniform", 4, {"a": "<b>"}),
            RemoveChannels("conv", (0, 2), (Slice("conv", "out", (0, 2), 8, 0), Slice("fc", "in", (0,), 8, 0))),
            MaskWeights.of("fc", torch.tensor([[True, False, False]])),
        ),
        {"out": "it is the classifier"},
    )


@pytest.mark.parametrize("result", list(results()), ids=lambda result: type(result).__name__)
def test_all_forms_of_a_result_say_the_same(result: Shown) -> None:
    cells = [cell for row in Reader(result._repr_html_()).rows for cell in row]
    if not isinstance(result, Plan):  # its text is a list of edits
        assert [cell for cell in cells if cell.strip() and cell.strip() not in str(result)] == []
    frame = result.to_pandas()
    assert len(frame) > 0
    assert frame.columns.is_unique
    read = pandas.read_csv(io.StringIO(result.to_csv()), true_values=["True"], false_values=["False"])
    pandas.testing.assert_frame_equal(read, frame.replace("", None), check_dtype=False, check_exact=True)


def test_numbers_go_out_whole_and_sums_do_not(tmp_path) -> None:
    table = Table([Column("layer"), Column("share", show=percent)], [("a,b", 1 / 3), ("c", None)], ("total", 0.5))
    assert table.to_csv(tmp_path / "t.csv") is None
    assert (tmp_path / "t.csv").read_text() == f'layer,share\n"a,b",{1 / 3!r}\nc,\n'
    assert "33.3" in str(table)
    assert Reader(table.to_html()).rows == [["layer", "share"], ["a,b", "33.3"], ["c", ""], ["total", "50.0"]]


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(snncompress.OptionError, match=r"pip install \"snncompress\[pandas\]\""):
        GradientFlow({"conv": 0.25}).to_pandas()


def test_a_plan_knows_widths_weights_and_bits() -> None:
    assert (plan().widths, plan().weights, plan().bits) == ({"conv": (8, 6)}, {"fc": (3, 1)}, {"conv": 4})
    assert Plan.from_json(json.dumps(plan().to_dict())) == plan()
