"""Energy from operation counts, with the per-operation energies that SNN papers quote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from snncompress.extend import EnergyModel, OperationCounts, OptionError


@dataclass(frozen=True)
class Horowitz45nm(EnergyModel):
    """E = N_AC · 0.9 pJ + N_MAC · 4.6 pJ: 32-bit floating point in 45 nm CMOS.

    An addition costs 0.9 pJ and a multiplication 3.7 pJ, so an accumulate 0.9 and a multiply-accumulate 4.6.
    Neuron updates and memory traffic, which on real hardware can cost more than both, are *not* in it, nor
    do narrower weights make an operation cheaper.

    Args:
        ac_pj: picojoules per accumulate.
        mac_pj: picojoules per multiply-accumulate.

    Raises:
        OptionError: an energy is negative, infinite or NaN.

    Source: M. Horowitz, "Computing's energy problem", ISSCC 2014, as used by Rathi & Roy and most SNN papers
    since.

    Example:
        11.20 M accumulates and 4.23 M multiply-accumulates, in millijoules:

        >>> from snncompress.extend import OperationCounts
        >>> round(Horowitz45nm().energy_pj(OperationCounts(n_ac=11.20e6, n_mac=4.23e6)) * 1e-9, 4)
        0.0295
    """

    name: ClassVar[str] = "horowitz_45nm"

    ac_pj: float = 0.9
    mac_pj: float = 4.6

    def __post_init__(self) -> None:
        for field, value in (("ac_pj", self.ac_pj), ("mac_pj", self.mac_pj)):
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"horowitz_45nm: {field} must be a number of picojoules ≥ 0, not {value!r}.")

    def energy_pj(self, counts: OperationCounts) -> float:
        """Energy of these operations in picojoules (1 mJ = 10⁹ pJ)."""
        return counts.n_ac * self.ac_pj + counts.n_mac * self.mac_pj
