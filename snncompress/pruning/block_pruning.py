"""Removing whole blocks: wires take their place, and what follows reads what goes in."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snncompress.base.distributed import gathered, together
from snncompress.base.progress import Progress, tracked
from snncompress.errors import DataError, ModelError, PlanError, PluginError
from snncompress.interfaces import Adapter, BlockCriterion
from snncompress.model.computed_once import evaluating
from snncompress.model.edits import Edit, RemoveBlock, Resized
from snncompress.model.network import WEIGHT_LAYERS, Network, width
from snncompress.model.parametrizations import separate_classes
from snncompress.model.resizing import resize_inputs
from snncompress.running.data import Feed
from snncompress.running.scores import loss_of
from snncompress.structure.blocks import Block, find_blocks
from snncompress.structure.tracing import trace

from .steps import Pruning, Regrowth, Share


class BlockPruning(Pruning):
    """Removes blocks: ⌊ratio · n⌋ of the n that may go, or those that the criterion selects.

    The layers behind them keep the weights of their first inputs, or get ``fresh`` ones.
    """

    criterion: BlockCriterion

    def __init__(
        self, model: nn.Module, adapter: Adapter, criterion: BlockCriterion, feed: Feed, ratio: float,
        network: Network | None = None, *, fresh: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, adapter, criterion)
        self._feed, self._ratio, self._network, self._fresh = feed, ratio, network, fresh
        self._found: dict[str, Block] | None = None  # of the model as it stands
        self.skipped: dict[str, str] = {}
        """Blocks whose place no wire can take, with the reason."""
        self._all: tuple[str, ...] | None = criterion.blocks
        self._all = tuple(self.blocks())
        if not self._all:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in self.skipped.items()) or "none was found"
            raise ModelError(
                f"{type(model).__name__} has no block whose place a wire could take ({why}). Name the modules to "
                f"consider: {criterion.name}(blocks=(...))."
            )

    def network(self) -> Network:
        """Of the model as it stands; traced once after each removal."""
        if self._network is None:
            feed = self._feed
            self._network = trace(
                self.model, self.adapter, feed.example(), timesteps=feed.telling_timesteps, groups=False
            )
        return self._network

    def blocks(self) -> dict[str, Block]:
        """What may still go, in order of execution; found once after each removal."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> dict[str, Block]:
        left = None if self._all is None else [n for n in self._all if not self._is_gone(n)]
        found = find_blocks(self.model, self.adapter, self._feed.example(), self.network(), left)
        blocks = {b.name: b for b in found if b.kind in {*self.criterion.kinds, "named"}}
        if self._all is None:
            self.skipped = {name: str(why) for name, b in blocks.items() if (why := self._refusal(b))}
        return {name: b for name, b in blocks.items() if name not in self.skipped}

    def redo(self, edit: Edit) -> None:
        """What was found is no longer so."""
        super().redo(edit)
        self._found = self._network = None

    def on(self, model: nn.Module) -> BlockPruning:
        """The same for a copy of the model as it stands."""
        twin = copy.copy(self)
        twin.model = model
        return twin

    def _is_gone(self, name: str) -> bool:
        try:
            return isinstance(self.model.get_submodule(name), nn.Identity)
        except AttributeError:  # a glob of the user's
            return False

    def score(self, feed: Feed, seed: int, progress: Progress | None = None, what: str = "") -> dict[str, Tensor]:
        """{block: score []}."""
        blocks = self.blocks()

        def loss_without(names: Collection[str]) -> float:
            with _bypassed(self.model, [blocks[name] for name in names]):
                return _mean_loss(self.model, feed, progress, f"{what}ablating {', '.join(names) or 'nothing'}")

        scores = torch.as_tensor(self.criterion.score_blocks(list(blocks), loss_without), dtype=torch.float64)
        if scores.shape != (len(blocks),) or not bool(torch.isfinite(scores).all()):
            raise PluginError(
                f"Criterion {self.criterion.name!r}: score_blocks() must return {len(blocks)} finite numbers, one per "
                f"block, not {scores.tolist()}."
            )
        return dict(zip(blocks, scores, strict=True))

    def step(self, scores: Mapping[str, Tensor], share: Share, regrowth: Regrowth | None = None) -> list[Edit]:
        """One edit per block, the first in the network first."""
        gone = len(self._all or ()) - len(scores)
        count = max(0, math.floor(round(share(self._ratio) * len(self._all or ()), 9)) - gone)
        chosen = self.criterion.select(torch.stack(list(scores.values())), count) if scores else torch.zeros(0)
        return [self.remove(name) for name, go in zip(scores, chosen.tolist(), strict=True) if go]

    def remove(self, name: str) -> Edit:
        """Remove one block, where the model runs without it."""
        block = self.blocks()[name]
        edit = self._edit(block)
        with _without(self.model, edit):
            self._try(block)
        self.redo(edit)
        return edit

    def _edit(self, block: Block) -> RemoveBlock:
        edit = RemoveBlock(block.name, tuple(self._resized(block)), self._fresh)
        edit.check(self.model)
        return edit

    def _refusal(self, block: Block) -> ModelError | PlanError | None:
        try:
            with _without(self.model, self._edit(block)):
                self._try(block)
        except (ModelError, PlanError) as error:
            return error
        return None

    def _try(self, block: Block) -> None:
        """Run the model, as it is now, on an example; raises ModelError where it doesn't fit."""
        try:
            with evaluating(self.model):
                self._feed.example()(self.model)
        except DataError as error:  # whatever the model's own code says of the new widths
            raise ModelError(
                f"Block {block.name!r} can't be removed from {type(self.model).__name__}: behind it the widths don't "
                f"fit. {error.__cause__}"
            ) from error
        finally:
            self.adapter.reset(self.model)

    def _resized(self, block: Block) -> Iterator[Resized]:
        if block.channels_in == block.channels_out:
            return
        for name in block.consumers:
            before = width(self.model.get_submodule(name), "in")
            after, rest = divmod(before * block.channels_in, block.channels_out)
            if before % block.channels_out or rest:
                raise ModelError(
                    f"Block {block.name!r} can't be removed: {name!r}, which reads its {block.channels_out} channels, "
                    f"has {before} inputs, so it reads others too."
                )
            yield Resized(name, before, after)


@contextmanager
def _without(model: nn.Module, edit: RemoveBlock) -> Iterator[None]:
    """Inside, the block is a wire and the layers behind it are copies of the new width; afterwards all is back."""
    resized = {piece.layer: copy.deepcopy(model.get_submodule(piece.layer)) for piece in edit.resized}
    for piece in edit.resized:
        separate_classes(resized[piece.layer])
        resize_inputs(resized[piece.layer], piece.after, fresh=edit.fresh)
    instead = {edit.name: nn.Identity(), **resized}
    before = {name: model.get_submodule(name) for name in instead}
    try:
        for name, module in instead.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@contextmanager
def _bypassed(model: nn.Module, blocks: Collection[Block]) -> Iterator[None]:
    """Inside, each block is a wire of its own width: missing channels are zero, further ones are cut off."""
    inside = {block.name: model.get_submodule(block.name) for block in blocks}
    try:
        for block in blocks:
            axis = 1 - next(m for m in inside[block.name].modules() if isinstance(m, WEIGHT_LAYERS)).weight.dim()
            model.set_submodule(block.name, _Wire(axis, block.channels_out))
        yield
    finally:
        for name, module in inside.items():
            model.set_submodule(name, module)


class _Wire(nn.Module):
    def __init__(self, axis: int, channels: int) -> None:
        super().__init__()
        self.axis, self.channels = axis, channels

    def forward(self, x: Tensor) -> Tensor:
        kept = x.narrow(self.axis, 0, min(self.channels, x.shape[self.axis]))
        return F.pad(kept, [0, 0] * (-self.axis - 1) + [0, self.channels - kept.shape[self.axis]])


def _mean_loss(model: nn.Module, feed: Feed, progress: Progress | None, what: str) -> float:
    total = samples = 0.0
    try:
        with together(), evaluating(model):
            for batch in tracked(feed, progress, what):
                output = feed(model, batch)
                count = 1 if batch.y is None else len(batch.y)
                total += count * float(loss_of(feed, output, batch))
                samples += count
    finally:
        feed.adapter.reset(model)
    found = gathered((total, samples))
    return sum(total for total, _ in found) / sum(samples for _, samples in found)
