"""Damaged and hostile files: always an error of ours, in bounded time, and the model as it was.

More cases: FUZZ=50 pytest tests/saving/test_hostile_files.py
"""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress import SNNCompressError, StorageError, load, save
from snncompress.saving.compact import MASK
from snncompress.saving.container import Container
from snncompress.saving.describing import describe
from tests.equivalence import same, snapshot
from tests.saving.test_storage import WAYS
from tests.structure.test_blocks import network


def damaged(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Write the file anew with a change, under a checksum that fits."""
    file = Container.read(path)
    data, tensors = dict(file.data), {name: tensor.clone() for name, tensor in file.tensors.items()}
    change(data, tensors)
    Container(data, tensors).write(path)


def _edit(metadata: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(e for e in metadata["plan"]["edits"] if e["edit"] == kind)


def _scale(metadata: dict[str, Any], tensors: dict[str, Tensor], scale: Tensor) -> None:
    """In a tensor, instead of as a number."""
    del metadata["packed"]["7.weight"]["scale"]
    tensors["7.weight.scale"] = scale


def _floats(metadata: dict[str, Any], tensors: dict[str, Tensor], value: float) -> None:
    """Floats behind the quantizer, instead of codes; of 4 bits each, two in a byte."""
    del metadata["packed"]["7.weight"]["bits"]
    codes = tensors.pop("7.weight.codes")
    tensors["7.weight.values"] = torch.full((2 * len(codes),), value)


def _codes(
    metadata: dict[str, Any], tensors: dict[str, Tensor], change: Callable[[bytes], bytes], **other: Any
) -> None:
    """In another form: what ``change`` makes of those of 4 bits, two in a byte."""
    mask = next(e for e in metadata["plan"]["edits"] if e["edit"] == "mask_weights" and e["layer"] == "7")
    count = int(np.unpackbits(tensors[mask["kept"]["tensor"]].numpy()).sum())
    metadata["packed"]["7.weight"].update({"form": "deflated", "weights": count} | other)
    codes = change(tensors["7.weight.codes"].numpy().tobytes())
    tensors["7.weight.codes"] = torch.tensor(list(codes), dtype=torch.uint8)


def _mask(metadata: dict[str, Any], tensors: dict[str, Tensor], change: Callable[[bytes], bytes], form: str) -> None:
    """In another form: what ``change`` makes of its bitmap."""
    kept = _edit(metadata, "mask_weights")["kept"]
    bitmap = tensors[kept["tensor"]].numpy()
    kept.update({"form": form, "weights": int(np.unpackbits(bitmap).sum())})
    tensors[kept["tensor"]] = torch.tensor(list(change(bitmap.tobytes())), dtype=torch.uint8)


def _bomb(_: bytes) -> bytes:
    """30 MB of zeros in 30 kB."""
    return zlib.compress(bytes(30_000_000))


ATTACKS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "channels that don't exist": lambda m, t: _edit(m, "remove_channels").update(width=10**9),
    "negative width": lambda m, t: _edit(m, "remove_channels")["slices"][0].__setitem__(2, -8),
    "all channels": lambda m, t: _edit(m, "remove_channels").update(indices="/w=="),
    "no base64": lambda m, t: _edit(m, "remove_channels").update(indices="§§"),
    "indices as numbers": lambda m, t: _edit(m, "remove_channels").update(indices=[1, 2]),
    "no own slice": lambda m, t: _edit(m, "remove_channels").update(slices=[]),
    "another layer": lambda m, t: _edit(m, "remove_channels").update(layer="nowhere"),
    "negative bits": lambda m, t: _edit(m, "quantize_weights").update(bits=-3),
    "huge bits": lambda m, t: _edit(m, "quantize_weights").update(bits=10**6),
    "other bits": lambda m, t: m["packed"]["7.weight"].update(bits=2),
    "no quantizer": lambda m, t: _edit(m, "quantize_weights").update(quantizer="__import__"),
    "odd options": lambda m, t: _edit(m, "quantize_weights").update(options={"gamma": {"a": [1]}}),
    "unknown options": lambda m, t: _edit(m, "quantize_weights").update(options={"path": "/"}),
    "huge mask": lambda m, t: _edit(m, "mask_weights").update(shape=[10**9, 10**9]),
    "negative mask": lambda m, t: _edit(m, "mask_weights").update(shape=[-4, -4]),
    "mask of another form": lambda m, t: _edit(m, "mask_weights")["kept"].update(form="pickle"),
    "no mask": lambda m, t: _edit(m, "mask_weights")["kept"].update(tensor=".plan.99"),
    "mask in floats": lambda m, t: t.update({k: v.float() for k, v in t.items() if k.startswith(MASK)}),
    "mask too long": lambda m, t: t.update({k: v.repeat(2) for k, v in t.items() if k.startswith(MASK)}),
    "no block": lambda m, t: _edit(m, "remove_block").update(name=""),
    "the block twice": lambda m, t: m["plan"]["edits"].insert(0, dict(_edit(m, "remove_block"), resized=[])),
    "a layer of terabytes": lambda m, t: _edit(m, "remove_block")["resized"][0].update(after=2**40),
    "a layer beyond all numbers": lambda m, t: _edit(m, "remove_block")["resized"][0].update(after=10**30),
    "neuron on axis 0": lambda m, t: [s.__setitem__(3, 0) for s in _edit(m, "remove_channels")["slices"]],
    "layer on another axis": lambda m, t: [s.__setitem__(3, -3) for s in _edit(m, "remove_channels")["slices"]],
    "a slice a thousand times": lambda m, t: _edit(m, "remove_channels").update(
        slices=_edit(m, "remove_channels")["slices"] * 1000
    ),
    "a mask a thousand times": lambda m, t: m["plan"].update(edits=[_edit(m, "mask_weights")] * 1000),
    "a mask of many dimensions": lambda m, t: _edit(m, "mask_weights").update(shape=[1] * 100_000),
    "wide neurons": lambda m, t: _edit(m, "remove_channels")["slices"].extend(
        [f"lif{n}", "neuron", 10**9, -3, ""] for n in range(1000)
    ),
    "unknown edit": lambda m, t: m["plan"]["edits"].append({"edit": "run", "code": "1"}),
    "edit of no kind": lambda m, t: m["plan"]["edits"].append(7),
    "a thousand times": lambda m, t: m["plan"].update(edits=[{"edit": "run"}] * 20_000),
    "twice": lambda m, t: m["plan"].update(edits=m["plan"]["edits"] * 2),
    "plan of another format": lambda m, t: m["plan"].update(format=99),
    "no plan": lambda m, t: m.pop("plan"),
    "plan is a list": lambda m, t: m.update(plan=[]),
    "skipped is a number": lambda m, t: m["plan"].update(skipped=3),
    "packed is a list": lambda m, t: m.update(packed=[]),
    "packed of numbers": lambda m, t: m["packed"].update({"7.weight": 3}),
    "no zero point": lambda m, t: m["packed"]["7.weight"].pop("zero_point"),
    "huge zero point": lambda m, t: m["packed"]["7.weight"].update(zero_point=1e300),
    "no codes": lambda m, t: t.pop("7.weight.codes"),
    "short codes": lambda m, t: t.update({"7.weight.codes": t["7.weight.codes"][:-1]}),
    "codes of another form": lambda m, t: _codes(m, t, bytes, form="pickle"),
    "codes that aren't deflated": lambda m, t: _codes(m, t, bytes),
    "codes that are cut off": lambda m, t: _codes(m, t, lambda plain: zlib.compress(plain)[:-1]),
    "codes with something behind": lambda m, t: _codes(m, t, lambda plain: zlib.compress(plain) + b"0"),
    "too few deflated codes": lambda m, t: _codes(m, t, lambda plain: zlib.compress(plain[:-1])),
    "codes of other weights": lambda m, t: _codes(m, t, zlib.compress, weights=10**12),
    "codes that are a bomb": lambda m, t: _codes(m, t, _bomb),
    "bitmap that is a bomb": lambda m, t: _mask(m, t, _bomb, "deflated bitmap"),
    "gaps that are a bomb": lambda m, t: _mask(m, t, _bomb, "deflated gaps"),
    "mask of other weights": lambda m, t: _mask(m, t, lambda b: zlib.compress(bytes(len(b))), "deflated bitmap"),
    "codes in floats": lambda m, t: t.update({"7.weight.codes": t["7.weight.codes"].float()}),
    "no scale": lambda m, t: m["packed"]["7.weight"].pop("scale"),
    "scale of another shape": lambda m, t: _scale(m, t, torch.ones(3)),
    "scale in eight bits": lambda m, t: _scale(m, t, torch.ones((), dtype=torch.float8_e4m3fn)),
    "infinite floats": lambda m, t: _floats(m, t, torch.inf),
    "scale is NaN": lambda m, t: _scale(m, t, torch.tensor(torch.nan)),
    "scale as an integer tensor": lambda m, t: _scale(m, t, torch.tensor(3)),
    "scale is zero": lambda m, t: m["packed"]["7.weight"].update(scale=0.0),
    "scale is negative": lambda m, t: m["packed"]["7.weight"].update(scale=-1.0),
    "scale is huge": lambda m, t: m["packed"]["7.weight"].update(scale=1e300),
    "scale in integers": lambda m, t: m["packed"]["7.weight"].update(scale=3),
    "no shape": lambda m, t: m["packed"]["7.weight"].pop("shape"),
    "huge shape": lambda m, t: m["packed"]["7.weight"].update(shape=[10**12, 10**12]),
    "a million layers": lambda m, t: _edit(m, "quantize_weights").update(layers=["7"] * 10**6),
    "layers are a number": lambda m, t: _edit(m, "quantize_weights").update(layers=7),
    "NaN": lambda m, t: t["7.bias"].fill_(torch.nan),
    "infinite": lambda m, t: t["7.bias"].fill_(torch.inf),
    "another shape": lambda m, t: t.update({"7.bias": torch.zeros(1000)}),
    "another type": lambda m, t: t.update({"7.bias": t["7.bias"].double()}),
    "a tensor missing": lambda m, t: t.pop("7.bias"),
    "a tensor more": lambda m, t: t.update({"evil": torch.zeros(3)}),
    "alias of nothing": lambda m, t: (t.pop("7.bias"), m["aliases"].update({"7.bias": "nothing"})),
    "alias of itself": lambda m, t: (t.pop("7.bias"), m["aliases"].update({"7.bias": "7.bias"})),
    "alias of a number": lambda m, t: (t.pop("7.bias"), m["aliases"].update({"7.bias": [3]})),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "small"
    save(WAYS["mix"](network("spikingjelly")), path)
    return path.read_bytes()


@pytest.mark.parametrize("attack", ATTACKS)
def test_absurd_content_under_a_valid_checksum(attack: str, whole: bytes, tmp_path: Path) -> None:
    path, net = tmp_path / "small", network("spikingjelly")
    path.write_bytes(whole)
    damaged(path, ATTACKS[attack])
    before, state = snapshot(net), torch.get_rng_state()
    with pytest.raises(SNNCompressError) as caught:
        load(path, into=net)
    assert len(str(caught.value)) < 2000
    assert same(before, snapshot(net))
    assert torch.equal(state, torch.get_rng_state())


def test_deflated_by_others_is_read(whole: bytes, tmp_path: Path) -> None:
    """What the attacks above change is otherwise right."""
    path = tmp_path / "small"
    path.write_bytes(whole)
    damaged(path, lambda m, t: (_codes(m, t, zlib.compress), _mask(m, t, zlib.compress, "deflated bitmap")))
    assert describe(path)
    load(path, into=network("spikingjelly"))


def test_a_bomb_takes_no_memory(whole: bytes, tmp_path: Path) -> None:
    path, net = tmp_path / "small", network("spikingjelly")
    path.write_bytes(whole)
    damaged(path, ATTACKS["codes that are a bomb"])
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match="hold more than the"):
            load(path, into=net)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_more_text_than_any_network_needs(tmp_path: Path) -> None:
    Container({"plan": " " * 8_000_000}, {}).write(tmp_path / "big")
    with pytest.raises(StorageError, match="more than 8,000,000 characters"):
        load(tmp_path / "big", into=network("spikingjelly"))


# -- bytes and JSON at random --

TIMES = int(os.environ.get("FUZZ", "1"))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), neuron.LIFNode(), nn.Linear(12, 5), neuron.LIFNode())


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Channels, weights and bits, all codes and masks deflated."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    options: dict[str, Any] = {"data": torch.rand(8, 6), "timesteps": 3, "skip": []}
    small = snncompress.apply(tiny(), "magnitude", 0.3, None, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snncompress.base.packing._SAYING", -1000)
        save(snncompress.apply(small, "weight_magnitude", 0.5, 4, **options), path)
    return path


def refused(content: bytes, path: Path) -> None:
    net = tiny()
    before = snapshot(net)
    path.write_bytes(content)
    with pytest.raises(StorageError):
        load(path, into=net)
    assert same(before, snapshot(net))


def test_cut_off_anywhere(tiny_file: Path, tmp_path: Path) -> None:
    """Within the length of the header, the header, between tensors, within them; and with something behind."""
    content = tiny_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    tensors = [
        header + entry["data_offsets"][1] for name, entry in json.loads(content[8:header]).items() if name[0] != "_"
    ]
    ends = {*range(10), *range(8, header, 97), header - 1, header, header + 1, *tensors, *(end - 1 for end in tensors)}
    for end in sorted(ends - {len(content)}):
        refused(content[:end], tmp_path / "cut")
    refused(content + b"\0", tmp_path / "cut")


@given(data=st.data())
@settings(max_examples=150 * TIMES, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bit_flipped(data: st.DataObject, tiny_file: Path, tmp_path: Path) -> None:
    content = bytearray(tiny_file.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    refused(bytes(content), tmp_path / "flipped")


def test_huge_declared_sizes(tmp_path: Path) -> None:
    """Headers that promise what the file hasn't, of terabytes and of negative and overflowing sizes."""
    sizes = [([2**40], [0, 2**42]), ([2**63], [0, 4]), ([2**32] * 2, [0, 0]), ([-1], [0, 4]), ([10**30], [0, 4])]
    for shape, offsets in [*sizes, ([1], [4, 0])]:
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        refused(len(header).to_bytes(8, "little") + header + b"\0" * 4, tmp_path / "huge")
    refused((2**63).to_bytes(8, "little") + b"{}", tmp_path / "huge")
    double = (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    refused(len(double).to_bytes(8, "little") + double + b"\0" * 4, tmp_path / "double")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([".plan.1", "gaps", "bitmap", "0.weight", "out", "deflated", "deflated gaps"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=200 * TIMES, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_part_of_the_json_replaced(data: st.DataObject, tiny_file: Path, tmp_path: Path) -> None:
    """Under a valid checksum: an error of ours, or a part that nothing depends on."""
    file, net = Container.read(tiny_file), tiny()
    content = json.loads(json.dumps(dict(file.data)))
    *way, last = data.draw(st.sampled_from(places(content)[1:]))
    parent = content
    for key in way:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(JSON)
    else:
        del parent[last]
    Container(content, file.tensors).write(tmp_path / "changed")
    before = snapshot(net)
    try:
        again = load(tmp_path / "changed", into=net)
    except SNNCompressError:
        pass
    else:
        assert torch.isfinite(again[0].weight).all()
    assert same(before, snapshot(net))


TENSORS = st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float16, torch.bool]).flatmap(
    lambda dtype: st.lists(st.integers(0, 7), max_size=3).map(lambda shape: torch.ones(shape, dtype=dtype))
)


@given(data=st.data())
@settings(max_examples=100 * TIMES, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_tensor_replaced(data: st.DataObject, tiny_file: Path, tmp_path: Path) -> None:
    file, net = Container.read(tiny_file), tiny()
    tensors = dict(file.tensors)
    name = data.draw(st.sampled_from([*tensors, "more", ".plan.7"]))
    if name in tensors and tensors[name].dtype == torch.uint8 and data.draw(st.booleans()):
        content = bytearray(tensors[name].numpy().tobytes())  # a stream, damaged, cut off or made longer
        at, byte, end = (data.draw(st.integers(0, n)) for n in (len(content) - 1, 255, len(content) + 1))
        content[at] = byte
        tensors[name] = torch.tensor(list((content + b"0")[:end]), dtype=torch.uint8)
    else:
        tensors[name] = data.draw(TENSORS)
    Container(file.data, tensors).write(tmp_path / "changed")
    before = snapshot(net)
    with suppress(SNNCompressError):
        load(tmp_path / "changed", into=net)
    assert same(before, snapshot(net))
