"""How a model is made to run fewer timesteps: found by trying on copies, never believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter
from snncompress.model.chance import seeded
from snncompress.model.copying import private_copy
from snncompress.model.edits import TruncateTimesteps
from snncompress.model.modules import tensors_in
from snncompress.model.network import NORMS, WEIGHT_LAYERS
from snncompress.running.data import Feed, Run

_TOLERANCE = 0.01  # of the sum: a spike at the threshold may flip where a layer sees fewer rows at once


def truncation(model: nn.Module, adapter: Adapter, feed: Feed, timesteps: int) -> TruncateTimesteps | None:
    """The edit that lets ``model`` run the first ``timesteps`` of its T steps; None where T is that already.

    Tried on private copies with a sample of ``feed``, in this order: cutting the model's input along an axis of size
    T (multi-step models, loops over [T, N, ...]); stopping the loop that drives the steps from outside, where the
    feed has ``timesteps``; setting a whole-number attribute of the model or a submodule that equals T (loops of the
    model's own). The first one counts with which every neuron makes ``timesteps`` steps, fires as in the first steps
    of the whole run, and every output [T, N, ...] or [N, T, ...], in tuples and mappings too, becomes the first part
    of what it was (spike by spike; a linear readout may differ in its last bit). A cut input is for the step mode that
    the model is in. The model and torch's random state stay as they are.

    Raises:
        OptionError: ``timesteps`` isn't a whole number from 1 to T.
        ModelError: no way works: the number of steps is a constant in ``forward``, stands in several places or
            outside the model, or a step depends on how many follow (latency coding, neurons that are parallel in
            time).

    Example:
        >>> from spikingjelly.activation_based import functional, layer, neuron
        >>> from snncompress.contract.detection import find_adapter
        >>> net = nn.Sequential(layer.Linear(4, 3), neuron.IFNode())
        >>> adapter = find_adapter(net)
        >>> truncation(net, adapter, Feed(adapter, torch.rand(2, 4), timesteps=8), 5)
        TruncateTimesteps(timesteps=5, way='loop', module='', attribute='', axis=0)
        >>> functional.set_step_mode(net, "m")
        >>> truncation(net, adapter, Feed(adapter, torch.rand(8, 2, 4)), 5)
        TruncateTimesteps(timesteps=5, way='input', module='', attribute='', axis=0)
    """
    if type(timesteps) is not int or timesteps < 1:
        raise OptionError(f"A model runs a whole number of timesteps, at least 1, not {timesteps!r}.")
    run = feed.example()
    whole = _trial(model, adapter, run)
    steps = _steps(whole, feed)
    if timesteps > steps:
        raise OptionError(f"{type(model).__name__} runs {steps} timesteps; it can't be truncated to {timesteps}.")
    if timesteps == steps:
        return None
    tried = []
    for edit in _candidates(model, feed, whole, steps, timesteps):
        refusal = _refusal(model, feed, run, whole, steps, edit)
        if refusal is None:
            return edit
        tried.append(f"{_described(edit)}: {refusal}")
    by_hand = f" Where forward= calls the model once per timestep, let it do so {timesteps} times." * bool(feed.forward)
    raise ModelError(
        f"{type(model).__name__} can't be made to run only {timesteps} of its {steps} timesteps. "
        f"{'; '.join(tried) or 'Nothing in it or its input counts to that number'}. Likely cause: the number of steps "
        f"is a constant in forward(), or stands in several places. Let the model's loop count one attribute "
        f"(self.num_steps = {steps}), or run over its input [T, N, ...].{by_hand}"
    )


@dataclass
class _Trial:
    """What a model did with the example: spikes of every step by neuron, samples at a time, output, input's shape."""

    spikes: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)
    output: list[Tensor] = field(default_factory=list)
    shape: tuple[int, ...] = ()


def _trial(model: nn.Module, adapter: Adapter, run: Run, edit: TruncateTimesteps | None = None) -> _Trial:
    copy = private_copy(model, adapter).eval()
    if edit is not None:
        edit.apply(copy, adapter)
    trial = _Trial()

    def listening(name: str) -> Callable[[Tensor, Tensor | None], None]:
        sums = trial.spikes.setdefault(name, [])

        def listen(spikes: Tensor, _: Tensor | None) -> None:
            sums.append(spikes.float().flatten(1).sum(1))
            trial.rows.add(spikes.shape[1])

        return listen

    def note_shape(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next((v for v in (*args, *named.values()) if isinstance(v, Tensor)), None)
        trial.shape = () if x is None else tuple(x.shape)

    with seeded(copy), torch.no_grad(), adapter.alone(copy), ExitStack() as stack:
        for name, neuron in adapter.neurons(copy).items():
            stack.callback(adapter.observe(neuron, listening(name), membrane=False))
        copy.register_forward_pre_hook(note_shape, with_kwargs=True)  # after earlier cuts
        trial.output = list(tensors_in(run(copy)))
    return trial


def _steps(whole: _Trial, feed: Feed) -> int:
    """Of the output where that is sure to tell, or as the neuron of the fewest made."""
    made = min((sum(map(len, calls)) for calls in whole.spikes.values() if calls), default=None)
    for tensor in whole.output:
        if tensor.dim() > 2:
            size = tensor.shape[int(feed.batch_first)]
            if made is None or (size not in whole.rows and made % size == 0):
                return size
    return 1 if made is None else made


def _candidates(model: nn.Module, feed: Feed, whole: _Trial, steps: int, timesteps: int) -> Iterator[TruncateTimesteps]:
    for axis, size in enumerate(whole.shape):
        if size == steps:
            yield TruncateTimesteps(timesteps, "input", axis=axis)
    if feed.timesteps is not None:
        yield TruncateTimesteps(timesteps)
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHT_LAYERS, *NORMS)):  # what they count is channels
            continue
        for attribute, value in vars(module).items():
            if type(value) is int and value == steps:
                yield TruncateTimesteps(timesteps, "attribute", name, attribute)


def _refusal(model: nn.Module, feed: Feed, run: Run, whole: _Trial, steps: int, edit: TruncateTimesteps) -> str | None:
    """Why this isn't what the model did in its first steps; None if it is."""
    try:
        short = _trial(model, feed.adapter, run, edit)
    except Exception as error:  # the model is the user's: anything can come out of it
        cause = error.__cause__ or error
        return f"it then fails with {type(cause).__name__}: {cause}"
    for name, calls in whole.spikes.items():
        if not calls:
            continue
        before, after = torch.cat(calls), torch.cat(short.spikes[name] or [calls[0][:0]])
        if len(after) * steps != len(before) * edit.timesteps:
            return f"neurons {name!r} then make {len(after)} steps ({len(before)} in the whole run)"
        if not _close(before[: len(after)], after):
            return f"neurons {name!r} then fire otherwise than in the first steps of the whole run"
    for before, after in zip(whole.output, short.output, strict=False):
        shrunk = [axis for axis in (0, 1) if before.shape[axis : axis + 1] != after.shape[axis : axis + 1]]
        axis = shrunk[0] if shrunk else int(feed.batch_first)
        over_time = before.dim() > 1 + axis and before.shape[axis] == steps and (shrunk or steps not in whole.rows)
        if over_time and not _close(before.narrow(axis, 0, edit.timesteps), after):
            return "its output isn't then the first part of the whole run's"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.cpu().double(), b.cpu().double()
    return bool((a - b).abs().sum() <= _TOLERANCE * a.abs().sum())


def _described(edit: TruncateTimesteps) -> str:
    if edit.way == "input":
        return f"Input cut on axis {edit.axis}"
    if edit.way == "loop":
        return f"Called {edit.timesteps} times"
    return f"{edit.module + '.' if edit.module else ''}{edit.attribute} = {edit.timesteps}"
