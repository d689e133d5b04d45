"""Removing whole blocks, and fitting what follows to its new input."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from snncompress.base.progress import Progress, tracked
from snncompress.errors import DataError, ModelError, OptionError, PlanError, PluginError
from snncompress.interfaces import Adapter, BlockCriterion
from snncompress.model.copying import private_copy
from snncompress.model.edits import REPAIRS, Edit, RemoveBlock, Repair
from snncompress.model.modules import in_mode
from snncompress.model.network import WEIGHT_LAYERS, width
from snncompress.model.parametrizations import stored_weight
from snncompress.running.data import Batch, Feed
from snncompress.running.scores import loss_of
from snncompress.structure.blocks import Block, find_blocks
from snncompress.structure.tracing import trace

from .steps import Pruning, Share


class BlockPruning(Pruning):
    """Removes blocks: ⌊ratio · n⌋ of the n that may go, or those that the criterion selects."""

    criterion: BlockCriterion

    def __init__(self, model: nn.Module, adapter: Adapter, criterion: BlockCriterion, feed: Feed, ratio: float) -> None:
        super().__init__(model, adapter, criterion)
        if criterion.repair not in REPAIRS:
            raise OptionError(
                f"Criterion {criterion.name!r}: repair must be one of {', '.join(REPAIRS)}, not {criterion.repair!r}."
            )
        self._feed, self._ratio = feed, ratio
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

    def blocks(self) -> dict[str, Block]:
        """What may still go, in order of execution."""
        network = trace(self.model, self.adapter, self._feed.example(), timesteps=self._feed.timesteps)
        left = None if self._all is None else [n for n in self._all if not self._is_gone(n)]
        found = find_blocks(self.model, self.adapter, self._feed.example(), network, left)
        blocks = {b.name: b for b in found if b.kind in {*self.criterion.kinds, "named"}}
        if self._all is None:
            self.skipped = {name: str(why) for name, b in blocks.items() if (why := self._refusal(b))}
        return {name: b for name, b in blocks.items() if name not in self.skipped}

    def on(self, model: nn.Module) -> BlockPruning:
        """The same for a copy of the model."""
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

    def step(self, scores: Mapping[str, Tensor], share: Share) -> list[Edit]:
        """One edit per block, the first in the network first."""
        gone = len(self._all or ()) - len(scores)
        count = max(0, math.floor(round(share(self._ratio) * len(self._all or ()), 9)) - gone)
        chosen = self.criterion.select(torch.stack(list(scores.values())), count) if scores else torch.zeros(0)
        return [self.remove(name) for name, go in zip(scores, chosen.tolist(), strict=True) if go]

    def remove(self, name: str) -> Edit:
        """Remove one block, and fit what follows it."""
        block = self.blocks()[name]
        edit, trial = self._tried(block)
        if self.criterion.repair == "project":
            whole = private_copy(self.model, self.adapter).eval()
            for piece in edit.repairs:
                _project(whole, trial, block, piece.layer, self._feed)
        self.redo(edit)
        for piece in edit.repairs:
            fitted = stored_weight(trial.get_submodule(piece.layer))
            with torch.no_grad():
                stored_weight(self.model.get_submodule(piece.layer)).copy_(fitted)
        return edit

    def _refusal(self, block: Block) -> ModelError | PlanError | None:
        try:
            self._tried(block)
        except (ModelError, PlanError) as error:
            return error
        return None

    def _tried(self, block: Block) -> tuple[RemoveBlock, nn.Module]:
        """The edit, and a copy of the model on which it worked."""
        edit = RemoveBlock(block.name, tuple(self._repairs(block)), self.criterion.repair)
        trial = private_copy(self.model, self.adapter).eval()
        edit.apply(trial, self.adapter)
        try:
            with torch.no_grad():
                self._feed.example()(trial)
        except DataError as error:  # whatever the model's own code says of the new widths
            raise ModelError(
                f"Block {block.name!r} can't be removed from {type(self.model).__name__}: behind it the widths don't "
                f"fit. {error.__cause__}"
            ) from error
        self.adapter.reset(trial)
        return edit, trial

    def _repairs(self, block: Block) -> Iterator[Repair]:
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
            yield Repair(name, before, after)


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
        with in_mode(model, training=False), torch.no_grad():
            for batch in tracked(feed, progress, what):
                output = feed(model, batch)
                count = 1 if batch.y is None else len(batch.y)
                total += count * float(loss_of(feed, output, batch))
                samples += count
    finally:
        feed.adapter.reset(model)
    return total / samples


def _project(model: nn.Module, trial: nn.Module, block: Block, consumer: str, feed: Feed) -> None:
    """Fit a layer behind the block in ``trial``: W' = W P, P minimizing ‖x - P x'‖² over calibration.

    x [c_out] is what such a layer sees of a position, sample and timestep in ``model``, x' [c_in] what it sees where
    the block is a wire.
    """
    old, new = model.get_submodule(consumer), trial.get_submodule(consumer)
    c_in, c_out = block.channels_in, block.channels_out
    gram, cross = (torch.zeros(c_in, size, dtype=torch.float64) for size in (c_in, c_out))
    for batch in feed:
        seen = [_inputs(net, layer, feed, batch) for net, layer in ((model, old), (trial, new))]
        for x, y in zip(*seen, strict=True):
            before, after = _by_channel(x, old, c_out), _by_channel(y, new, c_in)
            gram += after.T @ after
            cross += after.T @ before
    ridge = 1e-9 * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(c_in, dtype=torch.float64)
    _fold(old, new, torch.linalg.solve(gram + ridge, cross))


def _inputs(net: nn.Module, layer: nn.Module, feed: Feed, batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with ExitStack() as stack, torch.no_grad():
        stack.callback(handle.remove)
        stack.callback(feed.adapter.reset, net)
        feed(net, batch)
    return seen


def _by_channel(x: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """Inputs of a layer → [positions, channels], float64 on the CPU."""
    if isinstance(layer, nn.Linear):  # features [channels · k], as flattening leaves them
        flat = x.reshape(-1, channels, x.shape[-1] // channels).movedim(1, -1)
    else:
        flat = x.movedim(1 - stored_weight(layer).dim(), -1)
    return flat.reshape(-1, channels).double().cpu()


def _fold(old: nn.Module, new: nn.Module, transfer: Tensor) -> None:
    """W'[o, j, …] = Σ_i W[o, i, …] P[i, j]; ``transfer`` [c_in, c_out] is Pᵀ."""
    weight, fitted = stored_weight(old).detach(), stored_weight(new)
    dim = 0 if isinstance(old, _ConvTransposeNd) else 1
    columns = weight.movedim(dim, 0).double().cpu()
    if isinstance(old, nn.Linear):
        k = len(columns) // transfer.shape[1]
        columns = columns.view(transfer.shape[1], k, -1)
    mixed = torch.tensordot(transfer, columns, dims=([1], [0]))
    mixed = mixed.reshape(fitted.movedim(dim, 0).shape).movedim(0, dim)
    with torch.no_grad():
        fitted.copy_(mixed.to(fitted.dtype))
