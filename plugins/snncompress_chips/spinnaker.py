"""SpiNNaker 2 of TU Dresden, the University of Manchester and SpiNNcloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from snncompress.extend import Target

_SHEET = "SpiNNaker2 datasheet, version 0.03 of August 19, 2021, Features, 2026-11-26"


@dataclass(frozen=True)
class SpiNNaker2(Target):
    """SpiNNaker 2: 152 ARM processors (Cortex M4F), each with 128 Kbytes for code and data.

    Neurons are programs, and numbers of any width go; what counts is memory. Stages are cut over as many processors
    as their weights and potentials need.
    """

    name: ClassVar[str] = "spinnaker2"
    sources: ClassVar[Mapping[str, str]] = MappingProxyType({"cores": _SHEET, "bytes_per_core": _SHEET})
    caveat: ClassVar[str] = (
        "Code, routing and buffers of spikes take some of the 128 Kbytes too; memory outside the chip isn't counted."
    )

    cores: int | None = 152
    bytes_per_core: int | None = 128 * 1024
