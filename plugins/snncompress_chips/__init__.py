"""Plugin: chips as targets, and the energy model ``loihi``. Every figure stands with its public source."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import EnergyModel, Target, hookimpl

from .akida import Akida1, Akida2
from .fpga import FPGA
from .loihi import Loihi2, LoihiEnergy
from .speck import DynapCNN, Speck
from .spinnaker import SpiNNaker2
from .xylo import XyloAudio2, XyloAudio3, XyloIMU

__all__ = [
    "FPGA",
    "Akida1",
    "Akida2",
    "DynapCNN",
    "Loihi2",
    "LoihiEnergy",
    "Speck",
    "SpiNNaker2",
    "XyloAudio2",
    "XyloAudio3",
    "XyloIMU",
]


@hookimpl
def register_targets(register: Callable[[type[Target]], None]) -> None:
    """Offer all of them."""
    for chip in (Speck, DynapCNN, XyloAudio2, XyloAudio3, XyloIMU, Loihi2, SpiNNaker2, Akida1, Akida2, FPGA):
        register(chip)


@hookimpl
def register_energy_models(register: Callable[[type[EnergyModel]], None]) -> None:
    """Offer Loihi's."""
    register(LoihiEnergy)
