"""A safetensors file whose content is vouched for by a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from snncompress.base.files import as_path, refuse_special, write_whole
from snncompress.errors import StorageError

FORMAT = 2
_READ = (1, FORMAT)
_KEY = "snncompress"
MOST_TEXT = 8_000_000
"""Characters of JSON; the plan of a network of a thousand layers takes a tenth of it."""


@dataclass(frozen=True)
class Container:
    """A JSON object, and tensors by name; ``format`` is that of the file that they were read from."""

    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the file at once; raises StorageError where that fails, the old one is then still there."""
        if path.is_dir():
            raise StorageError(f"{path} is a folder. Give the name of a file, such as {path / 'small.safetensors'}.")
        try:  # copies: safetensors refuses tensors that share memory
            tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in self.tensors.items()}
            digest = _digest(self.data, tensors)
        except (RuntimeError, NotImplementedError) as error:
            raise StorageError(f"A tensor of this model can't be kept in a file: {error}") from error
        text = json.dumps({"format": FORMAT, **self.data, "sha256": digest}, ensure_ascii=False, allow_nan=False)
        try:
            content = safetensors.torch.save(tensors, {_KEY: text})
        except (KeyError, ValueError, RuntimeError) as error:
            raise StorageError(f"A tensor of this model is of a type that safetensors hasn't: {error}") from error
        write_whole(path, lambda file: file.write(content))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Container:
        """Read a file; raises StorageError for any that isn't whole and of this format."""
        file_path = as_path(path)
        try:
            refuse_special(file_path)
            with safetensors.safe_open(path, framework="pt") as file:
                version, data = _data(path, (file.metadata() or {}).get(_KEY, ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator
                digest, vouched = _digest(data, tensors), data.pop("sha256", "")
        except StorageError:
            raise
        except Exception as error:  # of safetensors, of the file system, of torch for an absurd shape
            raise StorageError(
                f"{path} can't be read: {type(error).__name__}: {error}. It is damaged, of another kind, or not there."
            ) from error
        if digest != vouched:
            raise StorageError(f"{path} is damaged: its content doesn't fit its checksum. Copy or save it again.")
        return cls(data, tensors, version)


def _data(path: str | os.PathLike[str], text: str) -> tuple[int, dict[str, Any]]:
    """The format, and the JSON object without it."""
    if not text:
        raise StorageError(f"{path} wasn't written by snncompress.save: its metadata don't say so.")
    if len(text) > MOST_TEXT:
        raise StorageError(f"{path} holds more than {MOST_TEXT:,} characters of metadata, which no network needs.")
    data = json.loads(text)
    found = data.pop("format")
    if found not in _READ:
        raise StorageError(
            f"{path} has format {str(found)[:40]}; this version reads {' and '.join(map(str, _READ))}. Upgrade "
            f"snncompress, or have the file saved by this version."
        )
    return found, dict(data)


def _digest(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the JSON without it; then, by name, over every tensor's name, type and shape as JSON, and bytes."""
    total = hashlib.sha256(_canonical({key: value for key, value in data.items() if key != "sha256"}))
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(_canonical([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
