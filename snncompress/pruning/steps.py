"""What one call of apply() removes, step by step: coupled channels, single weights or whole blocks."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snncompress.base.progress import Progress
from snncompress.errors import EmptyLayerWarning, PluginError
from snncompress.interfaces import Adapter, Criterion
from snncompress.model.cells import layer_at
from snncompress.model.edits import Edit, MaskWeights, RemoveChannels, SilenceChannels
from snncompress.model.network import ChannelGroup, Network, by_layer, without
from snncompress.model.parametrizations import restore_weights, stored_weight, weight_mask
from snncompress.model.silencing import give_voice, gradients_through_masks
from snncompress.running.data import Feed
from snncompress.structure.confirming import Confirm

from .recording import record
from .scorer import Groups
from .selection import Target, highest, in_step, lowest

Share = Callable[[float], float]
"""A layer's target → the share that must be gone after this step."""


@dataclass(frozen=True)
class Regrowth:
    """That what goes is only masked, and that a ``share`` of it comes back for others: what has the highest scores."""

    share: float
    scores: Mapping[str, Tensor]


class Pruning(ABC):
    """Removes from ``model``, in place, what scores lowest, and keeps the books that the next step needs."""

    def __init__(self, model: nn.Module, adapter: Adapter, criterion: Criterion) -> None:
        self.model, self.adapter, self.criterion = model, adapter, criterion

    @abstractmethod
    def score(self, feed: Feed, seed: int, progress: Progress | None = None, what: str = "") -> Mapping[str, Tensor]:
        """The scores of what may go, from one pass over the data; empty where nothing may."""

    @abstractmethod
    def step(self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None) -> list[Edit]:
        """Remove up to the share of everything, or exchange some of what is masked, and return what was done."""

    def redo(self, edit: Edit) -> None:
        """Apply one edit and note what it changed; a resumed run goes through its earlier edits with it."""
        edit.apply(self.model, self.adapter)


class LayerPruning(Pruning):
    """Pruning by scores of layers."""

    def __init__(self, model: nn.Module, adapter: Adapter, criterion: Criterion, network: Network) -> None:
        super().__init__(model, adapter, criterion)
        self.network = network

    @abstractmethod
    def scored(self) -> Mapping[str, Groups]:
        """The layers to score, each with the coupled groups that it stands in, where channels are scored."""

    @abstractmethod
    def going(self, scores: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """What a step would remove: bool, shaped like the layer's scores; True = goes."""

    def score(self, feed: Feed, seed: int, progress: Progress | None = None, what: str = "") -> dict[str, Tensor]:
        """{layer: scores}, see :func:`recording.record`."""
        return self._recorded(self.criterion, feed, seed, progress, what)

    def growth(
        self, share: float, criterion: Criterion, feed: Feed, seed: int, progress: Progress | None = None,
        what: str = "",
    ) -> Regrowth:  # fmt: skip
        """A share, and what this criterion says of all channels or weights, those included that are masked."""
        with gradients_through_masks(self.model):
            return Regrowth(share, self._recorded(criterion, feed, seed, progress, what) if share else {})

    def _recorded(
        self, criterion: Criterion, feed: Feed, seed: int, progress: Progress | None, what: str
    ) -> dict[str, Tensor]:
        layers = self.scored()
        return record(self.model, self.network, feed, criterion, layers, seed, progress, what) if layers else {}


class ChannelPruning(LayerPruning):
    """Removes coupled output channels, group by group, with ``confirm`` those that bear it.

    Where some may come back, they are silent until the end.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, criterion: Criterion, network: Network, targets: list[Target],
        confirm: Confirm | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, adapter, criterion, network)
        self.targets, self._confirm = targets, confirm
        self._tied = in_step(targets, network)
        self.left: dict[str, str] = {}
        """Layers that lost nothing in some step, since just the channels chosen can't go, with the reason."""

    def scored(self) -> dict[str, Groups]:
        """Every weight layer of every group, in the group's present size."""
        return dict(by_layer([target.group for target in self.targets], self.network.layers))

    def step(self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None) -> list[Edit]:
        """One edit per group that has channels to lose; with ``regrowth`` one of all that are silent."""
        chosen = self._chosen(scores, share, regrowth)
        if regrowth is not None:
            return self._silenced(chosen)
        edits: list[Edit] = []
        give_voice(self.model)
        for target, removed in self._confirmed([(target, removed) for target, removed in chosen if len(removed)]):
            edits.append(RemoveChannels.of(self.model, target.group, removed))
            self.redo(edits[-1])
        return edits

    def going(self, scores: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Of all layers of the groups; the same positions where they are coupled."""
        masks = {name: torch.zeros(len(scores[name]), dtype=torch.bool) for name in self.scored()}
        for target, removed in self._chosen(scores, share):
            for member in target.group.members:
                if member.side == "out" and member.module in masks:
                    masks[member.module][member.index[removed].flatten()] = True
        return masks

    def _chosen(
        self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None
    ) -> list[tuple[Target, Tensor]]:
        """All are chosen before any goes: groups may share a layer, whose scores keep their places."""
        return [(target, self._out(target, scores, share, regrowth)) for target in self.targets]

    def _out(self, target: Target, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None) -> Tensor:
        """The positions that must be out after this step."""
        count = target.count(share(target.ratio))
        back = 0 if regrowth is None else target.exchanged(count, regrowth.share)
        out = lowest(target.group, scores, count + back, target.silent)
        if regrowth is None or not back:
            return out
        grown = highest(target.group, regrowth.scores, back, out)
        return out[~torch.isin(out, grown)]

    def _silenced(self, chosen: list[tuple[Target, Tensor]]) -> list[Edit]:
        if all(torch.equal(target.silent, out) for target, out in chosen):
            return []
        edit = SilenceChannels.of(self.model, ((target.group, out) for target, out in chosen), self.network.direct)
        self.redo(edit)
        return [edit]

    def _confirmed(self, chosen: list[tuple[Target, Tensor]]) -> list[tuple[Target, Tensor]]:
        """Those that can go together; of groups that stay in proportion all or none."""
        while self._confirm and (whys := self._confirm(self.model, [(t.group, removed) for t, removed in chosen])):
            refused = {id(target): whys[id(target.group)] for target, _ in chosen if id(target.group) in whys}
            for group in self._tied:
                at_fault = next((target for target in group if id(target) in refused), None)
                if at_fault is not None:
                    name, why = at_fault.group.names("out")[0], refused[id(at_fault)]
                    why = f"forward counts on as many channels in {name}, which stays whole: {why}"
                    refused = {**{id(target): why for target in group}, **refused}
            for target, _ in chosen:
                if why := refused.get(id(target), ""):
                    self.left.update((n, why) for n in target.group.names("out") if n in self.network.layers)
            chosen = [(target, removed) for target, removed in chosen if id(target) not in refused]
        return chosen

    def redo(self, edit: Edit) -> None:
        """The groups are renumbered after channels that are gone; they know which are silent."""
        super().redo(edit)
        if isinstance(edit, SilenceChannels):
            for target in self.targets:
                target.silent = _positions(edit, target.group)
        if not isinstance(edit, RemoveChannels):
            return
        positions = (_positions(edit, target.group) for target in self.targets)
        number, removed = next((i, found) for i, found in enumerate(positions) if len(found))
        groups = without([t.group for t in self.targets], number, removed)
        for target, group in zip(self.targets, groups, strict=True):
            target.group = group


def _positions(edit: RemoveChannels | SilenceChannels, group: ChannelGroup) -> Tensor:
    """Which of the group's channels the edit is about: none where it is of another layer, or of another part of it."""
    told = {piece.module: piece.indices for piece in edit.slices if piece.side == "out"}
    own = next((member for member in group.members if member.side == "out" and member.module in told), None)
    if own is None:
        return torch.zeros(0, dtype=torch.long)
    return torch.isin(own.index, torch.tensor(told[own.module], dtype=torch.long)).all(1).nonzero().flatten()


class WeightPruning(LayerPruning):
    """Removes single weights: ⌊ratio · n⌋ of a layer's n, or, with a global scope, of all layers of that ratio."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, criterion: Criterion, network: Network, ratios: dict[str, float]
    ) -> None:
        super().__init__(model, adapter, criterion, network)
        self.ratios = ratios
        self._pools = [[name] for name in ratios]
        if criterion.scope == "global":
            self._pools = [[n for n in ratios if ratios[n] == ratio] for ratio in dict.fromkeys(ratios.values())]
        self._first = {name: weight_mask(layer_at(model, name)) for name in ratios}
        """Which weights there were before this run: no others may come back."""

    def scored(self) -> dict[str, Groups]:
        """The layers that have a ratio."""
        return dict.fromkeys(self.ratios, ())

    def step(self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None) -> list[Edit]:
        """One edit per layer that loses weights, or exchanges some."""
        edits: list[Edit] = []
        for name, out in self._out(scores, share, regrowth).items():
            kept = ~out
            if not torch.equal(kept, self._mask(name)):
                restore_weights(layer_at(self.model, name), kept)
                edits.append(MaskWeights.of(name, kept))
                self.redo(edits[-1])
                if not kept.any():
                    _warn_of_empty(name, self.criterion)
        return edits

    def going(self, scores: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Of all layers that have a ratio; what was removed before doesn't go again."""
        return {name: out & self._mask(name) for name, out in self._out(scores, share).items()}

    def _out(self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None) -> dict[str, Tensor]:
        """The weights that must be out after this step."""
        found: dict[str, Tensor] = {}
        for pool in self._pools:
            masks = {name: self._mask(name) for name in pool}
            flat = torch.cat([scores[n].masked_fill(~masks[n], -math.inf).flatten() for n in pool])
            wanted = sum(share(self.ratios[n]) * masks[n].numel() for n in pool)
            before = sum(int((~mask).sum()) for mask in masks.values())
            count = max(math.floor(round(wanted, 6)), before)
            back = math.floor(round(regrowth.share * min(count, len(flat) - count), 6)) if regrowth else 0
            if count + back == before:
                out = {name: ~mask for name, mask in masks.items()}
            else:
                out = self._select(flat, count + back, masks)
            if regrowth is not None and back:
                out = self._regrown(out, self._select(flat, count, masks), regrowth)
            found.update(out)
        return found

    def _regrown(
        self, gone: Mapping[str, Tensor], wanted: Mapping[str, Tensor], regrowth: Regrowth
    ) -> dict[str, Tensor]:
        """What is out once every layer got back as many weights as are out beyond those ``wanted``."""
        left = {}
        for name, out in gone.items():
            back = int(out.sum()) - int(wanted[name].sum())
            first = self._first[name]
            may = out if first is None else out & first
            others = (-regrowth.scores[name]).masked_fill(~may, math.inf).flatten()
            grown = Criterion.select(self.criterion, others, max(0, back)).view_as(out)  # in linear time
            left[name] = out & ~(grown & may)
        return left

    def _mask(self, name: str) -> Tensor:
        module = layer_at(self.model, name)
        mask = weight_mask(module)
        return torch.ones_like(stored_weight(module), dtype=torch.bool) if mask is None else mask

    def _select(self, flat: Tensor, count: int, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is out once ``count`` weights are, those that are masked included."""
        gone = self.criterion.select(flat, count)
        if not (isinstance(gone, Tensor) and gone.dtype == torch.bool and gone.shape == flat.shape):
            what = f"{gone.dtype} {list(gone.shape)}" if isinstance(gone, Tensor) else type(gone).__name__
            raise PluginError(
                f"Criterion {self.criterion.name!r}: select() must return a bool tensor {list(flat.shape)}, not {what}."
            )
        parts = torch.split_with_sizes(gone, [mask.numel() for mask in masks.values()])
        return {name: part.view_as(mask) | ~mask for part, (name, mask) in zip(parts, masks.items(), strict=True)}


def _warn_of_empty(name: str, criterion: Criterion) -> None:
    warnings.warn(
        f"{name!r} has lost all its weights to {criterion.name!r}: nothing passes it any more. Lower the ratio, give "
        f"the layer a smaller one of its own, or compare weights within layers (scope='layer').",
        EmptyLayerWarning,
        stacklevel=4,
    )
