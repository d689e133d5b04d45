"""check_adapter: a model goes through everything that calibration and tracing do with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter, Memory
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in

from .common import broken, calling, check_name
from .offers import (
    check_books,
    check_conversion,
    check_equations,
    check_export,
    check_fixed_point,
    check_inference,
    check_states,
)
from .trials import AdapterReport, Call, Trial, check_passes_on, equal, flat, in_order, mapped, nearly

_Shown = list[tuple[Tensor, "Tensor | None"]]


def check_adapter(adapter: Adapter, model: nn.Module, x: Tensor, timesteps: int | None = None) -> AdapterReport:
    """Resets, runs, observes, traces and shrinks a model of the adapter's framework; tries what else it offers.

    ``x`` and ``timesteps`` are those of ``apply``, and the model should fire on them. Take another number of samples
    than of timesteps, so that the two axes can be told apart. A copy of the model is used, in eval mode.

    Checked: neurons are found, and a torch layer isn't one; a run after ``reset`` repeats bitwise, resetting
    twice is resetting once, a reset neuron is out of the autograd graph, and the library's own memories are reset too;
    an observer sees the spikes that the neuron puts out (with time first, or samples first), every timestep once, and,
    only when asked for, a membrane potential that is higher where the neuron fires (so it is read before the reset);
    observing changes no output and stops when told; inside ``identities`` every neuron puts out what ``stand_in``
    returns for one timestep, differentiably, and afterwards, also after an exception, all is as it was before; a neuron
    that lost channels runs on the narrower input.

    Then the optional parts (``Adapter.OPTIONAL``): "books" change nothing and pass exceptions on; "conversion" makes
    the two neurons that it is asked for; "export" leaves the spikes as they were; "states" are all that a neuron
    remembers; "equations" predict its spikes on random currents; "inference" leaves
    them as they were; in "fixed point" all that is remembered lies on the grid, and a fine grid changes nothing.

    Returns:
        What was checked, and what is missing: a part that the adapter doesn't offer, or not for a neuron of this model,
        which it says by a ModelError.

    Raises:
        PluginError: the first of these that fails, or another exception in the adapter.

    Example:
        >>> import torch
        >>> from snncompress_snntorch import SNNTorchAdapter
        >>> from snntorch import Leaky
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Leaky(0.9, init_hidden=True, reset_mechanism="zero"))
        >>> report = check_adapter(SNNTorchAdapter(), model, 5 * torch.rand(3, 4), timesteps=2)
        >>> report.missing
        ()
    """
    check_name(adapter, "framework")
    with calling(adapter, "is_neuron()"):
        layers = [layer for layer in (nn.Linear(1, 1, device="meta"), nn.ReLU()) if adapter.is_neuron(layer)]
        neurons = adapter.neurons(model)
    if layers:
        raise broken(adapter, f"is_neuron() takes torch's {type(layers[0]).__name__} for a neuron.")
    if not neurons:
        raise broken(adapter, f"is_neuron() finds no neuron in {type(model).__name__}.")
    with torch.random.fork_rng(devices=[]):
        with calling(adapter, "copying the model, or reset()"):
            work = private_copy(model, adapter).eval()
        trial = Trial(adapter, work, x, timesteps)
        for required in ("is_neuron", "run"):
            trial.checked[required] = None
        _check_reset(trial)
        _check_observe(trial, membrane=False)
        _check_observe(trial, membrane=True)
        _check_identities(trial)
        _check_remove_channels(trial)
        checks = check_books, check_conversion, check_export, check_states, check_equations, check_inference
        for check in (*checks, check_fixed_point):
            check(trial)
    return trial.report


def _check_reset(trial: Trial) -> None:
    first = trial.run()
    if not equal(first, trial.run()):
        raise broken(trial.adapter, "a run after reset() doesn't repeat. Likely cause: reset() leaves state behind.")
    if not equal(first, trial.run(resets=2)):
        raise broken(trial.adapter, "a run after reset() twice isn't the run after reset() once.")
    trial.run(grad=True)
    trial.adapter.reset(trial.model)
    for name, neuron in trial.neurons().items():
        try:
            copy.deepcopy(neuron)
        except RuntimeError as error:
            raise broken(trial.adapter, f"reset() leaves {name} in the autograd graph.") from error
    _check_memories(trial)
    trial.checked["reset"] = None


def _check_observe(trial: Trial, *, membrane: bool) -> None:
    adapter, asked = trial.adapter, f"(membrane={membrane})"
    seen: dict[str, _Shown] = {}

    def observer(name: str) -> Callable[[Tensor, Tensor | None], None]:
        def call(spikes: Tensor, potential: Tensor | None) -> None:
            copied = None if potential is None else potential.clone()
            seen.setdefault(name, []).append((spikes.clone(), copied))

        return call

    plain = trial.run()
    with ExitStack() as stack:
        heard = trial.listen(stack)
        for name, neuron in trial.neurons().items():
            with calling(adapter, f"observe() of {name}"):
                stack.callback(adapter.observe(neuron, observer(name), membrane=membrane))
        observed = trial.run()
    calls = sum(map(len, seen.values()))
    after = trial.run()

    if not heard:
        raise broken(adapter, "run() reaches no neuron.")
    if not equal(plain, observed):
        raise broken(adapter, f"observing changes the output {asked}.")
    if calls != sum(map(len, seen.values())):
        raise broken(adapter, f"what observe() returns doesn't stop the observer {asked}.")
    if not equal(plain, after):
        raise broken(adapter, f"after observing, the output isn't what it was before {asked}.")
    for name, outputs in heard.items():
        _check_shown(adapter, f"{name} {asked}", outputs, seen.get(name, []), membrane=membrane)
        steps = sum(len(spikes) for spikes, _ in seen[name])
        if trial.timesteps not in (None, steps):
            raise broken(adapter, f"{name} {asked}: {steps} timesteps observed, not {trial.timesteps}.")
    if not membrane:
        _note_gradients(trial)
    trial.checked["observe"] = None


def _note_gradients(trial: Trial) -> None:
    """What a neuron puts out has a gradient: has what its observer gets?"""
    put_out: set[str] = set()
    shown: set[str] = set()

    def note(found: set[str], name: str, spikes: Tensor) -> None:
        if spikes.requires_grad:
            found.add(name)

    with ExitStack() as stack:
        for name, neuron in trial.neurons().items():
            hook = partial(lambda name, module, args, output: note(put_out, name, next(tensors_in(output))), name)
            stack.callback(neuron.register_forward_hook(hook).remove)
            look = partial(lambda name, spikes, _: note(shown, name, spikes), name)
            stack.callback(trial.adapter.observe(neuron, look, membrane=False))
        with trial.adapter.differentiable(trial.model):
            trial.run(grad=True)
    trial.adapter.reset(trial.model)
    for name in sorted(put_out - shown):
        trial.missing.append(f"gradients of {name}: observe() detaches its spikes, so training can't lower its rate")


def _check_shown(adapter: Adapter, name: str, outputs: list[Tensor], shown: _Shown, *, membrane: bool) -> None:
    if not shown:
        raise broken(adapter, f"{name}: the neuron ran, but its observer wasn't called.")
    if any(spikes.dim() < 3 for spikes, _ in shown):
        raise broken(adapter, f"{name}: spikes must be [T', N, C, ...], not {list(shown[0][0].shape)}.")
    if not _same_spikes([spikes for spikes, _ in shown], outputs):
        raise broken(adapter, f"{name}: the spikes observed aren't those that the neuron puts out.")
    potentials = [potential for _, potential in shown if potential is not None]
    if not membrane:
        if potentials:
            raise broken(adapter, f"{name}: the membrane potential wasn't asked for and must be None.")
        return
    if [u.shape for u in potentials] != [s.shape for s, _ in shown] or not flat(potentials).isfinite().all():
        raise broken(adapter, f"{name}: the membrane potential must be finite and have the spikes' shape.")
    by_channel = zip(_channels(s for s, _ in shown) > 0, _channels(potentials), strict=True)
    for fired, potential in by_channel:
        if fired.any() and not fired.all() and potential[fired].mean() <= potential[~fired].mean():
            cause = "Likely cause: it is read after the reset"
            raise broken(adapter, f"{name}: the membrane potential isn't higher where a channel fires. {cause}.")


def _same_spikes(pieces: list[Tensor], outputs: list[Tensor]) -> bool:
    if len({piece.shape[1:] for piece in pieces}) > 1:  # a neuron that is used at several places
        return torch.equal(flat(pieces), flat(outputs))
    return in_order(torch.cat(pieces), outputs) is not None


def _check_identities(trial: Trial) -> None:
    adapter, model = trial.adapter, trial.model
    names = {neuron: name for name, neuron in trial.neurons().items()}
    shapes: list[list[int]] = []

    def stand_in(neuron: nn.Module, current: Tensor) -> Tensor:
        shapes.append(list(current.shape))
        trial.currents.setdefault(names[neuron], current.shape)
        return current * 0.0 + 0.5

    with ExitStack() as stack:
        ran = trial.listen(stack)
        plain = trial.run()
    adapter.reset(model)
    before = _fingerprint(model)
    with ExitStack() as stack:
        heard = trial.listen(stack)
        with calling(adapter, "identities()"), adapter.identities(model, stand_in):
            output = trial.run(grad=True)
    if set(heard) != set(ran) or bool((flat(t for ts in heard.values() for t in ts) != 0.5).any()):
        raise broken(adapter, "inside identities(), a neuron puts out something else than stand_in() returns.")
    if trial.timesteps is not None and any(len(s) < 2 or s[0] != len(trial.x) for s in shapes):
        raise broken(adapter, f"stand_in() must get one timestep, [{len(trial.x)}, C, ...], not {shapes[0]}.")
    if any(p.requires_grad for p in model.parameters()) and not any(t.requires_grad for t in output):
        raise broken(adapter, "inside identities(), the output must be differentiable.")
    _check_restored(trial, before, plain, "after identities()")
    check_passes_on(adapter, lambda: adapter.identities(model, stand_in), "identities()")
    _check_restored(trial, before, plain, "after an exception inside identities()")
    trial.checked["identities"] = None


class _Note(nn.Identity, Memory):
    """Remembers whether it was reset."""

    forgot = False

    def reset(self) -> None:
        self.forgot = True


def _check_memories(trial: Trial) -> None:
    model, note = trial.copy(), _Note()
    model.add_module("snncompress_note", note)
    with calling(trial.adapter, "reset()"):
        trial.adapter.reset(model)
    if not note.forgot:
        raise broken(
            trial.adapter,
            "reset() leaves the library's own memories as they are, such as RateMaxPool's. Call "
            "self.reset_memories(model) in it.",
        )


def _check_remove_channels(trial: Trial) -> None:
    adapter, calls, model = trial.adapter, trial.calls(), trial.copy()
    neurons = trial.neurons(model)
    for name, shape in trial.currents.items():
        neuron = neurons[name]
        if len(shape) < 2 or shape[1] < 2:
            trial.missing.append(f"remove_channels of {name} ({type(neuron).__name__}): it has a single channel")
            continue
        width, axis = shape[1], 1 - len(shape)

        def kept(tensor: Tensor, width: int = width, axis: int = axis) -> Tensor:
            fits = tensor.dim() >= -axis and tensor.shape[axis] == width
            return tensor.movedim(axis, 0)[::2].movedim(0, axis).contiguous() if fits else tensor

        call = calls[name]
        whole = [kept(tensor) for tensor in trial.call(neuron, call, "that was reset")]
        adapter.reset(model)
        with trial.optional("remove_channels", (name, neuron)):
            adapter.remove_channels(neuron, list(range(1, width, 2)), width=width, axis=axis)
            adapter.reset(model)
            narrow = Call(mapped(kept, call.args), mapped(kept, call.named))
            left = trial.call(neuron, narrow, f"after remove_channels(), on {len(range(0, width, 2))} channels,")
            if [t.shape for t in left] != [t.shape for t in whole]:
                raise broken(adapter, f"after remove_channels(), {name} puts out {list(left[0].shape)}.")
            alone = not any(True for child in neuron.children() for _ in child.parameters())
            if alone and not nearly(left, whole):
                raise broken(adapter, f"after remove_channels(), the channels left of {name} put out something else.")


def _check_restored(trial: Trial, before: dict[str, Any], plain: list[Tensor], when: str) -> None:
    trial.adapter.reset(trial.model)
    now = _fingerprint(trial.model)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise broken(trial.adapter, f"{when}, {changed[0] or 'the model'} isn't as it was before.")
    if not equal(plain, trial.run()):
        raise broken(trial.adapter, f"{when}, the output isn't what it was before.")


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Identity, type and attributes of every module, by name."""
    return {
        name: (id(module), type(module), {k: _plain(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # parameters, buffers, children, hooks: which ones
        return list(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value)


def _channels(steps: Iterable[Tensor]) -> Tensor:
    """Pieces [T', N, C, ...] → [C, everything else]."""
    return torch.cat(list(steps)).transpose(0, 2).flatten(1)
