"""``report``: networks side by side on one page, with what was done to each and why."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from snncompress.base.display import ENERGY, SIZE, unit
from snncompress.base.distributed import gathered
from snncompress.base.files import writable, write_whole
from snncompress.base.tables import Column, Shown, Table, plain
from snncompress.contract.registry import registry
from snncompress.errors import DataError, OptionError
from snncompress.interfaces import Adapter, EnergyModel, Forward
from snncompress.measuring.conventions import Conventions, resolve_conventions
from snncompress.measuring.evaluation import classified
from snncompress.measuring.profiling import by_name, measure
from snncompress.measuring.reporting import METRICS, Comparison, Profile
from snncompress.model.cells import layer_at
from snncompress.model.network import weight_layers, width
from snncompress.model.own_neurons import Neurons, OwnNeurons, named_neurons
from snncompress.model.plan import Plan, has_plan, plan_of
from snncompress.running.batches import Batch
from snncompress.running.bench import bench
from snncompress.version import __version__

from .page import Code, Folded, Heading, Note, Part, Picture, page


@dataclass(frozen=True)
class _Network:
    """What the page says of one network."""

    kind: type[nn.Module]
    profile: Profile
    accuracy: float | None
    unjudged: str
    """Why there is no accuracy though there are labels; "" where there is, or are none."""
    plan: Plan | None
    widths: dict[str, int]
    framework: str
    own: str
    """How neurons of the user's own are named; "" where there are none."""


def report(
    models: Mapping[str, nn.Module],
    data: Any,
    *,
    path: str | os.PathLike[str],
    title: str | None = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    energy_model: EnergyModel | str = "horowitz_45nm",
    conventions: Conventions | str | None = None,
) -> Path:
    """Write a page of HTML that says what was done to networks, why, and what came of it.

    It has accuracy, size, operations and energy side by side; each plan with its settings, what it did to which layer,
    and what stayed whole for which reason; energy, size, channels and firing rates layer by layer, as pictures; by
    which conventions was counted; versions; and how the networks are loaded. The page is one file that needs no other
    and no net. Each network goes once through the data, as in :func:`snncompress.profile`, and stays as it is.

    Args:
        models: name → network, compressed or not; the first is what the others are compared with.
        data: what they are measured on; with labels there are accuracies, too.
        path: the file to write.
        title: the page's heading; None: the names.
        timesteps: as for ``profile``, and so is all that follows.

    Returns:
        The file.

    Raises:
        OptionError: ``models`` is no mapping from names to networks.
        DataError: the data don't fit.
        StorageError: the file can't be written.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2))
        >>> file = report({"dense": net}, torch.rand(2, 4), path=getfixture("tmp_path") / "r.html", timesteps=2)
        >>> file.read_text().splitlines()[0]
        '<!DOCTYPE html>'
    """
    networks = by_name("report", models)
    writable(path)  # or say so before the work, not after it
    if title is not None and not isinstance(title, str):
        raise OptionError(f"title must be text, not {title!r}.")
    if isinstance(data, Iterator):  # every network must see the same batches
        data = list(data)
    found = Measured.of(
        networks, data, timesteps=timesteps, forward=forward, adapter=adapter, neurons=neurons, time_dim=time_dim,
        energy_model=energy_model, conventions=conventions,
    )  # fmt: skip
    return written(found, path, title)


def written(found: Measured, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """The file of :func:`report` on what was measured."""
    networks, comparison = found.networks, found.comparison
    sections: dict[str, Sequence[Part]] = {
        "Before and after": list(_gains(found)),
        "What was done, and why": list(_done(networks)),
        "Layer by layer": list(_layers(networks, comparison)),
        "How it was counted": list(_counted(networks)),
        "How to load it": list(_loading(networks)),
        "Versions": [_versions(networks)],
    }
    heading = title or f"Compression report: {', '.join(networks)}"
    text = page(heading, {name: parts for name, parts in sections.items() if parts})
    write_whole(file := writable(path), lambda out: out.write(text.encode()))
    return file


def _network(
    model: nn.Module, data: Any, timesteps: int | None, forward: Forward | None, adapter: Adapter | str | None,
    energy: EnergyModel, rules: Conventions,
) -> _Network:  # fmt: skip
    right: list[int | str] = []

    def watch(output: Any, batch: Batch) -> None:
        try:
            predicted, labels = classified(output, batch.y, batch_first=table.feed.batch_first)
        except DataError as error:
            right.append("" if batch.y is None else str(error))
        else:
            right.append(int((predicted == labels).sum()))

    with bench(model, data, timesteps, forward, adapter=adapter, plain=True, unknown=True, mixed=True) as table:
        found = measure(table.model, table.feed, energy, rules, watch)
        framework = table.adapter.framework
        named = table.adapter.described() if isinstance(table.adapter, OwnNeurons) else ""
    rights = [part for own in gathered(right) for part in own]
    known = [part for part in rights if isinstance(part, int)]
    return _Network(
        type(model),
        found,
        sum(known) / found.n_samples if len(known) == len(rights) else None,
        next((part for part in rights if isinstance(part, str) and part), ""),
        plan_of(model) if has_plan(model) else None,
        {name: width(layer_at(model, name), "out") for name in weight_layers(model)},
        framework,
        named,
    )


@dataclass(frozen=True)
class Measured(Shown):
    """Networks that went through the same data: a comparison that has their accuracy, too."""

    networks: Mapping[str, _Network]

    @classmethod
    def of(
        cls, models: Mapping[str, nn.Module], data: Any, *, timesteps: int | None = None,
        forward: Forward | None = None, adapter: Adapter | str | None = None, neurons: Neurons | None = None,
        time_dim: int | None = None, energy_model: EnergyModel | str = "horowitz_45nm",
        conventions: Conventions | str | None = None,
    ) -> Measured:  # fmt: skip
        """Arguments and errors of :func:`report`."""
        energy: EnergyModel = registry().resolve("energy model", energy_model, EnergyModel)
        rules, named = resolve_conventions(conventions), named_neurons(adapter, neurons, time_dim)
        return cls({n: _network(m, data, timesteps, forward, named, energy, rules) for n, m in models.items()})

    @property
    def comparison(self) -> Comparison:
        """Of their profiles."""
        return Comparison({name: network.profile for name, network in self.networks.items()})

    def _parts(self) -> Iterator[str | Table]:
        first, *others = self.networks.values()
        accuracies = [network.accuracy for network in self.networks.values()]
        rows: list[Sequence[Any]] = []
        if any(accuracy is not None for accuracy in accuracies):
            points = [_points(other.accuracy, first.accuracy) for other in others]
            rows.append(("accuracy (%)", *(a if a is None else 100 * a for a in accuracies), *points))
        label = Column("metric", "", lambda metric: METRICS.get(metric, metric))
        for part in self.comparison._parts():
            yield Table([label, *part.columns[1:]], [*rows, *part.rows]) if isinstance(part, Table) else part


def _gains(found: Measured) -> Iterator[Part]:
    """What changed in a sentence for each network, and the table."""
    networks, ratios = found.networks, found.comparison.ratios
    first, *others = networks
    if gains := [_gain(name, networks[name], ratios[name], networks[first].accuracy) for name in others]:
        yield gains
    yield found.to_table()
    profile = networks[first].profile
    yield Note(
        f"Measured on {profile.n_samples:,} samples. Counts and energy per {profile.conventions.per}; MB = 10⁶ bytes, "
        f"every weight at its bit width, all else 32 bits."
    )
    for why in dict.fromkeys(network.unjudged for network in networks.values() if network.unjudged):
        yield Note(f"There are labels, but no accuracy. {why}")


def _gain(name: str, network: _Network, ratios: Mapping[str, float | None], reference: float | None) -> str:
    words = {"size_mb": "size", "energy_pj": "energy", "n_params": "parameters"}
    shares = [f"{word} × {ratio:.2g}" for key, word in words.items() if (ratio := ratios[key]) is not None]
    if network.accuracy is not None:
        points = _points(network.accuracy, reference)
        shares.append(f"accuracy {100 * network.accuracy:.1f} %" + (f" ({points})" if points else ""))
    return f"{name}: {', '.join(shares)}"


def _points(accuracy: float | None, reference: float | None) -> str | None:
    if accuracy is None or reference is None:
        return None
    return f"{100 * (accuracy - reference):+.1f} points".replace("-", "−")


def _done(networks: Mapping[str, _Network]) -> Iterator[Part]:
    told: dict[Plan | None, str] = {}
    for name, network in networks.items():
        yield Heading(name)
        if network.plan in told and network.plan is not None:
            yield f"It has the plan of {told[network.plan]}; only its weights may differ."
        else:
            yield from _plan(name, network)
        told.setdefault(network.plan, name)


def _plan(name: str, network: _Network) -> Iterator[Part]:
    plan = network.plan
    if plan is None:
        yield f"{network.kind.__name__} as it was handed in: it holds no plan, so nothing was done to it here."
        return
    runs = [plan.origin]
    while isinstance(before := runs[0].get("before"), Mapping):
        runs.insert(0, before)
    for number_, origin in enumerate(runs, 1):
        if len(runs) > 1:
            yield f"Run {number_} of {len(runs)}:"
        yield Table([Column("setting"), Column("value", left=True), Column("meaning", left=True)], _settings(origin))
        if trials := origin.get("trials"):
            kind = [Column("asked", "share asked for"), Column("reached"), Column("accuracy")]
            yield Folded("Trials", [Table(kind, [tuple(trial[c.key] for c in kind) for trial in trials])])
    if changes := _changes(network, plan):
        yield Heading(f"{name}: what became of the layers")
        yield changes
    if plan.skipped:
        yield Heading(f"{name}: what stayed whole, and why")
        yield Table([Column("layer"), Column("why", left=True)], list(plan.skipped.items()))
    yield Folded(f"All {len(plan.edits)} edits", [plan.to_table()])


_MEANINGS: dict[str, str] = {
    "ratio": "share of the channels or weights that goes, of each layer",
    "bits": "bits of a weight",
    "order": "qp: quantized, then pruned; pq: pruned, then quantized",
    "finetune": "epochs of training after each step",
    "seed": "of everything random",
    "data": "what it was calibrated on: given data, or synthetic ones",
    "truncate": "timesteps that were asked for",
    "repair": "what the weights that are left were fitted to, without labels",
    "repaired": "layers whose weights were fitted",
    "rounding": "how weights were rounded to their grid",
    "refresh": "statistics of batch norms were taken again",
    "round_to": "what the numbers of channels are multiples of",
    "budget": "what the result may cost, as shares of the original's, or in units",
    "max_drop": "the accuracy that may be lost, 0.01 being a point",
    "dense_accuracy": "accuracy of the original on what was held out",
}
_ELSEWHERE = {"snncompress", "torch", "framework", "before", "trials"}
_KINDS = {name: name for name in ("criterion", "quantizer", "scheduler", "target")}


def _settings(origin: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was asked for, what that is, and what it says; settings that ask for nothing are left out."""
    rows = []
    moot = {"quantizer", "order", "rounding"} if origin.get("bits") is None else set()
    if origin.get("criterion") is None:
        moot |= {"ratio", "scheduler", "order"}
    for key, value in origin.items():
        if key in _ELSEWHERE | moot or value is None:
            continue
        meaning = _summary(_KINDS[key], value) if key in _KINDS else _MEANINGS.get(key, "")
        rows.append((key, _worded(value), meaning))
    return rows


def _summary(kind: str, value: Any) -> str:
    """The first line of a plugin's docstring, where the plugin is installed here."""
    name = value.get("name") if isinstance(value, Mapping) else value
    return next((entry.plain_summary for entry in registry().entries(kind) if entry.name == name), "")


def _worded(value: Any) -> str:
    if isinstance(value, Mapping) and set(value) == {"name", "options"}:
        options = ", ".join(f"{key}={_worded(option)}" for key, option in value["options"].items())
        return f"{value['name']} ({options})" if options else str(value["name"])
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_worded(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_worded, value))
    return plain(value) if isinstance(value, (str, float)) else json.dumps(value)


def _changes(network: _Network, plan: Plan) -> Table | None:
    """Layer by layer, from what to what; None where none changed."""
    found: dict[str, dict[str, tuple[int, int]]] = {
        "channels": {layer: change for layer, change in plan.widths.items() if layer in network.widths},  # not norms
        "single weights": plan.weights,
        "bits per weight": {layer: (32, bits) for layer, bits in plan.bits.items()},
    }
    kinds = {kind: changes for kind, changes in found.items() if changes}
    layers = [layer for layer in network.widths if any(layer in changes for changes in kinds.values())]
    if not layers:
        return None
    rows = [
        (layer, *(f"{c[layer][0]:,} → {c[layer][1]:,}" if layer in c else None for c in kinds.values()))
        for layer in layers
    ]
    return Table([Column("layer"), *map(Column, kinds)], rows)


def _layers(networks: Mapping[str, _Network], comparison: Comparison) -> Iterator[Part]:
    names = list(networks)
    profile = networks[names[0]].profile

    def picture(title: str, values: Mapping[str, Sequence[float | None]]) -> Iterator[Part]:
        if values:
            yield Picture(title, names, {layer or "(model)": group for layer, group in values.items()})

    def scaled(field: str, units: Any, title: Callable[[str], str]) -> Iterator[Part]:
        found = comparison.by_layer(field)
        scale, word = unit((value or 0.0 for group in found.values() for value in group), units)
        yield from picture(title(word), {layer: [v and v / scale for v in group] for layer, group in found.items()})

    yield from scaled("energy_pj", ENERGY, lambda word: f"Energy ({word} per {profile.conventions.per})")
    yield from scaled("size_mb", SIZE, lambda word: f"Size ({word})")
    layers = dict.fromkeys(layer for network in networks.values() for layer in network.widths)
    yield from picture("Output channels", {layer: [n.widths.get(layer) for n in networks.values()] for layer in layers})
    yield from picture("Firing rate (spikes per neuron and timestep)", comparison.by_layer("firing_rate"))
    for name, network in networks.items():
        yield Folded(f"All figures of {name}", [network.profile.to_table()])


def _counted(networks: Mapping[str, _Network]) -> Iterator[Part]:
    profile = next(iter(networks.values())).profile
    name = profile.energy_model.partition("(")[0]
    yield f"Energy model {profile.energy_model}. {_summary('energy model', name)}".strip()
    yield f"Conventions {profile.conventions.describe()}."
    for name, network in networks.items():
        if network.profile.uncounted:
            yield f"Not counted in {name}: {', '.join(network.profile.uncounted)}."


def _loading(networks: Mapping[str, _Network]) -> Iterator[Part]:
    for name, network in networks.items():
        if network.plan is None:
            continue
        kind = network.kind
        variable = re.sub(r"\W+", "_", name) if re.match(r"[^\W\d]", name) else "small"
        home = "" if kind.__module__.startswith("torch.nn.") else f"from {kind.__module__} import {kind.__qualname__}\n"
        how = f", adapter={network.own}" if network.own else ""
        yield Heading(name)
        yield Code(
            f"import snncompress\n{home}\n"
            f'snncompress.save({variable}, "{variable}.safetensors"{how})  # once: plan and weights in one file\n\n'
            f"fresh = {kind.__qualname__}(...)  # as it was built before compression\n"
            f'{variable} = snncompress.load("{variable}.safetensors", into=fresh{how})'
        )


def _versions(networks: Mapping[str, _Network]) -> Table:
    frameworks = dict.fromkeys(network.framework for network in networks.values())
    rows = [("snncompress", __version__), ("torch", torch.__version__)]
    rows += [(name, version) for name in frameworks if (version := _version(name))]
    rows += [("numpy", numpy.__version__), ("Python", platform.python_version())]
    for name, network in networks.items():
        if network.plan is not None:
            made = ", ".join(f"{key} {network.plan.origin.get(key)}" for key in ("snncompress", "torch"))
            rows.append((f"{name} was made with", made))
    rows.append(("written on", datetime.date.today().isoformat()))
    return Table([Column("what", ""), Column("version", "", left=True)], rows)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a framework of one's own
        return ""
