"""Codes and masks come back from their bytes as they went in, in no more bytes than promised."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snncompress import StorageError
from snncompress.base.packing import pack_codes, pack_indices, pack_mask, unpack_codes, unpack_indices, unpack_mask

CODES = st.integers(1, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=50)))


@given(CODES, st.sampled_from([1, 40]))
@settings(max_examples=50)
def test_codes(case: tuple[int, list[int]], times: int) -> None:
    """In whichever form is smaller; in no other number of bytes."""
    bits, numbers = case
    codes = np.array(numbers * times, dtype=np.uint16)
    form, packed = pack_codes(codes, bits)
    assert len(packed) <= math.ceil(len(codes) * bits / 8)
    assert np.array_equal(unpack_codes(form, packed, bits, len(codes)), codes)
    with pytest.raises(StorageError, match=r"codes of|something behind"):
        unpack_codes(form, np.append(packed, np.uint8(0)), bits, len(codes))


@pytest.mark.parametrize("bits", range(1, 17))
def test_both_forms_of_codes(bits: int) -> None:
    """Evenly distributed ones can't be deflated; of a normal distribution, entropy says how far they can.

    n · H bits and a 50th more, where H is the entropy of the codes' distribution.
    """
    generator = np.random.default_rng(0)
    even = generator.integers(0, 2**bits, 5001, dtype=np.uint16)
    assert np.array_equal(unpack_codes(*pack_codes(even, bits), bits, 5001), even)
    span = 2.0**bits
    codes = np.clip(np.round(generator.normal(span / 2 - 0.5, span / 6, 200_001)), 0, span - 1).astype(np.uint16)
    form, packed = pack_codes(codes, bits)
    assert np.array_equal(unpack_codes(form, packed, bits, len(codes)), codes)
    share = np.bincount(codes) / len(codes)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert form == ("bits" if bits == 1 else "deflated")
    assert len(packed) <= 1.02 * len(codes) * entropy / 8


@given(st.lists(st.integers(0, 5000), max_size=40), st.integers(0, 700), st.sampled_from([1, 30]))
@settings(max_examples=50)
def test_masks(places: list[int], behind: int, times: int) -> None:
    once = np.zeros(max(places, default=0) + 1 + behind, bool)
    once[places] = True
    kept = np.tile(once, times)
    form, packed = pack_mask(kept)
    assert len(packed) <= math.ceil(len(kept) / 8)
    assert np.array_equal(unpack_mask(form, packed, len(kept)), kept)
    for other in ("bitmap", "gaps", "deflated bitmap", "deflated gaps"):
        with suppress(StorageError):  # whatever bytes: a mask of this size, or an error
            assert len(unpack_mask(other, packed, len(kept))) == len(kept)


def test_gaps_beyond_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = np.random.default_rng(0).random(20_000) < 0.1
    form, packed = pack_mask(kept)
    assert form == "deflated gaps"
    monkeypatch.setattr("snncompress.base.packing._CHUNK", 16)
    assert np.array_equal(unpack_mask(form, packed, len(kept)), kept)
    with pytest.raises(StorageError, match="don't end within"):
        unpack_mask(form, packed, int(np.flatnonzero(kept)[-1]))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.97])
def test_a_mask_takes_its_entropy(share: float) -> None:
    """n · H(p) bits and a 50th more."""
    kept = np.random.default_rng(0).random(200_000) >= share
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert len(pack_mask(kept)[1]) <= 1.02 * entropy * len(kept) / 8


@given(st.sets(st.integers(0, 99)))
def test_channels(channels: set[int]) -> None:
    assert unpack_indices(pack_indices(channels, 100), 100) == sorted(channels)
