"""What an adapter may offer beyond what it must: books, conversion, export, states, equations, inference, grids."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from snncompress.interfaces import Dynamics, Observer
from snncompress.model.fixed_point import FixedPoint
from snncompress.model.modules import tensors_in
from snncompress.model.spikes import Emitted, EmittedBytes, in_float

from .common import broken, calling
from .trials import Trial, check_passes_on, equal, in_order, nearly

_STEPS = 8
_NEAR = 1e-4
"""How far from the threshold rounding may decide."""


def check_books(trial: Trial) -> None:
    """``alone`` changes nothing and passes exceptions on; ``adopt`` takes a finished copy."""
    adapter, model = trial.adapter, trial.model
    plain = trial.run()
    with calling(adapter, "alone()"), adapter.alone(model):
        inside = trial.run()
    if not equal(plain, inside) or not equal(plain, trial.run()):
        raise broken(adapter, "alone() changes the output.")
    check_passes_on(adapter, lambda: adapter.alone(model), "alone()")
    finished = trial.copy()
    with calling(adapter, "adopt()"), adapter.alone(finished):  # else the books would keep it
        adapter.adopt(finished)
        adopted = trial.run(model=finished)
    if not equal(plain, adopted):
        raise broken(adapter, "adopt() changes the output.")
    if adapter.offers()["books"]:
        trial.checked["books"] = None
    else:
        trial.missing.append(f"books: right, if {adapter.framework} keeps no list of its modules")


def check_conversion(trial: Trial) -> None:
    """``make_neuron`` makes the two neurons that it is asked for."""
    with trial.optional("conversion"):
        _check_made(trial, "lif", 0.5, (1.0, 0.5), 0.0)
        _check_made(trial, "if", 0.0, (1.0,), None)


def _check_made(
    trial: Trial, kind: Literal["lif", "if"], leak: float, gains: tuple[float, ...], reset: float | None
) -> None:
    adapter, what = trial.adapter, f"make_neuron({kind!r})"
    neuron = adapter.make_neuron(kind)
    if not isinstance(neuron, nn.Module) or not adapter.is_neuron(neuron):
        raise broken(adapter, f"{what} makes a {type(neuron).__name__}, which isn't a neuron to is_neuron().")
    x = torch.rand(3, 4, requires_grad=True)
    spikes = neuron(x)
    if not isinstance(spikes, Tensor) or (spikes.shape, spikes.dtype) != (x.shape, x.dtype):
        raise broken(adapter, f"{what} must put out spikes of its input's shape and dtype.")
    if not spikes.requires_grad:
        raise broken(adapter, f"{what} has no surrogate gradient.")
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (leak, 1.0)]
    equations = [
        Dynamics(numbers[0], torch.tensor(gain, dtype=torch.float64), numbers[1], 0.0, reset, True) for gain in gains
    ]
    currents = torch.empty(8, 64)
    if not any(_follows(trial, neuron, equation, currents, membrane=True) for equation in equations):
        raise broken(
            adapter,
            f"{what} isn't what was asked for: threshold 1, {'τ = 2, reset to 0' if leak else 'no leak, reset by 1'}.",
        )


def check_export(trial: Trial) -> None:
    """``make_traceable`` leaves the spikes as they were, and so does ``single_step``, step by step."""
    adapter = trial.adapter
    with trial.optional("export"):
        traceable = trial.copy()
        adapter.make_traceable(traceable)
        heard = []
        for model in (trial.model, traceable):
            with ExitStack() as stack:
                spikes = trial.listen(stack, model)
                trial.run(model=model)
                heard.append(spikes)
        if not all(nearly(spikes, heard[1].get(name, [])) for name, spikes in heard[0].items()):
            raise broken(adapter, "make_traceable() changes the spikes.")

        with ExitStack() as stack:
            whole = _spikes(trial, stack, trial.model)
            trial.run()
        step = trial.copy()
        x = adapter.single_step(step, trial.x, trial.timesteps)
        with ExitStack() as stack, torch.no_grad():
            single = _spikes(trial, stack, step)
            adapter.reset(step)
            torch.manual_seed(0)
            for _ in range(trial.timesteps or 1):
                step(x)
        for name, seen in whole.items():
            if not nearly([_total(trial, seen)], [_total(trial, single.get(name, []))]):
                raise broken(
                    adapter,
                    f"after single_step(), {name} spikes differently when the model is called step by step. Likely "
                    f"cause: the model loops over time itself, which must raise a ModelError.",
                )


def _spikes(trial: Trial, stack: ExitStack, model: nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}

    def observer(name: str) -> Observer:
        return lambda spikes, _: seen.setdefault(name, []).append(spikes.clone())

    for name, neuron in trial.neurons(model).items():
        stack.callback(trial.adapter.observe(neuron, observer(name), membrane=False))
    return seen


def _total(trial: Trial, pieces: list[Tensor]) -> Tensor:
    """Spikes per neuron over all timesteps; in the first one where the later inputs aren't known."""
    steps = torch.cat(pieces) if pieces else torch.zeros(1)
    return steps.sum(0) if trial.timesteps is not None else steps[0]


def check_states(trial: Trial) -> None:
    """``states`` is all that a neuron remembers, and ``set_states`` puts it back."""
    adapter, model = trial.adapter, trial.copy()
    neurons = adapter.stateful(model)
    for name, call in trial.calls().items():
        if name not in neurons:
            raise broken(adapter, f"stateful() leaves out the neuron {name}.")
        neuron = neurons[name]
        with trial.optional("states", (name, neuron)):
            fresh = _states(trial, name, neuron)
            trial.call(neuron, call, "that was reset")
            following = trial.call(neuron, call, "that ran before")

            adapter.reset(model)
            trial.call(neuron, call, "that was reset")
            adapter.set_states(neuron, adapter.states(neuron))
            kept = _states(trial, name, neuron)
            if not equal(following, trial.call(neuron, call, "after set_states()")):
                raise broken(adapter, f"set_states(states()) changes what {name} does next.")
            adapter.reset(model)
            now = _states(trial, name, neuron)
            if list(now) != list(fresh) or not equal(list(now.values()), list(fresh.values())):
                raise broken(adapter, f"after reset(), states() of {name} aren't those of a fresh neuron.")
            if odd := [key for key, state in fresh.items() if state.dim()]:
                raise broken(adapter, f"before the first step, {odd[0]!r} of {name} must have the shape [].")
            adapter.set_states(neuron, kept)
            if not equal(following, trial.call(neuron, call, "after set_states()")):
                raise broken(adapter, f"states() doesn't hold all that {name} remembers.")
        adapter.reset(model)


def _states(trial: Trial, name: str, neuron: nn.Module) -> dict[str, Tensor]:
    states = trial.adapter.states(neuron)
    if not isinstance(states, dict) or not all(isinstance(state, Tensor) for state in states.values()):
        raise broken(trial.adapter, f"states() of {name} must return tensors by name.")
    return {key: state.detach().clone() for key, state in states.items()}


def check_equations(trial: Trial) -> None:
    """``dynamics`` predicts a neuron's spikes on random currents."""
    adapter, model = trial.adapter, trial.copy()
    calls = trial.calls()
    for name, neuron in trial.neurons(model).items():
        if name not in calls:
            continue
        with trial.optional("equations", (name, neuron)):
            equation = adapter.dynamics(neuron)
            if not isinstance(equation, Dynamics):
                raise broken(adapter, f"dynamics() must return a Dynamics, not a {type(equation).__name__}.")
            current = next(tensors_in([calls[name].args, calls[name].named]))
            if not _follows(trial, neuron, equation, current):
                raise broken(adapter, f"dynamics() of {name} predicts other spikes than the neuron's.")
        adapter.reset(model)


def check_inference(trial: Trial) -> None:
    """``make_fast`` leaves what a neuron puts out and remembers as it was, as floats and as bytes."""
    adapter, model = trial.adapter, trial.copy()
    calls, neurons = trial.calls(), trial.neurons(model)
    for name, call in calls.items():
        if name not in neurons:
            continue
        neuron = neurons[name]
        with trial.optional("inference", (name, neuron)):
            wanted = [t for _ in range(2) for t in trial.call(neuron, call, "as it was")]
            for emitted in (Emitted, EmittedBytes):
                adapter.make_fast(neuron, emitted)
                adapter.reset(model)
                made = [t for _ in range(2) for t in trial.call(neuron, call, "after make_fast()")]
                if not nearly([in_float(t) for t in made], wanted):
                    raise broken(adapter, f"make_fast() changes what {name} puts out.")
        adapter.reset(model)


def check_fixed_point(trial: Trial) -> None:
    """On a grid that is fine enough ``step_on`` changes nothing; on a coarse one, all that is remembered lies on it."""
    adapter = trial.adapter
    for name, call in trial.calls().items():
        model = trial.copy()
        if name not in (neurons := trial.neurons(model)):
            continue
        neuron = neurons[name]
        with trial.optional("fixed point", (name, neuron)):
            wanted = [t for _ in range(2) for t in trial.call(neuron, call, "as it was")]
            for step, bits in ((2.0**-20, 32), (0.25, 8)):
                adapter.step_on(neuron, FixedPoint(torch.tensor(step), bits))
                adapter.reset(model)
                made = [t for _ in range(2) for t in trial.call(neuron, call, "after step_on()")]
                if bits == 32 and not nearly(made, wanted):
                    raise broken(adapter, f"step_on() changes what {name} puts out, on a fine grid.")
            off = [k for k, v in _states(trial, name, neuron).items() if not torch.equal(v, (v * 4).round() / 4)]
            if off:
                raise broken(adapter, f"after step_on(), {off[0]!r} of {name} isn't on the grid.")
        adapter.reset(model)


def _follows(trial: Trial, neuron: nn.Module, d: Dynamics, like: Tensor, *, membrane: bool = False) -> bool:
    """Whether the equation predicts the spikes, with ``membrane`` also Ũ, on random currents of such a shape."""
    currents, spikes, potentials = _driven(trial, neuron, d, like)
    leak, gain, threshold = (t.to(currents) for t in (d.leak, d.gain, d.threshold))
    start = 0.0 if d.reset is None else d.reset
    v = torch.full_like(currents[0], start)
    near = max(_NEAR, 64 * torch.finfo(like.dtype).eps)
    current, last = torch.zeros_like(currents[0]), torch.zeros_like(currents[0])
    for x, fired, seen in zip(currents, spikes, potentials, strict=True):
        current = x + _handed_on(d.recurrent, last) + (0.0 if d.synapse is None else d.synapse.to(x) * current)
        v = v + leak * (d.rest - v) + gain * current
        if d.reset is None and d.late:
            v = v - threshold * (last != 0)
        predicted = v >= threshold if d.inclusive else v > threshold
        doubtful = (v - threshold).abs() <= near
        if bool(((predicted.to(fired) != fired) & ~doubtful).any()):
            return False
        if membrane and not torch.allclose(seen, v, rtol=near, atol=near):
            return False
        last = fired
        if d.reset is not None:
            v = torch.where(fired != 0, torch.full_like(v, d.reset), v)
        elif not d.late:
            v = torch.where(fired != 0, v - threshold, v)
    return True


def _handed_on(recurrent: nn.Module | Tensor | None, spikes: Tensor) -> Tensor | float:
    if recurrent is None:
        return 0.0
    if isinstance(recurrent, Tensor):
        return recurrent.detach().to(spikes) * spikes
    with torch.no_grad():
        made: Tensor = copy.deepcopy(recurrent).to(spikes)(spikes)
    return made


def _driven(trial: Trial, neuron: nn.Module, d: Dynamics, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Currents, spikes and Ũ, each [T, N, C, ...] in float64, of a neuron that gets random currents from reset on."""
    adapter = trial.adapter
    scale = float((d.threshold - d.rest).abs().mean().clamp(min=0.1) / d.gain.abs().mean().clamp(min=1e-3))
    seen: list[tuple[Tensor, Tensor]] = []

    def observer(spikes: Tensor, potential: Tensor | None) -> None:
        seen.append((spikes.double(), spikes.double() if potential is None else potential.double()))

    rows: list[tuple[Tensor, ...]] = []
    adapter.reset(neuron)
    torch.manual_seed(0)
    stop = adapter.observe(neuron, observer, membrane=True)
    try:
        while sum(len(row[0]) for row in rows) < _STEPS:
            seen.clear()
            x = (torch.rand(like.shape, dtype=like.dtype) * 3.5 - 0.5).to(like.device) * scale
            with torch.no_grad():
                output = next(tensors_in(neuron(x)))
            spikes, potential = (torch.cat(parts) for parts in zip(*seen, strict=True))
            time_first = in_order(spikes, [output.double()])
            if time_first is None or x.numel() != spikes.numel():
                raise broken(adapter, "the spikes observed aren't those that the neuron puts out.")
            swapped = spikes if time_first else spikes.transpose(0, 1)
            current = x.double().reshape(swapped.shape)
            rows.append((current if time_first else current.transpose(0, 1), spikes, potential))
    finally:
        stop()
    currents, spikes, potential = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return currents, spikes, potential
