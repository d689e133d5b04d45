"""Plans as small JSON: channels as bits, masks as tensors of the file beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .edits import Edit, MaskWeights, RemoveChannels, edit_from_dict, slice_from_dict
from .errors import PlanError, StorageError
from .packing import pack_indices, pack_mask, unpack_indices, unpack_mask
from .plan import Plan

MOST_EDITS = 10_000


def compact(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan as a JSON object, and the tensors that hold its masks.

    It is ``Plan.to_json`` but for two kinds of edits. ``remove_channels``: indices are text, a bit per channel (see
    :func:`packing.pack_indices`), and a slice without them has those of the edit. ``mask_weights``: ``kept`` is
    ``{"form": "bitmap" or "gaps", "tensor": name}`` (see :func:`packing.pack_mask`).
    """
    tensors: dict[str, Tensor] = {}
    edits: list[dict[str, Any]] = []
    for number, edit in enumerate(plan.edits):
        data = edit.to_dict()
        if isinstance(edit, RemoveChannels):
            own = next(s for s in edit.slices if (s.module, s.side) == (edit.layer, "out"))
            data["indices"] = pack_indices(edit.indices, own.width)
            for piece, entry in zip(edit.slices, data["slices"], strict=True):
                del entry["indices"]
                if (piece.indices, piece.width) != (edit.indices, own.width):
                    entry["indices"] = pack_indices(piece.indices, piece.width)
        elif isinstance(edit, MaskWeights):
            form, packed = pack_mask(edit.mask().numpy().reshape(-1))
            data["kept"] = {"form": form, "tensor": f"plan.{number}"}
            tensors[f"plan.{number}"] = torch.from_numpy(packed)
        edits.append(data)
    return {**json.loads(Plan((), plan.whole, plan.origin).to_json()), "edits": edits}, tensors


def expanded(data: Any, tensors: Mapping[str, Tensor], largest: int) -> Plan:
    """The plan; no weight of the network has more than ``largest`` elements. Raises PlanError or StorageError."""
    try:
        edits = data["edits"]
        if len(edits) > MOST_EDITS:
            raise StorageError(f"The file's plan has {len(edits):,} edits; at most {MOST_EDITS:,} are read.")
        rest = Plan.from_json(json.dumps({**data, "edits": []}))
        return Plan(tuple(_edit(edit, tensors, largest) for edit in edits), rest.whole, rest.origin)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StopIteration) as error:
        raise PlanError(f"The file's plan is damaged: {type(error).__name__}: {error}") from error


def _edit(data: dict[str, Any], tensors: Mapping[str, Tensor], largest: int) -> Edit:
    if data["edit"] == RemoveChannels.kind:
        return _removal(data)
    if data["edit"] == MaskWeights.kind:
        size = math.prod(data["shape"])
        if not 0 <= size <= largest:
            raise PlanError(f"{data['layer']}: a mask of {size} weights; the network's largest layer has {largest}.")
        kept = unpack_mask(data["kept"]["form"], _bytes(tensors[data["kept"]["tensor"]]), size)
        return MaskWeights.of(data["layer"], torch.from_numpy(kept).view(data["shape"]))
    return edit_from_dict(data)


def _removal(data: dict[str, Any]) -> RemoveChannels:
    layer, entries = data["layer"], data["slices"]
    own = next(entry for entry in entries if (entry["module"], entry["side"]) == (layer, "out"))
    indices = tuple(unpack_indices(data["indices"], own["width"]))
    slices = []
    for entry in entries:
        piece = slice_from_dict({**entry, "indices": []})
        found = tuple(unpack_indices(entry["indices"], piece.width)) if "indices" in entry else indices
        slices.append(dataclasses.replace(piece, indices=found))
    return RemoveChannels(layer, indices, tuple(slices))


def _bytes(tensor: Tensor) -> Any:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise PlanError(f"A mask is stored as bytes, not as {tensor.dtype} {list(tensor.shape)}.")
    return np.asarray(tensor)
