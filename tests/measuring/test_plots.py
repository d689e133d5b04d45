"""The pictures of profiles, comparisons and plans: a bar for every number."""

from __future__ import annotations

import matplotlib
import pytest

from snncompress import Comparison, Conventions, LayerProfile, OptionError, Plan, PlanError, Profile
from tests.base.test_tables import plan


@pytest.fixture(autouse=True)
def _off_screen() -> None:
    matplotlib.use("Agg")


def profile(energy: float, **settings: object) -> Profile:
    rows = (
        LayerProfile("conv", "weight", 10, 4e-5, 0, 9, 2000.0 * energy),
        LayerProfile("lif", "neuron", 0, 0, 0, 0, 0, firing_rate=0.5),
        LayerProfile("fc", "weight", 20, 8e-5, 0, 9, 1000.0 * energy),
    )
    return Profile(rows, Conventions(**settings), "horowitz_45nm", 1, 1)


def drawn(figure: object) -> list[tuple[str, list[str], list[list[float]]]]:
    """Title, names and lengths of bars, series by series, of every panel."""
    return [
        (
            panel.get_title(),
            [label.get_text() for label in panel.get_yticklabels()],
            [[bar.get_width() for bar in series] for series in panel.containers],
        )
        for panel in figure.axes
    ]


def test_energy_and_size_layer_by_layer() -> None:
    assert drawn(profile(1.0).plot()) == [
        ("energy (nJ per sample)", ["conv", "fc"], [[2.0, 1.0]]),
        ("size (bytes)", [], [pytest.approx([40.0, 80.0])]),
    ]


def test_before_and_after() -> None:
    figure = profile(0.5).plot(before=profile(1.0))
    assert drawn(figure)[0][2] == [[2.0, 1.0], [1.0, 0.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    same = Comparison({"dense": profile(1.0), "small": profile(0.5)}).plot()
    assert drawn(same) == drawn(figure)


def test_what_was_measured_differently_is_not_drawn_together() -> None:
    with pytest.raises(OptionError, match="can't be compared"):
        profile(0.5).plot(before=profile(1.0, zero_inputs=False))
    with pytest.raises(OptionError, match="not a int"):
        profile(0.5).plot(3)


def test_a_plan_draws_widths_weights_and_bits() -> None:
    assert drawn(plan().plot()) == [
        ("output channels", ["conv"], [[8], [6]]),
        ("weights", ["fc"], [[3], [1]]),
        ("bits per weight", ["conv"], [[32], [4]]),
    ]


def test_a_plan_that_does_nothing_has_no_picture() -> None:
    with pytest.raises(PlanError, match="nothing to draw"):
        Plan().plot()
