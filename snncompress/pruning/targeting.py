"""``apply(target=…)``: a chip's limits as settings, and as constraints of the allocation of channels.

Batch norms are folded where the chip has one scale per layer, weights get bits and a grid that it holds, and channels
go where its memories are too small. What it needs of each is asked of the target itself, for the widths that would be
left; so rules that no formula here knows, such as memories filled to powers of two, are kept exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import OptionError, SNNCompressError
from snncompress.interfaces import Criterion, Quantizer, Stage, Target
from snncompress.measuring.counting import FLOAT_BITS
from snncompress.measuring.fits import fitted, judged, limits_of, staged, too_much
from snncompress.model.edits import FoldNorm
from snncompress.model.grids import Grid
from snncompress.model.parametrizations import compression_of, computed_weight
from snncompress.running.bench import Bench
from snncompress.structure.folding import foldable
from snncompress.structure.stages import signed_bits

from .allocation import Costs, Part
from .selection import Target as Group
from .selection import check_bits, named_layers, per_layer
from .settings import Settings
from .states import StateSettings, kept_states

_MOST_BITS = 16


def prepared(table: Bench[Any], settings: Settings, skip: Any) -> tuple[Settings, Any]:
    """The settings, and what is skipped, as the chip wants them; batch norms of the bench's model are folded.

    Raises OptionError for what no compression can bring about.
    """
    chip = settings.chip
    if chip is None:
        return settings, skip
    folds = _folded(table) if chip.scales == "layer" else ()
    found = staged(table, known=not settings.synthetic)
    lasting = fitted(chip, _single(found))
    if lasting.steps:
        raise _refused(chip, lasting.steps)
    quantizer = settings.quantizer
    if chip.scales == "layer" and settings.plain_quantizer and getattr(quantizer, "per_channel", False):
        quantizer = dataclasses.replace(quantizer, per_channel=False)  # type: ignore[type-var]
    bits = _bits(chip, found, settings, quantizer)
    if skip is None:
        skip = {"prune": []}
    if bits is not None:
        skip = _in_full(chip, skip, bits)
    bits = settings.bits if bits is None else bits or None
    states = _states(chip, table, settings, found)
    return dataclasses.replace(settings, quantizer=quantizer, bits=bits, folds=folds, states=states), skip


def _states(chip: Target, table: Bench[Any], settings: Settings, found: Sequence[Stage]) -> StateSettings:
    """With as many bits for states as the chip has, where none were asked for and all neurons can be given them.

    Thresholds lie on the same grid, so it is the fewer of the two. Where layers have one scale, it is their
    neurons', too.
    """
    asked = settings.states.bits
    most = min((bits for bits in (chip.state_bits, chip.threshold_bits) if bits is not None), default=None)
    if most is None or settings.synthetic or not (asked is None or isinstance(asked, int)):
        return settings.states
    bits = most if asked is None else min(asked, most)
    if asked is None:
        try:
            kept_states(table.model, table.feed, dict.fromkeys(table.adapter.neurons(table.model), bits))
        except SNNCompressError:  # they stay floats, as the verdict says
            return settings.states
    shared = _averaged(found) if asked is None and chip.scales == "layer" else None
    return dataclasses.replace(settings.states, bits=bits, shared=shared)


def _averaged(found: Sequence[Stage]) -> dict[str, float]:
    """Of how many spikes each layer's inputs are averages; those that read several kinds are missing."""
    windows = {
        stage.name: math.prod(math.prod(pool.size) for pool in stage.pooling if pool.kind == "average")
        for stage in found
    }
    read = {stage.name: {windows[name] for name in stage.reads} or {1} for stage in found}
    return {name: float(next(iter(counts))) for name, counts in read.items() if len(counts) == 1}


def confirmed(table: Bench[Any], model: nn.Module, settings: Settings) -> None:
    """Raise OptionError unless the finished network fits the chip."""
    if settings.chip is None:
        return
    table = dataclasses.replace(table, model=model)
    found = fitted(settings.chip, staged(table, known=not settings.synthetic))
    if not found:
        raise _refused(settings.chip, found.steps)


def _refused(chip: Target, steps: Sequence[str]) -> OptionError:
    listed = "; ".join(steps)
    return OptionError(
        f"target {chip.name!r} can't be met. What is left to do: {listed}. Compression alone doesn't change these; "
        f"snncompress.fits(model, {chip.name!r}) shows all limits."
    )


def _too_large(chip: Target, steps: Sequence[str], criterion: Criterion | None) -> OptionError:
    cause = "too little may go. ratio= says how much of a layer may go at most, skip= what stays whole"
    if criterion is None:
        cause = "criterion=None removes nothing. Name one that removes channels"
    elif criterion.granularity != "channel":
        cause = (
            f"criterion {criterion.name!r} removes single weights, and layers stay as wide as they are. Name one that "
            f"removes channels"
        )
    return OptionError(
        f"target {chip.name!r} can't be met: with all gone that may go, this is too much still: "
        f"{'; '.join(steps)}. Likely cause: {cause}."
    )


def _single(found: Sequence[Stage]) -> list[Stage]:
    """The stages at their narrowest, and floats at their lightest: what they need then, they need in any case."""
    return [
        dataclasses.replace(
            stage,
            out_channels=1 if stage.feeds else stage.out_channels,
            in_channels=1 if stage.reads else stage.in_channels,
            weight_bits=1 if stage.weight_bits == FLOAT_BITS else stage.weight_bits,
        )
        for stage in found
    ]


def _folded(table: Bench[Any]) -> tuple[FoldNorm, ...]:
    """Fold the batch norms of the bench's model behind layers that aren't compressed yet, in place."""
    model = table.model
    modes = {name: module.training for name, module in model.named_modules()}
    copy = table.copy().eval()
    plain = [
        (layer, norm)
        for layer, norm in foldable(copy, table.adapter, table.feed.example())
        if compression_of(model.get_submodule(layer)) is None and not computed_weight(model.get_submodule(layer))
    ]
    folds = tuple(FoldNorm(layer, norm) for layer, norm in plain)
    for fold in folds:
        fold.apply(model, table.adapter)
    for name, module in model.named_modules():
        module.training = modes[name]
    return folds


def _bits(chip: Target, found: Sequence[Stage], settings: Settings, quantizer: Quantizer) -> dict[str, int] | None:
    """The bits of every layer, as many as were asked for where the chip holds them; None where it holds floats."""
    most = {stage.name: _widest(chip, stage, quantizer) for stage in found}
    if all(bits is None for bits in most.values()):
        return None
    if settings.bits == "auto":
        raise OptionError(
            "bits='auto' and target= can't be combined: give bits=, and the chip lowers them where it must."
        )
    asked: dict[str, int | None] = per_layer(settings.bits, list(most), "bits", check_bits)
    ends = {found[0].name, *(stage.name for stage in found if not stage.feeds)}
    quantized = {s.name for s in found if s.weight_bits < FLOAT_BITS}
    bits: dict[str, int] = {}
    for name, limit in most.items():
        if limit is None or name in quantized:
            continue
        wanted = asked.get(name)
        spared = not isinstance(settings.bits, Mapping) and name in ends  # by default they are kept in full
        bits[name] = limit if wanted is None or spared else min(wanted, limit)
    return bits


def _in_full(chip: Target, skip: Any, bits: Mapping[str, int]) -> Any:
    """``skip`` so that nothing stays at 32 bits that the chip doesn't hold so; raises OptionError where it says so."""
    if isinstance(skip, Mapping) and "quantize" not in skip:
        return {**skip, "quantize": []}
    named = named_layers(skip["quantize"] if isinstance(skip, Mapping) else skip, list(bits))
    if named:
        raise OptionError(
            f"target {chip.name!r} holds weights of few bits alone, and skip= leaves {', '.join(map(repr, named))} at "
            f"32. To keep channels and quantize all the same, skip={{'prune': {list(named)}}}."
        )
    return skip


def _widest(chip: Target, stage: Stage, quantizer: Quantizer) -> int | None:
    """The most bits of this quantizer that the chip holds; None where it holds floats."""

    least = sum(not limit.met for limit in limits_of(chip, dataclasses.replace(stage, weight_bits=1, scales=None)))

    def held(bits: int) -> bool:
        trial = dataclasses.replace(stage, weight_bits=bits, scales=None)
        return sum(not limit.met for limit in limits_of(chip, trial)) <= least

    if held(FLOAT_BITS):
        return None
    for bits in range(_MOST_BITS, 0, -1):
        _, scale, zero_point, _ = quantizer.tensor_quant(bits).eval()(torch.linspace(-1, 1, 8).view(2, 4))
        if held(signed_bits(Grid(scale.detach(), float(zero_point), bits))):
            return bits
    raise OptionError(f"target {chip.name!r} holds no weight of {quantizer.name!r}, not even of 1 bit.")


@dataclass(frozen=True)
class Chip:
    """What a network must fit on, its stages as they are, and what says which channels go."""

    target: Target
    found: Sequence[Stage]
    criterion: Criterion | None

    def costs(self, costs: Costs, groups: Sequence[Group]) -> OnChip:
        """With what the chip is asked for."""
        return OnChip(costs, self.target, self.found, groups)

    def check(self, costs: OnChip | None = None) -> None:
        """Raise OptionError where it is too large with what is gone."""
        steps = too_much(self.target, self.found if costs is None else costs.stages())
        if steps:
            raise _too_large(self.target, steps, self.criterion)


class OnChip(Costs):
    """Costs, and behind them what a chip is asked for: stage by stage, limit by limit, each a share of what it has.

    Args:
        costs: what else is limited.
        chip: the target.
        found: the stages of the network as it is.
        groups: what may go.
    """

    def __init__(self, costs: Costs, chip: Target, found: Sequence[Stage], groups: Sequence[Group]) -> None:
        super().__init__(costs.table, costs.out, costs.into, costs.by_bit, costs.sized)
        self._chip, self._found = chip, found
        stages = {stage.name: stage for stage in found}
        self._members: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
        for number, target in enumerate(groups):
            for member in target.group.members:
                if member.module in stages and member.side in ("out", "in"):
                    stage, each = stages[member.module], member.index.shape[1]
                    places = math.prod(stage.kernel_size) if member.side == "in" and stage.kind == "linear" else 1
                    self._members[stage.name].append((number, member.side, each / places))
        self._known: dict[tuple[float, ...], dict[tuple[str, str], float]] = {}
        self.keys = tuple(self._needs(self.gone))

    def total(self) -> Tensor:
        """[kinds + limits]."""
        return torch.cat([super().total(), self._vector(self.gone)])

    def saved(self, parts: Sequence[Part]) -> Tensor:
        """[parts, kinds + limits]: of a limit the mean over all steps that are left, as it may fall in jumps."""
        now = self._vector(self.gone)
        rows = []
        for part in parts:
            left, gone = len(part.losses) - part.gone, self.gone.clone()
            for group, size in part.sizes.items():
                gone[group] += left * size
            rows.append((now - self._vector(gone)) / max(1, left))
        return torch.cat([super().saved(parts), torch.stack(rows)], 1)

    def stages(self) -> list[Stage]:
        """The stages with what is gone gone."""
        return narrower(self._found, self._members, self.gone)

    def _vector(self, gone: Tensor) -> Tensor:
        needs = self._needs(gone)
        return torch.tensor([needs.get(key, 0.0) for key in self.keys], dtype=torch.float64)

    def _needs(self, gone: Tensor) -> dict[tuple[str, str], float]:
        key = tuple(gone.tolist())
        if key not in self._known:
            self._known[key] = self._asked(narrower(self._found, self._members, gone))
        return self._known[key]

    def _asked(self, found: Sequence[Stage]) -> dict[tuple[str, str], float]:
        rows, _ = judged(self._chip, found)
        needs: dict[tuple[str, str], float] = {}
        missing = 0
        for row in rows:
            limit, key = row.limit, (row.layer, row.limit.what)
            if limit.remedy or isinstance(limit.needs, str) or isinstance(limit.has, str):
                continue  # channels that go don't help
            if limit.has:
                needs[key] = max(needs.get(key, 0.0), limit.needs / limit.has)
            else:
                missing += not limit.met
        return {**needs, ("", "what there is none of"): 1.0 + missing}


def narrower(
    found: Sequence[Stage], members: Mapping[str, Collection[tuple[int, str, float]]], gone: Tensor
) -> list[Stage]:
    """The stages with so many channels of each group gone; members are (group, side, channels of the stage each)."""
    left = []
    for stage in found:
        lost = {"out": 0.0, "in": 0.0}
        for number, side, each in members.get(stage.name, ()):
            lost[side] += float(gone[number]) * each
        left.append(
            dataclasses.replace(
                stage,
                out_channels=max(1, round(stage.out_channels - lost["out"])),
                in_channels=max(1, round(stage.in_channels - lost["in"])),
            )
        )
    return left
