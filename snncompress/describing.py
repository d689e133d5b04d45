"""What is in a file, without the model that it was made from."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .compact import expanded
from .container import Container
from .display import table
from .storage import part


def describe(path: str | os.PathLike[str]) -> str:
    """The model that a file of :func:`snncompress.save` needs, its plan, and a table of what takes how many bytes.

    Raises StorageError or PlanError for any other file.
    """
    file = Container.read(path)
    described = part(file, "model")
    total = Path(path).stat().st_size
    held = sum(_bytes(tensor) for tensor in file.tensors.values())
    lines = [
        f"{path}: {total:,} bytes, written by snncompress {file.data.get('version')}",
        f"made from {described.get('class')} ({described.get('framework')})",
        "",
        str(expanded(part(file, "plan"), file.tensors, _LARGEST)),
        "",
        table(
            ["tensor", "kept as", "bytes"],
            [*_rows(file), ["plan and names", "JSON", f"{total - held:,}"]],
            ["total", "", f"{total:,}"],
        ),
    ]
    return "\n".join(lines)


_LARGEST = 10**9
"""Elements of a mask, at most; a model would tell."""


def _rows(file: Container) -> list[list[str]]:
    """One row per weight, mask and other tensor."""
    packed = part(file, "packed")
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in file.tensors.items():
        owner = name.rpartition(".")[0]
        parts[owner if owner in packed else name].append(tensor)
    rows = []
    for name, tensors in parts.items():
        how: Any = packed.get(name)
        if isinstance(how, dict):
            kept_as = f"{how['bits']}-bit codes, scale" if "bits" in how else "floats of the weights that exist"
        elif name.startswith("plan."):
            kept_as = "mask"
        else:
            kept_as = f"{str(tensors[0].dtype).removeprefix('torch.')} {list(tensors[0].shape)}"
        rows.append([name, kept_as, f"{sum(map(_bytes, tensors)):,}"])
    return rows


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
