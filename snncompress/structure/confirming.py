"""The last trial, of the channels that were chosen: code that counts or names them may have borne others by chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.model.copying import plain_copy
from snncompress.model.network import Network
from snncompress.running.data import Run
from snncompress.running.precision import full_precision

from .elimination import sound_together
from .trial import Flaw, Removal, Trial

Confirm = Callable[[nn.Module, list[Removal]], dict[int, str]]
"""A model as it stands, and what is to be removed from it → by the id of each group that must stay, why."""

_MOST = 64  # trials, in search of the groups at fault


def confirming(adapter: Adapter, run: Run, network: Network) -> Confirm:
    """What tells which removals aren't the same as silencing: none as a rule, which takes one trial."""

    def confirm(model: nn.Module, removals: list[Removal]) -> dict[int, str]:
        refused: dict[int, str] = {}
        if not removals:
            return refused
        with torch.inference_mode(False), full_precision():
            generator = torch.Generator().manual_seed(1)
            copy = plain_copy(model, adapter)
            trial = Trial(copy, adapter, run, network.direct, generator, network.modes, shared=network.shared)
            sound_together(removals, _bounded(trial), lambda group, why: refused.update({id(group): why}))
        return refused

    return confirm


def _bounded(trial: Trial) -> Callable[[list[Removal]], Flaw | None]:
    """The trial's difference, for so many times."""
    count = 0

    def difference(removals: list[Removal]) -> Flaw | None:
        nonlocal count
        count += 1
        flaw = trial.difference(removals)
        if flaw is not None and count > _MOST:
            raise ModelError(
                f"Without the channels that were chosen the compressed {type(trial.model).__name__} is not the "
                f"original with these channels silent, and {_MOST} trials didn't show which layers must keep theirs: "
                f"{flaw.why}. Likely cause: its forward counts on which channels are left. Name the layers concerned "
                f"in skip=."
            )
        return flaw

    return difference
