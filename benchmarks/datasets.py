"""Data sets as they are published, from a folder that the user names: MNIST, CIFAR-10 and -100, N-MNIST, CIFAR10-DVS.

    x, y = mnist(folder, "train")                    uint8 [60000, 28, 28], uint8 [60000]
    x, y = cifar10(folder, "test")                   uint8 [10000, 32, 32, 3], uint8 [10000]; cifar100 alike
    x, y = nmnist(folder, "train", 10, 100)          float32 [1000, 10, 2, 34, 34]: events in ten bins of 30 ms
    x, y = cifar10_dvs(folder, "test", 10, 10)       float32 [100, 10, 2, 128, 128]: ten parts of equally many events

Files may lie in the folder itself or in one below it that is named after the data set (``mnist``, ``cifar10``, …),
unpacked or in the archives that they come in. Nothing is downloaded: an error says what is missing, and where it can be
had.

Data in another form need a ``read.py`` beside them with functions of the same names, without the folder: what isn't
found as published is asked for there.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import itertools
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

PAGES = {
    "mnist": "https://yann.lecun.com/exdb/mnist/ (mirror: https://ossci-datasets.s3.amazonaws.com/mnist/)",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "nmnist": "https://www.garrickorchard.com/datasets/n-mnist",
    "cifar10_dvs": "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Split = tuple[Any, Any]


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """``--data FOLDER``, by default $SNNCOMPRESS_DATA or data/ in the repository."""
    default = Path(os.environ.get("SNNCOMPRESS_DATA") or Path(__file__).resolve().parent.parent / "data")
    what = f"folder with data sets as published (default: $SNNCOMPRESS_DATA, or data/ in the repository: {default})"
    parser.add_argument("--data", type=Path, default=default, metavar="FOLDER", help=what)


class DataMissingError(FileNotFoundError):
    """Files of a data set are missing, or aren't what they should be."""


def mnist(folder: Path, split: str) -> Split:
    """Images [N, 28, 28] and labels [N], from idx files, compressed or not."""
    stem = {"train": "train", "test": "t10k"}[split]
    found = []
    for what, dims in (("images", 3), ("labels", 1)):
        names = [f"{stem}-{what}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        path = next((b / n for b in _bases(folder, "mnist") for n in names if (b / n).is_file()), None)
        if path is None:
            return _otherwise("mnist", folder, f"{names[0]}(.gz)", split=split)
        found.append(_idx(path))
    return found[0], found[1]


def _idx(path: Path) -> Any:
    """An array of bytes: 0, 0, 8, the number of dimensions, each of them as a big-endian uint32, the bytes."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataMissingError(f"{path} is no idx file of bytes. Fetch it again: {PAGES['mnist']}.")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if len(data) != np.prod(shape, dtype=np.int64):
        raise DataMissingError(f"{path} says that it holds {shape}, and has {len(data)} bytes: it was cut off.")
    return data.reshape(shape)


def cifar10(folder: Path, split: str) -> Split:
    """Images [N, 32, 32, 3] and labels [N], from the pickled or the binary batches."""
    parts = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar("cifar-10", "cifar-10-batches-py", "cifar-10-batches-bin", parts, folder, split)


def cifar100(folder: Path, split: str) -> Split:
    """Images [N, 32, 32, 3] and fine labels [N], from the pickled or the binary file."""
    return _cifar("cifar-100", "cifar-100-python", "cifar-100-binary", [split], folder, split)


def _cifar(stem: str, python: str, binary: str, parts: list[str], folder: Path, split: str) -> Split:
    dataset = stem.replace("-", "")
    for base in _bases(folder, dataset):
        if blobs := _members(base, python, f"{stem}-python.tar.gz", parts):
            found = [_pickled(blob) for blob in blobs]
        elif blobs := _members(base, binary, f"{stem}-binary.tar.gz", [f"{part}.bin" for part in parts]):
            found = [_binary(blob, 2 if dataset == "cifar100" else 1) for blob in blobs]
        else:
            continue
        images = np.concatenate([x for x, _ in found]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.concatenate([y for _, y in found])
    return _otherwise(dataset, folder, f"{python}/{parts[0]}, {binary}/{parts[0]}.bin or {stem}-….tar.gz", split=split)


def _members(base: Path, inside: str, archive: str, names: list[str]) -> list[bytes] | None:
    """The files in base/inside, in base itself, or in the archive; None where they are in neither."""
    for place in (base / inside, base):
        if all((place / name).is_file() for name in names):
            return [(place / name).read_bytes() for name in names]
    if not (base / archive).is_file():
        return None
    with tarfile.open(base / archive) as tar:
        files = {member.name: member for member in tar if member.isfile()}
        missing = [name for name in names if f"{inside}/{name}" not in files]
        if missing:
            raise DataMissingError(f"{base / archive} has no {inside}/{missing[0]}: it isn't what it is called.")
        streams = [tar.extractfile(files[f"{inside}/{name}"]) for name in names]
        return [stream.read() for stream in streams if stream is not None]


def _binary(blob: bytes, labels: int) -> Split:
    """Of every image the labels, of which the last is the fine one, and its bytes."""
    rows = np.frombuffer(blob, np.uint8).reshape(-1, labels + 3072)
    return rows[:, labels:], rows[:, labels - 1]


def _pickled(blob: bytes) -> Split:
    batch = _Arrays(io.BytesIO(blob), encoding="latin1").load()
    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
    return np.asarray(batch["data"], np.uint8), np.asarray(labels, np.uint8)


class _Arrays(pickle.Unpickler):
    """Takes arrays of numpy and nothing else: a pickle may name any function, and it would be called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"The file asks for {module}.{name}, which no batch of CIFAR does: not loaded.")


def nmnist(folder: Path, split: str, timesteps: int = 10, per_class: int | None = None) -> Split:
    """Event counts [N, T, 2, 34, 34] in T bins of 300 ms in all, and labels; the first ``per_class`` of each digit."""
    name = {"train": "Train", "test": "Test"}[split]
    for base in _bases(folder, "nmnist", "N-MNIST"):
        loads = [_files(base, f"{name}/{digit}", f"{name}.zip", ".bin")[:per_class] for digit in range(10)]
        if not any(loads):
            continue
        x = np.zeros((sum(map(len, loads)), timesteps, 2, 34, 34), np.float32)
        for counts, load in zip(x, itertools.chain(*loads), strict=True):
            t, u, v, p = nmnist_events(load())
            np.add.at(counts, (np.minimum(t * timesteps // 300_000, timesteps - 1), p, v, u), 1)
        return x, np.repeat(np.arange(10, dtype=np.uint8), list(map(len, loads)))
    return _otherwise("nmnist", folder, f"{name}/0/*.bin or {name}.zip", split=split, timesteps=timesteps)


def nmnist_events(blob: bytes) -> tuple[Any, Any, Any, Any]:
    """t in µs, x, y and polarity: of five bytes x, y, and one bit and 23 bits of the others; y = 240 adds 2^13 µs."""
    raw = np.frombuffer(blob, np.uint8).reshape(-1, 5).astype(np.int64)
    over = raw[:, 1] == 240
    t = ((raw[:, 2] & 127) << 16) + (raw[:, 3] << 8) + raw[:, 4] + (np.cumsum(over) << 13)
    return t[~over], raw[~over, 0], raw[~over, 1], raw[~over, 2] >> 7


def cifar10_dvs(folder: Path, split: str, timesteps: int = 10, per_class: int | None = None) -> Split:
    """Event counts [N, T, 2, 128, 128] in T parts of equally many events, and labels.

    Nobody has published a split: the first nine tenths of each class are for training, as in most papers.
    """
    for base in _bases(folder, "cifar10_dvs", "CIFAR10DVS"):
        files = [_files(base, name, f"{name}.zip", ".aedat") for name in CLASSES]
        if not any(files):
            continue
        cuts = [round(0.9 * len(some)) for some in files]
        halves = [some[:cut] if split == "train" else some[cut:] for some, cut in zip(files, cuts, strict=True)]
        loads = [some[:per_class] for some in halves]
        x = np.zeros((sum(map(len, loads)), timesteps, 2, 128, 128), np.float32)
        for counts, load in zip(x, itertools.chain(*loads), strict=True):
            _, u, v, p = aedat_events(load())
            np.add.at(counts, (np.arange(len(u)) * timesteps // max(1, len(u)), p, v, u), 1)
        return x, np.repeat(np.arange(10, dtype=np.uint8), list(map(len, loads)))
    return _otherwise("cifar10_dvs", folder, "airplane/*.aedat or airplane.zip, …", split=split, timesteps=timesteps)


def aedat_events(blob: bytes) -> tuple[Any, Any, Any, Any]:
    """t in µs, x, y and polarity of a DVS128's AEDAT 2.0: lines beginning with #, then big-endian address and time.

    The camera lay on its side: what the address calls y is x, and both count from the far end, as SpikingJelly has it.
    """
    start = 0
    while blob[start : start + 1] == b"#":
        start = blob.index(b"\n", start) + 1
    address, t = np.frombuffer(blob, ">u4", offset=start).astype(np.int64).reshape(-1, 2).T
    return t, 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)


def _bases(folder: Path, *names: str) -> Iterator[Path]:
    """Where a data set's files may lie."""
    yield folder
    for name in names:
        for spelled in dict.fromkeys((name, name.upper())):
            yield from (folder / spelled, folder / spelled / "raw")


def _files(base: Path, name: str, archive: str, suffix: str) -> list[Callable[[], bytes]]:
    """What reads the files in base/name, or in a folder of this name in the archive, in the order of their numbers."""

    def order(path: str) -> tuple[int, str]:
        numbers = re.findall(r"\d+", PurePath(path).stem)
        return int(numbers[-1]) if numbers else 0, path

    if (base / name).is_dir():
        names = sorted((str(path) for path in (base / name).iterdir() if path.suffix == suffix), key=order)
        return [Path(path).read_bytes for path in names]
    if not (base / archive).is_file():
        return []
    zipped = _opened(base / archive)
    inside = [n for n in zipped.namelist() if n.endswith(suffix) and f"/{PurePath(n).parent}".endswith(f"/{name}")]
    return [partial(zipped.read, path) for path in sorted(inside, key=order)]


@cache
def _opened(archive: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _otherwise(dataset: str, folder: Path, looked_for: str, **how: Any) -> Split:
    """What the folder's own reader says; raises DataMissingError where it has none."""
    if (folder / "read.py").is_file():
        spec = importlib.util.spec_from_file_location("read", folder / "read.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, dataset):
            x, y = getattr(module, dataset)(**how)
            return x, y
    raise DataMissingError(
        f"No {dataset} in {folder}: looked there, and in {dataset}/, for {looked_for}. Get the files from "
        f"{PAGES[dataset]}, put them there as they are, and name the folder: --data FOLDER, or SNNCOMPRESS_DATA=FOLDER."
    )
