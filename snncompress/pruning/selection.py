"""Which channels go: targets per group, and the lowest scores."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import OptionError
from snncompress.interfaces import Granularity
from snncompress.model.cells import layer_at
from snncompress.model.network import ChannelGroup, Network, portions
from snncompress.model.parametrizations import stored_weight


@dataclass(frozen=True)
class Skips:
    """Which layers keep their outputs, and which stay at 32 bits; layer → reason."""

    prune: Mapping[str, str]
    quantize: Mapping[str, str]

    def and_(self, others: Mapping[str, str]) -> Skips:
        """With others, which stay whole and at 32 bits whatever was asked for."""
        return Skips({**self.prune, **others}, {**self.quantize, **others})


def resolve_skip(skip: Any, network: Network, quantizable: Collection[str], granularity: Granularity) -> Skips:
    """Turn ``skip`` into reasons per layer; see :func:`snncompress.apply` for its forms."""
    channels = granularity == "channel"
    prunable = network.layers if channels else quantizable
    if skip is None or isinstance(skip, Mapping):
        streams = network.streams
        keep = {n: "it feeds the classifier" for n in network.classifier_inputs if channels and n not in streams}
        first = {network.first: "it is the first weight layer"} if network.layers else {}
        full = {**first, **{n: "it is the classifier" for n in network.classifiers}}
        default = Skips(keep, full)
    if skip is None:
        return default
    if isinstance(skip, str):
        skip = [skip]
    elif isinstance(skip, Iterable) and not isinstance(skip, Mapping):
        skip = list(skip)  # looked through twice
    if isinstance(skip, Mapping):
        unknown = set(skip) - {"prune", "quantize"}
        if unknown:
            raise OptionError(f"skip as a mapping takes the keys 'prune' and 'quantize', not {sorted(unknown)}.")
        return Skips(
            named_layers(skip["prune"], prunable) if "prune" in skip else default.prune,
            named_layers(skip["quantize"], quantizable) if "quantize" in skip else default.quantize,
        )
    alone = named_layers(skip, quantizable)
    return Skips({name: why for name, why in alone.items() if name in prunable}, alone)


def left_by_default(model: nn.Module, network: Network, skips: Skips) -> dict[str, float]:
    """Layers that keep their channels, though they could lose some, and their share of all prunable parameters."""
    sizes = {
        n: stored_weight(layer_at(model, n)).numel()
        for g in network.groups
        for n in g.names("out")
        if n in network.layers
    }
    return {name: size / sum(sizes.values()) for name, size in sizes.items() if name in skips.prune}


def named_layers(patterns: Any, names: Collection[str]) -> dict[str, str]:
    """Layers that ``skip`` names, one by one or by globs, with the reason; raises OptionError for no names."""
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise OptionError(
            f"skip takes names or globs of layers, a mapping with 'prune' and 'quantize', or None; not {patterns!r}."
        )
    found: dict[str, str] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_matching(str(pattern), names, "skip"), "skip names it"))
    return found


def per_layer(value: Any, names: Collection[str], what: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A number for every layer, or a mapping from layer name or glob; the last matching key counts."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, check(value, what))
    found: dict[str, Any] = {}
    for pattern, number in value.items():
        checked = check(number, f"{what}[{pattern!r}]")
        found.update(dict.fromkeys(_matching(str(pattern), names, what), checked))
    return found


def _matching(pattern: str, names: Collection[str], what: str) -> list[str]:
    matches = [n for n in names if n == pattern] or [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if not matches:
        kind = "neuron" if what == "state_bits" else "weight layer"
        raise OptionError(f"{what}: {pattern!r} matches no {kind}. The model's: {', '.join(names)}.")
    return matches


def check_ratio(value: Any, what: str, *, all_may_go: bool = False) -> float:
    """A share in [0, 1), or [0, 1]."""
    share = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (0 <= share < 1 or (all_may_go and share == 1)):
        bounds = "[0, 1]" if all_may_go else "[0, 1)"
        raise OptionError(f"{what} must be a number in {bounds}, the share to remove; not {value!r}.")
    return share


def check_bits(value: Any, what: str) -> int | None:
    """A bit width from 1 to 16, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16:
        raise OptionError(f"{what} must be a whole number from 1 to 16, or None for no quantization; not {value!r}.")
    return value


def overruled(value: Any, protected: Mapping[str, str]) -> dict[str, str]:
    """Layers that a mapping names one by one although they are protected, with the reason."""
    if not isinstance(value, Mapping):
        return {}
    return {name: protected[name] for name, number in value.items() if number and name in protected}


@dataclass
class Target:
    """A group to prune down to ``ratio`` of its ``original`` channels; those ``silent`` are out already."""

    group: ChannelGroup
    original: int
    ratio: float
    portion: int = 0
    """How many channels go at a time; 0 for the group's portion."""
    silent: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def count(self, ratio: float) -> int:
        """How many more channels must go to reach ``ratio`` of the original ones: ⌈ratio · c⌉ in all.

        Of a group that can lose a half and nothing else, the half goes from a ratio of a quarter on.
        """
        portion = self.portion or self.group.portion
        local = self.original // portion
        if local == 2 and self.group.step > 1:
            ratio = 0.5 * (ratio >= 0.25)
        most = local - 1 if self.group.part else local  # a layer that loses enough may have parts that can't
        wanted = min(math.ceil(round(ratio * local, 9)), most) * portion
        return max(0, wanted - (self.original - self.group.size))

    def exchanged(self, count: int, share: float) -> int:
        """How many of ``count`` silent channels come back for as many others: the share of them, or of those left."""
        portion = self.portion or self.group.portion
        return math.floor(round(share * min(count, self.group.size - count) / portion, 9)) * portion


def targets(
    network: Network, ratio: Any, skips: Skips, round_to: int = 1, spared: Mapping[str, str] | None = None,
    *, at_most: bool = False, listening: bool = False,
) -> tuple[list[Target], dict[str, str]]:  # fmt: skip
    """The groups to prune, and why the other layers stay whole.

    A coupled group follows the smallest ratio among its layers, since no layer may lose more than asked; so do groups
    that must stay in proportion, and where one of them stays, all do. Of a layer's parts, each follows its own. Where
    groups have a multiple of ``round_to`` channels, they are left one. Layers that are ``spared`` stay for the reason
    that is given with them, where their ratio is 0. With ``at_most`` ratios are the most that may go, and some channels
    stay in any case. With ``listening`` groups without a neuron, of which a criterion of spikes hears nothing, stay
    whole.
    """
    ratios: dict[str, float] = per_layer(ratio, network.layers, "ratio", check_ratio)
    skipped = dict(network.skipped)
    found: list[Target] = []
    for group in network.groups:
        names = [n for n in group.names("out") if n in network.layers]
        kept = next((n for n in names if n in skips.prune), None)
        if kept is not None:
            for n in names:
                skipped[n] = skips.prune[kept] if n == kept else f"coupled with {kept}: {skips.prune[kept]}"
            continue
        if listening and not group.names("neuron"):
            skipped.update((n, f"no spiking neuron of its own follows {n}: use a criterion of weights") for n in names)
            continue
        smallest = min(names, key=lambda n: ratios.get(n, 0.0))
        share = ratios.get(smallest, 0.0)
        if share == 0:
            reason = _why_none(smallest, ratios, spared)
            for n in names:
                skipped[n] = reason if n == smallest else f"coupled with {smallest}: {reason}"
            continue
        found.append(Target(group, group.size, share))
    for groups in network.tied:
        found = _in_proportion(found, network, groups, skipped)
    for together in [*in_step(found, network), *([t] for t in found if not t.portion)]:
        _round(together, round_to)
    for target in found:
        group = target.group
        if at_most:
            target.ratio = min(target.ratio, 1 - (target.portion or group.portion) / group.size)
        if target.count(target.ratio) >= group.size:
            names = [n for n in group.names("out") if n in network.layers]
            raise OptionError(
                f"ratio {target.ratio} would remove all {group.size} channels of {', '.join(map(repr, names))} "
                f"(⌈{target.ratio}·{group.size // (target.portion or group.portion)}⌉). Give the layer a smaller "
                f"ratio, or name it in skip."
            )
    cut = {name for target in found for name in target.group.names("out")}  # if only in part
    return found, {name: why for name, why in skipped.items() if name not in cut}


def _why_none(name: str, ratios: Mapping[str, float], spared: Mapping[str, str] | None) -> str:
    """Why nothing is to go from a layer."""
    return (spared or {}).get(name) or ("ratio is 0" if name in ratios else "no key of ratio matches it")


def in_step(found: list[Target], network: Network) -> list[list[Target]]:
    """Those that must stay in proportion, together."""
    return [[target for target in found if any(target.group is group for group in groups)] for groups in network.tied]


def _round(together: list[Target], to: int) -> None:
    """Let them lose multiples, the same number of times each, where their channels are multiples."""
    sizes = [target.portion or target.group.portion for target in together]
    times = math.lcm(*(to // math.gcd(to, size) for size in sizes)) if together else 1
    fits = all(target.original % (size * times) == 0 for target, size in zip(together, sizes, strict=True))
    for target, size in zip(together, sizes, strict=True):
        target.portion = size * times if times > 1 and fits else target.portion


def _in_proportion(
    found: list[Target], network: Network, groups: list[ChannelGroup], skipped: dict[str, str]
) -> list[Target]:
    """The targets, of which those of these groups stay in proportion."""
    tied = [target for target in found if any(target.group is group for group in groups)]
    stays = next((group for group in groups if not any(target.group is group for target in tied)), None)
    if stays is not None:
        name = next(n for n in stays.names("out") if n in network.layers)
        for target in tied:
            why = f"forward counts on as many channels in {name}, which stays whole: {skipped[name]}"
            skipped.update({n: why for n in target.group.names("out") if n in network.layers})
        return [target for target in found if not any(target is other for other in tied)]
    at_a_time = portions([target.group for target in tied])
    for target in tied:
        target.ratio, target.portion = min(other.ratio for other in tied), at_a_time[target.group.size]
    return found


def weight_ratios(
    names: Collection[str], ratio: Any, skips: Skips, unusable: Mapping[str, str],
    spared: Mapping[str, str] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:  # fmt: skip
    """Layer → share of its weights to remove, and why the other layers stay whole."""
    ratios: dict[str, float] = per_layer(ratio, names, "ratio", check_ratio)
    skipped = {n: why for n in names if (why := skips.prune.get(n) or unusable.get(n))}
    for name in names:
        if name not in skipped and not ratios.get(name):
            skipped[name] = _why_none(name, ratios, spared)
    return {n: r for n, r in ratios.items() if n not in skipped}, skipped


def lowest(group: ChannelGroup, scores: Mapping[str, Tensor], count: int, first: Tensor | None = None) -> Tensor:
    """Positions of the ``count`` channels with the lowest combined score, ascending; ties by index.

    Positions ``first`` are taken to be lower than all others.
    """
    found = combined(group, scores)
    if first is not None:
        found[first] = -math.inf
    return _chosen(group, found, count)


def highest(group: ChannelGroup, scores: Mapping[str, Tensor], count: int, among: Tensor) -> Tensor:
    """Of positions ``among`` the ``count`` with the highest combined score, as in :func:`lowest`."""
    found = torch.full((group.size,), math.inf, dtype=torch.float64)
    found[among] = -combined(group, scores)[among]
    return _chosen(group, found, count)


def combined(group: ChannelGroup, scores: Mapping[str, Tensor]) -> Tensor:
    """One score for each channel [size]: of coupled layers each divided by its mean, so that none outweighs others."""
    total = torch.zeros(group.size, dtype=torch.float64)
    involved = [(scores[n], m) for n in group.names("out") if n in scores and (m := group.member(n, "out")) is not None]
    for score, member in involved:
        mine = score[member.index.flatten()].view(group.size, -1).mean(1)
        if len(involved) > 1:
            mine = mine / mine.abs().mean().clamp_min(1e-300)
        total += mine
    return total


def _chosen(group: ChannelGroup, scores: Tensor, count: int) -> Tensor:
    """Positions of the lowest, the same in every run."""
    local = group.size // group.runs
    order = torch.argsort(scores.view(group.runs, local).mean(0), stable=True)
    chosen = order[: count // group.runs].sort().values
    return (chosen + torch.arange(group.runs)[:, None] * local).flatten()
