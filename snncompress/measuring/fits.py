"""``fits``: whether a network fits a chip, layer by layer, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from snncompress.base.display import number
from snncompress.base.distributed import no_sync
from snncompress.base.tables import Column, Shown, Table
from snncompress.contract.registry import registry
from snncompress.errors import PluginError, SNNCompressError
from snncompress.interfaces import Adapter, Forward, Limit, Placement, Stage, Target
from snncompress.model.modules import tensors_in
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.plan import refuse_frozen
from snncompress.running.bench import Bench, bench
from snncompress.structure.stages import stages

from .counting import is_spikes

T = TypeVar("T")
_NO_GRID = "states aren't on a grid yet (floats)"


@dataclass(frozen=True)
class Row:
    """One limit of one layer; "" is the network as a whole."""

    layer: str
    limit: Limit


@dataclass(frozen=True)
class Fit(Shown):
    """Whether a network fits a chip. It is true where it does, and prints as a table.

    Fields:
        target: the chip's name.
        rows: what each layer, and the network, needs, and what the chip has.
        cores: the cores that each layer takes; one that got none is missing.
        widths: layer → output channels with which it fits, where fewer channels help; else empty.
        steps: what would make it fit, in the order in which to do it.
        notes: what isn't part of the verdict.
    """

    target: str
    rows: tuple[Row, ...]
    cores: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    title: str = "model"

    @property
    def ok(self) -> bool:
        """Is every limit kept?"""
        return not self.missed

    @property
    def missed(self) -> tuple[Row, ...]:
        """The limits that aren't kept."""
        return tuple(row for row in self.rows if not row.limit.met)

    @property
    def first(self) -> str:
        """The first thing that must change; "" where nothing must."""
        return self.steps[0] if self.steps else ""

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "target": self.target,
            "ok": self.ok,
            "rows": [
                {"layer": row.layer, **dataclasses.asdict(row.limit), "slack": row.limit.slack} for row in self.rows
            ],
            "cores": {name: list(cores) for name, cores in self.cores.items()},
            "widths": dict(self.widths),
            "steps": list(self.steps),
            "notes": list(self.notes),
        }

    def _parts(self) -> Iterator[str | Table]:
        shown = [row for row in self.rows if row.limit.slack is not None or not row.limit.met]
        columns = (
            Column("layer"), Column("kind", left=True),
            *(Column(key, show=_shown) for key in ("needs", "has", "slack")),
            Column("met", "", lambda met: "" if met else "✗"),
        )  # fmt: skip
        rows = [
            (row.layer or "(network)", row.limit.what, row.limit.needs, row.limit.has, row.limit.slack, row.limit.met)
            for row in shown
        ]
        verdict = "fits" if self.ok else f"doesn't fit: {len(self.missed)} of {len(self.rows)} limits are exceeded"
        yield f"{self.title} on {self.target}: {verdict}"
        yield Table(columns, rows)
        if self.steps:
            yield "\n".join(["what would make it fit:", *(f"  {n}. {step}" for n, step in enumerate(self.steps, 1))])
        yield from (f"note: {note}" for note in self.notes)


def fits(
    model: nn.Module,
    target: Target | str,
    *,
    data: Any = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
) -> Fit:
    """Does a network fit a chip? What each layer needs, what the chip has, and what would make it fit.

    Batch norms count as folded into the layer before them, and weights as what they are: floats have 32 bits. States
    and thresholds count where they are on a grid; of floats a note says that they aren't.

    Args:
        model: a network of SpikingJelly or snnTorch, compressed or not; it stays as it is.
        target: a name (:func:`snncompress.targets` lists them) or an instance, such as an ``FPGA`` of your figures.
        data: an example of what it takes: a batch, a DataLoader, or an iterable of batches, of which the first is used.
            None: noise of a shape that fits; whether the network's input is spikes is then not asked.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds a batch as it is.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        neurons: the class of spiking neurons of your own, or several (:class:`snncompress.OwnNeurons`).
        time_dim: the axis of time in what they take, None where they take one timestep.

    Raises:
        UnknownNameError: there is no such target.
        ModelError, DataError: the model can't be run on the data, or is frozen, in floats or in whole numbers.

    Example:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(16, 2000, bias=False), neuron.IFNode(v_reset=None),
        ...                     layer.Linear(2000, 8, bias=False), neuron.IFNode(v_reset=None))
        >>> found = fits(net, "xylo_audio2", data=torch.ones(1, 16), timesteps=4)
        >>> found.ok, found.widths
        (False, {'0': 1000})
        >>> found.steps[1]
        "leave '0' 1,000 of its 2,000 output channels"
    """
    chip: Target = registry().resolve("target", target, Target)
    named = named_neurons(adapter, neurons, time_dim)
    with no_sync(), bench(model, data, timesteps, forward, adapter=named, noise="structure") as tools:
        return fitted(chip, staged(tools, known=data is not None), type(model).__name__)


def staged(tools: Bench[Any], *, known: bool) -> tuple[Stage, ...]:
    """The stages of the model on a bench; where its data are ``known``, with what its first layers read."""
    refuse_frozen(tools.model, "held against a chip", "its weights aren't on the grids any more that they came from")
    found = stages(tools.model, tools.adapter, tools.feed.example())
    if not known:
        return found
    analog: dict[str, bool] = {}

    def look(name: str, layer: nn.Module, args: Any) -> None:
        x: Tensor = next(tensors_in(args))
        analog[name] = analog.get(name, False) or not is_spikes(x)

    first = [stage.name for stage in found if not stage.reads]
    handles = [tools.model.get_submodule(n).register_forward_pre_hook(partial(look, n)) for n in first]
    with torch.no_grad():
        tools.feed(tools.model, tools.feed.example_batch())
    for handle in handles:
        handle.remove()
    tools.adapter.reset(tools.model)
    return tuple(dataclasses.replace(stage, analog=analog.get(stage.name)) for stage in found)


def fitted(target: Target, found: Sequence[Stage], title: str = "model") -> Fit:
    """The verdict on stages, with what would make them fit."""
    rows, placement = judged(target, found)
    widths = _narrower(target, found) if any(_by_width(row) for row in rows) else {}
    steps = list(_steps(row for row in rows if not row.limit.met and not _by_width(row)))
    for stage in found:
        if stage.name in widths:
            steps.append(f"leave {stage.name!r} {widths[stage.name]:,} of its {stage.out_channels:,} output channels")
    if any(_by_width(row) for row in rows) and not widths:
        steps += too_much(target, found)
    notes = [_NO_GRID] if any(stage.state_bits is None and stage.neuron for stage in found) else []
    if notes and target.state_bits is not None:
        notes = [f"{_NO_GRID}; the chip has {target.state_bits} bits, to which its tools round them"]
    notes += [target.caveat] if target.caveat else []
    return Fit(target.name, rows, placement.cores, widths, tuple(steps), tuple(notes), title)


def too_much(target: Target, found: Sequence[Stage]) -> tuple[str, ...]:
    """What of the stages is exceeded and would be less with fewer channels, in words."""
    return tuple(_steps(row for row in judged(target, found)[0] if _by_width(row)))


def judged(target: Target, found: Sequence[Stage]) -> tuple[tuple[Row, ...], Placement]:
    """Every limit of every stage, those of the network, and where the stages go."""
    rows = [Row(stage.name, limit) for stage in found for limit in limits_of(target, stage)]
    placement = _asked(target, "place()", lambda: target.place(found))
    if not isinstance(placement, Placement):
        raise PluginError(f"Target {target.name!r}: place() must return a Placement, not a {type(placement).__name__}.")
    rows += [Row("", limit) for limit in placement.limits]
    fine = {row.layer for row in rows} - {row.layer for row in rows if _by_width(row)}
    for stage in found:
        if stage.name not in placement.cores:
            what = "a core of its own" if stage.name in fine or all(r.layer != stage.name for r in rows) else "a core"
            rows.append(Row(stage.name, Limit(what, 1, 0, False)))
    return tuple(rows), placement


def limits_of(target: Target, stage: Stage) -> list[Limit]:
    """What the stage needs of the chip; raises PluginError where the target can't tell."""
    limits = _asked(target, f"limits() of {stage.name!r}", lambda: list(target.limits(stage)))
    for limit in limits:
        if not isinstance(limit, Limit):
            raise PluginError(f"Target {target.name!r}: limits() must yield Limits, not a {type(limit).__name__}.")
    return limits


def _asked(target: Target, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except SNNCompressError:
        raise
    except Exception as error:  # a plugin's: anything can come out of it
        raise PluginError(f"Target {target.name!r}: {what} failed: {type(error).__name__}: {error}.") from error


def narrowed(found: Sequence[Stage], widths: Mapping[str, int]) -> tuple[Stage, ...]:
    """The stages with other numbers of output channels; what reads them has as many fewer, in proportion."""
    before = {stage.name: stage.out_channels for stage in found}
    now = {**before, **widths}

    def inputs(stage: Stage) -> int:
        share = sum(now[n] for n in stage.reads) / max(1, sum(before[n] for n in stage.reads))
        return max(1, round(stage.in_channels * share)) if stage.reads else stage.in_channels

    return tuple(dataclasses.replace(stage, out_channels=now[stage.name], in_channels=inputs(stage)) for stage in found)


def _narrower(target: Target, found: Sequence[Stage]) -> dict[str, int]:
    """Widths with which no limit that depends on them is exceeded; empty where none are found.

    All layers but the last lose the same share, the least that is enough, then each gets back what it can.
    """
    free = [stage for stage in found if stage.feeds]
    sums = {name for stage in found if "sum" in stage.operations for name in stage.reads}

    def good(widths: Mapping[str, int]) -> bool:
        rows, _ = judged(target, narrowed(found, widths))
        return not any(_by_width(row) for row in rows)

    def scaled(share: float) -> dict[str, int]:
        return {stage.name: max(1, math.floor(stage.out_channels * share)) for stage in free}

    if not free or not good(scaled(0.0)):
        return {}
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if good(scaled(middle)) else (low, middle)
    widths = scaled(low)
    for stage in sorted(free, key=lambda stage: stage.name in sums):
        if stage.name in sums:  # what is added keeps one width
            continue
        most = stage.out_channels
        least = widths[stage.name]
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if good({**widths, stage.name: middle}) else (least, middle - 1)
        widths[stage.name] = least
    return {stage.name: widths[stage.name] for stage in free if widths[stage.name] < stage.out_channels}


def _by_width(row: Row) -> bool:
    """Is it exceeded, and would fewer channels help?"""
    return not row.limit.met and not row.limit.remedy


def _steps(rows: Iterable[Row]) -> Iterator[str]:
    """What to do about limits that are exceeded; layers of which the same is to be said, together."""
    said: dict[str, list[str]] = {}
    for row in rows:
        limit = row.limit
        text = f"{limit.what} {_shown(limit.needs)}, the chip has {_shown(limit.has)}"
        said.setdefault(text + (f": {limit.remedy}" if limit.remedy else ""), []).append(row.layer)
    for text, layers in said.items():
        named = ", ".join(repr(layer) for layer in dict.fromkeys(layers) if layer)
        yield f"{named}: {text}" if named else text


def _shown(value: float | str | None) -> str:
    return value if isinstance(value, str) else number(value)
