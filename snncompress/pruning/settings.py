"""What one call of apply() was asked for: names resolved, options checked, and how a plan remembers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import nn

from snncompress.contract.registry import registry
from snncompress.errors import OptionError, PluginError
from snncompress.interfaces import BlockCriterion, Criterion, Granularity, Quantizer, Scheduler, Scope, Signal, Target
from snncompress.model.edits import FoldNorm
from snncompress.version import __version__

from .fitting import RepairKind, Rounding
from .repair import check_rounding
from .states import FLOAT_STATES, StateSettings

Finetune = int | Callable[[nn.Module], object] | None
Truncate = Literal["auto"] | int | None
Repair = RepairKind | Literal["reinit"] | None
RepairChoice = Repair | Literal["auto"]


@dataclass(frozen=True)
class Settings:
    """The options of :func:`snncompress.apply`; raises OptionError for what can't be.

    ``ratio`` and ``bits`` are as the user wrote them: which layers they are about shows the network.
    """

    criterion: Criterion | None
    ratio: Any
    bits: Any
    quantizer: Quantizer
    scheduler: Scheduler
    order: str
    finetune: Finetune
    seed: int
    truncate: Truncate
    repair: Repair
    rounding: Rounding
    refresh: bool
    synthetic: bool
    round_to: int = 1
    at_most: bool = False
    """Is ``ratio`` the most that may go?"""
    spared: Mapping[str, str] = field(default_factory=dict)
    """Layer → why nothing goes from it, where that isn't what ``ratio`` was asked for."""
    growth: Criterion | None = None
    """By what that which is masked comes back, where the scheduler has it come back."""
    chip: Target | None = None
    """What the result must fit on."""
    folds: tuple[FoldNorm, ...] = ()
    """Batch norms that were folded for it."""
    plain_quantizer: bool = True
    """Was the quantizer named, so that its options are for us to choose?"""
    states: StateSettings = FLOAT_STATES
    """How the neurons' states are kept."""

    @classmethod
    def of(
        cls, criterion: str | Criterion | None, ratio: Any, bits: Any, quantizer: str | Quantizer,
        scheduler: str | Scheduler, order: str, finetune: Finetune, seed: int, truncate: Truncate,
        repair: RepairChoice, rounding: Rounding, refresh: bool, synthetic: bool, round_to: int = 1,
        target: str | Target | None = None,
        states: StateSettings = FLOAT_STATES,
    ) -> Settings:  # fmt: skip
        """Names become instances with default options; the data, which may be ``synthetic``, settle what "auto" is."""
        find = registry().resolve
        chosen = None if criterion is None else find("criterion", criterion, Criterion)
        codec, schedule = find("quantizer", quantizer, Quantizer), find("scheduler", scheduler, Scheduler)
        word = resolve_repair(repair, chosen, synthetic=synthetic)
        growth = None if chosen is None else _growth(schedule, chosen, finetune)
        return cls(
            chosen, ratio, bits, codec, schedule, order, finetune, seed, truncate, word, rounding, refresh, synthetic,
            round_to, growth=growth, chip=None if target is None else find("target", target, Target),
            plain_quantizer=isinstance(quantizer, str), states=states,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise OptionError(f"round_to must be a whole number from 1, not {self.round_to!r}.")
        _check_run(self.order, self.finetune, self.seed, self.truncate)
        check_rounding(self.rounding)
        _check_refresh(self.refresh, synthetic=self.synthetic)
        if self.criterion is not None:
            _check_criterion(self.criterion)

    def settled(self) -> Settings:
        """With the ratio that counts where none was named and no budget has found one."""
        if self.bits == "auto":
            raise OptionError("bits='auto' finds the bits for a budget of size: budget={'size': …} or {'size_mb': …}.")
        return self if self.ratio is not None else replace(self, ratio=0.6, at_most=True)

    @property
    def granularity(self) -> Granularity:
        """Of the criterion; of channels where there is none."""
        return "channel" if self.criterion is None else self.criterion.granularity

    @property
    def fits(self) -> RepairKind | None:
        """How the weights that are left are fitted; None: not at all."""
        return fitting(self.repair)

    @property
    def prunes(self) -> bool:
        """Was anything asked to be removed?"""
        some = any(self.ratio.values()) if isinstance(self.ratio, Mapping) else self.ratio > 0  # settled by then
        return self.criterion is not None and bool(some)

    @property
    def needs_labels(self) -> str:
        """Why labels are needed; empty where they aren't."""
        if self.criterion is not None and "gradients" in self.criterion.needs:
            return f"criterion {self.criterion.name!r} needs labels"
        if self.growth is not None and "gradients" in self.growth.needs:
            return f"scheduler {self.scheduler.name!r}, which brings back by gradients, needs labels"
        return "finetune needs labels" if isinstance(self.finetune, int) and self.finetune > 0 else ""

    def origin(self, framework: str) -> dict[str, Any]:
        """Plain JSON values: where a plan came from."""
        finetune = self.finetune if isinstance(self.finetune, int) else None if self.finetune is None else "callable"
        return {
            "snncompress": __version__,
            "torch": torch.__version__,
            "framework": framework,
            "criterion": _named(self.criterion),
            "ratio": _plain(self.ratio),
            "bits": _plain(self.bits),
            "quantizer": _named(self.quantizer),
            "scheduler": _named(self.scheduler),
            "order": self.order,
            "finetune": finetune,
            "seed": self.seed,
            "data": "synthetic" if self.synthetic else "given",
            "truncate": self.truncate,
            "repair": self.repair,
            **({"rounding": self.rounding} if self.fits and self.bits is not None else {}),
            **({"refresh": True} if self.refresh else {}),
            **({"round_to": self.round_to} if self.round_to > 1 else {}),
            **({"target": _named(self.chip)} if self.chip else {}),
            **self.states.origin(),
        }


def _growth(scheduler: Scheduler, criterion: Criterion, finetune: Finetune) -> Criterion | None:
    """The criterion by which the scheduler brings back what this one lets go; None where it doesn't."""
    if not scheduler.grows:
        return None
    name = scheduler.grows.get(criterion.granularity)
    if name is None:
        grown = " or ".join(f"single {kind}s" if kind == "weight" else f"{kind}s" for kind in scheduler.grows)
        raise OptionError(
            f"Scheduler {scheduler.name!r} brings back {grown}, and criterion {criterion.name!r} removes "
            f"{criterion.granularity}s. Take another schedule, such as 'gradual'."
        )
    if not finetune:
        raise OptionError(
            f"Scheduler {scheduler.name!r} lets what it brings back prove itself in training between its steps, and "
            f"there is none: pass finetune=, a number of epochs or a callable, or take 'gradual', which brings back "
            f"nothing."
        )
    found: Criterion = registry().resolve("criterion", name, Criterion)
    if found.granularity != criterion.granularity:
        raise PluginError(
            f"Scheduler {scheduler.name!r} brings back {criterion.granularity}s by {name!r}, which scores a "
            f"{found.granularity!r}."
        )
    return found


def resolve_repair(repair: RepairChoice, criterion: Criterion | None, *, synthetic: bool = False) -> Repair:
    """What "auto" is with these data; raises OptionError for what can't be with this criterion."""
    if repair == "auto":
        return None if synthetic else "membrane"
    if repair not in ("reinit", None, *get_args(RepairKind)):
        raise OptionError(
            f"repair must be 'auto', 'membrane', 'current', None or, for blocks, 'reinit', not {repair!r}."
        )
    if repair == "reinit" and not isinstance(criterion, BlockCriterion):
        what = "there is no criterion" if criterion is None else f"criterion {criterion.name!r} removes no blocks"
        raise OptionError(
            f"repair='reinit' draws new weights for the layers behind a removed block, and {what}. Take 'membrane', "
            f"'current' or None."
        )
    return repair


def _check_refresh(refresh: Any, *, synthetic: bool) -> None:
    if not isinstance(refresh, bool):
        raise OptionError(f"refresh must be True or False, not {refresh!r}.")
    if refresh and synthetic:
        raise OptionError("refresh=True takes the statistics of batch norms from data: pass them as data=.")


def fitting(repair: Repair) -> RepairKind | None:
    """How this word has weights fitted; None: not at all."""
    return None if repair == "reinit" else repair


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def _named(plugin: Any) -> dict[str, Any] | None:
    return None if plugin is None else {"name": plugin.name, "options": plugin.options()}


def _check_run(order: Any, finetune: Any, seed: Any, truncate: Any) -> None:
    if order not in ("qp", "pq"):
        raise OptionError(f"order must be 'qp' (quantize, then prune) or 'pq', not {order!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
    if truncate not in (None, "auto") and (isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1):
        raise OptionError(f"truncate must be None, 'auto' or a number of timesteps, not {truncate!r}.")
    if not (finetune is None or callable(finetune)) and (
        isinstance(finetune, bool) or not isinstance(finetune, int) or finetune < 0
    ):
        raise OptionError(f"finetune must be None, a number of epochs or callable(model), not {finetune!r}.")


def _check_criterion(criterion: Criterion) -> None:
    known = ("block",) if isinstance(criterion, BlockCriterion) else ("channel", "weight")
    if criterion.granularity not in known:
        raise OptionError(
            f"Criterion {criterion.name!r} has granularity {criterion.granularity!r}; a Criterion scores a 'channel' "
            f"or a 'weight', a BlockCriterion a 'block'."
        )
    if criterion.scope not in get_args(Scope):
        raise OptionError(f"Criterion {criterion.name!r}: scope must be 'layer' or 'global', not {criterion.scope!r}.")
    if unknown := criterion.needs - set(get_args(Signal)):
        known_signals = ", ".join(map(repr, get_args(Signal)))
        raise OptionError(f"Criterion {criterion.name!r} needs {sorted(unknown)}; known are {known_signals}.")
    if "readers" in criterion.needs and criterion.granularity != "channel":
        raise OptionError(
            f"Criterion {criterion.name!r} needs 'readers', those of a channel, and scores a {criterion.granularity!r}."
        )
