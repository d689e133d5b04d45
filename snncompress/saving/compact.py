"""Plans as small JSON: channels as bits, masks as tensors of the file beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snncompress.base.packing import pack_indices, pack_mask, unpack_indices, unpack_mask
from snncompress.errors import PlanError, StorageError
from snncompress.model.edits import (
    Edit,
    MaskWeights,
    QuantizeWeights,
    RemoveChannels,
    Slice,
    edit_from_dict,
    slice_from_dict,
)
from snncompress.model.plan import Plan

MOST_EDITS = 10_000
MASK = ".plan."
"""How names of mask tensors begin: no name in a state_dict begins with a dot."""


class Budget:
    """How much a plan may unfold to; raises PlanError where it is more."""

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, count: int) -> None:
        """Take something off."""
        self._left -= count
        if self._left < 0:
            raise PlanError(
                "The file's plan unfolds to far more than the network has weights. It is damaged, or hostile."
            )


def compact(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan as a JSON object, and the tensors that hold its masks; docs/format.md describes both."""
    tensors: dict[str, Tensor] = {}
    edits: list[dict[str, Any]] = []
    for number, edit in enumerate(plan.edits):
        data = edit.to_dict()
        if isinstance(edit, RemoveChannels):
            data = _compact_removal(edit)
        elif isinstance(edit, MaskWeights):
            form, packed = pack_mask(edit.mask().numpy().reshape(-1))
            data["kept"] = {"form": form, "tensor": f"{MASK}{number}"}
            tensors[f"{MASK}{number}"] = torch.from_numpy(packed)
        elif isinstance(edit, QuantizeWeights):
            data["layers"] = [data.pop("layer")]
            if edits and {**edits[-1], "layers": None} == {**data, "layers": None}:
                edits[-1]["layers"] += data["layers"]
                continue
        edits.append(data)
    return {**json.loads(Plan((), plan.skipped, plan.origin).to_json()), "edits": edits}, tensors


def expanded(data: Any, tensors: Mapping[str, Tensor], most: int) -> Plan:
    """The plan; its masks and lists of channels have at most ``most`` entries. Raises PlanError or StorageError."""
    try:
        rest = Plan.from_json(json.dumps({**data, "edits": []}))
        edits = list(islice(_edits(data["edits"], dict(tensors), Budget(most)), MOST_EDITS + 1))
        if len(edits) > MOST_EDITS:
            raise StorageError(f"The file's plan has more than {MOST_EDITS:,} edits, the most that are read.")
        return Plan(tuple(edits), rest.skipped, rest.origin)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise PlanError(f"The file's plan is damaged: {type(error).__name__}: {error}") from error


def _edits(edits: list[dict[str, Any]], tensors: dict[str, Tensor], budget: Budget) -> Iterator[Edit]:
    for data in edits:
        if data["edit"] == RemoveChannels.kind:
            yield _removal(data, budget)
        elif data["edit"] == MaskWeights.kind:
            size = size_of(data)
            budget.spend(size)
            kept = unpack_mask(data["kept"]["form"], _bytes(tensors.pop(data["kept"]["tensor"])), size)
            yield MaskWeights.of(str(data["layer"]), torch.from_numpy(kept).view(data["shape"]))
        elif data["edit"] == QuantizeWeights.kind:
            for layer in data["layers"]:
                yield edit_from_dict({**data, "layer": layer})
        else:
            yield edit_from_dict(data)


def size_of(mask: Mapping[str, Any]) -> int:
    """How many weights a mask is about; raises PlanError for what is no shape."""
    shape = mask["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise PlanError(f"A mask has the shape {str(shape)[:80]}.")
    return math.prod(shape)


def _compact_removal(edit: RemoveChannels) -> dict[str, Any]:
    width = next(s.width for s in edit.slices if (s.module, s.side) == (edit.layer, "out"))
    slices: list[list[Any]] = []
    for piece in edit.slices:
        slices.append([piece.module, piece.side, piece.width, piece.axis])
        if (piece.indices, piece.width) != (edit.indices, width):
            slices[-1].append(pack_indices(piece.indices, piece.width))
    indices = pack_indices(edit.indices, width)
    return {"edit": edit.kind, "layer": edit.layer, "width": width, "indices": indices, "slices": slices}


def _removal(data: dict[str, Any], budget: Budget) -> RemoveChannels:
    indices = tuple(unpack_indices(data["indices"], data["width"]))
    budget.spend(data["width"])
    slices: dict[tuple[str, str], Slice] = {}
    for module, side, width, axis, *own in data["slices"]:
        budget.spend(width)
        piece = slice_from_dict({"module": module, "side": side, "width": width, "axis": axis, "indices": []})
        found = tuple(unpack_indices(own[0], width)) if own else indices
        if (piece.module, piece.side) in slices:
            raise PlanError(f"A removal of channels lists {piece.module[:80]!r} twice.")
        slices[piece.module, piece.side] = dataclasses.replace(piece, indices=found)
    if data["width"] != getattr(slices.get((data["layer"], "out")), "width", None):
        raise PlanError(f"A removal of channels of {str(data['layer'])[:80]!r} doesn't list that layer.")
    return RemoveChannels(data["layer"], indices, tuple(slices.values()))


def _bytes(tensor: Tensor) -> Any:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise PlanError(f"A mask is stored as bytes, not as {tensor.dtype} {list(tensor.shape)}.")
    return np.asarray(tensor)
