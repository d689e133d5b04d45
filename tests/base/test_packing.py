"""Codes and masks come back from their bytes as they went in, in no more bytes than promised."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snncompress import StorageError
from snncompress.base.packing import pack_codes, pack_indices, pack_mask, unpack_codes, unpack_indices, unpack_mask


@given(st.integers(1, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=50))))
def test_codes(case: tuple[int, list[int]]) -> None:
    bits, numbers = case
    codes = np.array(numbers, dtype=np.uint16)
    packed = pack_codes(codes, bits)
    assert len(packed) == math.ceil(len(codes) * bits / 8)
    assert np.array_equal(unpack_codes(packed, bits, len(codes)), codes)
    with pytest.raises(StorageError, match="codes of"):
        unpack_codes(np.append(packed, np.uint8(0)), bits, len(codes))


@pytest.mark.parametrize("bits", [3, 8, 11])
def test_codes_beyond_a_chunk(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snncompress.base.packing._CHUNK", 64)
    codes = np.random.default_rng(0).integers(0, 2**bits, 200, dtype=np.uint16)
    assert np.array_equal(unpack_codes(pack_codes(codes, bits), bits, 200), codes)


@given(st.lists(st.integers(0, 5000), max_size=40), st.integers(0, 700))
def test_masks(places: list[int], behind: int) -> None:
    kept = np.zeros(max(places, default=0) + 1 + behind, bool)
    kept[places] = True
    form, packed = pack_mask(kept)
    assert len(packed) <= math.ceil(len(kept) / 8)
    assert np.array_equal(unpack_mask(form, packed, len(kept)), kept)
    for other in ("bitmap", "gaps"):  # whatever bytes: a mask of this size, or an error
        with suppress(StorageError):
            assert len(unpack_mask(other, packed, len(kept))) == len(kept)


@given(st.sets(st.integers(0, 99)))
def test_channels(channels: set[int]) -> None:
    assert unpack_indices(pack_indices(channels, 100), 100) == sorted(channels)
