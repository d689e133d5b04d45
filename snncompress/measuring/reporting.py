"""What ``profile`` and ``compare`` return: plain values that print as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from snncompress.base.display import ENERGY, SIZE, bars, bars_figure, unit
from snncompress.base.tables import Column, Shown, Table
from snncompress.errors import OptionError

from .conventions import Conventions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["weight", "neuron", "norm", "pool", "product", "other"]


@dataclass(frozen=True)
class LayerProfile:
    """One row of a profile.

    Fields:
        name: the module's name in the model.
        kind: ``"weight"`` (convolution, transposed convolution, linear layer), ``"neuron"`` (a population),
            ``"norm"``, ``"pool"`` (listed where the conventions count pooling), ``"product"`` (of tensors, outside
            layers: named by the module that multiplies and torch's function), or ``"other"``: a module that holds
            parameters and is none of these.
        n_params: parameters, pruned ones that are still stored included.
        size_mb: their size in MB = 10⁶ bytes, each weight at its bit width (Eq. 16 of QP-SNN), removed ones too. A
            saved file is smaller, by their entropy; ``snncompress info`` prints both.
        n_mac, n_ac: multiply-accumulates and accumulates per sample (or per batch, see the conventions).
        energy_pj: their energy in pJ.
        firing_rate: mean spikes per neuron and timestep; neuron rows only.
        bits: bit width of the weight; of neurons that of a membrane potential in fixed point, None for one in float.
        sparsity: share of weights that are exactly 0; weight rows only.
        input_rate: mean spikes per input and timestep (of averaged spikes, all that were averaged); weight rows only,
            and None where the input isn't spikes.
        n_neuron_updates: neurons × timesteps per sample (or batch); neuron rows only.
        state_mb: one 32-bit membrane potential per neuron, in MB; neuron rows only. Further states, such as a
            synaptic current, are not in it.
        n_weights: elements of the weight; weight rows only.
    """

    name: str
    kind: Kind
    n_params: int
    size_mb: float
    n_mac: float
    n_ac: float
    energy_pj: float
    firing_rate: float | None = None
    bits: int | None = None
    sparsity: float | None = None
    input_rate: float | None = None
    n_neuron_updates: float = 0.0
    state_mb: float = 0.0
    n_weights: int = 0


@dataclass(frozen=True)
class Profile(Shown):
    """A measured network: one row per layer, and totals that are the sums of the rows, exactly.

    ``energy_model`` is the energy model's name and options; ``n_samples`` and ``n_batches`` are what was
    measured; ``uncounted`` names what costs something and isn't counted. ``print`` and notebooks show a table;
    :meth:`to_dict` gives plain JSON values, :meth:`to_csv` and :meth:`to_pandas` a row for every layer.

    Examples:
        >>> weight = LayerProfile("fc", "weight", 12, 48e-6, 0, 24, 21.6, bits=32, sparsity=0.5, n_weights=12)
        >>> neuron = LayerProfile("lif", "neuron", 0, 0, 0, 0, 0, firing_rate=0.25, n_neuron_updates=6)
        >>> result = Profile((weight, neuron), Conventions(), "horowitz_45nm", n_samples=2, n_batches=1)
        >>> result.n_params, result.n_ac, result.energy_pj, result.sparsity, result.firing_rate
        (12, 24, 21.6, 0.5, 0.25)
        >>> result.to_dict()["layers"][0]["bits"]
        32
    """

    layers: tuple[LayerProfile, ...]
    conventions: Conventions
    energy_model: str
    n_samples: int
    n_batches: int
    title: str = "model"
    uncounted: tuple[str, ...] = ()

    @property
    def n_params(self) -> int:
        """Parameters; shared ones once, pruned ones that are still stored included."""
        return sum(row.n_params for row in self.layers)

    @property
    def size_mb(self) -> float:
        """Model size (QP-SNN, Eq. 16): Σ P_q·B_q + Σ P_fp·32 bits, in MB = 10⁶ bytes."""
        return sum(row.size_mb for row in self.layers)

    @property
    def n_mac(self) -> float:
        """Multiply-accumulates per sample (or per batch, see the conventions)."""
        return sum(row.n_mac for row in self.layers)

    @property
    def n_ac(self) -> float:
        """Accumulates per sample (or per batch, see the conventions)."""
        return sum(row.n_ac for row in self.layers)

    @property
    def energy_pj(self) -> float:
        """Energy per sample (or per batch, see the conventions) in pJ."""
        return sum(row.energy_pj for row in self.layers)

    @property
    def firing_rate(self) -> float | None:
        """Mean spikes per neuron and timestep over all neurons; None where no neuron ran."""
        rated = [(row.firing_rate, row.n_neuron_updates) for row in self.layers if row.firing_rate is not None]
        updates = sum(n for _, n in rated)
        return sum(rate * n for rate, n in rated) / updates if updates else None

    @property
    def is_spiking(self) -> bool:
        """Has the network spiking neurons that its adapter knows? Without, all operations are MACs of a single pass."""
        return any(row.kind == "neuron" for row in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of weights (of weight layers) that are exactly 0."""
        weights = sum(row.n_weights for row in self.layers)
        return sum((row.sparsity or 0.0) * row.n_weights for row in self.layers) / weights if weights else 0.0

    @property
    def n_neuron_updates(self) -> float:
        """Neurons × timesteps per sample (or per batch, see the conventions)."""
        return sum(row.n_neuron_updates for row in self.layers)

    @property
    def state_mb(self) -> float:
        """One 32-bit membrane potential per neuron, in MB = 10⁶ bytes."""
        return sum(row.state_mb for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Totals, rows and conventions as plain JSON values."""
        return {
            **{metric: getattr(self, metric) for metric in METRICS},
            "layers": [dataclasses.asdict(row) for row in self.layers],
            "conventions": {"name": self.conventions.name, **dataclasses.asdict(self.conventions)},
            "energy_model": self.energy_model,
            "n_samples": self.n_samples,
            "n_batches": self.n_batches,
            "uncounted": list(self.uncounted),
        }

    def plot(self, before: Profile | None = None, figure: Figure | None = None) -> Figure:
        """Where energy and size sit: a bar for every layer that has some, in both.

        With ``before``, a profile of the network before it was compressed, each layer has two bars. Draws on
        ``figure``, or on a new one, and returns it; showing or saving it is left to you. Raises OptionError where
        matplotlib isn't installed, or where ``before`` was profiled under other conventions.
        """
        if before is not None and not isinstance(before, Profile):
            raise OptionError(f"before= is a profile of the network before, not a {type(before).__name__}.")
        pair = {self.title: self} if before is None else {"before": before, "after": self}
        return Comparison(pair).plot(figure)

    def _parts(self) -> Iterator[str | Table]:
        columns = [Column("layer"), Column("kind", left=True), *(Column(*pair) for pair in _COLUMNS.items())]
        rows = [(row.name or "(model)", row.kind, *_values(row)) for row in self.layers]
        yield f"{self.title}: {self._measured()}"
        yield Table(columns, rows, ("total", "", *_values(self)))
        yield _footer(self)
        if self.uncounted:
            yield f"not counted: {', '.join(self.uncounted)}"
        if not self.is_spiking:
            yield _PLAIN.format(self.title)

    def _measured(self) -> str:
        samples = "1 sample" if self.n_samples == 1 else f"{self.n_samples:,} samples"
        return f"{samples} in {'1 batch' if self.n_batches == 1 else f'{self.n_batches:,} batches'}"


@dataclass(frozen=True)
class Comparison(Shown):
    """Several profiles side by side; the first is the reference of the ratios.

    Raises:
        OptionError: the profiles were made under different conventions or energy models, so that their
            numbers can't be compared.
    """

    profiles: Mapping[str, Profile]

    def __post_init__(self) -> None:
        first_name, first = next(iter(self.profiles.items()))
        for name, other in self.profiles.items():
            for field in ("conventions", "energy_model"):
                if getattr(first, field) != getattr(other, field):
                    raise OptionError(
                        f"{first_name!r} and {name!r} can't be compared: they were profiled under different "
                        f"{field}, {getattr(first, field)} and {getattr(other, field)}. Profile both alike."
                    )

    @property
    def ratios(self) -> dict[str, dict[str, float | None]]:
        """Per further model and metric: its value over the first model's; None where that is 0 or missing."""
        names = list(self.profiles)[1:]
        return {name: {metric: self._ratio(name, metric) for metric in METRICS} for name in names}

    def to_dict(self) -> dict[str, Any]:
        """All profiles and ratios as plain JSON values."""
        return {"profiles": {name: p.to_dict() for name, p in self.profiles.items()}, "ratios": self.ratios}

    def by_layer(self, field: str) -> dict[str, list[float | None]]:
        """Layer → this field of :class:`LayerProfile` in each network; None where it has none, or lacks the layer.

        Layers for which no network has more than 0 aren't in it.
        """
        rows = [{row.name: getattr(row, field) for row in profile.layers} for profile in self.profiles.values()]
        values = {layer: [found.get(layer) for found in rows] for found in rows for layer in found}
        return {layer: found for layer, found in values.items() if any(found)}

    def plot(self, figure: Figure | None = None) -> Figure:
        """Where energy and size sit: for every layer that has some a bar for each network, in both.

        Draws on ``figure``, or on a new one, and returns it; showing or saving it is left to you. Raises OptionError
        where matplotlib isn't installed.
        """
        energy, size = self.by_layer("energy_pj"), self.by_layer("size_mb")
        every = dict.fromkeys(row.name for profile in self.profiles.values() for row in profile.layers)
        layers = [layer for layer in every if layer in energy or layer in size]
        figure = bars_figure(2, len(layers), len(self.profiles)) if figure is None else figure
        left, right = figure.subplots(1, 2, sharey=True)
        per = next(iter(self.profiles.values())).conventions.per
        for panel, found, units, what in ((left, energy, ENERGY, "energy"), (right, size, SIZE, "size")):
            scale, word = unit((value or 0.0 for values in found.values() for value in values), units)
            rows = [[v and v / scale for v in found.get(layer, [None] * len(self.profiles))] for layer in layers]
            series = {name: [row[at] for row in rows] for at, name in enumerate(self.profiles)}
            title = f"{what} ({word} per {per})" if what == "energy" else f"{what} ({word})"
            bars(panel, [layer or "(model)" for layer in layers], series, title)
        if len(self.profiles) > 1:
            figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
        else:
            figure.suptitle(next(iter(self.profiles)))
        return figure

    def _parts(self) -> Iterator[str | Table]:
        first, *others = self.profiles
        titles = [*self.profiles, *(f"{name} / {first}" for name in others)]
        rows = [
            (
                metric,
                *(getattr(p, metric) for p in self.profiles.values()),
                *(self._ratio(name, metric) for name in others),
            )
            for metric in METRICS
        ]
        yield Table([Column("metric", "", METRICS.__getitem__), *map(Column, titles)], rows)
        yield _footer(self.profiles[first])
        if plain := [name for name, p in self.profiles.items() if not p.is_spiking]:
            yield _PLAIN.format(", ".join(plain))

    def _ratio(self, name: str, metric: str) -> float | None:
        reference = getattr(next(iter(self.profiles.values())), metric)
        value = getattr(self.profiles[name], metric)
        return None if value is None or not reference else float(value / reference)


METRICS: dict[str, str] = {
    "n_params": "parameters",
    "size_mb": "size (MB)",
    "sparsity": "sparsity",
    "n_mac": "MAC",
    "n_ac": "AC",
    "energy_pj": "energy (pJ)",
    "firing_rate": "firing rate (spikes/neuron/step)",
    "n_neuron_updates": "neuron updates",
    "state_mb": "neuron state (MB)",
}
"""Totals of a profile, and how tables call them."""

_PLAIN = "no spiking neurons in {}: an ordinary network, run once, all multiply-accumulates"

_COLUMNS = {
    "n_params": "params",
    "bits": "bits",
    "sparsity": "sparsity",
    "size_mb": "size (MB)",
    "n_mac": "MAC",
    "n_ac": "AC",
    "energy_pj": "energy (pJ)",
    "input_rate": "input rate (/step)",
    "firing_rate": "firing rate (/step)",
    "n_neuron_updates": "neuron updates",
    "state_mb": "state (MB)",
}


def _values(row: LayerProfile | Profile) -> list[float | None]:
    # A zero that can't be anything else is left out.
    moot = {"n_neuron_updates", "state_mb"} if getattr(row, "kind", "neuron") != "neuron" else set()
    return [None if column in moot else getattr(row, column, None) for column in _COLUMNS]


def _footer(profile: Profile) -> str:
    return (
        f"counts and energy per {profile.conventions.per}; MB = 10^6 bytes; "
        f"energy model {profile.energy_model}\n"
        f"conventions {profile.conventions.describe()}"
    )
