"""What one call of apply() removes, step by step: coupled channels, single weights or whole blocks."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from snncompress.base.progress import Progress
from snncompress.errors import EmptyLayerWarning, PluginError
from snncompress.interfaces import Adapter, Criterion
from snncompress.model.cells import layer_at
from snncompress.model.edits import Edit, MaskWeights, RemoveChannels
from snncompress.model.network import ChannelGroup, Network, by_layer, without
from snncompress.model.parametrizations import stored_weight, weight_mask
from snncompress.running.data import Feed

from .recording import Groups, record
from .selection import Target, lowest

Share = Callable[[float], float]
"""A layer's target → the share that must be gone after this step."""


class Pruning(ABC):
    """Removes from ``model``, in place, what scores lowest, and keeps the books that the next step needs."""

    def __init__(self, model: nn.Module, adapter: Adapter, criterion: Criterion) -> None:
        self.model, self.adapter, self.criterion = model, adapter, criterion

    @abstractmethod
    def score(self, feed: Feed, seed: int, progress: Progress | None = None, what: str = "") -> Mapping[str, Tensor]:
        """The scores of what may go, from one pass over the data; empty where nothing may."""

    @abstractmethod
    def step(self, scores: Mapping[str, Tensor], share: Share) -> list[Edit]:
        """Remove up to the share of everything, and return what was done."""

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
        layers = self.scored()
        return record(self.model, self.network, feed, self.criterion, layers, seed, progress, what) if layers else {}


class ChannelPruning(LayerPruning):
    """Removes coupled output channels, group by group."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, criterion: Criterion, network: Network, targets: list[Target]
    ) -> None:
        super().__init__(model, adapter, criterion, network)
        self._targets = targets

    def scored(self) -> dict[str, Groups]:
        """Every weight layer of every group, in the group's present size."""
        return dict(by_layer([target.group for target in self._targets], self.network.layers))

    def step(self, scores: Mapping[str, Tensor], share: Share) -> list[Edit]:
        """One edit per group that has channels to lose."""
        edits: list[Edit] = []
        for target, removed in self._chosen(scores, share):
            edit = RemoveChannels.of(self.model, target.group, removed)
            self.redo(edit)
            edits.append(edit)
        return edits

    def going(self, scores: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Of all layers of the groups; the same positions where they are coupled."""
        masks = {name: torch.zeros(len(scores[name]), dtype=torch.bool) for name in self.scored()}
        for target, removed in self._chosen(scores, share):
            for member in target.group.members:
                if member.side == "out" and member.module in masks:
                    masks[member.module][member.index[removed].flatten()] = True
        return masks

    def _chosen(self, scores: Mapping[str, Tensor], share: Share) -> list[tuple[Target, Tensor]]:
        """All are chosen before any goes: groups may share a layer, whose scores keep their places."""
        counts = [(target, target.count(share(target.ratio))) for target in self._targets]
        return [(target, lowest(target.group, scores, count)) for target, count in counts if count]

    def redo(self, edit: Edit) -> None:
        """The groups are renumbered after their channels."""
        super().redo(edit)
        if not isinstance(edit, RemoveChannels):
            return
        positions = (_positions(edit, target.group) for target in self._targets)
        number, removed = next((i, found) for i, found in enumerate(positions) if len(found))
        groups = without([t.group for t in self._targets], number, removed)
        for target, group in zip(self._targets, groups, strict=True):
            target.group = group


def _positions(edit: RemoveChannels, group: ChannelGroup) -> Tensor:
    """Which of the group's channels the edit removes: none where it is of another layer, or of another part of it."""
    own = next(member for member in group.members if member.side == "out")
    gone = torch.isin(own.index, torch.tensor(edit.indices)).all(1) & (own.module == edit.layer)
    return gone.nonzero().flatten()


class WeightPruning(LayerPruning):
    """Removes single weights: ⌊ratio · n⌋ of a layer's n, or, with a global scope, of all layers of that ratio."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, criterion: Criterion, network: Network, ratios: dict[str, float]
    ) -> None:
        super().__init__(model, adapter, criterion, network)
        self._ratios = ratios
        self._pools = [[name] for name in ratios]
        if criterion.scope == "global":
            self._pools = [[n for n in ratios if ratios[n] == ratio] for ratio in dict.fromkeys(ratios.values())]

    def scored(self) -> dict[str, Groups]:
        """The layers that have a ratio."""
        return dict.fromkeys(self._ratios, ())

    def step(self, scores: Mapping[str, Tensor], share: Share) -> list[Edit]:
        """One edit per layer that loses weights."""
        edits: list[Edit] = []
        for name, gone in self.going(scores, share).items():
            if gone.any():
                kept = self._mask(name) & ~gone
                edits.append(MaskWeights.of(name, kept))
                self.redo(edits[-1])
                if not kept.any():
                    _warn_of_empty(name, self.criterion)
        return edits

    def going(self, scores: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Of all layers that have a ratio; what was removed before doesn't go again."""
        found: dict[str, Tensor] = {}
        for pool in self._pools:
            masks = {name: self._mask(name) for name in pool}
            flat = torch.cat([scores[n].masked_fill(~masks[n], -math.inf).flatten() for n in pool])
            wanted = sum(share(self._ratios[n]) * masks[n].numel() for n in pool)
            count = math.floor(round(wanted, 6))
            if count <= sum(int((~mask).sum()) for mask in masks.values()):
                found.update({name: torch.zeros_like(mask) for name, mask in masks.items()})
                continue
            for name, gone in zip(pool, self._select(flat, count, masks), strict=True):
                found[name] = gone & masks[name]
        return found

    def _mask(self, name: str) -> Tensor:
        module = layer_at(self.model, name)
        mask = weight_mask(module)
        return torch.ones_like(stored_weight(module), dtype=torch.bool) if mask is None else mask

    def _select(self, flat: Tensor, count: int, masks: Mapping[str, Tensor]) -> list[Tensor]:
        gone = self.criterion.select(flat, count)
        if not (isinstance(gone, Tensor) and gone.dtype == torch.bool and gone.shape == flat.shape):
            what = f"{gone.dtype} {list(gone.shape)}" if isinstance(gone, Tensor) else type(gone).__name__
            raise PluginError(
                f"Criterion {self.criterion.name!r}: select() must return a bool tensor {list(flat.shape)}, not {what}."
            )
        parts = torch.split_with_sizes(gone, [mask.numel() for mask in masks.values()])
        return [part.view(mask.shape) for part, mask in zip(parts, masks.values(), strict=True)]


def _warn_of_empty(name: str, criterion: Criterion) -> None:
    warnings.warn(
        f"{name!r} has lost all its weights to {criterion.name!r}: nothing passes it any more. Lower the ratio, give "
        f"the layer a smaller one of its own, or compare weights within layers (scope='layer').",
        EmptyLayerWarning,
        stacklevel=4,
    )
