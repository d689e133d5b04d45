"""Calibration: runs the data through the network and lets the criterion fold up what the neurons do."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, processes, shared, together
from snncompress.base.progress import Progress, tracked
from snncompress.errors import PluginError, SilentNeuronsWarning, SNNCompressError
from snncompress.interfaces import Criterion, Inputs, Layer, Signal
from snncompress.model.cells import layer_at
from snncompress.model.computed_once import evaluating
from snncompress.model.network import ChannelGroup, Member, Network, outputs_first
from snncompress.model.parametrizations import float_weight, stored_weight
from snncompress.model.weight_norms import plain_weights
from snncompress.running.data import Feed
from snncompress.running.scores import loss_of

from .integration import InputRecorder, decay, input_of, timelines

Groups = Sequence[ChannelGroup]
"""The groups that a layer's channels stand in: one, or several parts; none where single weights are scored."""


def record(
    model: nn.Module,
    network: Network,
    feed: Feed,
    criterion: Criterion,
    layers: Mapping[str, Groups],
    seed: int,
    progress: Progress | None = None,
    what: str = "",
) -> dict[str, Tensor]:
    """Scores of weight layers, higher = keep: {layer: [C], or the weight's shape}; ``what`` begins the progress text.

    ``layers`` names each with the coupled groups it stands in, where its channels are scored.

    One pass over the data in eval mode, with a backward pass per batch where the criterion needs gradients. Nothing
    but the criterion's own states is kept from one timestep to the next.
    """
    with plain_weights(model):
        recording = Recording(model, network, criterion, layers, seed)
        calibrate(model, network, feed, [recording], progress, what)
        return recording.scores()


class Recording:
    """A criterion's states of layers, into which :func:`calibrate` folds data; arguments as in :func:`record`."""

    def __init__(
        self, model: nn.Module, network: Network, criterion: Criterion, layers: Mapping[str, Groups], seed: int
    ) -> None:
        self.criterion = criterion
        self.joint = True
        """Whether several processes record together; else each says what its own batch does."""
        watching = bool(criterion.needs & {"spikes", "membrane"})
        self._scorers = {
            name: [
                _Scorer(model, network, name, neuron, groups, criterion, seed)
                for neuron in ((watching and _heard(network, name, groups)) or (None,))
            ]
            for name, groups in layers.items()
        }

    @property
    def scorers(self) -> list[_Scorer]:
        """Of all layers."""
        return [scorer for own in self._scorers.values() for scorer in own]

    def restart(self) -> None:
        """Forget the data."""
        for scorer in self.scorers:
            scorer.restart()

    def scores(self, method: Callable[[Layer, Any], Tensor] | None = None) -> dict[str, Tensor]:
        """What ``method(layer, state)``, the criterion's ``score`` or one like it, makes of every layer's state.

        It may be called more than once, and draws from the layers' generators as if each time were the first. Of
        several processes that of rank 0 decides: two may round differently.
        """
        method = method or self.criterion.score
        scores: dict[str, Tensor] = {}
        for name, scorers in self._scorers.items():
            own = [s.score(method) for s in scorers]
            found = own[0] if len(own) == 1 else _mean(own, [s.heard for s in scorers])
            scores[name] = shared(found, found.device) if self.joint else found
        return scores


def calibrate(
    model: nn.Module,
    network: Network,
    feed: Feed,
    recordings: Sequence[Recording],
    progress: Progress | None = None,
    what: str = "",
    each: Callable[[], None] | None = None,
) -> None:
    """One pass over the data in eval mode, for all recordings at once; none where no criterion needs one.

    With ``each``, every batch is recorded alone: ``each()`` is called behind it, and then the recordings restart.
    Otherwise, what several processes recorded is put together at the end.
    """
    needs = frozenset[Signal]().union(*(recording.criterion.needs for recording in recordings))
    for recording in recordings:
        recording.joint = each is None
    if not needs and each is None:
        return
    if each is None:
        for recording in recordings:
            _check_mergeable(recording.criterion)
    reading = [s for r in recordings if "inputs" in r.criterion.needs for s in r.scorers]
    readers = _readers(model, network, feed, dict.fromkeys(s.layer_name for s in reading)) if reading else {}
    gradients = "gradients" in needs
    learning = [s for r in recordings if "gradients" in r.criterion.needs for s in r.scorers]
    listening: dict[str, list[_Scorer]] = {}
    for scorer in (s for r in recordings for s in r.scorers if s.neuron is not None):
        listening.setdefault(str(scorer.neuron), []).append(scorer)
    fired: dict[str, bool] = {}

    def settle() -> None:
        for scorer in reading:
            if scorer.layer_name in readers:
                scorer.inputs = readers[scorer.layer_name].inputs()

    with together(), ExitStack() as stack:
        stack.callback(feed.adapter.reset, model)
        for neuron, scorers in listening.items():
            observer = _observer(neuron, scorers, fired)
            membrane = any(s.needs_membrane for s in scorers)
            stack.callback(feed.adapter.observe(model.get_submodule(neuron), observer, membrane=membrane))
        for name, reader in readers.items():
            stack.callback(_listen(model.get_submodule(name), reader))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for parameter in {parameter for s in learning for parameter in s.parameters()}:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)  # a frozen one has a gradient too
            parameter.requires_grad_(True)
        names = ", ".join(recording.criterion.name for recording in recordings)
        for batch in tracked(feed, progress, f"{what}calibrating {names}"):
            for reader in readers.values():
                reader.begin_batch()
            if needs:
                output = feed(model, batch)
                if gradients:
                    model.zero_grad()
                    loss_of(feed, output, batch).backward()  # type: ignore[no-untyped-call]
                del output
            for scorer in (s for r in recordings if r.criterion.needs for s in r.scorers):
                scorer.end_batch()
            if each is not None:
                settle()
                each()
                for recording in recordings:
                    recording.restart()
                for reader in readers.values():
                    reader.restart()
        if gradients:
            model.zero_grad()
    if each is None:
        if processes() > 1:
            fired = {neuron: any(said) for neuron, said in _by_key(gathered(fired)).items()}
            for reader in readers.values():
                reader.reduce()
            for scorer in (s for r in recordings for s in r.scorers):
                scorer.reduce()
        settle()
    _warn_of_silence(listening, fired, learning)


def _check_mergeable(criterion: Criterion) -> None:
    """Raise PluginError for a criterion of a state that can't be put together from several processes."""
    kind = type(criterion)
    if processes() > 1 and kind.begin is not Criterion.begin and kind.merge is Criterion.merge:
        raise PluginError(
            f"Criterion {criterion.name!r} records on one process only, and there are {processes()}: it has no "
            f"merge(layer, state, other), which makes one state of two. Write it (for sums: state + other), or call "
            f"inside snncompress.no_sync() with all data on every process."
        )


def _by_key(found: Sequence[Mapping[str, bool]]) -> dict[str, list[bool]]:
    return {key: [part[key] for part in found] for key in found[0]}


def _readers(model: nn.Module, network: Network, feed: Feed, layers: Collection[str]) -> dict[str, InputRecorder]:
    with evaluating(model):
        lines = timelines(model, feed)
    modules = dict(model.named_modules())  # a recurrent cell's weights are none of them
    return {
        name: InputRecorder(modules[name], lines[name], decay(model, name, lines[name], network, feed))
        for name in layers
        if name in lines and name in modules
    }


def _warn_of_silence(
    listening: Mapping[str, list[_Scorer]], fired: Mapping[str, bool], learning: list[_Scorer]
) -> None:
    for neuron, any_spike in fired.items():
        if not any_spike:
            names, driven = (
                _named(s.criterion.name for s in listening[neuron]),
                _named(s.layer_name for s in listening[neuron]),
            )
            warnings.warn(
                f"Neurons {neuron!r} never fired in calibration, so the {names} scores of {driven} carry no "
                f"information. Check the scale of the data, the threshold and whether the model is trained.",
                SilentNeuronsWarning,
                stacklevel=2,
            )
    if unreached := [s for s in learning if not s.any_gradient]:
        names, layers = _named(s.criterion.name for s in unreached), _named(s.layer_name for s in unreached)
        warnings.warn(
            f"No gradient but 0 reached {layers} in calibration, so the {names} "
            f"scores there carry no information. Likely cause: neurons behind them never fire. Check the scale of the "
            f"data, the threshold and whether the model is trained.",
            SilentNeuronsWarning,
            stacklevel=2,
        )


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))


def _listen(layer: nn.Module, reader: InputRecorder) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        with torch.no_grad():
            reader.add(input_of(args, named), output.detach())

    return layer.register_forward_hook(hook, with_kwargs=True).remove


def _observer(neuron: str, scorers: list[_Scorer], fired: dict[str, bool]) -> Callable[[Tensor, Tensor | None], None]:
    fired[neuron] = False

    def observe(spikes: Tensor, membrane: Tensor | None) -> None:
        if not fired[neuron]:
            fired[neuron] = _any(spikes)
        for scorer in scorers:
            scorer.observe(spikes.detach(), membrane if scorer.needs_membrane else None)

    return observe


def _any(tensor: Tensor) -> bool:
    """Whether a number isn't 0; a small part often tells."""
    return bool(tensor[:1, :1].any()) or bool(tensor.any())


class _Scorer:
    """Folds what one layer, or one neuron population that it drives, does into scores of that layer."""

    def __init__(
        self, model: nn.Module, network: Network, name: str, neuron: str | None, groups: Groups,
        criterion: Criterion, seed: int,
    ) -> None:  # fmt: skip
        self.layer_name, self.neuron, self.criterion = name, neuron, criterion
        self._module = layer_at(model, name)
        self._norm = model.get_submodule(network.norms[name]) if name in network.norms else None
        self._neurons = network.drives.get(name, ())
        self._weight = outputs_first(float_weight(self._module), self._module)
        self.heard = torch.ones(len(self._weight), dtype=torch.bool)
        """The channels that drive this neuron."""
        self._site: Member | None = None
        self._columns: Tensor | None = None
        if groups and neuron is not None:
            self._site = next((m for g in groups if (m := g.member(neuron, "neuron")) is not None), None)
            self._columns, self.heard = _columns(groups, name, neuron, len(self._weight))
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._chance = self._generator.get_state()
        self.any_gradient = False
        """In any batch, whether or not the recording restarted behind it."""
        self.restart()

    @property
    def needs_membrane(self) -> bool:
        return "membrane" in self.criterion.needs

    def restart(self) -> None:
        self.inputs: Inputs | None = None
        self._generator.set_state(self._chance)
        self._state = self._guarded(self.criterion.begin, self.layer())

    def parameters(self) -> list[nn.Parameter]:
        return [stored_weight(self._module), *(() if self._norm is None else self._norm.parameters())]

    def layer(self) -> Layer:
        gradient = stored_weight(self._module).grad if "gradients" in self.criterion.needs else None
        if gradient is not None:
            gradient = outputs_first(gradient, self._module)
        return Layer(
            self.layer_name,
            self._module,
            self._weight,
            gradient,
            self._norm,
            self._neurons,
            self._generator,
            self.inputs,
        )

    def observe(self, spikes: Tensor, membrane: Tensor | None) -> None:
        if self._site is not None:
            spikes = self._site.observed(spikes)
            membrane = None if membrane is None else self._site.observed(membrane)
        if self._columns is not None:
            spikes = _select(spikes, self._columns)
            membrane = None if membrane is None else _select(membrane, self._columns)
        before = self._state
        self._state = self._guarded(self.criterion.observe, self.layer(), before, spikes, membrane)
        if self._state is None and before is not None:
            raise PluginError(f"Criterion {self.criterion.name!r}: observe() returned None; it must return the state.")

    def end_batch(self) -> None:
        gradient = stored_weight(self._module).grad
        self.any_gradient = self.any_gradient or (gradient is not None and _any(gradient))
        self._state = self._guarded(self.criterion.end_batch, self.layer(), self._state)

    def reduce(self) -> None:
        """Put the states of all processes together, in the order of their ranks."""
        state, *others = gathered(self._state, self._weight.device)
        for other in others:
            if state is not None or other is not None:
                state = self._guarded(self.criterion.merge, self.layer(), state, other)
        self._state = state
        self.any_gradient = any(gathered(self.any_gradient))

    def score(self, method: Callable[[Layer, Any], Tensor]) -> Tensor:
        layer = self.layer()
        chance = self._generator.get_state()
        with torch.no_grad():
            scores = self._guarded(method, layer, self._state)
        self._generator.set_state(chance)
        where, what = f"Criterion {self.criterion.name!r}, layer {layer.name}", f"{method.__name__}()"
        single = self.criterion.granularity == "weight"
        shape = layer.weight.shape if single else layer.weight.shape[:1]
        if not isinstance(scores, Tensor):
            raise PluginError(f"{where}: {what} must return a tensor {list(shape)}, not {type(scores).__name__}.")
        if scores.shape != shape:
            per = "weight" if single else "output channel"
            raise PluginError(
                f"{where}: {what} must return one score per {per}, {list(shape)}, not {list(scores.shape)}."
            )
        if scores.is_complex() or scores.layout != torch.strided or scores.is_meta:
            raise PluginError(
                f"{where}: scores must be real numbers in a dense tensor, not {scores.dtype} {scores.layout} on "
                f"{scores.device}."
            )
        # a finite sum tells of all, five times as fast
        if not bool(torch.isfinite(scores.sum())) and not bool(torch.isfinite(scores).all()):
            raise PluginError(
                f"{where}: scores hold NaN or infinite values. Check for a division by zero, a silent layer or a "
                f"diverged model."
            )
        if single:  # as many as weights, so in their own precision and place
            return outputs_first(scores.detach(), self._module)
        return scores.detach().double().cpu()

    def _guarded(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except SNNCompressError:
            raise
        except Exception as error:
            raise PluginError(
                f"Criterion {self.criterion.name!r} failed in {method.__name__}() on layer {self.layer_name}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _heard(network: Network, layer: str, groups: Groups) -> tuple[str, ...]:
    """The neurons that a layer drives; where it writes last into a stream and drives none, those that read before."""
    driven = network.drives.get(layer, ())
    if not groups:
        return driven
    traced = dict.fromkeys(name for group in groups for name in group.names("neuron"))
    return tuple(name for name in driven if name in traced) or tuple(traced)


def _mean(scores: list[Tensor], heard: list[Tensor]) -> Tensor:
    """Over neurons, each of which hears all of the layer's channels or some."""
    if all(bool(channels.all()) for channels in heard):
        return torch.stack(scores).mean(0)
    weights = torch.stack(heard).double()
    return (torch.stack(scores) * weights).sum(0) / weights.sum(0).clamp_min(1)


def _columns(groups: Groups, layer: str, neuron: str, channels: int) -> tuple[Tensor | None, Tensor]:
    """For each channel of the layer the neuron's columns [C, k], and which channels it hears at all [C].

    None where the columns are the same [0 … C-1]; of a channel that isn't heard they are the first ones.
    """
    heard, table, width = torch.zeros(channels, dtype=torch.bool), torch.zeros(channels, 1, dtype=torch.long), 0
    for group in groups:
        own, driven = group.member(layer, "out"), group.member(neuron, "neuron")
        if own is None or driven is None:
            continue
        parts, k, width = own.index.shape[1], driven.index.shape[1], driven.width
        rows = (
            driven.index.repeat_interleave(parts, 0) if k % parts else driven.index.reshape(len(own.index) * parts, -1)
        )
        most = max(table.shape[1], rows.shape[1])
        table, rows = (t[:, torch.arange(most) % t.shape[1]] for t in (table, rows))
        heard[own.index.flatten()] = True
        table[own.index.flatten()] = rows
    same = width == channels and torch.equal(table.flatten(), torch.arange(channels))
    return (None if same or not width else table), (heard if width else ~heard)


def _select(activity: Tensor, columns: Tensor) -> Tensor:
    picked = activity.index_select(2, columns.flatten().to(activity.device))
    if columns.shape[1] == 1:
        return picked
    maps = picked.shape[3:]  # several of a channel stand below one another
    return picked.reshape(*picked.shape[:2], len(columns), -1, *maps[1:])
