"""Budgets: what a compressed network may cost, as shares of the original or in units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from snncompress.errors import OptionError
from snncompress.measuring.reporting import Profile

KINDS: Mapping[str, Callable[[Any], float]] = {
    "energy": lambda found: found.energy_pj,
    "size": lambda found: found.size_mb,
    "params": lambda found: found.n_params,
    "synops": lambda found: found.n_ac,
    "macs": lambda found: found.n_mac,
}
"""Kind of cost → what a profile, or a row of one, says of it."""
UNITS = {
    "energy_pj": ("energy", 1.0), "energy_nj": ("energy", 1e3), "energy_uj": ("energy", 1e6),
    "energy_mj": ("energy", 1e9), "size_mb": ("size", 1.0), "size_kb": ("size", 1e-3),
}  # fmt: skip
COUNTED = ("params", "synops", "macs")


@dataclass(frozen=True)
class Budget:
    """What was asked for: kinds of costs, each with a share of the original's (in (0, 1]) or a number of its own."""

    shares: Mapping[str, float]
    numbers: Mapping[str, float]
    timesteps: float | None = None
    """A share, or from 1 on a number."""

    @classmethod
    def of(cls, asked: Any) -> Budget:
        """Check what a user wrote; raises OptionError."""
        if not isinstance(asked, Mapping) or not asked:
            raise OptionError(f"budget must be a mapping such as {{'energy': 0.5}}, not {asked!r}. Keys: {_known()}.")
        shares: dict[str, float] = {}
        numbers: dict[str, float] = {}
        steps = None
        for key, value in asked.items():
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
            if not 0 < number < math.inf:
                raise OptionError(f"budget[{key!r}] must be a number above 0, not {value!r}.")
            if key == "timesteps":
                steps = number
            elif key in UNITS:
                kind, unit = UNITS[key]
                numbers[kind] = min(numbers.get(kind, math.inf), number * unit)
            elif key not in KINDS:
                raise OptionError(f"There is no budget {key!r}. Keys: {_known()}.")
            elif number <= 1:
                shares[key] = number
            elif key in COUNTED:
                numbers[key] = number
            else:
                units = ", ".join(repr(name) for name, (kind, _) in UNITS.items() if kind == key)
                raise OptionError(
                    f"budget[{key!r}] is a share of the original's and at most 1, not {value!r}. With a unit: {units}."
                )
        return cls(shares, numbers, steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that are limited."""
        return tuple(kind for kind in KINDS if kind in self.shares or kind in self.numbers)

    @property
    def measured(self) -> bool:
        """Does it depend on how the network fires, so that only running it tells?"""
        return any(kind in ("energy", "synops", "macs") for kind in self.kinds)

    def most(self, before: Profile) -> dict[str, float]:
        """Kind → what it may come to, in pJ, MB or numbers."""
        return {
            kind: min(self.shares.get(kind, math.inf) * KINDS[kind](before), self.numbers.get(kind, math.inf))
            for kind in self.kinds
        }


def _known() -> str:
    return (
        f"{', '.join(map(repr, (*KINDS, 'timesteps')))}, as shares of the original's (params, synops, macs and "
        f"timesteps also as numbers), and {', '.join(map(repr, UNITS))}"
    )
