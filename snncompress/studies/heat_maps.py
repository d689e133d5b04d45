"""What ``scores`` and ``robustness`` return: how channels were judged, batch by batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snncompress.base.display import new_figure
from snncompress.base.tables import Column, Shown, Table, left_out, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, float | None]
"""Layer → number, None where there is none."""


@dataclass(frozen=True, eq=False)
class Scores(Shown):
    """A criterion's scores of every layer, of each batch alone; higher = keep. ``print`` shows a table.

    Fields:
        values: layer → [batches, channels], float64; NaN for channels that can't go. Of a criterion that scores single
            weights [batches, *weight], output channels first, in the weights' own precision.
        criterion: the criterion's name, and the options that aren't its defaults.
        skipped: layers that were left out, with the reason.
        title: the model's class.

    Example:
        >>> print(Scores({"conv": torch.tensor([[1.0, 4.0], [2.0, 4.0]])}, "svs"))
        model: scores of svs, each of 2 batches alone
         layer   channels   lowest   mean   highest   between channels   between batches
         ───────────────────────────────────────────────────────────────────────────────
         conv           2      1.5   2.75         4               1.25              0.25
        lowest, mean, highest: of the batches' mean; between: standard deviations
    """

    values: Mapping[str, Tensor]
    criterion: str
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = "model"

    @property
    def batches(self) -> int:
        """How many there were."""
        return len(next(iter(self.values.values())))

    def channels(self, layer: str) -> Tensor:
        """[batches, channels] of a layer; of single weights the mean over each output channel's.

        >>> Scores({"fc": torch.tensor([[[1.0, 3.0], [0.0, 1.0]]])}, "cqp").channels("fc")
        tensor([[2.0000, 0.5000]], dtype=torch.float64)
        """
        return self.values[layer].double().flatten(2).mean(2) if self.values[layer].dim() > 2 else self.values[layer]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; NaN is None."""
        values = {name: _plain(scores) for name, scores in self.values.items()}
        return {"values": values, "criterion": self.criterion, "skipped": dict(self.skipped), "title": self.title}

    def plot(self, figure: Figure | None = None) -> Figure:
        """A heat map for each layer, kernels (output channels) × batches, as in QP-SNN's Figures 3 and 13 to 18.

        Upright stripes: the batches agree, as AvgCosS says. Each layer has colours of its own, from its lowest score to
        its highest. Draws on ``figure``, or on a new one, and returns it; showing or saving it is left to you. Raises
        OptionError where matplotlib isn't installed.
        """
        across = min(4, math.ceil(math.sqrt(len(self.values))))
        down = math.ceil(len(self.values) / across)
        figure = new_figure(4.2 * across, 2.2 * down + 0.5) if figure is None else figure
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for panel, name in zip(panels, self.values, strict=False):
            rows = self.channels(name)
            extent = (-0.5, rows.shape[1] - 0.5, len(rows) + 0.5, 0.5)
            drawn = panel.imshow(rows.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
            alike = average_cosine(rows) if len(rows) > 1 else None
            told = "" if alike is None else f", AvgCosS {alike:.3f}"
            panel.set_title(f"layer {name}: {rows.shape[1]} kernels{told}", fontsize=9)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.yaxis.get_major_locator().set_params(integer=True)
            panel.tick_params(labelsize=8)
            figure.colorbar(drawn, ax=panel, pad=0.02).ax.tick_params(labelsize=8)
        for panel in panels[len(self.values) :]:
            panel.remove()
        figure.suptitle(f"{self.title}: scores of {self.criterion}")
        figure.supxlabel("kernel", fontsize=10)
        figure.supylabel("batch", fontsize=10)
        return figure

    def _parts(self) -> Iterator[str | Table]:
        header = ["layer", "channels", "lowest", "mean", "highest", "between channels", "between batches"]
        columns = [Column(title.replace(" ", "_"), title) for title in header]
        batches = "1 batch" if self.batches == 1 else f"each of {self.batches:,} batches alone"
        yield f"{self.title}: scores of {self.criterion}, {batches}"
        yield Table(columns, [(name, *_summary(self.channels(name))) for name in self.values])
        yield "lowest, mean, highest: of the batches' mean; between: standard deviations"
        yield from left_out(self.skipped)


@dataclass(frozen=True)
class Robustness(Shown):
    """How much criteria depend on the batch that they see. ``print`` shows two tables.

    Fields:
        cosine: criterion → layer → AvgCosS: the cosine similarity of the layer's score vectors, mean over all pairs of
            batches; None where all scores are 0.
        agreement: criterion → layer → the share of what would go that two batches have in common, mean over all pairs;
            chosen at random it would be about ``ratio``. None where the ratio takes nothing from the layer, or all, or
            where all scores are 0.
        ratio: the share to remove that ``agreement`` is about.
        batches: how many were compared.
        skipped: layers that a criterion left out, with the reason.
        title: the model's class.

    Example:
        >>> print(Robustness({"svs": {"conv": 0.99, "fc": 1.0}}, {"svs": {"conv": 0.75, "fc": None}}, 0.5, 4))
        model: AvgCosS, mean over the pairs of 4 batches
         layer        svs
         ────────────────
         conv      0.9900
         fc        1.0000
         minimum   0.9900
        common share (%) of what would go at ratio 0.5; about 50 by chance
         layer      svs
         ──────────────
         conv      75.0
         fc
         minimum   75.0
    """

    cosine: Mapping[str, Figures]
    agreement: Mapping[str, Figures]
    ratio: float
    batches: int
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = "model"

    @property
    def minimum(self) -> dict[str, float | None]:
        """Criterion → the lowest AvgCosS of all layers, the figure that QP-SNN reports."""
        return {name: _least(layers) for name, layers in self.cosine.items()}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    def plot(self, figure: Figure | None = None) -> Figure:
        """AvgCosS by layer on the left, the common share of what would go on the right, one line per criterion.

        The dashed line is the share that two random choices have in common. Draws on ``figure``, or on a new one, and
        returns it; showing or saving it is left to you. Raises OptionError where matplotlib isn't installed.
        """
        layers = list(dict.fromkeys(name for found in self.cosine.values() for name in found))
        figure = new_figure(max(12.0, 0.5 * len(layers) + 7), 4) if figure is None else figure
        left, right = figure.subplots(1, 2)
        for panel, by_criterion, scale in ((left, self.cosine, 1), (right, self.agreement, 100)):
            for name, found in by_criterion.items():
                known = [(layers.index(layer), scale * value) for layer, value in found.items() if value is not None]
                least = _least(found)
                told = name if least is None else f"{name}: {scale * least:.{3 if scale == 1 else 0}f}"
                panel.plot([at for at, _ in known], [value for _, value in known], marker="o", label=told)
            panel.set_xticks(range(len(layers)), layers, rotation=90)
            panel.set_xlabel("layer")
            panel.grid(alpha=0.3)
        right.axhline(100 * self.ratio, linestyle="--", color="grey", label="by chance")
        right.set_ylim(top=102)
        left.set(ylabel="AvgCosS", title=f"scores, pairs of {self.batches} batches")
        right.set(ylabel="in common (%)", title=f"what would go at ratio {self.ratio:g}")
        for panel in (left, right):
            panel.legend(title="minimum over layers", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.suptitle(self.title)
        return figure

    def _parts(self) -> Iterator[str | Table]:
        yield f"{self.title}: AvgCosS, mean over the pairs of {self.batches:,} batches"
        yield _by_layer(self.cosine, "{:.4f}".format)
        yield f"common share (%) of what would go at ratio {self.ratio:g}; about {100 * self.ratio:g} by chance"
        yield _by_layer(self.agreement, percent)
        yield from left_out(self.skipped)

    def to_table(self) -> Table:
        """A row for every criterion and layer."""
        rows = [
            (criterion, layer, cosine, self.agreement[criterion].get(layer))
            for criterion, layers in self.cosine.items()
            for layer, cosine in layers.items()
        ]
        return Table([Column(key) for key in ("criterion", "layer", "cosine", "agreement")], rows)


def average_cosine(rows: Tensor) -> float | None:
    """AvgCosS of the rows of [batches, n], without columns that hold NaN; None where all are 0.

    A row of zeros has the cosine 0 with any.

    >>> round(average_cosine(torch.tensor([[2.0, 0.0], [3.0, 4.0]])), 12)
    0.6
    """
    rows = _that_can_go(rows.double())
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool(norms.any()):
        return None
    directions = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    return _over_pairs((directions @ directions.T).clamp(-1, 1))


def common_share(masks: Tensor) -> float | None:
    """2|A ∩ B| / (|A| + |B|), mean over all pairs of rows of bool [batches, n]; None where all are empty.

    >>> round(common_share(torch.tensor([[True, True, False], [True, False, True], [True, False, True]])), 4)
    0.6667
    """
    chosen = masks.double()
    sizes = chosen.sum(1)
    if not bool(sizes.any()):
        return None
    total = sizes[:, None] + sizes
    return _over_pairs(torch.where(total > 0, 2 * (chosen @ chosen.T) / total.clamp_min(1), 1.0))


def _over_pairs(matrix: Tensor) -> float:
    i, j = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return float(matrix[i, j].mean())


def _summary(rows: Tensor) -> list[float | None]:
    """Channels; lowest, mean and highest of the batches' mean; standard deviations between channels, batches."""
    rows = _that_can_go(rows)
    mean = rows.mean(0)
    between = float(rows.std(0, correction=0).mean()) if len(rows) > 1 else None
    ends = float(mean.min()), float(mean.mean()), float(mean.max())
    return [rows.shape[1], *ends, float(mean.std(correction=0)), between]


def _that_can_go(rows: Tensor) -> Tensor:
    return rows[:, ~rows.isnan().any(0)]


def _plain(scores: Tensor) -> Any:
    if scores.dim() == 0:
        return None if math.isnan(float(scores)) else float(scores)
    return [_plain(row) for row in scores] if bool(scores.isnan().any()) else scores.tolist()


def _least(found: Figures) -> float | None:
    return min((value for value in found.values() if value is not None), default=None)


def _by_layer(figures: Mapping[str, Figures], show: Callable[[Any], str]) -> Table:
    layers = dict.fromkeys(name for found in figures.values() for name in found)
    rows = [(name, *(found.get(name) for found in figures.values())) for name in layers]
    columns = [Column("layer"), *(Column(criterion, show=show) for criterion in figures)]
    return Table(columns, rows, ("minimum", *map(_least, figures.values())))
