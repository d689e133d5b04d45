"""A trial of one population of neurons by itself: it must do with fewer channels what it did with all.

In the trial of the whole network neurons are wires, so what they hold per channel (thresholds, decays, memories, plain
tensors of a user's own class) is tried here, on random currents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import SNNCompressError
from snncompress.interfaces import Adapter
from snncompress.model.chance import Steady, seeded
from snncompress.model.copying import private_copy
from snncompress.model.fixed_point import remove_channels
from snncompress.model.modules import tensors_in
from snncompress.model.network import Member
from snncompress.model.one_step import in_all_steps
from snncompress.running.data import Run
from snncompress.running.sameness import wire

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments."""
_SCALES = (1.0, 16.0)  # of currents: thresholds are mostly about 1
_STEPS = 3
_FAR = 1e4
_FLIPS = 0.001  # share of values that rounding may change: a spike at the threshold


def first_calls(model: nn.Module, adapter: Adapter, run: Run) -> dict[str, Call]:
    """With what each neuron is called first, by its name: what stands for its current is random, of the right shape."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        return lambda module, args, named: calls.setdefault(name, (args, named)) and None

    with torch.no_grad(), seeded(model), adapter.identities(model, wire), ExitStack() as stack:
        for name, neuron in adapter.neurons(model).items():
            stack.callback(neuron.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        try:
            run(model)
        except Exception:  # the model is the user's; whoever runs it for its results will tell
            calls = {}
    adapter.reset(model)
    return calls


def uncuttable(neuron: nn.Module, adapter: Adapter, call: Call, member: Member, removed: Tensor) -> str | None:
    """Why the neuron isn't the same without the positions ``removed``, in plain words; None where it is."""
    what = f"{member.module} ({type(neuron).__name__})"
    one_step, member = member, _in_all_steps(member, adapter, neuron, call)
    gone = member.index[removed].flatten().sort().values
    kept = torch.ones(member.width, dtype=torch.bool)
    kept[gone] = False
    whole, cut = private_copy(neuron, adapter), private_copy(neuron, adapter)
    try:
        remove_channels(adapter, cut, gone.tolist(), width=member.width, axis=one_step.axis)
    except SNNCompressError as error:
        return f"its channels can't be removed safely: {error}"
    except Exception:  # a plugin's adapter may raise anything
        return f"its channels can't be removed safely: {what} can't be cut"
    coupled = any(True for child in neuron.children() for _ in child.parameters())  # recurrent weights mix channels
    coupled |= any(p.shape == (member.width, member.width) for p in neuron.parameters(recurse=False))
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        args = _random(call, member, scale, generator, states=not coupled)
        silent = _silent(args, member, gone) if coupled else args
        try:
            wanted = list(_results(whole, adapter, silent, _STEPS))
        except Exception:  # it doesn't run by itself, so nothing is learned
            return f"its channels can't be removed safely: {what} can't be tried by itself" if coupled else None
        try:
            got = list(_results(cut, adapter, _map(args, lambda t: _part(t, member, kept)), _STEPS))
        except Exception:  # whatever it is, it wouldn't run in the network
            got = []
        if not _agree([_part(t, member, kept) for t in wanted], got):
            return (
                f"its channels can't be removed safely: {what} holds values for each that aren't cut along, or they "
                f"depend on one another"
            )
    return None


def held(neuron: nn.Module) -> Iterator[Tensor]:
    """All tensors that a neuron holds: parameters, buffers, plain attributes, memories; its modules' own included."""
    for module in neuron.modules():
        yield from (*module.parameters(recurse=False), *module.buffers(recurse=False), *tensors_in(vars(module)))
        yield from tensors_in(getattr(module, "_memories", {}))


def remembers(neuron: nn.Module, adapter: Adapter, call: Call, member: Member) -> bool:
    """Does what a call returns depend on calls before it?"""
    copy, generator = private_copy(neuron, adapter), torch.Generator().manual_seed(0)
    member = _in_all_steps(member, adapter, neuron, call)
    once, other = (_random(call, member, scale, generator, states=True) for scale in _SCALES)
    try:
        wanted = list(_results(copy, adapter, once, 1))
        with torch.no_grad(), seeded(copy), Steady():
            copy(*other[0], **other[1])
            got = list(_results(copy, adapter, once, 1))
    except Exception:  # it doesn't run by itself, so nothing is learned
        return True
    return not _agree(wanted, got)


def _in_all_steps(member: Member, adapter: Adapter, neuron: nn.Module, call: Call) -> Member:
    """The member with the axis on which channels stand in what the neuron is called with."""
    x = next(tensors_in(call), None)
    return member if x is None else replace(member, axis=in_all_steps(member.axis, adapter.time_axis(neuron), x.dim()))


def _results(neuron: nn.Module, adapter: Adapter, call: Call, steps: int) -> Iterator[Tensor]:
    with torch.no_grad(), seeded(neuron), Steady():
        for _ in range(steps):
            yield from tensors_in(neuron(*call[0], **call[1]))
    adapter.reset(neuron)


def _random(call: Call, member: Member, scale: float, generator: torch.Generator, *, states: bool) -> Call:
    """The current, and with ``states`` what else is handed in per channel, drawn anew."""
    first = next(tensors_in(call), None)

    def drawn(tensor: Tensor) -> Tensor:
        if not (tensor is first or (states and _per_channel(tensor, member))) or not tensor.is_floating_point():
            return tensor
        return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor)

    changed: Call = _map(call, drawn)
    return changed


def _silent(call: Call, member: Member, gone: Tensor) -> Call:
    """The same with currents far below any threshold for channels ``gone``, so that they send nothing to others."""
    first = next(tensors_in(call), None)

    def silenced(tensor: Tensor) -> Tensor:
        if tensor is not first or not _per_channel(tensor, member):
            return tensor
        return tensor.index_fill(member.axis, gone.to(tensor.device), -_FAR)

    changed: Call = _map(call, silenced)
    return changed


def _map(value: Any, change: Any) -> Any:
    """The same, with every tensor in nested tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map(item, change) for item in value)
    return value


def _per_channel(tensor: Tensor, member: Member) -> bool:
    return tensor.dim() >= -member.axis and tensor.shape[member.axis] == member.width


def _part(tensor: Tensor, member: Member, kept: Tensor) -> Tensor:
    if not _per_channel(tensor, member):
        return tensor
    return tensor.index_select(member.axis, kept.nonzero().flatten().to(tensor.device))


def _agree(wanted: list[Tensor], got: list[Tensor]) -> bool:
    if len(wanted) != len(got):
        return False
    for a, b in zip(wanted, got, strict=True):
        if a.shape != b.shape:
            return False
        if torch.equal(a, b):
            continue
        unlike = ~torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        if int(unlike.sum()) > _FLIPS * a.numel():
            return False
    return True
