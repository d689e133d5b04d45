"""A trial of removals: one network with channels silenced, one without them, compared layer by layer.

Neurons are bent wires here, so no threshold can hide or exaggerate a difference. Every layer's output and every
neuron's input is compared, not only what the model returns, since what comes behind may hide a difference: a
normalization, an average. From each of them on both networks go on with the same tensor, scaled to at most 1: so
nothing overflows and rounding doesn't add up, however deep the network is. That's as good as other weights: a factor
for all channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import SNNCompressError
from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
from snncompress.model.chance import Steady, seeded
from snncompress.model.channel_map import ChannelMap
from snncompress.model.copying import private_copy
from snncompress.model.edits import RemoveChannels
from snncompress.model.modules import in_mode, patched, tensors_in
from snncompress.model.network import (
    WEIGHT_LAYERS,
    ChannelGroup,
    Side,
    channel_axis,
    multiplier,
    silent_members,
    without,
)
from snncompress.running.data import Run, memory_ran_out
from snncompress.running.sameness import same

from .random_parameters import randomize

Removal = tuple[ChannelGroup, Tensor]
"""A group, and the positions that it loses."""

_CALLS = 4  # of one module that are compared: a loop over timesteps does the same in each


@dataclass(frozen=True)
class Flaw:
    """How removing isn't the same as silencing, in plain words, and where it shows.

    That is in what goes into ``module`` (side "in"), or in what is done with what it puts out ("out"); "" where it
    shows at the model's output, or nowhere in particular. ``code`` is the module in whose forward it failed, where it
    did.
    """

    why: str
    module: str = ""
    side: Side = "in"
    code: str | None = None


class UnsteadyError(Exception):
    """The network computes something else each time that it is run."""


class Trial:
    """Compares what is left of removals with what the silenced network computes.

    ``model`` is a copy for this purpose: its parameters are overwritten. Two networks that agree at a random point of
    their parameter space agree everywhere, almost surely. Silenced is what neurons put out, and what a layer takes in
    that the group's layers feed without a neuron between (``direct``), as from a residual stream. Where the model calls
    other layers, or returns something else, in training than it does in evaluation, both ways are compared.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, run: Run, direct: Mapping[str, Collection[str]],
        generator: torch.Generator, modes: Sequence[bool] = (), *, shared: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.run, self._direct, self._shared = model, adapter, run, direct, shared
        randomize(model, adapter, generator)
        self.modes = list(modes)
        """In evaluation (False), and in training where that is another way; found here if not given."""
        self.flaw = ""
        """Why nothing can be concluded from any trial of this model; "" where something can."""
        self.called: set[str] = set()
        """Layers and neurons that ran."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of what they put out."""
        self._steady = bool(modes)
        """Does the network compute the same when it is run again? Asked when a difference is found, once."""
        if not modes:
            self._look(model)

    def _look(self, model: nn.Module) -> None:
        """Find out what runs, whether trials tell anything, and which modes there are."""
        bare = self._noted(model)
        self.called, self.shapes = {*bare.outputs, *self._shared}, dict(bare.shapes)
        self.flaw = bare.why
        self.modes = [False]
        with in_mode(model, training=True):
            train = self._noted(model)
            more = set(train.outputs) - self.called
            if (more or (not train.failed and train.shapes != bare.shapes)) and not self._again(model, train):
                self.modes.append(True)
                self.called |= more
                self.shapes = dict(train.shapes) | self.shapes

    def difference(self, removals: Sequence[Removal]) -> Flaw | None:
        """Where removing isn't the same as silencing; None where it is.

        Raises UnsteadyError where it differs, but from run to run, so that no trial tells anything.
        """
        flaw = self._difference(removals)
        if flaw is not None and not self._steady:
            if why := self._again(self.model, self._noted(self.model)):
                raise UnsteadyError(why)
            self._steady = True
        return flaw

    def _difference(self, removals: Sequence[Removal]) -> Flaw | None:
        silent, lost = self._gone(removals)
        pruned = private_copy(self.model, self.adapter, share=True)
        groups = [group for group, _ in removals]
        owners = Counter((member.module, member.side) for group in groups for member in group.members)
        for number, (group, removed) in enumerate(removals):
            try:
                RemoveChannels.of(pruned, groups[number], removed).apply(pruned, self.adapter)
            except SNNCompressError as error:
                return Flaw(f"its channels can't be removed safely: {error}", group.names("out")[0], "out")
            except Exception:  # a plugin's adapter may raise anything
                why = "its channels can't be removed safely: one of the modules that they run through can't be cut"
                return Flaw(why, group.names("out")[0], "out")
            if any(owners[member.module, member.side] > 1 for member in group.members):
                groups = without(groups, number, removed)
        for training in self.modes:
            with in_mode(self.model, training=training), in_mode(pruned, training=training):
                wanted = self._noted(self.model, silent, lost)
                if wanted.problem and not (training and wanted.failed):  # as far as it comes, then
                    return wanted.problem
                if problem := self._noted(pruned, wanted=wanted).problem:
                    return problem
        return None

    def _gone(self, removals: Sequence[Removal]) -> tuple[_Gone, _Gone]:
        """What neurons and direct readers are silenced in, and what layers and neurons lose."""
        silent: _Gone = {}
        lost: _Gone = {}
        for group, removed in removals:
            for member in silent_members(group, self.model, self._direct):
                axis = member.axis or channel_axis(layer_at(self.model, member.module))
                _add(silent, member.module, member.index[removed].flatten(), axis)
            for member in group.members:
                module = layer_at(self.model, member.module)
                if member.side == "neuron":
                    _add(lost, member.module, member.index[removed].flatten(), member.axis)
                elif member.side == "out" and isinstance(module, (*WEIGHT_LAYERS, ChannelMap)):
                    _add(lost, member.module, member.index[removed].flatten(), channel_axis(module))
        return silent, lost

    def _again(self, model: nn.Module, first: _Notes) -> str:
        """Why a second run isn't like the first."""
        if self._noted(model, wanted=first).problem is not None:
            return "the network computes something else each time that it is run, so no trial tells what removals do"
        return ""

    def _noted(
        self, model: nn.Module, silent: _Gone | None = None, lost: _Gone | None = None, wanted: _Notes | None = None
    ) -> _Notes:
        """Run the model with channels ``silent``; note it without those ``lost``, or hold it against other notes."""
        notes = _Notes(silent or {}, lost or {}, wanted)
        names = {m: n for n, m in model.named_modules()}
        neurons = self.adapter.neurons(model)
        inside = {m for neuron in neurons.values() for m in neuron.modules()}
        layers = [m for m in names if isinstance(m, (*WEIGHT_LAYERS, ChannelMap)) and m not in inside]

        def stand_in(neuron: nn.Module, x: Tensor) -> Tensor:
            return bent(x) if names[neuron] in self._shared else notes.neuron(names[neuron], x)

        with torch.no_grad(), seeded(model), Steady(), ExitStack() as stack:
            for layer in layers:  # first, so that of layers which repeat their first timestep that alone is noted
                stack.enter_context(patched(layer, "forward", notes.layer(names[layer], layer)))
            stack.enter_context(self.adapter.identities(model, stand_in))
            try:
                result = self.run(model)
            except Exception as error:  # the model is the user's: anything can come out of it
                if memory_ran_out(error):
                    raise
                notes.fails(error, names)
                return notes
        notes.returns([t for t in tensors_in(result) if t.is_floating_point()])
        return notes


def bent(x: Tensor) -> Tensor:
    """A wire that isn't straight."""
    return x + x.square() / 2


_Gone = dict[str, tuple[Tensor, int]]
"""Module → indices, and the axis of its output on which they stand, counted from the end."""


def _add(gone: _Gone, name: str, indices: Tensor, axis: int) -> None:
    before = [gone[name][0]] if name in gone else []
    gone[name] = torch.cat([*before, indices]), axis


class _DecidedError(Exception):
    """The trial is decided."""


@dataclass
class _Notes:
    """What every module put out, call by call, and whether that was what was ``wanted``."""

    silent: _Gone
    lost: _Gone
    wanted: _Notes | None = None
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    scales: dict[str, list[Tensor]] = field(default_factory=dict)
    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    problem: Flaw | None = None
    failed: bool = False
    last: str = ""
    inside: str = ""
    """The layer that is being called."""

    @property
    def why(self) -> str:
        """The problem in words."""
        return "" if self.problem is None else self.problem.why

    def layer(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Stands in for the module's forward."""
        forward = module.forward

        def call(*args: Any, **named: Any) -> Any:
            if args and isinstance(args[0], Tensor):
                args = (self._silenced(name, args[0]), *args[1:])
            self.inside = name
            result = forward(*args, **named)
            self.inside = ""
            # what a depthwise convolution makes of silence is counted on behind it, so it isn't scaled
            return self._note(name, result, scaled=not multiplier(module)) if isinstance(result, Tensor) else result

        return call

    def neuron(self, name: str, x: Tensor) -> Tensor:
        """Stands in for the neuron: bent, so that what is normalized before doesn't cancel in an average behind it."""
        return self._silenced(name, bent(self._note(name, x)))

    def _silenced(self, name: str, x: Tensor) -> Tensor:
        if name not in self.silent:
            return x
        indices, axis = self.silent[name]
        return x.index_fill(axis, indices.to(x.device), 0.0)

    def fails(self, error: Exception, names: Mapping[nn.Module, str]) -> None:
        """The run came to an end before its time: fair enough, if there the other did too."""
        if self.problem is not None:
            return
        self.failed = True
        if self.wanted is None:
            where = f"behind {self.last}" if self.last else "before its first layer"
            self.problem = Flaw(f"a trial with other numbers in the network failed {where}, which tells nothing")
        elif not self.wanted.failed or len(self.wanted.shapes) != len(self.shapes):
            at: tuple[str, Side] = (self.inside, "in") if self.inside else (self.last, "out")
            self.problem = Flaw(_counts_on_width(self.last, error), *at, _failing(error, names))

    def returns(self, results: list[Tensor]) -> None:
        """What the model returned."""
        self.results = results
        self.shapes += [("", tuple(t.shape)) for t in results]
        if self.wanted is None:
            return
        if len(results) != len(self.wanted.results):
            self.problem = Flaw("without some of its channels the model returns something else")
        for a, b in zip(self.wanted.results, results, strict=False):
            if a.shape != b.shape:
                self.problem = Flaw(
                    f"removing its channels would change the output's shape from {list(a.shape)} to {list(b.shape)}"
                )
            elif not same(a, b):
                self.problem = Flaw(_not_the_same("the model's output"))

    def _note(self, name: str, x: Tensor, *, scaled: bool = True) -> Tensor:
        """The tensor, scaled, with which the network goes on."""
        self.last = name
        self.shapes.append((name, tuple(x.shape)))
        number = len(self.scales.setdefault(name, []))
        if self.wanted is not None and number < len(self.wanted.scales.get(name, ())):
            scale = self.wanted.scales[name][number]
        elif not (scaled and x.numel()):
            scale = x.new_ones(())
        else:
            scale = 1 / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        self.scales[name].append(scale)
        x = x * scale
        if not (bool(x.sum().isfinite()) or bool(x.isfinite().all())):  # a finite sum tells of all
            self._stop(name, f"a trial with random weights gave NaN or infinite numbers at {name}, which tells nothing")
        known = self.outputs.setdefault(name, [])
        if len(known) == _CALLS:
            return x
        if self.wanted is None:
            known.append(_left(x, self.lost.get(name)))
            return x
        known.append(x)
        calls = self.wanted.outputs.get(name, [])
        if number >= len(calls):
            self._stop(name, f"without some of its channels {name} is called more often")
        if calls[number].shape != x.shape:
            self._stop(name, _counts_on_width(name))
        if not same(calls[number], x):
            self._stop(name, _not_the_same(f"what {name} computes"))
        return calls[number]

    def _stop(self, name: str, why: str) -> None:
        self.problem = Flaw(why, name)
        raise _DecidedError


def _not_the_same(what: str) -> str:
    return (
        f"removing its channels is not the same as silencing its neurons: {what} would change (something adds to "
        f"silent channels, or forward reads membrane potentials or names single ones)"
    )


def _counts_on_width(name: str, error: Exception | None = None) -> str:
    if isinstance(error, SNNCompressError) and isinstance(error.__cause__, SNNCompressError):
        return f"its channels can't be removed safely: {error.__cause__}"
    where = f"behind {name}" if name else "before its first layer"
    return f"its channels can't be removed safely: forward, {where}, counts on how many there are"


def _failing(error: BaseException, names: Mapping[nn.Module, str]) -> str | None:
    """The innermost module, other than torch's own, in whose forward an error was raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    found, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names and not type(module).__module__.startswith("torch."):
            found = names[module]
        trace = trace.tb_next
    return found


def _left(x: Tensor, gone: tuple[Tensor, int] | None) -> Tensor:
    if gone is None:
        return x.clone()
    indices, axis = gone
    keep = torch.ones(x.shape[axis], dtype=torch.bool)
    keep[indices] = False
    return x.index_select(axis, keep.nonzero().flatten().to(x.device))
