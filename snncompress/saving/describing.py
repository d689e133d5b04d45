"""What is in a file, without the model that it was made from."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from snncompress.base.tables import Column, Table
from snncompress.errors import StorageError
from snncompress.model.edits.base import KINDS

from .compact import MASK
from .container import Container
from .storage import part


def describe(path: str | os.PathLike[str]) -> str:
    """The model that a file of :func:`snncompress.save` needs, its plan, and a table of what takes how many bytes.

    "Plain" is what it would take with every code at its bit width, as Eq. 16 counts, and a bit for every weight of a
    mask; "bytes" is what it takes in the file, where codes and masks are deflated. Nothing is unpacked, so a hostile
    file costs no more than its size. Raises StorageError or PlanError for any other file.
    """
    file = Container.read(path)
    described, plan = part(file, "model"), part(file, "plan")
    total = Path(path).stat().st_size
    try:
        edits = [_shown(KINDS[data["edit"]].summary(data, file.tensors)) for data in plan["edits"]]
        skipped = plan["whole" if plan["format"] == 1 else "skipped"]
        whole = [_shown(f"{name} left whole: {why}") for name, why in skipped.items()]
        rows = [(_shown(name), _shown(how), plain, size) for name, how, plain, size in _rows(file)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StorageError(f"{path} can't be described: {type(error).__name__}: {error}.") from error
    rest = total - sum(size for *_, size in rows)
    rows.append(("plan and names", "JSON", rest, rest))
    return "\n".join(
        [
            f"{path}: {total:,} bytes, format {file.format}, written by snncompress {_shown(file.data.get('version'))}",
            f"made from {_shown(described.get('class'))} ({_shown(described.get('framework'))})",
            "",
            f"{len(edits)} edits:",
            *(f"  {line}" for line in (*edits, *whole)),
            "",
            str(
                Table(
                    [Column(title) for title in ("tensor", "kept as", "plain", "bytes")],
                    rows,
                    ("total", "", sum(plain for *_, plain, _ in rows), total),
                )
            ),
        ]
    )


def _rows(file: Container) -> Iterator[tuple[str, str, int, int]]:
    """One row per weight, mask and other tensor: name, how it is kept, its bytes plain and in the file."""
    packed = part(file, "packed")
    kept = {e["kept"]["tensor"]: e["shape"] for e in part(file, "plan")["edits"] if isinstance(e.get("kept"), dict)}
    parts: dict[str, list[str]] = defaultdict(list)
    for name in file.tensors:
        owner = name.rpartition(".")[0]
        parts[owner if owner in packed else name].append(name)
    for name, names in parts.items():
        plain = size = sum(_bytes(file.tensors[n]) for n in names)
        if name in packed:
            how = packed[name]
            kept_as = f"{how['bits']}-bit codes" if "bits" in how else "floats of the weights that exist"
            if "weights" in how:
                plain += math.ceil(how["weights"] * how["bits"] / 8) - _bytes(file.tensors[f"{name}.codes"])
        elif name in kept:
            plain, kept_as = math.ceil(math.prod(kept[name]) / 8), "bits or gaps"
            name = f"mask {name.removeprefix(MASK)}"
        else:
            kept_as = f"{str(file.tensors[name].dtype).removeprefix('torch.')} {list(file.tensors[name].shape)}"
        yield name, kept_as, plain, size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shown(text: object) -> str:
    """Text of a stranger's, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in str(text)[:400])
