"""What a study asks about: a criterion, and the layers whose channels or weights go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, Criterion, Quantizer
from snncompress.model.cells import decays
from snncompress.model.network import ChannelGroup, Network, by_layer, computed_or_shared, weight_layers
from snncompress.pruning.scorer import Groups, listens
from snncompress.pruning.selection import Target, overruled, per_layer, resolve_skip, targets, weight_ratios
from snncompress.pruning.steps import ChannelPruning, LayerPruning, WeightPruning

P = TypeVar("P", Criterion, Quantizer)
ANY = 1e-12
"""A ratio that every layer can bear: which layers could be pruned, not by how much."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What is pruned at once: one layer's weights, or the channels of coupled layers."""

    layers: tuple[str, ...]
    parts: tuple[Target, ...] = ()
    """One, or those that the layers' channels fall into, or that must stay in proportion."""

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Of its parts."""
        return tuple(part.group for part in self.parts)

    def bears(self, ratio: float) -> bool:
        """Is something left?"""
        return all(target.count(ratio) < target.group.size for target in self.targets(ratio))

    def targets(self, ratio: float) -> list[Target]:
        """To be pruned down to the ratio."""
        return [replace(part, ratio=ratio) for part in self.parts]


def scored(found: Sequence[Unit]) -> dict[str, Groups]:
    """Their layers, each with the coupled groups that it stands in, as a recording asks for them."""
    return {name: by_layer(unit.groups, unit.layers).get(name, ()) for unit in found for name in unit.layers}


def pruning(
    found: Sequence[Unit], model: nn.Module, adapter: Adapter, network: Network, criterion: Criterion, ratio: float
) -> LayerPruning:
    """Of all these at once, down to the ratio."""
    if criterion.granularity == "channel":
        wanted = [target for unit in found for target in unit.targets(ratio)]
        return ChannelPruning(model, adapter, criterion, network, wanted)
    shares = dict.fromkeys([name for unit in found for name in unit.layers], ratio)
    return WeightPruning(model, adapter, criterion, network, shares)


def units(
    model: nn.Module, network: Network, criterion: Criterion, layers: str | Iterable[str] | None, skip: Any
) -> tuple[list[Unit], dict[str, str]]:
    """What can be pruned, of ``layers`` where these are named, and why other layers that were asked for are left out.

    ``skip`` is what it is for :func:`snncompress.apply`.
    """
    names = weight_layers(model)
    skips = resolve_skip(skip, network, names, criterion.granularity)
    if criterion.granularity == "channel":
        names = list(network.layers)
        todo, skipped = targets(network, ANY, skips, listening=listens(criterion))
        found: list[Unit] = []
        for target in todo:
            unit = Unit(tuple(n for n in target.group.names("out") if n in names), (target,))
            with_it = {id(g) for groups in network.tied if any(g is target.group for g in groups) for g in groups}
            for other in [
                u for u in found if set(u.layers) & set(unit.layers) or any(id(g) in with_it for g in u.groups)
            ]:  # another part of the same layers, or one that must stay in proportion
                found.remove(other)
                unit = Unit(tuple(dict.fromkeys(other.layers + unit.layers)), other.parts + unit.parts)
            found.append(unit)
    else:
        prunable, skipped = weight_ratios(names, ANY, skips, {**computed_or_shared(model), **decays(model)})
        found = [Unit((name,)) for name in prunable]
    if layers is not None:
        asked = dict.fromkeys(listed([layers] if isinstance(layers, str) else layers, "layers"), True)
        refuse("layers", overruled(asked, skipped))
        wanted = per_layer(asked, names, "layers", lambda value, _: value)
        found = [unit for unit in found if wanted.keys() & set(unit.layers)]
        skipped = {name: why for name, why in skipped.items() if name in wanted}
    if not found:
        raise OptionError(f"No layer is left to prune. {reasons(skipped)}.")
    return found, skipped


def criterion_of(criterion: str | Criterion, seed: int) -> Criterion:
    """An instance, of channels or of single weights; raises OptionError for another, or a seed that is none."""
    chosen: Criterion = registry().resolve("criterion", criterion, Criterion)
    if chosen.granularity not in ("channel", "weight"):
        raise OptionError(
            f"Criterion {chosen.name!r} scores {chosen.granularity}s; only channels and weights are pruned."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
    return chosen


def label(plugin: Criterion | Quantizer) -> str:
    """Its name, and the options that aren't the defaults."""
    options = plugin.options()
    try:
        usual = type(plugin)().options()
    except TypeError:  # it has options that must be given
        usual = {}
    own = ", ".join(f"{key}={value!r}" for key, value in options.items() if key not in usual or usual[key] != value)
    return f"{plugin.name}({own})" if own else plugin.name


def labelled(what: str, values: Any, resolve: Callable[[Any], P]) -> dict[str, P]:
    """One plugin or several, by name or as instances, under their labels; none twice."""
    several = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    found = [resolve(value) for value in listed(several, f"The names of a {what}")]
    names = [label(plugin) for plugin in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"The {what} {twice} stands there twice. Leave one out, or give them other options.")
    return dict(zip(names, found, strict=True))


def listed(values: Any, what: str) -> list[Any]:
    """One entry or more; raises OptionError for anything else."""
    found = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not found:
        raise OptionError(f"{what} must be a list with at least one entry, not {values!r}.")
    return found


def refuse(what: str, layers: Mapping[str, str], done: str = "pruned") -> None:
    """Raise OptionError where a layer was named that can't be, layer → reason."""
    for name, why in layers.items():
        raise OptionError(f"{what} names {name!r}, which can't be {done}: {why}. Leave it out.")


def reasons(skipped: Mapping[str, str]) -> str:
    """In a sentence, without the stop."""
    return "; ".join(f"{name!r}: {why}" for name, why in skipped.items()) or "The model has none"


def fully(target: float) -> float:
    """All at once: the share of a layer's target that a single step removes."""
    return target
