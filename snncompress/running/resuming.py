"""Runs up to one layer after another, each going on from where the last one stopped.

To run a network up to each of its L layers is to run half of it L times. What the layers, norms and neurons in front
put out is the same as the last time, though, so that little of it has to be kept: what those behind still read. The
code in between, which can't be left out, is given that, and zeros of the right shape for all else.

Who reads what is found on a few samples (:mod:`snncompress.running.readers`), and holds for batches of their shape.
Then it is tried on an example, with wild numbers in the place of zeros. Where anything isn't followed, or a layer is
handed anything else than in a run of the whole network, there is nothing but such runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.base.distributed import processes
from snncompress.interfaces import Adapter
from snncompress.model.chance import seeded
from snncompress.model.computed_once import evaluating
from snncompress.model.copying import private_copy
from snncompress.model.modules import patched, tensors_in
from snncompress.model.network import WEIGHT_LAYERS

from .batches import Batch, own_copy, split
from .data import Feed
from .readers import Aside, readers_in

_LIMIT = 2**30
"""Bytes that are kept of one network, at most."""
_FEWEST = 8
"""Layers, with fewer of which it isn't worth while."""
_SAMPLES = 3
"""On which it is found out who reads what."""
_ALWAYS = ""
"""A reader that is never done."""


class OffTrackError(BaseException):
    """A run failed that left something out: past handlers of ordinary exceptions in a user's code."""


class _EnoughError(BaseException):
    """Ends a forward pass early."""


@dataclass(frozen=True)
class _Unread:
    """A tensor that nobody reads: one of its shape, the same for all."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, x: Tensor, dtype: torch.dtype | None = None) -> _Unread:
        return cls(x.shape, dtype or x.dtype, x.device)

    def restored(self, blanks: dict[_Unread, Tensor]) -> Tensor:
        if self not in blanks:
            blanks[self] = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return blanks[self].view(self.shape)  # whose own shape may be changed

    def wild(self) -> Tensor:
        """Numbers that show wherever somebody reads them after all, be it across a threshold."""
        generator = torch.Generator().manual_seed(0)
        return (100 * torch.randn(self.shape, generator=generator)).to(self.device, self.dtype)


@dataclass(frozen=True)
class _Held:
    """A tensor that somebody reads; spikes take a byte each."""

    values: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> _Held:
        binary = x.is_floating_point() and bool((x.eq(0) | x.eq(1)).all())
        return cls(x.bool() if binary else x.clone(), x.dtype)

    def restored(self, blanks: dict[_Unread, Tensor]) -> Tensor:
        return self.values.to(self.dtype, copy=True)


_Stage = dict[str, list[Any]]
"""How far a batch is: what those that are done put out, call by call."""


class Resumed:
    """Runs of ``model`` in eval mode, up to each of ``layers`` in order, on batches that are the same every time.

    Between the runs up to two layers those from the first on, but before the second, may change.
    """

    def __init__(self, model: nn.Module, feed: Feed, layers: Sequence[str], seed: int) -> None:
        self._model, self._feed, self._seed = model, feed, seed
        self._sites = _sites(model, feed.adapter)
        self._stages: dict[int, _Stage] = {}
        self._sizes: dict[int, int] = {}
        self._too_large: set[int] = set()
        self._room = 0
        self._blanks: dict[_Unread, Tensor] = {}
        self._done: dict[str, frozenset[str]] = {}
        self._readers: Mapping[str, list[list[set[str]]]] = {}
        self._shapes: Any = []
        self._trying = True
        self.works = False
        """Whether anything is left out at all; never where several processes have to keep in step."""
        if len(layers) >= _FEWEST and processes() == 1 and not self._is_little():
            self._model = private_copy(model, feed.adapter)
            self._sites = _sites(self._model, feed.adapter)
            with warnings.catch_warnings(), evaluating(self._model):
                warnings.simplefilter("ignore")
                try:
                    self.works = self._traced(layers) and self._tried(layers)
                except (OffTrackError, Exception):  # the model is the user's, and may not go together with this
                    self.works = False
            self._forget()
        self._trying = False
        self._model, self._sites = model, _sites(model, feed.adapter)

    @contextmanager
    def up_to(self, layer: str, number: int, batch: Batch) -> Iterator[None]:
        """Inside, a run of the model on a batch is one up to this layer; what comes behind isn't defined.

        Raises OffTrackError where that failed, after which nothing is left out any more.
        """
        fits = self._trying or self._shapes_of(batch) == self._shapes
        if not (self.works and fits) or number in self._too_large or layer not in self._done:
            yield
            return
        before = self._stages.get(number, {})
        done = self._done[layer].union(before)
        stage: _Stage = {}
        self._room = _LIMIT - sum(size for n, size in self._sizes.items() if n != number)
        self._failed = False
        with ExitStack() as stack:
            for name in done:
                module = self._sites[name]
                if name in before:
                    stage[name] = [self._noted(name, n, call, done) for n, call in enumerate(before[name])]
                    forward = self._replaying(iter(before[name]))
                else:
                    forward = self._noting(name, module, stage.setdefault(name, []), done)
                stack.enter_context(patched(module, "forward", forward))
            try:
                yield
            except (OffTrackError, Exception) as error:  # its code may not take zeros; if it's the data, it comes again
                self.stop()
                raise OffTrackError from error
        if self._failed:  # and a forward that catches everything went on
            self.stop()
            raise OffTrackError
        self._keep(number, stage)

    def stop(self) -> None:
        """Run all of it from now on."""
        self.works = False
        self._forget()

    def _forget(self) -> None:
        self._stages.clear()
        self._sizes.clear()
        self._blanks.clear()

    def _keep(self, number: int, stage: _Stage) -> None:
        """For the next layer, if there is room."""
        self._stages.pop(number, None)
        self._sizes.pop(number, None)
        if self._room < 0:
            self._too_large.add(number)
            return
        parts = (part for calls in stage.values() for part in _parts(calls))
        self._sizes[number] = sum(part.values.nbytes for part in parts if isinstance(part, _Held))
        self._stages[number] = stage

    def _replaying(self, calls: Iterator[Any]) -> Callable[..., Any]:
        """Stands in for a module's forward."""

        def call(*args: Any, **named: Any) -> Any:
            output = next(calls, OffTrackError)
            if output is OffTrackError:
                self._failed = True
                raise OffTrackError
            return _mapped(output, self._restored)

        return call

    def _restored(self, part: _Part) -> Tensor:
        return part.wild() if self._trying and isinstance(part, _Unread) else part.restored(self._blanks)

    def _noting(self, name: str, module: nn.Module, calls: list[Any], done: frozenset[str]) -> Callable[..., Any]:
        """The same, run and noted."""
        forward = module.forward

        def call(*args: Any, **named: Any) -> Any:
            output = forward(*args, **named)
            calls.append(self._noted(name, len(calls), output, done))
            return output

        return call

    def _noted(self, name: str, number: int, output: Any, done: frozenset[str]) -> Any:
        """What of a call's output those read that aren't done; of a call that the example hadn't, all."""
        calls = self._readers[name]
        readers = iter(calls[number]) if number < len(calls) else None

        def noted(x: Any) -> Any:
            read = (readers is None or bool(next(readers, {_ALWAYS}) - done)) and self._room >= 0
            if isinstance(x, Tensor):
                x = _Held.of(x) if read else _Unread.like(x)
            elif not read and isinstance(x, _Held):
                x = _Unread.like(x.values, x.dtype)
            if isinstance(x, _Held):
                self._room -= x.values.nbytes
            return x

        return _mapped(output, noted)

    # -- who reads what --

    def _traced(self, layers: Sequence[str]) -> bool:
        """Find out what is done, and whose outputs are read, before each layer."""
        batch, adapter = self._few_samples(), self._feed.adapter
        reset = adapter.reset

        def run(aside: Aside) -> None:
            def quietly(model: nn.Module) -> None:
                with aside():
                    reset(model)

            with patched(adapter, "reset", quietly):
                self._run(batch)

        found = readers_in(self._model, self._sites, batch.raw, run)
        self._shapes, self._readers = self._shapes_of(batch), found.readers
        behind: set[str] = set()
        for layer in reversed(layers):
            holder = _holder(layer, self._sites)
            if holder is None or holder not in found.last:
                return False
            found.behind(holder, behind)
            before = (name for name in found.last if name not in behind and found.last[name] < found.last[holder])
            self._done[layer] = frozenset(before)
        return bool(self._shapes)

    def _is_little(self) -> bool:
        """Are the data hardly more than what it takes to find out who reads what?"""
        batch = self._feed.first()
        axis = self._feed.samples_axis(batch)
        try:
            return axis is not None and batch.x.shape[axis] * len(self._feed) < 3 * _SAMPLES
        except TypeError:  # they don't tell how many batches there are
            return False

    def _few_samples(self) -> Batch:
        """Of the first batch: more than one, as code may ask for that; all, where nothing tells on which axis."""
        batch = self._feed.first()
        axis = self._feed.samples_axis(batch)
        if axis is None or batch.x.shape[axis] <= _SAMPLES:
            return batch
        x = batch.x.narrow(axis, 0, _SAMPLES)
        return Batch(x, batch.y, x if isinstance(batch.raw, Tensor) else (x, batch.y))

    def _shapes_of(self, batch: Batch) -> Any:
        """The shapes of its tensors; the number of samples only where nothing tells which it is, or where it is one."""
        axis = self._feed.samples_axis(batch)
        if axis is None:
            return [x.shape for x in tensors_in(batch.raw)]
        count = batch.x.shape[axis]
        return [*batch.x.shape[:axis], min(count, 2), *batch.x.shape[axis + 1 :]]

    def _run(self, batch: Batch) -> None:
        with seeded(self._model, self._seed), self._feed.adapter.alone(self._model):
            self._feed(self._model, batch)

    def _tried(self, layers: Sequence[str]) -> bool:
        """Whether every layer is handed the same on an example as in a run of the whole network."""
        self.works = True
        whole = self._handed(layers)
        for layer in layers:
            with self.up_to(layer, -1, self._feed.example_batch()):
                found = self._handed([layer], len(whole[layer]))
            pairs = zip(found[layer], whole[layer], strict=False)
            if len(found[layer]) != len(whole[layer]) or not all(torch.equal(a, b) for a, b in pairs):
                return False
        return not self._too_large

    def _handed(self, layers: Sequence[str], most: int | None = None) -> dict[str, list[Tensor]]:
        """What layers take in, call by call; nothing runs after ``most`` of them."""
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}

        def hook(calls: list[Tensor]) -> Callable[..., None]:
            def take(module: nn.Module, args: Any, named: Any, output: Any) -> None:
                calls.append(next(tensors_in([*args, *named.values()])).detach().clone())
                if len(calls) == most:
                    raise _EnoughError

            return take

        handles = [
            self._model.get_submodule(layer).register_forward_hook(hook(calls), with_kwargs=True)
            for layer, calls in found.items()
        ]
        try:
            self._run(self._feed.example_batch())
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._feed.adapter.reset(self._model)
        return found


class SameBatches:
    """The batches of a feed; as long as any of the runs works the same ones every time, shuffled or not."""

    def __init__(self, feed: Feed, runs: Collection[Resumed]) -> None:
        self._feed, self._runs = feed, runs
        self._kept: list[Batch] = []
        self._rest: Iterator[Batch] | None = None
        self._size = 0

    def __iter__(self) -> Iterator[Batch]:
        if not any(run.works for run in self._runs):
            self._kept.clear()
            yield from self._feed
            return
        self._rest = self._rest or iter(self._feed)
        yield from self._kept
        for batch in self._rest:
            self._size += sum(x.nbytes for x in tensors_in(batch.raw))
            raw = own_copy(batch.raw)  # a loader may fill the same tensors again
            x, y = split(raw)
            self._kept.append(Batch(x, y, raw))
            if self._size > _LIMIT:
                for run in self._runs:
                    run.stop()
                self._kept.clear()
            yield batch


def _sites(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """Neurons, and the layers and norms outside of them; those of several names once."""
    neurons = adapter.neurons(model)
    inside = {m for neuron in neurons.values() for m in neuron.modules() if m is not neuron}
    return {
        name: m
        for name, m in model.named_modules()
        if m not in inside and (name in neurons or isinstance(m, (*WEIGHT_LAYERS, _BatchNorm)))
    }


def _holder(layer: str, sites: dict[str, nn.Module]) -> str | None:
    """The site that a layer is, or is in."""
    return layer if layer in sites else next((name for name in sites if layer.startswith(f"{name}.")), None)


# -- what modules put out: tensors, or what stands for them, in tuples, lists and mappings --

_Part = _Held | _Unread


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (Tensor, _Held, _Unread)):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _parts(value: Any) -> list[_Part]:
    found: list[_Part] = []
    _mapped(value, found.append)
    return found
