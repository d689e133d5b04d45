"""The chips' own rules, by hand from what their vendors write."""

from __future__ import annotations

import dataclasses

import pytest
from snncompress_chips import FPGA, Akida1, Akida2, Loihi2, LoihiEnergy, Speck, SpiNNaker2, XyloAudio2, XyloIMU

import snncompress
from snncompress import OptionError
from snncompress.extend import Limit, OperationCounts, Pooling, Stage, Target

_WINDOW = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
_KI = 1024


def conv(name: str, into: int, out: int, side: int, **fields: object) -> Stage:
    stage = Stage(
        name, "convolution", into, out, (side, side), (side, side), **_WINDOW, neuron="if", reset="value",
        weight_bits=8, scales="layer",
    )  # fmt: skip
    return dataclasses.replace(stage, **fields)


def linear(name: str, into: int, out: int, **fields: object) -> Stage:
    stage = Stage(name, "linear", into, out, neuron="lif", reset="subtract", weight_bits=8, scales="layer")
    return dataclasses.replace(stage, **fields)


def limits(target: Target, stage: Stage) -> dict[str, Limit]:
    return {limit.what: limit for limit in target.limits(stage)}


def missed(target: Target, stage: Stage) -> list[str]:
    return [limit.what for limit in target.limits(stage) if not limit.met]


def test_every_chip_is_there() -> None:
    names = {entry.name for entry in snncompress.targets()}
    assert names >= {
        "speck", "dynapcnn", "xylo_audio2", "xylo_audio3", "xylo_imu", "loihi2", "spinnaker2", "akida1", "akida2",
        "fpga",
    }  # fmt: skip


def test_specks_memories_as_its_documentation_computes_them() -> None:
    """16 channels into 32, 3 × 3, 64 × 64: a kernel takes 16 words, so 16 · 32 · 16 = 8 Ki; neurons 128 Ki."""
    found = limits(Speck(), conv("a", 16, 32, 64))
    assert found["words of kernel memory"].needs == 8 * _KI
    assert found["words of neuron memory"].needs == 128 * _KI
    assert not found["words of neuron memory"].met
    # 33 channels take the addresses of 64; a map of 33 × 20 those of 64 × 32
    found = limits(Speck(), conv("a", 16, 33, 33, out_size=(33, 20)))
    assert found["words of kernel memory"].needs == 16 * 64 * 16
    assert found["words of neuron memory"].needs == 33 * 64 * 32


def test_specks_cores_are_matched_and_not_dealt_out() -> None:
    """Four layers of 64 Ki neurons, and three cores that have so many; a layer that fits all must make room."""
    large = [conv(f"large{n}", 1, 16, 64) for n in range(3)]
    small = conv("small", 1, 1, 8)
    placed = Speck().place([small, *large]).cores
    assert sorted(placed[stage.name] for stage in large) == [(0,), (1,), (2,)]
    assert placed["small"][0] > 2
    assert len(Speck().place([*large, conv("large3", 1, 16, 64)]).cores) == 3
    # 64 Ki of each memory: there are such cores for either, none for both
    both = conv("both", 64, 64, 32)
    assert all(limit.met for limit in Speck().limits(both))
    assert Speck().place([both]).cores == {}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"kernel_size": (17, 17)}, "kernel size"),
        ({"kernel_size": (3, 5)}, "shape of its kernel"),
        ({"stride": (3, 3)}, "stride"),
        ({"padding": (8, 8)}, "padding"),
        ({"dilation": (2, 2)}, "dilation"),
        ({"weight_bits": 9}, "bits of a weight"),
        ({"state_bits": 17}, "bits of a state"),
        ({"scales": "channel"}, "scales of its weights"),
        ({"neuron": "lif"}, "neurons"),
        ({"neuron": None}, "neurons"),
        ({"analog": True}, "input"),
        ({"feeds": ("b", "c", "d")}, "layers it feeds"),
        ({"operations": ("product",)}, "operation"),
        ({"pooling": (Pooling("max", (2, 2), (2, 2), (0, 0)),)}, "pooling"),
        ({"pooling": (Pooling("average", (3, 3), (3, 3), (0, 0)),)}, "window of the pooling"),
        ({"pooling": (Pooling("average", (2, 2), (1, 1), (0, 0)),)}, "windows of the pooling"),
        ({"pooling": (Pooling("average", (4, 4), (4, 4), (0, 0)),) * 2}, "window of all pooling together"),
        ({"in_size": (129, 129)}, "side of the map it reads"),
        ({"in_channels": 1025, "kernel_size": (1, 1)}, "channels in"),
        ({"kind": "transposed convolution"}, "kind of layer"),
    ],
)
def test_what_speck_refuses(changed: dict[str, object], what: str) -> None:
    fine = conv("a", 4, 8, 8, analog=False)
    assert missed(Speck(), fine) == []
    assert missed(Speck(), dataclasses.replace(fine, **changed)) == [what]


def test_xylos_populations() -> None:
    """Hidden neurons reach 64 others on Audio 2; inputs 128 hidden neurons, and 128 the outputs, on IMU."""
    first, last = linear("a", 16, 128, feeds=("b",)), linear("c", 65, 8, reads=("b",))
    inner = linear("b", 128, 65, reads=("a",), feeds=("c",))
    assert [missed(XyloAudio2(), stage) for stage in (first, inner, last)] == [
        [],
        ["neurons that a neuron reaches"],
        [],
    ]
    assert [missed(XyloIMU(), stage) for stage in (first, inner, last)] == [[], [], []]
    assert missed(XyloIMU(), dataclasses.replace(first, out_channels=129)) == ["neurons that inputs reach"]
    assert missed(XyloAudio2(), dataclasses.replace(last, out_channels=9, biased=True)) == ["biases", "outputs"]
    wide = [dataclasses.replace(first, out_channels=600), dataclasses.replace(inner, out_channels=401), last]
    assert [limit.what for limit in XyloAudio2().place(wide).limits if not limit.met] == ["hidden neurons"]
    assert not XyloAudio2().place([last]).limits[1].met  # one layer alone
    # 128 · 249 weights between hidden neurons are more than 31,744
    inner = dataclasses.replace(inner, out_channels=249)
    assert [limit.what for limit in XyloIMU().place([first, inner, last]).limits if not limit.met] == [
        "weights between hidden neurons"
    ]


def test_akidas_first_layer_is_another() -> None:
    first, second = conv("a", 1, 193, 32), conv("b", 193, 32, 32, reads=("a",))
    assert missed(Akida1(), first) == []
    assert missed(Akida1(), second) == ["bits of a weight"]  # 4
    assert missed(Akida2(), second) == []
    assert missed(Akida1(), dataclasses.replace(first, in_channels=3)) == ["filters of the first layer"]  # 192
    assert missed(Akida1(), dataclasses.replace(first, in_channels=2)) == ["channels of the image"]
    assert missed(Akida1(), dataclasses.replace(second, weight_bits=4, padding=(0, 0))) == ["padding of a kernel of 3"]
    strided = dataclasses.replace(second, weight_bits=4, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2))
    assert missed(Akida1(), strided) == ["kernel size at stride 2"]


def test_chips_of_many_cores_count_what_they_have() -> None:
    """A linear layer of 1,000 × 1,000 weights of 8 bits, 1,000 floats beside: 1,004,000 bytes on 131,072 each."""
    stage = linear("a", 1000, 1000)
    assert len(SpiNNaker2().place([stage]).cores["a"]) == 8
    fields = {limit.what: limit.needs for limit in Loihi2().place([stage]).limits}
    assert fields == {"cores": 1, "neurons on the chip": 1000, "synapses on the chip": 1_000_000}
    (whole,) = FPGA(bytes=1_003_999).place([stage]).limits
    assert (whole.what, whole.needs, whole.slack) == ("bytes on the chip", 1_004_000, -1)
    few = FPGA(weight_bits=8, cores=7, bytes_per_core=131_072)
    assert few.place([stage]).cores == {}
    with pytest.raises(OptionError, match="cores must be a number above 0"):
        FPGA(cores=0)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("weight_bits", "4", "a number above 0"),
        ("neurons", True, "a number above 0"),
        ("events", 1, "True or False"),
        ("scales", "none", "'layer' or 'channel'"),
        ("kernel_sizes", 3, "whole numbers"),
        ("layers", "linear", "words"),
    ],
)
def test_figures_of_another_kind_are_refused(field: str, value: object, kind: str) -> None:
    with pytest.raises(OptionError, match=f"{field} must be {kind}"):
        FPGA(**{field: value})


def test_loihis_published_energies() -> None:
    """1,000 synaptic operations of 23.6 pJ and 10 updates of 81 pJ: 23,600 + 810."""
    assert LoihiEnergy().energy_pj(OperationCounts(1000, 0, 10)) == 24_410
    with pytest.raises(OptionError, match="synop_pj"):
        LoihiEnergy(synop_pj=-1)
