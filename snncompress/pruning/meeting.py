"""Finds the ratios, and the bits, with which a network keeps to a budget: guessed, tried, and corrected."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snncompress.base.display import number as shown
from snncompress.base.progress import Progress
from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import EnergyModel, Quantizer, Scheduler
from snncompress.measuring.conventions import Conventions, resolve_conventions
from snncompress.measuring.fits import staged
from snncompress.measuring.profiling import measure
from snncompress.measuring.reporting import Profile
from snncompress.model.cells import layer_at
from snncompress.model.network import Network, outputs_first, portions, width
from snncompress.model.parametrizations import float_weight
from snncompress.running.bench import Bench

from .allocation import Costs, Part, allocate, losses_of
from .budgets import KINDS, Budget
from .run import Run
from .selection import Target, combined
from .settings import Settings
from .steps import ChannelPruning, WeightPruning
from .targeting import Chip

WIDTHS = range(2, 9)
"""Bit widths among which "auto" chooses."""
_TRIES = 6
_CEILING = 0.95
_NOTHING = Profile((), Conventions(), "", 0, 0)
"""Of a network whose costs aren't asked for."""
_NARROWER = 0.9
_CLOSE, _AIM = 0.98, 0.99
"""Of a budget that much must be used up, where what can go comes in pieces small enough, and is aimed at."""


def within(budget: Budget, table: Bench[Any], settings: Settings, skip: Any, progress: Progress | None) -> Settings:
    """The settings with ratios, and bits where they are "auto", whose result keeps to the budget.

    Without ``ratio`` up to 95 % of a layer's channels may go, otherwise up to ``ratio``. What depends on spikes is
    measured on networks that are compressed, and repaired, in one step and not trained.

    Raises OptionError where the budget can't be met.
    """
    meeting = Meeting(budget, table, settings, skip, progress)
    if not budget.kinds:
        return meeting.settings if settings.chip is None else meeting.for_the_chip()
    most = budget.most(meeting.before)
    found, used = meeting.meet(most)
    if used > 1:
        raise not_met(most, used)
    return found


def not_met(most: Mapping[str, float], used: float) -> OptionError:
    """For a budget of which the least that was ``used`` is more than 1."""
    return OptionError(
        f"The budget can't be met: {_told(most)} was asked for, and the least that was reached is "
        f"{_told({kind: most[kind] * used for kind in most})}. Likely cause: too little may go. ratio= says how much "
        f"of a layer may go at most, skip= what stays whole, bits= how many bits are left; and what spikes cost falls "
        f"with timesteps."
    )


class Meeting:
    """Finds the settings of one network for limits on the kinds of costs that a budget names; scores it once."""

    def __init__(
        self, budget: Budget, table: Bench[Any], settings: Settings, skip: Any, progress: Progress | None
    ) -> None:
        if budget.timesteps is not None:
            settings = replace(settings, truncate=_timesteps(budget.timesteps, table))
        if settings.bits == "auto" and "size" not in budget.kinds:
            raise OptionError("bits='auto' finds the bits for a budget of 'size' (or 'size_mb'), and there is none.")
        self.settings, self._table, self._skip, self._progress = settings, table, skip, progress
        if not budget.kinds and settings.chip is None:
            return
        self.before = measured(table.copy(), table) if budget.kinds else _NOTHING
        one_shot = registry().resolve("scheduler", "one_shot", Scheduler)
        self._trying = replace(settings, finetune=None, scheduler=one_shot)
        if not budget.measured:
            self._trying = replace(self._trying, repair=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run that counts will say it
            self._guess = _guess(table, self._trying, skip, self.before, budget.kinds)

    def for_the_chip(self) -> Settings:
        """Those with which nothing but the chip is kept to, which can be told without running what comes of them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, _ = self._guess({})
        return replace(self.settings, **found)

    def meet(self, most: Mapping[str, float]) -> tuple[Settings, float]:
        """Those with which each kind comes to at most so much, or near to it, and which share of that is then used."""
        goals, over = most, dict.fromkeys(most, 0.0)
        known: dict[str, list[tuple[float, float]]] = {kind: [] for kind in most}
        best: tuple[float, dict[str, Any]] = math.inf, {}
        tried: list[dict[str, Any]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(_TRIES):
                found, enough = self._guess(goals)
                while found in tried and enough and best[0] > 1:  # what goes goes in pieces: these goals are too near
                    goals = {kind: goal * _NARROWER if over[kind] > 1 else goal for kind, goal in goals.items()}
                    found, enough = self._guess(goals)
                if found in tried:
                    break
                tried.append(found)
                run = Run(
                    self._table.copy(), self._table.feed, replace(self._trying, **found), self._skip, self._progress
                )
                run.carry_out()
                now = measured(run.model, self._table)
                over = {kind: _share(KINDS[kind](now), most[kind]) for kind in most}
                used = max(over.values())
                if (used > best[0]) if max(used, best[0]) <= 1 else used < best[0]:
                    best = used, found
                if _CLOSE <= used <= 1 or (not enough and used > 1):
                    break
                for kind, goal in goals.items():
                    known[kind].append((goal, over[kind]))
                goals = {kind: _aim(known[kind], binding=over[kind] == used or over[kind] > 1) for kind in goals}
        return replace(self.settings, **best[1]), best[0]


def _aim(known: list[tuple[float, float]], *, binding: bool) -> float:
    """The next goal for a cost, from the goals so far and what share of the budget came of each.

    Between one that was too low and one that was too high where both are known.

    >>> _aim([(10.0, 1.2)], binding=True), _aim([(10.0, 1.2), (8.0, 0.9)], binding=True)  # 10 / 1.2, and 0.3 of the way
    (8.25, 8.6)
    """
    goal, share = known[-1]
    below, above = [k for k in known if k[1] <= 1], [k for k in known if k[1] > 1]
    if below and above:
        (low, less), (high, more) = max(below, key=lambda k: k[1]), min(above, key=lambda k: k[1])
        return low + (high - low) * (_AIM - less) / (more - less)
    return goal / max(share, 1e-12) * _AIM if binding else goal  # 0 where all fell silent


def _share(cost: float, most: float) -> float:
    """Of a budget; all of it where it is nothing, as that of a silent network, and nothing is used."""
    return cost / most if most else (math.inf if cost else 1.0)


def measured(model: Any, table: Bench[Any]) -> Profile:
    """What a network costs, on the data of the bench."""
    energy: EnergyModel = registry().resolve("energy model", "horowitz_45nm", EnergyModel)
    return measure(model, table.feed, energy, resolve_conventions(None))


def _told(costs: Mapping[str, float]) -> str:
    units = {"energy": " pJ", "size": " MB"}
    return ", ".join(f"{kind} {shown(cost)}{units.get(kind, '')}" for kind, cost in costs.items())


def _timesteps(asked: float, table: Bench[Any]) -> int:
    """A share of the T that there are, or a number."""
    if asked > 1 or asked == int(asked):
        return int(asked)
    steps = table.feed.steps(table.model) or table.feed.telling_timesteps
    if steps is None:
        raise OptionError(
            "budget['timesteps'] can't be a share here: the data don't tell how many there are. Give a number."
        )
    return max(1, math.floor(asked * steps))


Guess = Callable[[Mapping[str, float]], tuple[dict[str, Any], bool]]
"""What the costs may come to → settings that are expected to keep to it, and whether they are."""


def _guess(table: Bench[Any], settings: Settings, skip: Any, before: Profile, kinds: tuple[str, ...]) -> Guess:
    """With the ratios and bits, which layers these spare, and why those stay that no budget is about."""
    first, guess = _guesses(table, settings, skip, before, kinds)
    asking = " and ".join(what for what, there in (("budget", kinds), ("target", settings.chip)) if there)
    nothing = f"{asking} take nothing from it" if " " in asking else f"the {asking} takes nothing from it"

    def told(goals: Mapping[str, float]) -> tuple[dict[str, Any], bool]:
        found, enough = guess(goals)
        ratios = found["ratio"] if isinstance(found["ratio"], Mapping) else {}
        spared = {name: nothing for name, ratio in ratios.items() if not ratio}
        return {**found, "spared": {**first.skipped, **spared}}, enough

    return told


def _guesses(
    table: Bench[Any], settings: Settings, skip: Any, before: Profile, kinds: tuple[str, ...]
) -> tuple[Run[Any], Guess]:
    """The run from which as much goes as may, and what is guessed from it."""
    auto = settings.bits == "auto"
    ceiling = _CEILING if settings.ratio is None else settings.ratio
    first = Run(
        table.copy(),
        table.feed,
        replace(settings, ratio=ceiling, at_most=True, bits=WIDTHS[-1] if auto else settings.bits),
        skip,
        False,
    )
    quantized = first.quantized()
    errors = {name: _errors(first.model, name, settings.quantizer) for name in quantized} if auto else {}
    pruning = first.pruning
    found = () if settings.chip is None else staged(table, known=not settings.synthetic)
    chip = None if settings.chip is None else Chip(settings.chip, found, settings.criterion)
    if isinstance(pruning, WeightPruning):
        if chip is not None:
            chip.check()
        if not kinds:
            return first, lambda goals: ({"ratio": settings.ratio or 0.0}, True)
        return first, _shares(pruning, before, kinds)
    if pruning is not None and not isinstance(pruning, ChannelPruning):
        raise OptionError("A budget is met by removing channels, or single weights, and criterion= ranks whole blocks.")
    targets = [] if pruning is None else pruning.targets
    scores = {} if pruning is None or not targets else pruning.score(table.feed, settings.seed + 1, False)
    allocation = Allocation(first.model, first.network, targets, scores, before, kinds, quantized, errors, chip)
    return first, allocation.meet


def _shares(pruning: WeightPruning, before: Profile, kinds: tuple[str, ...]) -> Guess:
    """Of single weights the same share of what may go, everywhere: the criterion compares them."""
    for kind in kinds:
        if kind in ("params", "size"):
            raise OptionError(
                f"A budget of {kind!r} counts weights that are stored, and single weights that are removed still are. "
                f"Remove channels instead, or give a budget of 'energy', 'synops' or 'macs'."
            )

    def guess(goals: Mapping[str, float]) -> tuple[dict[str, Any], bool]:
        wanted = max(1 - goals[kind] / max(KINDS[kind](before), 1e-300) for kind in kinds)
        largest = max(pruning.ratios.values(), default=0.0)
        share = min(1.0, max(0.0, wanted) / largest) if largest else 0.0
        return {"ratio": {name: share * ratio for name, ratio in pruning.ratios.items()}}, wanted <= largest

    return guess


def _errors(model: Any, name: str, quantizer: Quantizer) -> Tensor:
    """‖W − Ŵ‖² / ‖W‖² of a layer at each of :data:`WIDTHS`."""
    layer = layer_at(model, name)
    weight = outputs_first(float_weight(layer), layer)
    values = [quantizer.tensor_quant(bits).to(weight.device).eval()(weight.clone())[0] for bits in WIDTHS]
    power = weight.double().square().sum().clamp_min(1e-300)
    return torch.stack([(value.double() - weight).square().sum() / power for value in values]).cpu()


class Allocation:
    """The ratios and bits of one network that meet a budget, as far as can be told without running what comes of them.

    Args:
        model: what is compressed, as it is.
        network: its structure.
        targets: what may go, each with the most of it as its ratio.
        scores: of the layers' channels.
        before: what the network costs.
        kinds: the costs that are limited.
        bits: of layers that are quantized.
        errors: of layers whose bits are to be found, see :func:`_errors`.
        chip: what it must fit on.
    """

    def __init__(
        self, model: Any, network: Network, targets: list[Target], scores: Mapping[str, Tensor], before: Profile,
        kinds: tuple[str, ...], bits: Mapping[str, int], errors: Mapping[str, Tensor], chip: Chip | None = None,
    ) -> None:  # fmt: skip
        self._chip = chip
        self._model, self._targets, self._scores, self._kinds = model, targets, scores, kinds
        self._layers, self._bits, self._errors = network.layers, bits, errors
        self._rows = [row for row in before.layers if row.n_params or row.n_ac or row.n_mac]
        self._at = {row.name: number for number, row in enumerate(self._rows)}
        self._sets = _together(targets, network)

    def meet(self, most: Mapping[str, float]) -> tuple[dict[str, Any], bool]:
        """``ratio`` and ``bits`` for the costs, and whether they are expected to keep to them."""
        costs = self._costs()
        channels, widths = [self._part(numbers) for numbers in self._sets], [self._width(name) for name in self._errors]
        limits = torch.tensor([most[kind] for kind in self._kinds], dtype=torch.float64)
        parts = [*channels, *widths]
        if self._chip is None:
            enough = allocate(parts, costs, limits)
        else:
            on_chip = self._chip.costs(costs, self._targets)
            enough = allocate(parts, on_chip, torch.cat([limits, torch.ones(len(on_chip.keys), dtype=torch.float64)]))
            self._chip.check(on_chip)
        ratios = {
            name: part.gone * part.sizes[index] / self._targets[index].original
            for numbers, part in zip(self._sets, channels, strict=True)
            for index in numbers
            for name in self._targets[index].group.names("out")
            if name in self._layers
        }
        found: dict[str, Any] = {"ratio": ratios or 0.0}
        if self._errors:
            found["bits"] = {name: WIDTHS[-1] - part.gone for name, part in zip(self._errors, widths, strict=True)}
        return found, enough

    def _costs(self) -> Costs:
        listed = [[KINDS[kind](row) for row in self._rows] for kind in self._kinds]
        table = torch.tensor(listed, dtype=torch.float64).view(len(self._kinds), len(self._rows))
        out = torch.zeros(len(self._rows), len(self._targets), dtype=torch.float64)
        into = torch.zeros_like(out)
        for number, target in enumerate(self._targets):
            for member in target.group.members:
                if member.module in self._at and member.side != "neuron":
                    share = member.index.shape[1] / width(layer_at(self._model, member.module), member.side)
                    (into if member.side == "in" else out)[self._at[member.module], number] = share
        by_bit = torch.zeros(len(self._rows), dtype=torch.float64)
        sized = self._kinds.index("size") if "size" in self._kinds else 0
        for name, bits in self._bits.items() if "size" in self._kinds else ():
            by_bit[self._at[name]] = self._rows[self._at[name]].n_weights / 8e6
            table[sized, self._at[name]] -= by_bit[self._at[name]] * (32 - bits)
        return Costs(table, out, into, by_bit, sized)

    def _part(self, numbers: list[int]) -> Part:
        """Targets that lose in step."""
        chosen = [self._targets[number] for number in numbers]
        sizes = [target.portion or target.group.portion for target in chosen]
        if len(chosen) > 1:
            in_proportion = portions([target.group for target in chosen])
            sizes = [max(size, in_proportion[t.group.size]) for t, size in zip(chosen, sizes, strict=True)]
        steps = min(target.count(target.ratio) // size for target, size in zip(chosen, sizes, strict=True))
        losses = torch.zeros(steps, dtype=torch.float64)
        for target, size in zip(chosen, sizes, strict=True):
            losses += losses_of(combined(target.group, self._scores), [size] * steps)
        return Part(losses, dict(zip(numbers, sizes, strict=True)))

    def _width(self, name: str) -> Part:
        left = (1 - self._errors[name]).clamp_min(1e-12).log()
        return Part((left[1:] - left[:-1]).flip(0).clamp_min(0), row=self._at[name])


def _together(targets: list[Target], network: Network) -> list[list[int]]:
    """Numbers of targets that lose the same share: those that must stay in proportion, and parts of one layer."""
    sets: list[list[int]] = []
    for number, target in enumerate(targets):
        names = set(target.group.names("out"))
        tied = [groups for groups in network.tied if any(target.group is group for group in groups)]
        near = [
            found
            for found in sets
            if any(
                names & set(targets[other].group.names("out"))
                or any(any(targets[other].group is group for group in groups) for groups in tied)
                for other in found
            )
        ]
        sets = [found for found in sets if found not in near] + [[*(n for found in near for n in found), number]]
    return sets
