"""Deflated bytes: back as they were, or an error in bounded memory."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest

from snncompress import StorageError
from snncompress.base.deflating import deflated, inflated


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_there_and_back(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 9, size, dtype=np.uint8)
    assert np.array_equal(inflated(deflated(data), size), data)
    assert bytes(zlib.decompress(deflated(data))) == data.tobytes()
    assert np.array_equal(deflated(data), deflated(data))


def test_a_bomb_costs_no_more_than_is_due() -> None:
    """100 MB of zeros in 100 kB, where a thousand bytes belong."""
    bomb = np.frombuffer(zlib.compress(bytes(100_000_000), 1), np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match="more than the 1000"):
            inflated(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(bomb)
    finally:
        tracemalloc.stop()


def test_streams_that_are_none() -> None:
    stream = deflated(np.arange(200, dtype=np.uint8))
    assert len(inflated(stream, 1000)) == 200
    for cut in range(len(stream)):
        with pytest.raises(StorageError, match="cut off"):
            inflated(stream[:cut], 200)
    with pytest.raises(StorageError, match="something behind"):
        inflated(np.append(stream, np.uint8(0)), 200)
    with pytest.raises(StorageError, match="more than the 199"):
        inflated(stream, 199)
    wrong = stream.copy()
    wrong[-1] ^= 1
    with pytest.raises(StorageError, match="damaged"):
        inflated(wrong, 200)
