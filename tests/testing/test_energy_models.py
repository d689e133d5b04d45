"""The checks of energy models: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import snncompress
from snncompress.contract.registry import Entry
from snncompress.extend import EnergyModel
from snncompress.testing import (
    check_energy_model,
)
from tests.testing.common import broken, named


@pytest.mark.parametrize("entry", snncompress.energy_models(), ids=named)
def test_our_energy_models(entry: Entry) -> None:
    check_energy_model(entry.cls())


def energy(energy_pj: Callable[[Any], Any], **attributes: Any) -> EnergyModel:
    body = {"name": "made", "energy_pj": lambda self, counts: energy_pj(counts), **attributes}
    return type("Made", (EnergyModel,), body)()


def test_a_right_energy_model_passes() -> None:
    check_energy_model(energy(lambda c: 1.0 * c.n_ac + 3.0 * c.n_mac + 0.1 * c.n_neuron_updates))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (energy(lambda c: c.n_ac, name=""), "'name' must be"),
        (energy(lambda c: c.n_ac, options=lambda self: {1: 2}), "come back from JSON"),
        (energy(lambda c: c.n_ac, options=lambda self: 1 / 0), "options() failed"),
        (energy(lambda c: c.no_such_count), "energy_pj() of (0.0, 0.0, 0.0) failed"),
        (energy(lambda c: torch.tensor(c.n_ac)), "must return a finite number"),
        (energy(lambda c: c.n_ac * float("inf")), "must return a finite number"),
        (energy(lambda c: c.n_ac - 1), "must return a finite number"),
        (energy(lambda c: c.n_ac + 1), "no operations must cost nothing, not 1.0 pJ"),
        (energy(lambda c: 0.0), "cost nothing"),
        (energy(lambda c: c.n_ac / (1 + c.n_mac)), "cost less than"),
        (energy(lambda c: c.n_ac + c.n_mac + 9 * (c.n_neuron_updates == 1.0)), "cost less than"),
    ],
)
def test_a_broken_energy_model(made: EnergyModel, said: str) -> None:
    assert said in broken(check_energy_model, made)
