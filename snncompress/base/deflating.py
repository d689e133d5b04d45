"""Bytes in fewer bytes by their entropy (zlib), and back to a length that is known beforehand."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from snncompress.errors import StorageError

Bytes = NDArray[np.uint8]
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)
"""Codes and masks hardly repeat themselves: Huffman codes alone come within 2 % of their entropy, and are faster and
smaller than with repetitions looked for; but where whole rows are alike, runs count."""


def deflated(data: Bytes) -> Bytes:
    """The bytes as a zlib stream, the shortest of a few.

    >>> len(deflated(np.zeros(10_000, np.uint8))) < 50
    True
    """
    return min((_stream(data, strategy) for strategy in _STRATEGIES), key=len)


def _stream(data: Bytes, strategy: int) -> Bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return np.frombuffer(stream.compress(data.data) + stream.flush(), np.uint8)


def inflated(stream: Bytes, most: int) -> Bytes:
    """The bytes of a whole stream, ``most`` of them at the most, and never more memory than that.

    Raises StorageError for a stream that holds more, is cut off or damaged, or has something behind it.

    >>> inflated(deflated(np.arange(5, dtype=np.uint8)), 5)
    array([0, 1, 2, 3, 4], dtype=uint8)
    """
    inflating = zlib.decompressobj()
    try:
        data = inflating.decompress(stream.data, most + 1)
    except zlib.error as error:
        raise StorageError(f"Deflated bytes are damaged: {error}.") from error
    if len(data) > most:
        raise StorageError(f"Deflated bytes hold more than the {most} that belong there.")
    if not inflating.eof:
        raise StorageError("Deflated bytes are cut off.")
    if inflating.unused_data:
        raise StorageError("Deflated bytes have something behind them.")
    return np.frombuffer(data, np.uint8)
