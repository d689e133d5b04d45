"""An FPGA, or any chip of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from snncompress.extend import OptionError, Target


def _above_0(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _all_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (tuple, list)) and bool(value) and all(type(v) is kind for v in value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a number above 0", _above_0),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "Literal": ("'layer' or 'channel'", lambda value: value in ("layer", "channel")),
    "tuple[int": ("whole numbers, such as (1, 3)", _all_of(int)),
    "tuple[str": ("words, such as ('linear', 'convolution')", _all_of(str)),
}
"""How a field's type begins → what its values are, in words, and whether one is such."""


@dataclass(frozen=True)
class FPGA(Target):
    """An FPGA whose figures you give: every field of :class:`snncompress.extend.Target` is an option.

    ``snncompress.fits(model, FPGA(weight_bits=4, bytes=600 * 1024), data=x)`` asks whether weights of
    4 bits, and potentials, fit 600 KB of block RAM.

    Raises:
        OptionError: a number that is not above 0, or a value of another type than the field's.

    Example:
        >>> FPGA(weight_bits=4, bytes=600 * 1024).options()
        {'weight_bits': 4, 'bytes': 614400}
    """

    name: ClassVar[str] = "fpga"
    caveat: ClassVar[str] = "The figures are yours."

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            what, fits = next(kind for start, kind in _KINDS.items() if str(field.type).startswith(start))
            if value is not None and not fits(value):
                raise OptionError(f"fpga: {field.name} must be {what}, not {value!r}.")
