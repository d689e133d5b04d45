"""One call of apply() at work: it quantizes, prunes and trains its private copy, and keeps the books of the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from snncompress.base.progress import Progress
from snncompress.errors import DataError, DefaultSkipWarning, ModelError, NothingToDoWarning, OptionError
from snncompress.interfaces import BlockCriterion
from snncompress.measuring.temporal import analyse
from snncompress.model.cells import cell_weights, decays, layer_at
from snncompress.model.chance import seeded
from snncompress.model.copying import private_copy, same_everywhere
from snncompress.model.edits import Edit, QuantizeWeights
from snncompress.model.network import Network, computed_or_shared, weight_layers
from snncompress.model.parametrizations import computed_weight, quantize_weight
from snncompress.model.plan import Plan
from snncompress.running.data import Feed
from snncompress.structure.confirming import confirming
from snncompress.structure.tracing import trace
from snncompress.structure.truncation import truncation

from .block_pruning import BlockPruning
from .checkpoint import Checkpoint
from .fitting import Rounding
from .recipe import Recipe
from .refresh import refresh_statistics
from .repair import fit
from .scorer import listens
from .selection import (
    Skips,
    check_bits,
    check_ratio,
    left_by_default,
    overruled,
    per_layer,
    resolve_skip,
    targets,
    weight_ratios,
)
from .settings import Finetune, Settings
from .shares import Shares
from .states import check_state_bits, fixed_point_states, kept_states
from .steps import ChannelPruning, LayerPruning, Pruning, Regrowth, WeightPruning
from .training import train

M = TypeVar("M", bound=nn.Module)
Step = Callable[[str], list[Edit]]
"""Does its part of the work and returns it; called with how the text of its progress begins."""

_MUCH = 0.2  # of the prunable parameters, for the defaults to leave without a word


class Run(Generic[M]):
    """What is done to ``model``, in place, and the ``edits`` that were made so far.

    ``skip`` is the user's; ``skipped`` says which layers stay whole, and why. Warns of layers that were named one by
    one although they are left alone; raises what the settings, the model and the data don't bear.
    """

    def __init__(self, model: M, feed: Feed, settings: Settings, skip: Any, progress: Progress | None) -> None:
        self.model, self.feed, self.settings, self.progress = model, feed, settings, progress
        self.edits: list[Edit] = list(settings.folds)
        self.repaired: list[str] = []
        self._before = private_copy(model, feed.adapter) if settings.fits else None
        self._since: list[Edit] = []
        self._shares = Shares(settings.scheduler)
        channels = settings.criterion is not None and settings.granularity == "channel"
        self.network = network = trace(
            model, feed.adapter, feed.example(), timesteps=feed.telling_timesteps, groups=channels
        )
        names = weight_layers(model)
        self.skips = resolve_skip(skip, network, names, settings.granularity).and_(decays(model))
        self._widths: dict[str, int | None] = per_layer(settings.bits, names, "bits", check_bits)
        neurons = list(feed.adapter.neurons(model))
        self._states: dict[str, int | None] = per_layer(settings.states.bits, neurons, "state_bits", check_state_bits)
        self._kept = kept_states(model, feed, self._states) if any(self._states.values()) else {}
        computed = {n: why for n in self.quantized() if (why := computed_weight(layer_at(model, n)))}
        self.skips = Skips(self.skips.prune, {**self.skips.quantize, **computed})
        self.pruning, self.skipped = self._what_goes(network)
        if settings.criterion is None:  # the plan says what is left of what was asked for
            self.skipped = computed
        for name, bits in self.quantized().items():
            QuantizeWeights(name, "", bits, {}).check(model)  # before anything takes time
        if channels and (skip is None or (isinstance(skip, Mapping) and "prune" not in skip)):
            _warn_of_defaults(left_by_default(model, network, self.skips))
        named = overruled(settings.bits, self.skips.quantize)
        _warn_of_overruled("bits", named)
        _warn_of_computed({name: why for name, why in computed.items() if name not in named})
        if settings.criterion is not None:
            _warn_of_overruled("ratio", overruled(settings.ratio, self.skipped))

    @property
    def left(self) -> dict[str, str]:
        """Layers of which the channels that were chosen can't go, and why."""
        return self.pruning.left if isinstance(self.pruning, ChannelPruning) else {}

    def carry_out(self, store: Checkpoint | None = None) -> None:
        """Take all steps, those that ``store`` doesn't know yet: quantize and prune, repair, train; then truncate."""
        steps = self.steps()
        done = self.resume(store) if store else 0
        for number, step in enumerate(steps[done:], done + 1):
            what = f"step {number}/{len(steps)}: "
            if new := step(what):
                self.repair(new, what, last=number >= self._last(steps))
            last, shared = number == self._last(steps), self.settings.states.shared is not None
            if last and not shared:
                new = new + self.quantize_states(what)
            if new:
                self.tune(what)
                same_everywhere(self.model)
            if last and shared:  # with the weights' scale, which training moves
                self.quantize_states(what)
            if store:
                store.save(number, self.edits, self.repaired, self.left, self.model, self.feed)
        self.truncate()

    def _last(self, steps: list[Step]) -> int:
        """The step after which nothing is quantized or pruned any more."""
        return len(steps) if self.settings.prunes else steps.index(self.quantize) + 1

    def steps(self) -> list[Step]:
        """Quantization and the pruning steps, in the order that was asked for."""
        steps: list[Step] = [partial(self.prune, n + 1) for n in range(self._shares.steps)]
        steps.insert(0 if self.settings.order == "qp" else len(steps), self.quantize)
        return steps

    def quantize(self, what: str) -> list[Edit]:
        """Fake-quantize every layer that has a bit width."""
        edits: list[Edit] = []
        for name, bits in self.quantized().items():
            edit = QuantizeWeights.of(name, self.settings.quantizer, bits)
            edit.check(self.model)
            quantize_weight(layer_at(self.model, name), self.settings.quantizer, bits)
            edits.append(edit)
        return self._keep(edits)

    def prune(self, step: int, what: str) -> list[Edit]:
        """Score what is left, and remove up to the share of this step."""
        seed = self.settings.seed + step
        if self.pruning is None or not (scores := self.pruning.score(self.feed, seed, self.progress, what)):
            return []
        regrowth = self._regrowth(step, seed, what)
        return self._keep(self.pruning.step(scores, partial(self._shares.after, step), regrowth))

    def quantize_states(self, what: str) -> list[Edit]:
        """Put every neuron that has a bit width on a grid."""
        left = self.feed.adapter.neurons(self.model)
        asked = {n: b for n, b in self._states.items() if b is not None and n in left and n not in self._kept}
        if not asked:
            return []
        edits = fixed_point_states(
            self.model, self.network_now(), self.feed, asked,
            self.settings.states, self.settings.seed, self.progress, what,
        )  # fmt: skip
        for edit in edits:
            edit.apply(self.model, self.feed.adapter)
        return self._keep(list(edits))

    def network_now(self) -> Network:
        """As it is after what was done to it so far."""
        return self.pruning.network() if isinstance(self.pruning, BlockPruning) else self.network

    def _regrowth(self, step: int, seed: int, what: str) -> Regrowth | None:
        """What may come back of what is masked; None in the last step, and where what goes is gone."""
        growth = self.settings.growth
        if growth is None or step == self._shares.steps or not isinstance(self.pruning, LayerPruning):
            return None
        return self.pruning.growth(self._shares.back(step), growth, self.feed, seed, self.progress, what)

    def repair(self, new: list[Edit], what: str, *, last: bool) -> None:
        """Fit what is left to what the network did before, or did when it was trained last.

        What reads channels that are silent for a while keeps its weights for them: the data say nothing about those.

        Rounding errors are passed on in the ``last`` step only: what is pruned after it is scored by weights of their
        own.
        """
        self._fit(new, what, self.settings.rounding if last else "nearest")
        if self.settings.refresh:
            refresh_statistics(self.model, self.feed, self.progress, what)

    def _fit(self, new: list[Edit], what: str, rounding: Rounding) -> None:
        kind, seed = self.settings.fits, self.settings.seed
        if self._before is None or kind is None:
            return
        self._since += new
        fitted = fit(
            self.model,
            self._before,
            self.network_now(),
            self.feed,
            self._since,
            kind,
            seed,
            self.progress,
            what,
            rounding,
        )
        self.repaired = list(dict.fromkeys([*self.repaired, *fitted]))

    def tune(self, what: str) -> None:
        """Train as the user asked."""
        finetune = self.settings.finetune
        if finetune:
            self._train(finetune, what)
            if self._before is not None:
                self._before, self._since = private_copy(self.model, self.feed.adapter), []

    def _train(self, finetune: Finetune, what: str) -> None:
        if callable(finetune):
            result = finetune(self.model)
            if isinstance(result, nn.Module) and result is not self.model:
                raise OptionError("finetune= must train the model that it is handed in place, not return another.")
            self.feed.adapter.reset(self.model)
        elif isinstance(finetune, int):
            train(self.model, self.feed, Recipe(finetune), self.progress, what)

    def truncate(self) -> None:
        """Leave out timesteps, where that was asked for."""
        t = self.settings.truncate
        if t is None:
            return
        if t == "auto":
            t = analyse(self.model, self.feed, progress=self.progress).t_star
        if cut := truncation(self.model, self.feed.adapter, self.feed, t):
            cut.apply(self.model, self.feed.adapter)
            self.edits.append(cut)

    def try_out(self, original: nn.Module) -> None:
        """Run the result once before it is handed out; raises ModelError where it fails and the original doesn't."""

        def run(model: nn.Module) -> None:
            copy = private_copy(model, self.feed.adapter).eval()
            with torch.no_grad(), seeded(copy):
                self.feed.example()(copy)

        try:
            run(self.model)
        except DataError as error:
            run(original)
            raise ModelError(
                f"The compressed {type(original).__name__} fails where the original runs: {error.__cause__ or error}. "
                f"Likely cause: its forward counts on channels or timesteps in a way that no trial has shown. Name the "
                f"layers concerned in skip=."
            ) from error

    def resume(self, store: Checkpoint) -> int:
        """Come to where an earlier run was; how many steps it had done."""
        done, edits, self.repaired, left = store.resume(self.model, self.feed, self.redo)
        self.edits = edits if done else self.edits
        self.left.update(left)
        if self._before is not None and done:
            if self.settings.finetune:
                self._before = private_copy(self.model, self.feed.adapter)
            else:
                self._since = list(self.edits)
        return done

    def redo(self, edit: Edit) -> None:
        """Apply an edit of an earlier run, and note what it changed."""
        if edit in self.settings.folds:  # they were before the run began
            return
        if self.pruning is not None:
            self.pruning.redo(edit)
        else:
            edit.apply(self.model, self.feed.adapter)

    def plan(self, asked: Mapping[str, Any]) -> Plan:
        """What was done, and what it came from; ``asked`` is what the settings were found for."""
        origin = {**self.settings.origin(self.feed.adapter.framework), **asked}
        if self.repaired:
            origin["repaired"] = self.repaired
        return Plan(tuple(self.edits), self.whole(), origin)

    def whole(self) -> dict[str, str]:
        """Layers that stay whole, and why."""
        cut = Plan(tuple(self.edits)).removed_channels()
        return {**self.skipped, **self._kept, **{name: why for name, why in self.left.items() if name not in cut}}

    def why_nothing(self) -> str:
        """The text of a warning where something was asked for and nothing was done; else empty."""
        quantizes = any(self._widths.values())
        if self.edits or not (quantizes or self._kept or self.settings.prunes):
            return ""
        left = {**(self.skips.quantize if quantizes else {}), **self.whole()}
        if not left:
            return "Nothing was compressed: no layer has that much left to lose."
        reasons = "; ".join(f"{name!r}: {why}" for name, why in left.items())
        return f"Nothing was compressed. {reasons}. skip=[] leaves out nothing that can be compressed."

    def _keep(self, new: list[Edit]) -> list[Edit]:
        """Note new edits; earlier ones that they make superfluous go."""
        self.edits = [edit for edit in self.edits if not any(later.supersedes(edit) for later in new)] + new
        return new

    def quantized(self) -> dict[str, int]:
        """Layer → bits, of those that are to be quantized."""
        return {name: b for name, b in self._widths.items() if b is not None and name not in self.skips.quantize}

    def _what_goes(self, network: Network) -> tuple[Pruning | None, Mapping[str, str]]:
        """What removes channels, weights or blocks, and why which layers stay whole."""
        model, adapter, criterion, ratio = self.model, self.feed.adapter, self.settings.criterion, self.settings.ratio
        if criterion is None:
            return None, {}
        if isinstance(criterion, BlockCriterion):
            share = check_ratio(ratio, "ratio", all_may_go=True)
            fresh = self.settings.repair == "reinit"
            blocks = BlockPruning(model, adapter, criterion, self.feed, share, network, fresh=fresh)
            return blocks, blocks.skipped
        if criterion.granularity == "channel":
            at_most, growth = self.settings.at_most, self.settings.growth
            listening = listens(criterion) or (growth is not None and listens(growth))
            todo, skipped = targets(
                network,
                ratio,
                self.skips,
                self.settings.round_to,
                self.settings.spared,
                at_most=at_most,
                listening=listening,
            )
            cells = (weight for name, module in model.named_modules() for weight in cell_weights(name, module))
            back = "each of its outputs comes back to all in the next timestep, so they stay"
            skipped |= {w: decays(model).get(w, back) for w in cells if w not in network.layers}
            cut = {name for target in todo for name in target.group.names("neuron")}
            for name, neuron in adapter.neurons(model).items():
                inner = (f"{name}.{layer}" for layer in weight_layers(neuron) if name not in cut)
                whole = (layer for layer in inner if layer not in network.layers and layer not in skipped)
                skipped |= dict.fromkeys(whole, f"it is a part of the neurons {name}, none of which goes")
            confirm = confirming(adapter, self.feed.example(), network)
            return ChannelPruning(model, adapter, criterion, network, todo, confirm), skipped
        unused = {name: why for name, why in network.skipped.items() if name not in network.layers}
        unusable = unused | computed_or_shared(model)
        ratios, skipped = weight_ratios(weight_layers(model), ratio, self.skips, unusable, self.settings.spared)
        return WeightPruning(model, adapter, criterion, network, ratios), skipped


def _warn_of_defaults(left: Mapping[str, float]) -> None:
    if sum(left.values()) > _MUCH:
        warnings.warn(
            f"By default {', '.join(map(repr, left))} keeps its channels, as it feeds the classifier: "
            f"{sum(left.values()):.0%} of the parameters that could be pruned. skip=[] leaves out nothing; to keep it "
            f"and say so, skip={{'prune': {list(left)}}}.",
            DefaultSkipWarning,
            stacklevel=4,
        )


def _warn_of_computed(layers: Mapping[str, str]) -> None:
    if layers:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in layers.items())
        warnings.warn(
            f"bits leaves some weights as they are. {reasons}. Make them plain parameters first "
            f"(remove_parametrizations, remove_weight_norm), or name these layers in skip.",
            NothingToDoWarning,
            stacklevel=4,
        )


def _warn_of_overruled(what: str, layers: Mapping[str, str]) -> None:
    for name, why in layers.items():
        warnings.warn(
            f"{what} names {name!r}, which is left alone: {why}. skip= says which layers to leave alone; skip=[] none.",
            NothingToDoWarning,
            stacklevel=4,
        )
