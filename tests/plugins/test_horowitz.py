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


@pytest.mark.parametrize(
    ("sops", "timesteps", "channels", "millijoules"),
    [
        (54.60e6, 4, 57, 0.204),  # 0.19656 + 0.00725
        (11.63e6, 4, 35, 0.046),  # 0.04187 + 0.00445
        (415.64e6, 2, 64, 0.756),  # 0.74815 + 0.00814
    ],
)
def test_table_6_of_qp_snn(sops: float, timesteps: int, channels: int, millijoules: float) -> None:
    """E = 0.9 pJ · T · SOPs + 4.6 pJ · MACs of the first layer, once, of SOPs that are printed per timestep.

    T and the first layer aren't printed. It is a 3×3 convolution of 32×32 pixels, of 64 channels, or of the 57 or 35
    that a ratio of 0.1 (ResNet20's stem) or 0.45 (VGG-16's first) leaves. No other T comes out: one step of SOPs more
    is too much, one less more than 64 channels can make up for. The table's digits don't tell whether padding counts.
    """

    def energy(steps: int, macs: float) -> float:
        return round(Horowitz45nm().energy_pj(OperationCounts(steps * sops, macs)) * 1e-9, 3)

    macs = 3 * channels * 9 * 32 * 32
    assert energy(timesteps, macs) == millijoules
    assert energy(timesteps, 3 * channels * (3 * 32 - 2) ** 2) == millijoules
    assert energy(timesteps, timesteps * macs) > millijoules  # charged at every step
    assert energy(timesteps + 1, 0) > millijoules > energy(timesteps - 1, 3 * 64 * 9 * 32 * 32)


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
