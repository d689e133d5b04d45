"""The data sets' readers of the benchmarks, on tiny files in the formats that are published, written byte by byte."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import datasets
from benchmarks.datasets import DataMissingError


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("where", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path: Path, where: str, packed: bool) -> None:
    images, labels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([7, 1], np.uint8)
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name, array in {"t10k-images-idx3-ubyte": images, "t10k-labels-idx1-ubyte": labels}.items():
        path = tmp_path / where / f"{name}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    x, y = datasets.mnist(tmp_path, "test")
    assert np.array_equal(x, images)
    assert y.tolist() == [7, 1]
    path.write_bytes(gzip.compress(idx(labels)[:-1]) if packed else idx(labels)[:-1])
    with pytest.raises(DataMissingError, match="cut off"):
        datasets.mnist(tmp_path, "test")
    path.write_bytes(gzip.compress(b"<html>") if packed else b"<html>")
    with pytest.raises(DataMissingError, match="no idx file"):
        datasets.mnist(tmp_path, "test")


def test_mnist_as_published(data_dir: Path) -> None:
    x, y = datasets.mnist(data_dir, "test")
    assert x.shape == (10_000, 28, 28)
    assert y[:5].tolist() == [7, 2, 1, 0, 4]


def python2(data: np.ndarray, labels: dict[str, list[int]]) -> bytes:
    """A batch as Python 2 pickled it: the opcodes of protocol 2, strings of bytes, numpy's former module."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"tR("
        + number(1) + b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t"
        + b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
        + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        + b"\x89" + text(data.tobytes()) + b"tb"
    )  # fmt: skip
    items = [text(b"data") + array]
    items += [text(k.encode()) + b"](" + b"".join(map(number, v)) + b"e" for k, v in labels.items()]
    return b"\x80\x02}(" + b"".join(items) + b"u."


PLANES = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)


def check_images(x: np.ndarray) -> None:
    assert x.shape[1:] == (32, 32, 3)
    assert x[1, 2, 5].tolist() == [PLANES[1, plane * 1024 + 2 * 32 + 5] for plane in range(3)]


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar10_pickled(tmp_path: Path, form: str) -> None:
    names = [f"data_batch_{n}" for n in range(1, 6)]
    blobs = {name: python2(PLANES, {"labels": [n, 9]}) for n, name in enumerate(names)}
    if form == "folder":
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, blob in blobs.items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(blob)
    else:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, blob in blobs.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
    x, y = datasets.cifar10(tmp_path, "train")
    assert y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    check_images(x)
    with pytest.raises(DataMissingError, match="test_batch"):
        datasets.cifar10(tmp_path, "test")


def test_cifar_in_binary(tmp_path: Path) -> None:
    rows = np.concatenate([np.array([[3], [8]], np.uint8), PLANES], 1)
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes())
    x, y = datasets.cifar10(tmp_path, "test")
    assert y.tolist() == [3, 8]
    check_images(x)
    (tmp_path / "cifar100" / "cifar-100-binary").mkdir(parents=True)
    rows = np.concatenate([np.array([[19, 99], [4, 0]], np.uint8), PLANES], 1)
    (tmp_path / "cifar100" / "cifar-100-binary" / "test.bin").write_bytes(rows.tobytes())
    x, y = datasets.cifar100(tmp_path, "test")
    assert y.tolist() == [99, 0]  # the second byte is the fine label
    check_images(x)


def test_cifar100_pickled_as_any_version_of_numpy_does(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    blob = python2(PLANES, {"coarse_labels": [1, 2], "fine_labels": [42, 0]})
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        (tmp_path / "cifar-100-python" / "train").write_bytes(blob.replace(b"numpy.core.multiarray", module))
        x, y = datasets.cifar100(tmp_path, "train")
        assert y.tolist() == [42, 0]
        check_images(x)


def test_a_pickle_that_would_run_something_is_not_loaded(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "harm").touch, ())

    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Harm()}))
    with pytest.raises(pickle.UnpicklingError, match="not loaded"):
        datasets.cifar10(tmp_path, "test")
    assert not (tmp_path / "harm").exists()


def atis(t: int, x: int, y: int, p: int) -> bytes:
    return bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255])


@pytest.mark.parametrize("zipped", [False, True])
def test_nmnist(tmp_path: Path, zipped: bool) -> None:
    """Ten bins of 30 ms; an event with y = 240 is none, and puts 2^13 µs on the clock; what is late counts last."""
    first = atis(0, 5, 6, 1) + atis(29_999, 5, 6, 1) + atis(30_000, 0, 33, 0) + atis(70_000, 33, 0, 1)
    second = atis(26_000, 1, 2, 0) + atis(0, 0, 240, 0) + atis(26_000, 1, 2, 0) + atis(310_000, 3, 3, 1)
    files = {"0/00010.bin": second, "0/00002.bin": first, "7/00001.bin": first}
    if zipped:
        with zipfile.ZipFile(tmp_path / "Train.zip", "w") as archive:
            for name, blob in files.items():
                archive.writestr(f"Train/{name}", blob)
    else:
        for name, blob in files.items():
            (tmp_path / "N-MNIST" / "Train" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "N-MNIST" / "Train" / name).write_bytes(blob)
    x, y = datasets.nmnist(tmp_path, "train")
    assert (x.shape, y.tolist()) == ((3, 10, 2, 34, 34), [0, 0, 7])
    at = {(0, 0, 1, 6, 5): 2, (0, 1, 0, 33, 0): 1, (0, 2, 1, 0, 33): 1, (1, 0, 0, 2, 1): 1, (1, 1, 0, 2, 1): 1,
          (1, 9, 1, 3, 3): 1}  # fmt: skip
    assert {tuple(map(int, place)): int(x[tuple(place)]) for place in np.argwhere(x[:2])} == at
    assert np.array_equal(x[0], x[2])
    assert datasets.nmnist(tmp_path, "train", per_class=1)[1].tolist() == [0, 7]


def test_nmnist_as_tonic_reads_it(tmp_path: Path) -> None:
    tonic = pytest.importorskip("tonic.io")
    blob = np.random.default_rng(0).integers(0, 256, 500, np.uint8).tobytes() + atis(9, 0, 240, 0) + atis(9, 4, 5, 1)
    events = tonic.read_mnist_file(io.BytesIO(blob), np.dtype([(n, int) for n in "xytp"]), is_stream=True)
    for name, mine in zip("txyp", datasets.nmnist_events(blob), strict=True):
        assert np.array_equal(events[name], mine)


def test_cifar10_dvs(tmp_path: Path) -> None:
    """Bit 0 is the polarity, bits 1 to 7 and 8 to 14 are what SpikingJelly calls 127 - y and 127 - x."""
    addresses = [(10 << 8 | 20 << 1 | 1, 5), (0 << 8 | 127 << 1, 9)]
    blob = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n" + b"".join(struct.pack(">II", *a) for a in addresses)
    (tmp_path / "dog").mkdir()
    for number in range(20):
        (tmp_path / "dog" / f"cifar10_dog_{number}.aedat").write_bytes(blob if number == 2 else blob[:-8])
    x, y = datasets.cifar10_dvs(tmp_path, "train", timesteps=2, per_class=3)
    assert (x.shape, y.tolist()) == ((3, 2, 2, 128, 128), [5, 5, 5])
    assert np.argwhere(x[2]).tolist() == [[0, 0, 107, 117], [1, 1, 0, 127]]  # t, p, y, x
    assert np.argwhere(x[1]).tolist() == [[0, 0, 107, 117]]
    assert len(datasets.cifar10_dvs(tmp_path, "test")[1]) == 2
    with zipfile.ZipFile(tmp_path / "airplane.zip", "w") as archive:
        archive.writestr("airplane/cifar10_airplane_0.aedat", blob)
    assert datasets.cifar10_dvs(tmp_path, "train")[1].tolist() == [0] + 18 * [5]


@pytest.mark.parametrize("name", datasets.PAGES)
def test_what_is_missing_and_where_it_can_be_had(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataMissingError) as raised:
        getattr(datasets, name)(tmp_path, "train")
    for part in (str(tmp_path), datasets.PAGES[name], "--data FOLDER"):
        assert part in str(raised.value)


def test_data_in_another_form_bring_their_own_reader(tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text("def cifar10(split):\n    return split, [3]\n")
    assert datasets.cifar10(tmp_path, "test") == ("test", [3])
    with pytest.raises(DataMissingError):
        datasets.cifar100(tmp_path, "test")


def test_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNCOMPRESS_DATA", str(tmp_path))
    parser = argparse.ArgumentParser()
    datasets.add_data_option(parser)
    assert parser.parse_args([]).data == tmp_path
    assert parser.parse_args(["--data", "here"]).data == Path("here")
    monkeypatch.delenv("SNNCOMPRESS_DATA")
    parser = argparse.ArgumentParser()
    datasets.add_data_option(parser)
    assert parser.parse_args([]).data.name == "data"


def test_every_benchmark_takes_its_data_through_it() -> None:
    folder = Path(datasets.__file__).parent
    scripts = {path.name: path.read_text() for path in folder.glob("*.py") if path.name != "datasets.py"}
    assert [name for name, text in scripts.items() if 'add_argument("--data"' in text or "read.py" in text] == []
    assert sum("add_data_option(parser)" in text for text in scripts.values()) > 8
