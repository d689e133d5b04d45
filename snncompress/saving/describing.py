"""What is in a file, without the model that it was made from."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from snncompress.base.display import table
from snncompress.errors import StorageError
from snncompress.model.edits.base import KINDS

from .compact import MASK
from .container import Container
from .storage import part


def describe(path: str | os.PathLike[str]) -> str:
    """The model that a file of :func:`snncompress.save` needs, its plan, and a table of what takes how many bytes.

    Nothing is unpacked, so a hostile file costs no more than its size. Raises StorageError or PlanError for any other
    file.
    """
    file = Container.read(path)
    described, plan = part(file, "model"), part(file, "plan")
    total = Path(path).stat().st_size
    held = sum(_bytes(tensor) for tensor in file.tensors.values())
    try:
        edits = [_shown(KINDS[data["edit"]].summary(data, file.tensors)) for data in plan["edits"]]
        skipped = plan["whole" if plan["format"] == 1 else "skipped"]
        whole = [_shown(f"{name} left whole: {why}") for name, why in skipped.items()]
        rows = [[*map(_shown, row[:2]), row[2]] for row in _rows(file)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StorageError(f"{path} can't be described: {type(error).__name__}: {error}.") from error
    return "\n".join(
        [
            f"{path}: {total:,} bytes, written by snncompress {_shown(file.data.get('version'))}",
            f"made from {_shown(described.get('class'))} ({_shown(described.get('framework'))})",
            "",
            f"{len(edits)} edits:",
            *(f"  {line}" for line in (*edits, *whole)),
            "",
            table(
                ["tensor", "kept as", "bytes"],
                [*rows, ["plan and names", "JSON", f"{total - held:,}"]],
                ["total", "", f"{total:,}"],
            ),
        ]
    )


def _rows(file: Container) -> Iterator[tuple[str, str, str]]:
    """One row per weight, mask and other tensor."""
    packed = part(file, "packed")
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in file.tensors.items():
        owner = name.rpartition(".")[0]
        parts[owner if owner in packed else name].append(tensor)
    for name, tensors in parts.items():
        if name in packed:
            how = packed[name]
            kept_as = f"{how['bits']}-bit codes" if "bits" in how else "floats of the weights that exist"
        elif name.startswith(MASK):
            name, kept_as = f"mask {name.removeprefix(MASK)}", "bits or gaps"
        else:
            kept_as = f"{str(tensors[0].dtype).removeprefix('torch.')} {list(tensors[0].shape)}"
        yield name, kept_as, f"{sum(map(_bytes, tensors)):,}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shown(text: object) -> str:
    """Text of a stranger's, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in str(text)[:400])
