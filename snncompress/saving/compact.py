"""Plans as small JSON: each edit packs itself, with masks as tensors of the file beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from snncompress.errors import PlanError, StorageError
from snncompress.model.edits import Budget, Edit
from snncompress.model.edits.base import KINDS
from snncompress.model.plan import Plan

MOST_EDITS = 10_000
MASK = ".plan."
"""How names of mask tensors begin: no name in a state_dict begins with a dot."""


def compact(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan as a JSON object, and the tensors that hold its masks; docs/format.md describes both."""
    tensors: dict[str, Tensor] = {}
    edits: list[dict[str, Any]] = []
    for number, edit in enumerate(plan.edits):
        data = edit.packed(f"{MASK}{number}", tensors)
        if not (edits and edits[-1]["edit"] == edit.kind and edit.merged(edits[-1], data)):
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
        yield from KINDS[data["edit"]].unpacked(data, tensors, budget)
