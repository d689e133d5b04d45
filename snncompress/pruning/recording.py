"""Calibration: runs the data through the network and lets the criterion fold up what the neurons do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, processes, shared, together
from snncompress.base.progress import Progress, tracked
from snncompress.errors import PluginError, SilentNeuronsWarning
from snncompress.interfaces import Criterion, Layer, Signal
from snncompress.model.computed_once import evaluating
from snncompress.model.network import Network
from snncompress.model.weight_norms import plain_weights
from snncompress.running.data import Feed
from snncompress.running.scores import loss_of

from .integration import InputRecorder, decay, input_of, timelines
from .scorer import Groups, Scorer, any_of, heard_by, listens, mean_over


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
        self._scorers = {
            name: [
                Scorer(model, network, name, neuron, groups, criterion, seed)
                for neuron in ((listens(criterion) and heard_by(network, name, groups)) or (None,))
            ]
            for name, groups in layers.items()
        }

    @property
    def scorers(self) -> list[Scorer]:
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
            found = own[0] if len(own) == 1 else mean_over(own, [s.heard for s in scorers])
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
    reading = [s for r in recordings for s in r.scorers if s.reading()]
    wanted = dict.fromkeys(name for s in reading for name in sorted(s.reading()))
    readers = _readers(model, network, feed, wanted) if reading else {}
    gradients = "gradients" in needs
    learning = [s for r in recordings if "gradients" in r.criterion.needs for s in r.scorers]
    listening: dict[str, list[Scorer]] = {}
    for scorer in (s for r in recordings for s in r.scorers if s.neuron is not None):
        listening.setdefault(str(scorer.neuron), []).append(scorer)
    fired: dict[str, bool] = {}

    def settle() -> None:
        found = {name: reader.inputs() for name, reader in readers.items()}
        for scorer in reading:
            scorer.hear(found)

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


def _warn_of_silence(listening: Mapping[str, list[Scorer]], fired: Mapping[str, bool], learning: list[Scorer]) -> None:
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


def _observer(neuron: str, scorers: list[Scorer], fired: dict[str, bool]) -> Callable[[Tensor, Tensor | None], None]:
    fired[neuron] = False

    def observe(spikes: Tensor, membrane: Tensor | None) -> None:
        if not fired[neuron]:
            fired[neuron] = any_of(spikes)
        for scorer in scorers:
            scorer.observe(spikes.detach(), membrane if scorer.needs_membrane else None)

    return observe
