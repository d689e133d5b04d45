"""Numbers as bits: codes of 1 to 16 bits, masks, and lists of channels, each in the fewest bytes."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from snncompress.errors import StorageError

from .deflating import Bytes, deflated, inflated

_SKIP = 255
_CHUNK = 1 << 20
_SAYING = 40


def pack_codes(codes: NDArray[np.integer], bits: int) -> tuple[str, Bytes]:
    """Codes [n] below 2^bits as ("bits", …) or ("deflated", …), whichever is smaller.

    "bits": one behind the other, the highest bit first, ⌈n · bits / 8⌉ bytes. "deflated": a zlib stream of bytes that
    hold ⌊8 / bits⌋ codes each, the first highest, so that a code never lies across two; of more than 8 bits first the
    highest 8 of all, then the rest in the same way.

    >>> pack_codes(np.array([1, 2, 3]), 2)  # 01 10 11 and two bits of nothing
    ('bits', array([108], dtype=uint8))
    >>> form, packed = pack_codes(np.ones(10_000, int), 5)
    >>> form, len(packed) < 50
    ('deflated', True)
    """
    return min(("bits", _dense(codes, bits)), ("deflated", deflated(_aligned(codes, bits))), key=_cost)


def unpack_codes(form: str, packed: Bytes, bits: int, count: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The ``count`` codes that :func:`pack_codes` packed; raises StorageError for bytes that aren't as many codes.

    >>> unpack_codes("bits", np.array([108], dtype=np.uint8), 2, 3)
    array([1, 2, 3], dtype=uint8)
    """
    if form == "deflated":
        size = sum(math.ceil(count / (8 // width)) for width in _planes(bits))
        packed = inflated(packed, size)
    elif form == "bits":
        size = math.ceil(count * bits / 8)
    else:
        raise StorageError(f"Codes are stored as 'bits' or 'deflated', not {str(form)[:40]!r}.")
    if len(packed) != size:
        raise StorageError(f"{count} codes of {bits} bits take {size} bytes, not {len(packed)}.")
    return _from_aligned(packed, bits, count) if form == "deflated" else _from_dense(packed, bits, count)


def _dense(codes: NDArray[np.integer], bits: int) -> Bytes:
    rows = _rows(codes, 8)  # of eight codes, which fill as many bytes as a code has bits
    packed = np.zeros((len(rows), bits), np.uint8)
    for place in range(8):
        for byte, shift in _shifts(place, bits):
            packed[:, byte] |= (rows[:, place] << shift if shift >= 0 else rows[:, place] >> -shift).astype(np.uint8)
    return packed.reshape(-1)[: math.ceil(len(codes) * bits / 8)]


def _from_dense(packed: Bytes, bits: int, count: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    rows = np.zeros((math.ceil(count / 8), bits), np.uint8)
    rows.reshape(-1)[: len(packed)] = packed
    codes = np.zeros((len(rows), 8), np.uint8 if bits <= 8 else np.uint16)
    for place in range(8):
        for byte, shift in _shifts(place, bits):
            wide = rows[:, byte].astype(np.uint32)
            codes[:, place] |= (wide >> shift if shift >= 0 else wide << -shift).astype(codes.dtype)
        codes[:, place] &= 2**bits - 1
    return codes.reshape(-1)[:count]


def _shifts(place: int, bits: int) -> Iterator[tuple[int, int]]:
    """Of the code at a place: the bytes that it reaches into, and how far left it stands in each."""
    end = (place + 1) * bits
    for byte in range(place * bits // 8, math.ceil(end / 8)):
        yield byte, 8 * (byte + 1) - end


def _planes(bits: int) -> list[int]:
    """Into how many bits each a code is taken apart, the highest first."""
    return [bits] if bits <= 8 else [8, bits - 8]


def _aligned(codes: NDArray[np.integer], bits: int) -> Bytes:
    if bits > 8:
        return np.concatenate([_aligned(codes >> bits - 8, 8), _aligned(codes & 2 ** (bits - 8) - 1, bits - 8)])
    rows = _rows(codes, 8 // bits)
    packed = np.zeros(len(rows), np.uint8)
    for column in rows.T:
        packed = packed << bits | column.astype(np.uint8)
    return packed


def _from_aligned(packed: Bytes, bits: int, count: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    if bits > 8:
        high, low = packed[:count].astype(np.uint16), _from_aligned(packed[count:], bits - 8, count)
        high <<= np.uint16(bits - 8)
        high |= low
        return high
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[::-1]
    codes = np.empty((len(packed), len(shifts)), np.uint8)
    for place, shift in enumerate(shifts):
        codes[:, place] = packed >> shift & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:count]


def _rows(codes: NDArray[np.integer], width: int) -> NDArray[np.uint16]:
    """Codes in rows of that width, zeros at the end."""
    rows = np.zeros((math.ceil(len(codes) / width), width), np.uint16)
    rows.reshape(-1)[: len(codes)] = codes
    return rows


def pack_mask(kept: NDArray[np.bool_]) -> tuple[str, Bytes]:
    """A mask [n] as ("bitmap", a bit per weight) or ("gaps", bytes), as such or deflated, whichever is smallest.

    Gaps are the distances from one kept weight to the next, the first from the front; 255 stands for 255 weights that
    are gone, none kept among them.

    >>> pack_mask(np.arange(2000) == 300)
    ('gaps', array([255,  45], dtype=uint8))
    >>> pack_mask(np.arange(2000) % 200 > 0)[0]
    'deflated bitmap'
    """
    forms = [("bitmap", np.packbits(kept)), ("gaps", _gaps(kept))]
    return min(*forms, *((f"deflated {form}", deflated(packed)) for form, packed in forms), key=_cost)


def _gaps(kept: NDArray[np.bool_]) -> Bytes:
    distances = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    ends = np.cumsum(distances // _SKIP + 1) - 1
    gaps = np.full(ends[-1] + 1 if len(ends) else 0, _SKIP, np.uint8)
    gaps[ends] = distances % _SKIP
    return gaps


def _cost(packed: tuple[str, Bytes]) -> int:
    """In bytes, with those that say that something is deflated."""
    form, data = packed
    return len(data) + _SAYING * form.startswith("deflated")


def unpack_mask(form: str, packed: Bytes, size: int) -> NDArray[np.bool_]:
    """The mask [size] that :func:`pack_mask` packed; raises StorageError for bytes that are none of this size.

    >>> np.flatnonzero(unpack_mask("gaps", np.array([255, 45], dtype=np.uint8), 2000))
    array([300])
    """
    plain = str(form).removeprefix("deflated ")
    if plain not in ("bitmap", "gaps"):
        raise StorageError(f"A mask is stored as 'bitmap' or 'gaps', deflated or not, not as {str(form)[:40]!r}.")
    if plain != form:
        packed = inflated(packed, math.ceil(size / 8) if plain == "bitmap" else size + size // _SKIP + 1)
    if plain == "bitmap":
        if len(packed) != math.ceil(size / 8):
            raise StorageError(f"The bitmap of {size} weights takes {math.ceil(size / 8)} bytes, not {len(packed)}.")
        return np.unpackbits(packed, count=size).view(bool)
    if len(packed) > size + size // _SKIP + 1:
        raise StorageError(f"The gaps of a mask of {size} weights take {len(packed)} bytes.")
    if len(packed) and packed[-1] == _SKIP:
        raise StorageError(f"The gaps of a mask end in {_SKIP}, behind which another must come.")
    kept, place = np.zeros(size, bool), -1
    for start in range(0, len(packed), _CHUNK):
        some = packed[start : start + _CHUNK]
        ends = some != _SKIP
        places = place + np.cumsum(some + ends, dtype=np.int64)
        place = int(places[-1])
        if place >= size:
            raise StorageError(f"The gaps of a mask don't end within its {size} weights.")
        kept[places[ends]] = True
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
