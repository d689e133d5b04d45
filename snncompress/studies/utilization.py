"""``utilization``: how many of a quantizer's grid values a network's weights really take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.base.display import new_figure, number
from snncompress.base.tables import Column, Shown, Table, left_out
from snncompress.contract.registry import registry
from snncompress.errors import ModelError, OptionError, PluginError, SNNCompressError
from snncompress.interfaces import Quantizer
from snncompress.model.cells import decays, layer_at
from snncompress.model.copying import refuse_broken
from snncompress.model.network import outputs_first, weight_layers
from snncompress.model.parametrizations import computed_weight, float_weight, weight_mask
from snncompress.pruning.selection import check_bits, overruled, per_layer

from .units import label, labelled, listed, reasons, refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 101
_ROWS = 4


@dataclass(frozen=True, eq=False)
class GridUse:
    """How a layer's weights use one grid of 2^bits values.

    Fields:
        quantizer: its name, and the options that aren't the defaults.
        bits: b.
        measured: R_utilize, distinct values in use over 2^b. Where every channel has a scale of its own, its values
            count as the same number n of the grid.
        estimate: what the largest weight reaches of the grid, as a share.
        values: the grid's values, [2^b]; with a scale per channel, of the mean one.
        counts: how many weights have each, [2^b].
    """

    quantizer: str
    bits: int
    measured: float
    estimate: float
    values: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class WeightRange:
    """A layer's float weights, those that exist.

    Fields:
        largest: max|W|.
        percentiles: the 1st and the 99th.
        edges: of a histogram from -max|W| to max|W|, [bins + 1].
        counts: weights in each bin, [bins].
    """

    largest: float
    percentiles: tuple[float, float]
    edges: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Utilization(Shown):
    """What :func:`utilization` found. ``print`` shows a table.

    Fields:
        uses: layer → a :class:`GridUse` for each quantizer and bit width.
        weights: layer → its weights before they are quantized, as a :class:`WeightRange`.
        skipped: layers that were left out, with the reason.
        title: the model's class.
    """

    uses: Mapping[str, tuple[GridUse, ...]]
    weights: Mapping[str, WeightRange]
    skipped: Mapping[str, str] = field(default_factory=dict)
    title: str = "model"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "uses": {name: [_plain(use) for use in uses] for name, uses in self.uses.items()},
            "weights": {name: _plain(weights) for name, weights in self.weights.items()},
            "skipped": dict(self.skipped),
            "title": self.title,
        }

    def plot(self, layers: str | Iterable[str] | None = None, figure: Figure | None = None) -> Figure:
        """Histograms of the weights, a row per layer: before, then on each grid, from its first value to its last.

        Dashed lines stand at the 1st and the 99th percentile of the weights before.

        Args:
            layers: names or globs; None: at most four, spread over the network.
            figure: to draw on; None: a new one.

        Returns:
            The figure; showing or saving it is left to you.

        Raises:
            OptionError: a layer that isn't there, or matplotlib isn't installed.
        """
        shown = _spread(list(self.uses)) if layers is None else _among(list(self.uses), layers)
        columns = 1 + len(self.uses[shown[0]])
        figure = new_figure(2.9 * columns, 1.6 * len(shown) + 0.9) if figure is None else figure
        panels = figure.subplots(len(shown), columns, squeeze=False)
        for row, name in zip(panels, shown, strict=True):
            weights = self.weights[name]
            row[0].stairs(_shares(weights.counts), weights.edges.numpy(), fill=True, color="0.6")
            row[0].set_title(f"layer {name}: max|W| = {number(weights.largest)}", fontsize=9)
            for panel, use in zip(row[1:], self.uses[name], strict=True):
                values = use.values.numpy()
                edges = np.append(values, 2 * values[-1] - values[-2]) - (values[1] - values[0]) / 2
                panel.stairs(_shares(use.counts), edges, fill=True, color="tab:blue")
                panel.set_xlim(edges[0], edges[-1])
                used = f"{int((use.counts > 0).sum())} of {len(values)} ({100 * use.measured:.0f} %)"
                panel.set_title(f"{use.quantizer}, {_bits(use.bits)}: {used}", fontsize=9)
            for panel in row:
                for at in weights.percentiles:
                    panel.axvline(at, linestyle="--", linewidth=1, color="tab:red")
                panel.tick_params(labelsize=8)
        panels[0][0].plot([], [], linestyle="--", linewidth=1, color="tab:red", label="1st, 99th percentile")
        figure.legend(loc="outside upper right", frameon=False, fontsize=9)
        figure.suptitle(f"{self.title}: weights before, and the grid values in use")
        figure.supylabel("weights (%)", fontsize=10)
        return figure

    def _parts(self) -> Iterator[str | Table]:
        titles = dict.fromkeys(use.quantizer for uses in self.uses.values() for use in uses)
        widths = dict.fromkeys(use.bits for uses in self.uses.values() for use in uses)

        def row(title: str, uses: Iterable[GridUse]) -> list[str]:
            own = [use for use in uses if use.quantizer == title]
            same = [[use for use in own if use.bits == bits] for bits in widths]
            return [title, *(_cell(mean(u.measured for u in us), mean(u.estimate for u in us)) for us in same)]

        rows = [
            ["" if at else name, None if at else self.weights[name].largest, *row(title, uses)]
            for name, uses in self.uses.items()
            for at, title in enumerate(titles)
        ]
        every = [use for uses in self.uses.values() for use in uses]
        rows += [["" if at else "mean", None, *row(title, every)] for at, title in enumerate(titles)]
        columns = [Column("layer"), Column("max|W|"), Column("quantizer", left=True), *map(Column, map(_bits, widths))]
        yield f"{self.title}: grid values in use (%), and what max|W| reaches of the grid"
        yield Table(columns, rows)
        yield from left_out(self.skipped)

    def to_table(self) -> Table:
        """A row for every layer, quantizer and bit width."""
        rows = [
            (name, self.weights[name].largest, use.quantizer, use.bits, use.measured, use.estimate)
            for name, uses in self.uses.items()
            for use in uses
        ]
        keys = ("layer", "largest", "quantizer", "bits", "measured", "estimate")
        return Table([Column(key) for key in keys], rows)


def utilization(
    model: nn.Module,
    quantizer: str | Quantizer | Sequence[str | Quantizer] = ("uniform", "rescaw"),
    bits: int | Sequence[int] = (8, 4),
    *,
    layers: str | Iterable[str] | None = None,
) -> Utilization:
    """How much of its grid each layer's weights use: R_utilize, measured and by the paper's estimate.

        R_utilize = distinct grid values in use / grid values available                                (Eq. 8)
        estimate  = (s · min(a / γ, 1) + 1) / (s + 1),   s = 2^b - 1,   a = max|W|

    where the grid goes from -γ to γ: γ = 1 on the vanilla grid ("uniform"), which gives the paper's
    (s · a + 1) / (s + 1). The estimate takes every grid value between -a and a as used, and is off by up to one of
    them; where a layer has few weights or heavy tails, fewer are in use. Other grids, ``scale * (n - zero_point)`` for
    n = 0 … s, are estimated alike, from the n that -a and a come to. The weights are those before quantization, also
    in a network that is quantized already; removed ones don't count. Nothing is run, and nothing is changed.

    Args:
        model: a network of any kind with convolutions or linear layers.
        quantizer: name or instance (:func:`snncompress.quantizers` lists the names), or several.
        bits: 1 to 16, or several widths: each quantizer is tried at each of them.
        layers: names or globs; None: all.

    Raises:
        OptionError: a bit width out of range, a quantizer twice, or a layer that isn't there or can't be quantized.
        UnknownNameError: no quantizer has this name.
        ModelError: no layer with weights to quantize, or weights that hold NaN.
        PluginError: a quantizer fails, or its values aren't on the grid that it names.

    Source: QP-SNN (ICLR 2025), Eq. 8, and 14.33 % to 32.26 % at 8 bits for max|W| from 0.14 to 0.32: the estimate is
    14.3359 and 32.2656, cut off behind two digits.

    Example:
        At two bits the vanilla grid is -1, -1/3, 1/3, 1. Weights up to 0.5 use its middle two; scaled by γ = 0.5, all:

        >>> net = nn.Linear(4, 1)
        >>> net.weight.data = torch.tensor([[-0.5, -0.2, 0.1, 0.5]])
        >>> result = utilization(nn.Sequential(net), ["uniform", "rescaw"], 2)
        >>> [(use.quantizer, use.measured, round(use.estimate, 6)) for use in result.uses["0"]]  # (3 · 0.5 + 1) / 4
        [('uniform', 0.5, 0.625), ('rescaw', 1.0, 1.0)]
        >>> print(result)
        Sequential: grid values in use (%), and what max|W| reaches of the grid
         layer   max|W|   quantizer            2 bits
         ────────────────────────────────────────────
         0          0.5   uniform       50.00 (62.50)
                          rescaw      100.00 (100.00)
         mean             uniform       50.00 (62.50)
                          rescaw      100.00 (100.00)
    """
    chosen = labelled("quantizer", quantizer, lambda value: registry().resolve("quantizer", value, Quantizer))
    widths = [_width(value) for value in (listed(bits, "bits") if isinstance(bits, Iterable) else [bits])]
    refuse_broken(model)
    found, skipped = _weights(model, layers)
    with torch.no_grad():
        uses = {
            name: tuple(_use(codec, title, width, name, *pair) for title, codec in chosen.items() for width in widths)
            for name, pair in found.items()
        }
    ranges = {name: _range(weight[exists]) for name, (weight, exists) in found.items()}
    return Utilization(uses, ranges, skipped, type(model).__name__)


def _weights(
    model: nn.Module, layers: str | Iterable[str] | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Layer → float weight and which of it exist, output channels first; and why others are left out."""
    names = weight_layers(model)
    if not names:
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer: nothing to quantize.")
    wanted = names if layers is None else _among(names, layers)
    whys = decays(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in wanted:
        module = layer_at(model, name)
        if why := whys.get(name) or computed_weight(module):
            whys[name] = why
            continue
        weight, mask = outputs_first(float_weight(module), module), weight_mask(module)
        if not bool(weight.any()):
            whys[name] = "all its weights are 0"
            continue
        exists = torch.ones_like(weight, dtype=torch.bool) if mask is None else outputs_first(mask, module)
        found[name] = weight, exists
    skipped = {name: whys[name] for name in wanted if name in whys}
    if layers is not None:
        refuse(
            "layers",
            overruled(dict.fromkeys([layers] if isinstance(layers, str) else layers, True), skipped),
            "quantized",
        )
    if not found:
        raise ModelError(f"{type(model).__name__} has no layer to quantize. {reasons(skipped)}.")
    return found, skipped


def _use(quantizer: Quantizer, title: str, bits: int, name: str, weight: Tensor, exists: Tensor) -> GridUse:
    value, scale, zero = _quantized(quantizer, bits, name, weight)
    steps = 2**bits - 1
    numbers = value / scale + zero
    slack = 1e-3 + 16 * torch.finfo(torch.float32).eps * 2**bits  # scales are float32 often enough
    whole = numbers.round()
    off = ((numbers - whole).abs() > slack) | (whole < 0) | (whole > steps)
    nothing = off & (value == 0) & (weight == 0)  # a channel without a range has no grid
    if bool((off & exists & ~nothing).any()):
        raise PluginError(
            f"Quantizer {title}, layer {name}: values aren't on the grid scale * (n - zero_point), n = 0 … {steps}, "
            f"so there is no share of it in use. snncompress.testing.check_quantizer tries a quantizer."
        )
    counts = torch.bincount(whole[exists & ~nothing].long(), minlength=steps + 1)
    reach = weight.abs().double() / scale
    high, low = (zero + reach).clamp(0, steps), (zero - reach).clamp(0, steps)
    within = float(high[exists & ~nothing].max() - low[exists & ~nothing].min())
    grid = (torch.arange(steps + 1, dtype=torch.float64) - float(zero.mean())) * float(scale.mean())
    measured = int((counts > 0).sum()) / (steps + 1)
    return GridUse(title, bits, measured, (within + 1) / (steps + 1), grid, counts.cpu())


def _quantized(quantizer: Quantizer, bits: int, name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, scale and zero point, float64."""
    try:
        module = quantizer.tensor_quant(bits).to(weight.device).eval()
        value, scale, zero, _ = module(weight.clone())
        return cast(Tensor, value).double(), cast(Tensor, scale).double(), cast(Tensor, zero).double()
    except SNNCompressError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(
            f"Quantizer {label(quantizer)} failed at {_bits(bits)} on layer {name}: {type(error).__name__}: {error}"
        ) from error


def _range(weights: Tensor) -> WeightRange:
    values = weights.double().cpu().numpy()
    largest = float(np.abs(values).max())
    low, high = np.percentile(values, (1, 99))
    counts, edges = np.histogram(values, _BINS, (-largest, largest))
    return WeightRange(largest, (float(low), float(high)), torch.tensor(edges), torch.tensor(counts))


def _width(value: Any) -> int:
    width = check_bits(value, "bits")
    if width is None:
        raise OptionError("bits must be whole numbers from 1 to 16: without bits there is no grid.")
    return width


def _among(names: list[str], layers: str | Iterable[str]) -> list[str]:
    asked = dict.fromkeys(listed([layers] if isinstance(layers, str) else layers, "layers"), True)
    wanted = per_layer(asked, names, "layers", lambda value, _: value)
    return [name for name in names if name in wanted]


def _spread(names: list[str]) -> list[str]:
    """At most four, the first and the last among them."""
    count = min(_ROWS, len(names))
    return [names[round(at * (len(names) - 1) / max(1, count - 1))] for at in range(count)]


def _shares(counts: Tensor) -> Any:
    return (100 * counts / counts.sum().clamp_min(1)).numpy()


def _plain(record: GridUse | WeightRange) -> dict[str, Any]:
    values = ((name, getattr(record, name)) for name in record.__dataclass_fields__)
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values}


def _bits(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def _cell(measured: float, estimate: float) -> str:
    return f"{100 * measured:.2f} ({100 * estimate:.2f})"
