"""An FPGA, or any chip of one's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from snncompress.extend import OptionError, Target


@dataclass(frozen=True)
class FPGA(Target):
    """An FPGA whose figures you give: every field of :class:`snncompress.extend.Target` is an option.

    ``snncompress.fits(model, FPGA(weight_bits=4, bytes=600 * 1024), data=x)`` asks whether weights of
    4 bits, and potentials, fit 600 KB of block RAM.

    Raises:
        OptionError: a number that is not above 0.

    Example:
        >>> FPGA(weight_bits=4, bytes=600 * 1024).options()
        {'weight_bits': 4, 'bytes': 614400}
    """

    name: ClassVar[str] = "fpga"
    caveat: ClassVar[str] = "The figures are yours."

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 1
            if not (math.isfinite(number) and number > 0):
                raise OptionError(f"fpga: {field.name} must be a number above 0, not {value!r}.")
