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

from .edits import Edit, MaskWeights, QuantizeWeights, RemoveChannels, edit_from_dict, slice_from_dict
from .errors import PlanError, StorageError
from .packing import pack_indices, pack_mask, unpack_indices, unpack_mask
from .plan import Plan

MOST_EDITS = 10_000


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
            data["kept"] = {"form": form, "tensor": f"plan.{number}"}
            tensors[f"plan.{number}"] = torch.from_numpy(packed)
        elif isinstance(edit, QuantizeWeights):
            data["layers"] = [data.pop("layer")]
            if edits and {**edits[-1], "layers": None} == {**data, "layers": None}:
                edits[-1]["layers"] += data["layers"]
                continue
        edits.append(data)
    return {**json.loads(Plan((), plan.whole, plan.origin).to_json()), "edits": edits}, tensors


def expanded(data: Any, tensors: Mapping[str, Tensor], largest: int) -> Plan:
    """The plan; no weight of the network has more than ``largest`` elements. Raises PlanError or StorageError."""
    try:
        rest = Plan.from_json(json.dumps({**data, "edits": []}))
        edits = list(islice(_edits(data["edits"], tensors, largest), MOST_EDITS + 1))
        if len(edits) > MOST_EDITS:
            raise StorageError(f"The file's plan has more than {MOST_EDITS:,} edits, the most that are read.")
        return Plan(tuple(edits), rest.whole, rest.origin)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise PlanError(f"The file's plan is damaged: {type(error).__name__}: {error}") from error


def _edits(edits: list[dict[str, Any]], tensors: Mapping[str, Tensor], largest: int) -> Iterator[Edit]:
    for data in edits:
        if data["edit"] == RemoveChannels.kind:
            yield _removal(data)
        elif data["edit"] == MaskWeights.kind:
            size = math.prod(data["shape"])
            if not 0 <= size <= largest:
                raise PlanError(f"{data['layer']}: a mask of {size} weights; the network's largest has {largest}.")
            kept = unpack_mask(data["kept"]["form"], _bytes(tensors[data["kept"]["tensor"]]), size)
            yield MaskWeights.of(data["layer"], torch.from_numpy(kept).view(data["shape"]))
        elif data["edit"] == QuantizeWeights.kind:
            for layer in data["layers"]:
                yield edit_from_dict({**data, "layer": layer})
        else:
            yield edit_from_dict(data)


def _compact_removal(edit: RemoveChannels) -> dict[str, Any]:
    width = next(s.width for s in edit.slices if (s.module, s.side) == (edit.layer, "out"))
    slices: list[list[Any]] = []
    for piece in edit.slices:
        slices.append([piece.module, piece.side, piece.width, piece.axis])
        if (piece.indices, piece.width) != (edit.indices, width):
            slices[-1].append(pack_indices(piece.indices, piece.width))
    indices = pack_indices(edit.indices, width)
    return {"edit": edit.kind, "layer": edit.layer, "width": width, "indices": indices, "slices": slices}


def _removal(data: dict[str, Any]) -> RemoveChannels:
    indices = tuple(unpack_indices(data["indices"], data["width"]))
    slices = []
    for module, side, width, axis, *own in data["slices"]:
        piece = slice_from_dict({"module": module, "side": side, "width": width, "axis": axis, "indices": []})
        found = tuple(unpack_indices(own[0], width)) if own else indices
        slices.append(dataclasses.replace(piece, indices=found))
    if not any((s.module, s.side, s.width) == (data["layer"], "out", data["width"]) for s in slices):
        raise PlanError(f"A removal of channels of {str(data['layer'])[:80]!r} doesn't list that layer.")
    return RemoveChannels(data["layer"], indices, tuple(slices))


def _bytes(tensor: Tensor) -> Any:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise PlanError(f"A mask is stored as bytes, not as {tensor.dtype} {list(tensor.shape)}.")
    return np.asarray(tensor)
