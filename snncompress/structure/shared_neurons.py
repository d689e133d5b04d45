"""One neuron object behind layers of several widths: where its calls know nothing of one another, it's a function.

Then it's as any operation on the way from a layer to what reads it, and what is silent there is what the reader takes
in: no channel of the object itself goes. It must hold nothing for each channel, and from one call to the next nothing
but what it is handed or what has been reset, as a state that doesn't fit is begun anew and one that fits is carried on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from snncompress.interfaces import Adapter
from snncompress.model.chance import seeded
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in
from snncompress.model.network import Member
from snncompress.model.one_step import in_all_steps
from snncompress.running.data import Run

from .neuron_trial import Call, held, remembers, uncuttable

Places = Set[tuple[int, int]]
"""Numbers of channels of a neuron's inputs, each with the axis on which they stand."""


def several_widths(places: Places) -> bool:
    """Do these differ in their number of channels?"""
    return len({width for width, _ in places}) > 1


def functions(model: nn.Module, adapter: Adapter, run: Run, places: Mapping[str, Places]) -> tuple[str, ...]:
    """Those among neurons of several widths whose calls know nothing of one another."""
    neurons = adapter.neurons(model)
    asked = {n: found for n, found in places.items() if several_widths(found) and not _for_each(neurons[n], adapter)}
    if not asked:
        return ()
    calls, dirty = _calls(model, adapter, run, asked)
    return tuple(
        name
        for name, found in asked.items()
        if all(_is_function(neurons[name], adapter, calls[name], dirty[name], m) for m in _members(name, found))
    )


def _members(name: str, places: Places) -> Iterator[Member]:
    for width, axis in sorted(places):
        yield Member(name, "neuron", torch.arange(width)[:, None], width, axis)


def _for_each(neuron: nn.Module, adapter: Adapter) -> bool:
    """Does it hold numbers for each channel, or layers?"""
    return any(tensor.numel() > 1 for tensor in held(private_copy(neuron, adapter)))


def _is_function(neuron: nn.Module, adapter: Adapter, calls: list[Call], dirty: bool, member: Member) -> bool:
    removed = torch.arange(member.width // 2)
    time = adapter.time_axis(neuron)
    mine = [call for call in calls if _width(call, member.axis, time) == member.width]
    for call in mine:
        if dirty and remembers(neuron, adapter, call, member):
            return False
        if len(removed) and uncuttable(neuron, adapter, call, member, removed) is not None:
            return False
    return bool(mine)


def _width(call: Call, axis: int, time: int | None) -> int:
    x = next(tensors_in(call))
    axis = in_all_steps(axis, time, x.dim())
    return x.shape[axis] if x.dim() >= -axis else 0


def _form(call: Call) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(call)]


def _calls(
    model: nn.Module, adapter: Adapter, run: Run, names: Mapping[str, Any]
) -> tuple[dict[str, list[Call]], dict[str, bool]]:
    """Of each the calls, one of each form, and whether it ever held a state when it was called."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    dirty = dict.fromkeys(names, False)

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, named: Any) -> None:
            dirty[name] |= any(tensor.numel() > 1 for tensor in held(module))
            if all(_form(call) != _form((args, named)) for call in calls[name]):
                calls[name].append((args, named))

        return hook

    with torch.no_grad(), seeded(model), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True).remove)
        try:
            run(model)
        except Exception:  # the model is the user's; whoever runs it for its results will tell
            calls = {name: [] for name in names}
    adapter.reset(model)
    return calls, dirty
