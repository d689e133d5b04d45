"""The plan: an ordered list of edits, with where it came from. It reads back from JSON as it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from snncompress.base.display import bars, bars_figure
from snncompress.base.tables import Column, Shown, Table
from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, PlanError, SNNCompressError
from snncompress.interfaces import Adapter

from .copying import private_copy
from .edits import Edit, MaskWeights, QuantizeWeights, RemoveChannels, TruncateTimesteps, edit_from_dict
from .network import Side
from .parametrizations import compute_once_per_call

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 2
M = TypeVar("M", bound=nn.Module)
_GROWTH = 1000
"""No layer behind a removed block gets more weights than this many times those of the network."""
_ATTRIBUTE = "_snncompress_plan"
_DETACHED = "_snncompress_detached"


@dataclass(frozen=True)
class Plan(Shown):
    """What was done to a network.

    ``edits`` in order; ``skipped`` says which layers kept all their channels, and why, or where nothing was pruned,
    which can't be quantized; ``origin`` which settings and versions produced the plan. A plan is JSON: it reads back
    equal to itself. ``print`` shows its edits, a notebook a table of them, which :meth:`to_csv` and :meth:`to_pandas`
    give, too.

    >>> from snncompress import Plan, QuantizeWeights
    >>> plan = Plan((QuantizeWeights("conv2", "uniform", 4, {"ste": "clip"}),))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    edits: tuple[Edit, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module, adapter: Adapter | str | None = None) -> nn.Module:
        """Replay on a fresh model of the same architecture: a new, equally compressed model with its own weights.

        The given model stays as it was. Raises PlanError where the architecture differs.
        """
        found = find_adapter(model, adapter)
        weights = sum(p.numel() for p in model.parameters())
        return self.replayed(model, found, largest=_GROWTH * (weights + _GROWTH))

    def replayed(self, model: M, adapter: Adapter, largest: int | None = None, *, blank: Iterable[object] = ()) -> M:
        """:meth:`apply`, for those who know the adapter; no layer may grow beyond ``largest`` weights.

        Values of the parameters in ``blank`` aren't copied: the caller writes over them.
        """
        refuse_frozen(model, "compressed")
        result = private_copy(model, adapter, blank=blank)
        for edit in self.edits:
            try:
                if largest is not None:
                    edit.check_growth(result, largest)
                edit.apply(result, adapter)
            except SNNCompressError:
                raise
            except Exception as error:  # a plan may come from anywhere
                raise PlanError(
                    f"A {edit.kind!r} edit of the plan failed: {type(error).__name__}: {error}. The plan is damaged, "
                    f"or made for another architecture."
                ) from error
        adapter.adopt(result)
        attach(result, self)
        return result

    def removed_channels(self, side: Side = "out") -> dict[str, list[int]]:
        """layer → output channels that are gone, as indices in the original model; coupled layers included.

        With ``side`` "neuron" the same of neurons.
        """
        removed: dict[str, list[int]] = {}
        for edit in self.edits:
            if not isinstance(edit, RemoveChannels):
                continue
            for piece in edit.slices:
                if piece.side == side:
                    gone = removed.setdefault(piece.module, [])
                    before = np.array(gone, dtype=np.int64) - np.arange(len(gone))  # of each, channels left before it
                    now = np.array(piece.indices, dtype=np.int64)
                    gone.extend((now + np.searchsorted(before, now, side="right")).tolist())
                    gone.sort()
        return removed

    @property
    def whole(self) -> tuple[str, ...]:
        """The layers that were left as they are; ``skipped`` says why.

        >>> Plan(skipped={"fc": "it feeds the classifier"}).whole
        ('fc',)
        """
        return tuple(self.skipped)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """layer → output channels before and after, of all layers that lost some; coupled ones and norms included.

        >>> from snncompress.model.edits.slices import Slice
        >>> first = RemoveChannels("conv", (0, 2), (Slice("conv", "out", (0, 2), 8, 0),))
        >>> Plan((first, RemoveChannels("conv", (5,), (Slice("conv", "out", (5,), 6, 0),)))).widths
        {'conv': (8, 5)}
        """
        found: dict[str, tuple[int, int]] = {}
        pieces = (piece for edit in self.edits if isinstance(edit, RemoveChannels) for piece in edit.slices)
        for piece in pieces:
            if piece.side == "out":
                before, _ = found.get(piece.module, (piece.width, 0))
                found[piece.module] = before, piece.width - len(piece.indices)
        return found

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """layer → weights before and after, of all layers that lost single ones.

        Where channels went as well, before is what the layer had when single weights were last removed.

        >>> import torch
        >>> Plan((MaskWeights.of("fc", torch.tensor([[True, False, False]])),)).weights
        {'fc': (3, 1)}
        """
        masks = {edit.layer: edit.mask() for edit in self.edits if isinstance(edit, MaskWeights)}
        return {layer: (mask.numel(), int(mask.sum())) for layer, mask in masks.items()}

    @property
    def bits(self) -> dict[str, int]:
        """layer → bit width of its weight, of all layers that are quantized.

        >>> Plan((QuantizeWeights("conv2", "uniform", 4, {}),)).bits
        {'conv2': 4}
        """
        return {edit.layer: edit.bits for edit in self.edits if isinstance(edit, QuantizeWeights)}

    @property
    def timesteps(self) -> int | None:
        """How many timesteps the model runs since the last truncation; None where it was never truncated.

        >>> from snncompress import TruncateTimesteps
        >>> Plan((TruncateTimesteps(8), TruncateTimesteps(5))).timesteps
        5
        """
        return next((e.timesteps for e in reversed(self.edits) if isinstance(e, TruncateTimesteps)), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "format": FORMAT,
            "edits": [edit.to_dict() for edit in self.edits],
            "skipped": dict(self.skipped),
            "origin": dict(self.origin),
        }

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises PlanError for anything that isn't one."""
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(data, dict) or "format" not in data:
                raise PlanError("Not a plan: it has no format number. Plan.to_json() writes one.")
            if data["format"] not in (1, FORMAT):
                raise PlanError(
                    f"Plan format {data['format']!r} is unknown to this version, which reads 1 and {FORMAT}. Upgrade."
                )
            edits = tuple(edit_from_dict(e) for e in data["edits"])
            skipped = data["whole" if data["format"] == 1 else "skipped"]
            return cls(edits, dict(skipped), dict(data["origin"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"Not a plan: {type(error).__name__}: {str(error)[:200]}") from error

    def plot(self, figure: Figure | None = None) -> Figure:
        """Layer by layer before and after: output channels, weights where single ones went, and bits.

        What the plan leaves alone isn't drawn. Draws on ``figure``, or on a new one, and returns it; showing or saving
        it is left to you. Raises OptionError where matplotlib isn't installed, PlanError where there is nothing to
        draw.
        """
        bits = {layer: (32, width) for layer, width in self.bits.items()}
        panels = {"output channels": self.widths, "weights": self.weights, "bits per weight": bits}
        shown = {title: found for title, found in panels.items() if found}
        if not shown:
            raise PlanError("The plan removes no channels or weights and quantizes nothing: there is nothing to draw.")
        figure = bars_figure(len(shown), max(map(len, shown.values())), 2) if figure is None else figure
        for panel, (title, found) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            before, after = zip(*found.values(), strict=True)
            bars(panel, list(found), {"before": before, "after": after}, title)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=2, frameon=False)
        return figure

    def _parts(self) -> Iterator[str | Table]:
        rows = []
        for edit in self.edits:
            where = getattr(edit, "layer", getattr(edit, "name", ""))
            rows.append((edit.kind, where, edit.describe().removeprefix(f"{where}: ")))
        rows += [("kept_whole", layer, why) for layer, why in self.skipped.items()]
        yield f"Plan of {len(self.edits)} edits"
        columns = (Column("edit", show=lambda kind: kind.replace("_", " ")), Column("layer", left=True))
        yield Table((*columns, Column("what", left=True)), rows)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __str__(self) -> str:
        lines = [f"Plan of {len(self.edits)} edits"]
        lines += [f"  {edit.describe()}" for edit in self.edits]
        lines += [f"  {layer} kept whole: {why}" for layer, why in self.skipped.items()]
        return "\n".join(lines)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} isn't JSON")


def attach(model: nn.Module, plan: Plan) -> None:
    """Remember the plan on the compressed model (deep copies keep it, the state_dict doesn't hold it)."""
    setattr(model, _ATTRIBUTE, plan)
    compute_once_per_call(model)


def detach(model: nn.Module) -> None:
    """Forget the plan: this network isn't what a plan makes any more."""
    vars(model).pop(_ATTRIBUTE, None)
    compute_once_per_call(model)
    setattr(model, _DETACHED, True)


def has_plan(model: nn.Module) -> bool:
    """Does it hold a plan?"""
    return isinstance(vars(model).get(_ATTRIBUTE), Plan)


def is_detached(model: nn.Module) -> bool:
    """Is this a network that no plan leads to?"""
    return bool(vars(model).get(_DETACHED, False))


def refuse_frozen(model: nn.Module, what: str, why: str = "no plan leads to it") -> None:
    """Raise ModelError for a frozen network, or one with a frozen part."""
    frozen = next((name for name, module in model.named_modules() if is_detached(module)), None)
    if frozen is not None:
        part = f"its part {frozen!r} is" if frozen else "it is"
        raise ModelError(
            f"This {type(model).__name__} can't be {what}: {part} frozen, so {why}. Take the network "
            f"that it was made from."
        )


def plan_of(model: nn.Module) -> Plan:
    """The plan that compressed this model; raises PlanError for a model that isn't compressed."""
    plan = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    if not isinstance(plan, Plan):
        kind = type(model).__name__
        inner = getattr(model, "_modules", {})
        part = next((name for name, module in inner.items() if module is not None and has_plan(module)), None)
        if part is not None:  # DistributedDataParallel, a compiled or an averaged model
            raise PlanError(f"This {kind} holds no plan, but its part {part!r} does: plan_of(model.{part}).")
        raise PlanError(f"This {kind} holds no plan: it did not come from snncompress.apply.")
    return plan


def continued(original: nn.Module, plan: Plan) -> Plan:
    """The plan of a model that was made from ``original``, with what had been done to that before."""
    try:
        before = plan_of(original)
    except PlanError:
        return plan
    return Plan(before.edits + plan.edits, plan.skipped, {**plan.origin, "before": dict(before.origin)})
