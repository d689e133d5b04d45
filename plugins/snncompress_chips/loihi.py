"""Loihi 2 of Intel, and what Intel published on the energy of the first Loihi."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from snncompress.extend import EnergyModel, OperationCounts, OptionError, Target

_ONM = "Open Neuromorphic, Loihi 2 (open-neuromorphic.org/neuromorphic-computing/hardware/loihi-2-intel), 2026-11-26"
_LAVA = "Lava 0.10 (github.com/lava-nc/lava), src/lava/proc"


@dataclass(frozen=True)
class Loihi2(Target):
    """Loihi 2: 128 cores, up to a million neurons and 120 million synapses; neurons are programs.

    Weights, states and thresholds are those of Lava's models of leaky neurons that compute bit by bit as Loihi does.
    """

    name: ClassVar[str] = "loihi2"
    sources: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "weight_bits": f"{_LAVA}/dense/process.py, 8 bits, 2026-11-26",
            "state_bits": f"{_LAVA}/lif/models.py, uv_bitwidth, 2026-11-26",
            "threshold_bits": f"{_LAVA}/lif/models.py, precision of vth, 2026-11-26",
            "cores": _ONM,
            "neurons": _ONM,
            "synapses": _ONM,
        }
    )
    caveat: ClassVar[str] = (
        "Every synapse counts, also where a convolution shares its weight; how much a core holds isn't public, so that "
        "Intel's compiler has the last word."
    )

    weight_bits: int | None = 8
    state_bits: int | None = 24
    threshold_bits: int | None = 17
    cores: int | None = 128
    neurons: int | None = 1_000_000
    synapses: int | None = 120_000_000


@dataclass(frozen=True)
class LoihiEnergy(EnergyModel):
    """E = N_AC · 23.6 pJ + N_neuron updates · 81 pJ: the first Loihi, in 14 nm, simulated before there was silicon.

    23.6 pJ is what a spike takes at a synapse at least. An update of a neuron takes 81 pJ where it is active, 52 where
    it isn't; the former is charged to all. Spikes on their way between cores (1.7 pJ within a tile, 3 to 4 for each hop
    beyond) are not in it, nor is what the chip draws at rest. Products of analog values aren't what Loihi computes: a
    multiply-accumulate is charged like a synapse. For Loihi 2 no such figures are public.

    Args:
        synop_pj: picojoules per accumulate.
        update_pj: picojoules per neuron and timestep.

    Raises:
        OptionError: an energy is negative, infinite or NaN.

    Source: M. Davies et al., "Loihi: A Neuromorphic Manycore Processor with On-Chip Learning", IEEE Micro 38(1), 2018,
    Table 2 ("Energy per synaptic spike op (min)", "Energy per neuron update (active / inactive)").

    Example:
        >>> from snncompress.extend import OperationCounts
        >>> LoihiEnergy().energy_pj(OperationCounts(n_ac=1000, n_mac=0, n_neuron_updates=10))
        24410.0
    """

    name: ClassVar[str] = "loihi"
    covers: ClassVar[str] = "synapses and neurons of the first Loihi, simulated; neither routing nor rest"

    synop_pj: float = 23.6
    update_pj: float = 81.0

    def __post_init__(self) -> None:
        for field, value in (("synop_pj", self.synop_pj), ("update_pj", self.update_pj)):
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"loihi: {field} must be a number of picojoules ≥ 0, not {value!r}.")

    def energy_pj(self, counts: OperationCounts) -> float:
        """Energy of these operations in picojoules."""
        return (counts.n_ac + counts.n_mac) * self.synop_pj + counts.n_neuron_updates * self.update_pj
