from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snncompress_horowitz import Horowitz45nm

from snncompress import OptionError
from snncompress.extend import OperationCounts


@pytest.mark.parametrize(
    ("ac", "mac", "millijoules"),
    [
        (11.20e6, 4.23e6, 0.0295),  # 10.08e6 + 19.458e6 = 29.538e6 pJ
        (16.61e6, 4.47e6, 0.0355),  # 14.949e6 + 20.562e6 = 35.511e6 pJ
    ],
)
def test_published_energies(ac: float, mac: float, millijoules: float) -> None:
    assert round(Horowitz45nm().energy_pj(OperationCounts(ac, mac)) * 1e-9, 4) == millijoules


def test_neuron_updates_cost_nothing() -> None:
    assert Horowitz45nm().energy_pj(OperationCounts(0, 0, n_neuron_updates=1e9)) == 0


def test_options() -> None:
    assert Horowitz45nm(ac_pj=0.1).options() == {"ac_pj": 0.1, "mac_pj": 4.6}
    assert Horowitz45nm(ac_pj=1, mac_pj=10).energy_pj(OperationCounts(3, 2)) == 23


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_linear(ac: float, mac: float) -> None:
    model = Horowitz45nm()
    parts = model.energy_pj(OperationCounts(ac, 0)) + model.energy_pj(OperationCounts(0, mac))
    assert model.energy_pj(OperationCounts(ac, mac)) == pytest.approx(parts)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("field", ["ac_pj", "mac_pj"])
def test_energies_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(OptionError, match=field):
        Horowitz45nm(**{field: value})
