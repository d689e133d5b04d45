"""Numbers as bits: codes of 1 to 16 bits, masks, and lists of channels, each in the fewest bytes."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from snncompress.errors import StorageError

_CHUNK = 1 << 20  # a multiple of 8: packed chunks can be joined
_SKIP = 255


def pack_codes(codes: NDArray[np.uint16], bits: int) -> NDArray[np.uint8]:
    """Codes [n] below 2^bits, one behind the other, the highest bit first: ⌈n · bits / 8⌉ bytes.

    >>> pack_codes(np.array([1, 2, 3], dtype=np.uint16), 2)  # 01 10 11 and two bits of nothing
    array([108], dtype=uint8)
    """
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint16)
    chunks = [codes[i : i + _CHUNK] for i in range(0, len(codes), _CHUNK)]
    packed = [np.packbits((chunk[:, None] >> shifts & 1).astype(np.uint8)) for chunk in chunks]
    return np.concatenate(packed) if packed else np.zeros(0, np.uint8)


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """The ``count`` codes that :func:`pack_codes` packed; raises StorageError for another number of bytes.

    >>> unpack_codes(np.array([108], dtype=np.uint8), 2, 3)
    array([1, 2, 3], dtype=uint16)
    """
    if len(packed) != math.ceil(count * bits / 8):
        raise StorageError(f"{count} codes of {bits} bits take {math.ceil(count * bits / 8)} bytes, not {len(packed)}.")
    codes = np.empty(count, np.uint16)
    for i in range(0, count, _CHUNK):
        some = min(_CHUNK, count - i)
        chunk = np.unpackbits(packed[i * bits // 8 : math.ceil((i + some) * bits / 8)], count=some * bits)
        high, *low = np.packbits(chunk.reshape(some, bits), axis=1).T.astype(np.uint16)  # filled up with zeros
        codes[i : i + some] = (high << 8 | low[0]) >> (16 - bits) if low else high >> (8 - bits)
    return codes


def pack_mask(kept: NDArray[np.bool_]) -> tuple[str, NDArray[np.uint8]]:
    """A mask [n] as ("bitmap", a bit per weight) or ("gaps", bytes), whichever is smaller.

    Gaps are the distances from one kept weight to the next, the first from the front; 255 stands for 255 weights that
    are gone, none kept among them.

    >>> pack_mask(np.arange(2000) == 300)
    ('gaps', array([255,  45], dtype=uint8))
    """
    bitmap = np.packbits(kept)
    distances = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    size = int((distances // _SKIP + 1).sum())
    if size >= len(bitmap):
        return "bitmap", bitmap
    gaps = np.full(size, _SKIP, np.uint8)
    gaps[np.cumsum(distances // _SKIP + 1) - 1] = distances % _SKIP
    return "gaps", gaps


def unpack_mask(form: str, packed: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    """The mask [size] that :func:`pack_mask` packed; raises StorageError for bytes that are none of this size.

    >>> np.flatnonzero(unpack_mask("gaps", np.array([255, 45], dtype=np.uint8), 2000))
    array([300])
    """
    if form == "bitmap":
        if len(packed) != math.ceil(size / 8):
            raise StorageError(f"The bitmap of {size} weights takes {math.ceil(size / 8)} bytes, not {len(packed)}.")
        return np.unpackbits(packed, count=size).astype(bool)
    if form != "gaps":
        raise StorageError(f"A mask is stored as 'bitmap' or 'gaps', not {str(form)[:40]!r}.")
    if len(packed) > size + size // _SKIP + 1:
        raise StorageError(f"The gaps of a mask of {size} weights take {len(packed)} bytes.")
    ends = packed != _SKIP
    places = np.cumsum(packed.astype(np.int64) + ends)[ends] - 1
    if len(packed) and (not ends[-1] or places[-1] >= size):
        raise StorageError(f"The gaps of a mask don't end within its {size} weights.")
    kept = np.zeros(size, bool)
    kept[places] = True
    return kept


def pack_indices(indices: Iterable[int], width: int) -> str:
    """Channels of a layer of that width as text: a bit per channel, the first highest, in base64.

    >>> pack_indices([0, 9], 10)
    'gEA='
    """
    marked = np.zeros(width, bool)
    marked[list(indices)] = True
    return base64.b64encode(np.packbits(marked).tobytes()).decode()


def unpack_indices(text: str, width: int) -> list[int]:
    """The channels, in order; raises StorageError for text that doesn't fit the width.

    >>> unpack_indices("gEA=", 10)
    [0, 9]
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (ValueError, TypeError) as error:
        raise StorageError(f"A list of channels isn't base64: {error}.") from error
    if type(width) is not int or width < 0 or len(packed) != math.ceil(width / 8):
        raise StorageError(f"A list of channels has {len(packed)} bytes for a width of {str(width)[:40]}.")
    found: list[int] = np.flatnonzero(np.unpackbits(packed, count=width)).tolist()
    return found
