"""For plugin authors: does a plugin keep the contract of :mod:`snncompress.interfaces`?

Each check raises a PluginError that says what is broken, and returns nothing otherwise. One line makes a test::

    from snncompress.testing import check_criterion

    def test_peak():
        check_criterion(Peak())

What a check can't know is whether the mathematics is right. The global random state is left as it was.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .copying import private_copy
from .data import tensors_in
from .errors import PluginError, SNNCompressError
from .interfaces import Adapter, Criterion, EnergyModel, Layer, OperationCounts, Quantizer, Scheduler, Signal

__all__ = ["check_adapter", "check_criterion", "check_energy_model", "check_quantizer", "check_scheduler"]

_T = 4
_BITS = (1, 2, 4, 8, 16)


def check_criterion(criterion: Criterion) -> None:
    """Feeds made-up activity of convolutions and a linear layer to a criterion.

    Checked: scores are [C] and finite, also for a silent layer; they are the same when the timesteps come one by one
    and all at once, when the fold is repeated under another global seed, and when two layers are folded in turns (so
    no state sits in the instance); the tensors that the criterion is shown stay as they are; the options are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the criterion.

    Example:
        >>> from snncompress import Criterion
        >>> class Mean(Criterion):
        ...     name = "mean"
        ...     def score(self, layer, state):
        ...         return layer.weight.mean()
        >>> check_criterion(Mean())
        Traceback (most recent call last):
        snncompress.errors.PluginError: Mean: score() must return one score per output channel, [6], not []. (conv2d)
    """
    _check_name(criterion)
    _check_options(criterion)
    if criterion.granularity != "channel":
        raise _broken(criterion, f"granularity must be 'channel', not {criterion.granularity!r}.")
    if not isinstance(criterion.needs, (set, frozenset)) or not criterion.needs <= set(get_args(Signal)):
        known = ", ".join(map(repr, get_args(Signal)))
        raise _broken(criterion, f"needs must be a frozenset of {known}, not {criterion.needs!r}.")
    with torch.random.fork_rng(devices=[]):
        for kind, maps in (("conv2d", (5, 4)), ("conv1d", (5,)), ("linear", ())):
            try:
                _check_scores(criterion, _Activity.random(maps, seed=0), _Activity.random(maps, seed=1))
            except PluginError as error:
                raise PluginError(f"{error} ({kind})") from error


def _check_scores(criterion: Criterion, activity: _Activity, other: _Activity) -> None:
    before = [t.clone() for t in activity.tensors()]
    torch.manual_seed(0)
    (scores,) = _in_turns(_fold(criterion, activity, chunk=_T))
    if not all(map(torch.equal, activity.tensors(), before)):
        raise _broken(
            criterion, "it changes a tensor that it is shown in place: the network's own spikes or weights."
        )
    torch.manual_seed(1)
    (again,) = _in_turns(_fold(criterion, activity, chunk=_T))
    if not torch.equal(scores, again):
        cause = "chance that doesn't come from layer.generator, or state kept in the instance"
        raise _broken(criterion, f"the same data gave other scores the second time. Likely cause: {cause}.")
    (by_step,) = _in_turns(_fold(criterion, activity, chunk=1))
    if not torch.allclose(scores, by_step, rtol=1e-5, atol=1e-6 * float(scores.abs().max())):
        raise _broken(criterion, f"observing {_T} timesteps at once and one by one gives other scores.")
    (alone,) = _in_turns(_fold(criterion, other, chunk=1))
    together = _in_turns(_fold(criterion, activity, chunk=1), _fold(criterion, other, chunk=1))
    if not all(map(torch.equal, together, (by_step, alone))):
        raise _broken(
            criterion, "two layers folded in turns disturb each other. Keep state in `state`, not in self."
        )
    try:
        _in_turns(_fold(criterion, activity.silent(), chunk=1))
    except PluginError as error:
        raise PluginError(f"With silent neurons: {error}") from error


def check_quantizer(quantizer: Quantizer) -> None:
    """Quantizes convolution and linear weights to 1, 2, 4, 8 and 16 bits.

    Checked: the value keeps shape and dtype, is finite and lies on ``scale * (n - zero_point)``, n = 0 … 2^bits - 1,
    with at most 2^bits distinct values per scale; the gradient is finite and lets something through; an all-zero
    weight stays finite; the same weight gives the same value, also from a copy of the module; the weight is left as
    it is; the options survive JSON and rebuild an equal quantizer.

    Raises:
        PluginError: the first of these that fails, or an exception in the quantizer.

    Example:
        >>> from snncompress_rescaw import ReScaW
        >>> check_quantizer(ReScaW(gamma="max"))
    """
    _check_name(quantizer)
    options = _check_options(quantizer)
    with _calling(quantizer, f"being rebuilt from its options {options}"):
        rebuilt: Quantizer = type(quantizer)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for bits, shape in itertools.product(_BITS, ((32, 4, 3, 3), (7, 5))):
            where = f"at {bits} bits, weight {list(shape)}"
            for dtype in (torch.float32, torch.float64):
                weight = (torch.randn(shape, dtype=dtype) * 0.1).requires_grad_()
                _check_quantized(quantizer, bits, weight, f"{where}, {dtype}")
            value = _quantized(quantizer, bits, weight)[0]
            if not torch.equal(value, _quantized(rebuilt, bits, weight)[0]) or rebuilt.options() != options:
                raise _broken(
                    quantizer, f"rebuilt from its options {options} it quantizes differently {where}."
                )
            zero = torch.zeros(shape, requires_grad=True)
            if not bool(torch.isfinite(_quantized(quantizer, bits, zero)[0]).all()):
                raise _broken(quantizer, f"an all-zero weight becomes NaN or infinite {where}.")


def _check_quantized(quantizer: Quantizer, bits: int, weight: Tensor, where: str) -> None:
    before = weight.detach().clone()
    value, scale, zero_point, width = _quantized(quantizer, bits, weight)
    if value.shape != weight.shape or value.dtype != weight.dtype:
        got = f"{list(value.shape)} {value.dtype}"
        raise _broken(quantizer, f"the value must have the weight's shape and dtype, not {got}, {where}.")
    if not bool(torch.isfinite(value).all()) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise _broken(quantizer, f"values must be finite and scales finite and positive {where}.")
    if float(width) != bits:
        raise _broken(quantizer, f"the bit width it returns is {float(width)} {where}.")
    number = value.detach().double() / scale.double() + zero_point.double()
    slack = 1e-3 + 16 * torch.finfo(torch.float32).eps * 2**bits
    outside = number.min() < -slack or number.max() > 2**bits - 1 + slack
    if outside or (number - number.round()).abs().max() > slack:
        raise _broken(
            quantizer, f"values aren't on the grid scale * (n - zero_point), n = 0 … {2**bits - 1}, {where}."
        )
    scales = scale.detach().expand_as(value)
    if any(len(value[scales == s].unique()) > 2**bits for s in scale.unique()):
        raise _broken(quantizer, f"more than {2**bits} distinct values of one scale {where}.")
    with _calling(quantizer, f"the backward pass {where}"):
        (gradient,) = torch.autograd.grad((value * torch.rand_like(value)).sum(), weight, allow_unused=True)
    if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        raise _broken(
            quantizer, f"the gradient must be finite and not zero everywhere, for training, {where}."
        )
    if not torch.equal(value, _quantized(quantizer, bits, weight)[0]):
        raise _broken(quantizer, f"the same weight gives other values the second time {where}.")
    if not torch.equal(weight, before):
        raise _broken(quantizer, f"it changes the weight in place {where}.")


def check_scheduler(scheduler: Scheduler) -> None:
    """Asks a scheduler for every step of several targets and numbers of steps.

    Checked: the ratio never decreases, lies between 0 and the target, and is exactly the target at the last step; it
    depends on nothing but the arguments; ``n_steps`` is at least 1; the options are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the scheduler.

    Example:
        >>> from snncompress_schedules import Gradual
        >>> check_scheduler(Gradual(steps=4))
    """
    _check_name(scheduler)
    _check_options(scheduler)
    with _calling(scheduler, "n_steps"):
        n_steps = scheduler.n_steps
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise _broken(scheduler, f"n_steps must be a whole number of at least 1, not {n_steps!r}.")
    for target, steps in itertools.product(
        (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0), sorted({1, 2, 3, 7, n_steps})
    ):
        where = f"target {target}, {steps} steps"
        with _calling(scheduler, f"ratio() ({where})"):
            ratios = [scheduler.ratio(target, step, steps) for step in range(1, steps + 1)]
            backwards = [scheduler.ratio(target, step, steps) for step in range(steps, 0, -1)]
        if any(isinstance(r, bool) or not isinstance(r, (int, float)) or math.isnan(r) for r in ratios):
            raise _broken(scheduler, f"ratio() must return numbers, not {ratios} ({where}).")
        if ratios != backwards[::-1]:
            raise _broken(scheduler, f"ratio() must depend on its arguments alone ({where}).")
        if min(ratios) < 0 or max(ratios) > target:
            raise _broken(scheduler, f"ratio() must stay between 0 and the target: {ratios} ({where}).")
        if ratios != sorted(ratios):
            raise _broken(scheduler, f"ratio() must not decrease: {ratios} ({where}).")
        if ratios[-1] != target:
            raise _broken(
                scheduler, f"the last step must give the target exactly, not {ratios[-1]!r} ({where})."
            )


def check_energy_model(model: EnergyModel) -> None:
    """Asks an energy model for operation counts from none to 10¹².

    Checked: energies are finite numbers, never negative; no operations cost nothing and some cost something; more of
    one kind never costs less; the options are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the model.

    Example:
        >>> from snncompress_horowitz import Horowitz45nm
        >>> check_energy_model(Horowitz45nm())
    """
    _check_name(model)
    _check_options(model)
    levels = (0.0, 0.5, 1.0, 1e3, 1e12)
    energy: dict[tuple[float, ...], float] = {}
    for counts in itertools.product(levels, repeat=3):
        with _calling(model, f"energy_pj() of {counts}"):
            energy[counts] = value = model.energy_pj(OperationCounts(*counts))
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
        ):
            raise _broken(
                model, f"energy_pj() must return a finite number of at least 0, not {value!r}, for {counts}."
            )
    if energy[0.0, 0.0, 0.0] != 0:
        raise _broken(model, f"no operations must cost nothing, not {energy[0.0, 0.0, 0.0]!r} pJ.")
    if energy[1e3, 1e3, 1e3] == 0:
        raise _broken(model, "a thousand operations of every kind cost nothing.")
    for counts, (kind, name) in itertools.product(energy, enumerate(("n_ac", "n_mac", "n_neuron_updates"))):
        if counts[kind] != levels[-1]:
            more = list(counts)
            more[kind] = levels[levels.index(counts[kind]) + 1]
            if energy[tuple(more)] < energy[counts]:
                raise _broken(model, f"more {name} cost less: {tuple(more)} against {counts}.")


def check_adapter(adapter: Adapter, model: nn.Module, x: Tensor, timesteps: int | None = None) -> None:
    """Runs a model of the adapter's framework through everything that calibration and tracing do with it.

    ``x`` and ``timesteps`` are those of ``apply``; the model should fire on ``x``. It works on a copy, in eval mode.

    Checked: neurons are found, and a torch layer isn't one; a run after ``reset`` repeats bitwise, resetting twice is
    resetting once, and a reset neuron is out of the autograd graph; an observer sees the spikes that the neuron puts
    out, every timestep once, with a membrane potential that is higher where the neuron fired (before the reset, then)
    and only when asked for; observing changes no output and can be stopped; inside ``identities`` every neuron puts
    out what ``fire`` returns, for one timestep, differentiably; afterwards, also after an exception, all is as before.

    Raises:
        PluginError: the first of these that fails, or an exception in the adapter.

    Example:
        >>> import torch
        >>> from snncompress_snntorch import SNNTorchAdapter
        >>> from snntorch import Leaky
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Leaky(beta=0.9, init_hidden=True))
        >>> check_adapter(SNNTorchAdapter(), model, 5 * torch.rand(3, 4), timesteps=2)
    """
    _check_name(adapter, "framework")
    if adapter.is_neuron(nn.Linear(1, 1)) or adapter.is_neuron(nn.ReLU()):
        raise _broken(adapter, "is_neuron() takes a torch layer for a neuron.")
    if not adapter.neurons(model):
        raise _broken(adapter, f"is_neuron() finds no neuron in {type(model).__name__}.")
    with torch.random.fork_rng(devices=[]):
        with _calling(adapter, "reset()"):
            work = private_copy(model, adapter).eval()
        trial = _Trial(adapter, work, x, timesteps)
        _check_reset(trial)
        _check_observe(trial, membrane=False)
        _check_observe(trial, membrane=True)
        _check_identities(trial)


@dataclass
class _Trial:
    """A model under test, and how it is fed."""

    adapter: Adapter
    model: nn.Module
    x: Tensor
    timesteps: int | None

    def run(self, *, resets: int = 1, grad: bool = False) -> list[Tensor]:
        """Reset, run, and give all tensors of the output."""
        torch.manual_seed(0)
        with _calling(self.adapter, "reset() or run()"), torch.set_grad_enabled(grad):
            for _ in range(resets):
                self.adapter.reset(self.model)
            output = list(tensors_in(self.adapter.run(self.model, self.x, self.timesteps)))
        if not output:
            raise _broken(self.adapter, "run() must return a tensor, or tensors in a tuple, list or dict.")
        return output

    def listen(self, stack: ExitStack) -> dict[str, list[Tensor]]:
        """What each neuron puts out from now on, by name."""
        heard: dict[str, list[Tensor]] = {}
        for name, neuron in self.adapter.neurons(self.model).items():

            def hook(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                heard.setdefault(name, []).append(next(tensors_in(output)).detach().clone())

            stack.callback(neuron.register_forward_hook(hook).remove)
        return heard


def _check_reset(trial: _Trial) -> None:
    first = trial.run()
    if not _equal(first, trial.run()):
        raise _broken(
            trial.adapter, "a run after reset() doesn't repeat. Likely cause: reset() leaves state behind."
        )
    if not _equal(first, trial.run(resets=2)):
        raise _broken(trial.adapter, "reset() twice isn't reset() once.")
    trial.run(grad=True)
    trial.adapter.reset(trial.model)
    for name, neuron in trial.adapter.neurons(trial.model).items():
        try:
            copy.deepcopy(neuron)
        except RuntimeError as error:
            raise _broken(trial.adapter, f"reset() leaves {name} attached to the autograd graph.") from error


def _check_observe(trial: _Trial, *, membrane: bool) -> None:
    adapter = trial.adapter
    seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def observer(name: str) -> Callable[[Tensor, Tensor | None], None]:
        def call(spikes: Tensor, potential: Tensor | None) -> None:
            seen.setdefault(name, []).append(
                (spikes.clone(), None if potential is None else potential.clone())
            )

        return call

    plain = trial.run()
    with ExitStack() as stack:
        heard = trial.listen(stack)
        for name, neuron in adapter.neurons(trial.model).items():
            with _calling(adapter, f"observe() of {name}"):
                stack.callback(adapter.observe(neuron, observer(name), membrane=membrane))
        observed = trial.run()
    if not heard:
        raise _broken(adapter, "run() doesn't reach any neuron.")
    # With the membrane read, the framework may compute along another path: equal up to rounding.
    if not (_equal(plain, observed) or (membrane and _close(plain, observed))):
        raise _broken(adapter, f"observing changes the output (membrane={membrane}).")
    steps = {name: sum(len(spikes) for spikes, _ in shown) for name, shown in seen.items()}
    calls = sum(map(len, seen.values()))
    after = trial.run()
    if calls != sum(map(len, seen.values())):
        raise _broken(adapter, f"what observe() returns doesn't stop the observer (membrane={membrane}).")
    if not _equal(plain, after):
        raise _broken(adapter, f"after observing, the output isn't what it was (membrane={membrane}).")
    for name, outputs in heard.items():
        _check_seen(adapter, name, outputs, seen.get(name, []), membrane=membrane)
        if trial.timesteps is not None and steps[name] != trial.timesteps:
            raise _broken(adapter, f"{name}: {steps[name]} timesteps observed, not {trial.timesteps}.")


def _check_seen(
    adapter: Adapter,
    name: str,
    outputs: list[Tensor],
    shown: list[tuple[Tensor, Tensor | None]],
    *,
    membrane: bool,
) -> None:
    if not shown:
        raise _broken(adapter, f"{name} ran, but its observer wasn't called (membrane={membrane}).")
    if any(spikes.dim() < 3 for spikes, _ in shown):
        raise _broken(adapter, f"{name}: spikes must be [T', N, C, ...], not {list(shown[0][0].shape)}.")
    if not torch.equal(_flat(spikes for spikes, _ in shown), _flat(outputs)):
        raise _broken(adapter, f"{name}: the spikes observed aren't those it puts out (membrane={membrane}).")
    if not membrane:
        if any(potential is not None for _, potential in shown):
            raise _broken(adapter, f"{name}: the membrane potential wasn't asked for, and must be None.")
        return
    for spikes, potential in shown:
        if potential is None or potential.shape != spikes.shape or not bool(torch.isfinite(potential).all()):
            raise _broken(
                adapter, f"{name}: the membrane potential must be finite and have the spikes' shape."
            )
    spikes = torch.cat([s for s, _ in shown]).transpose(0, 2).flatten(1)
    potentials = torch.cat([u for _, u in shown if u is not None]).transpose(0, 2).flatten(1)
    for fired, potential in zip(spikes > 0, potentials, strict=True):
        if fired.any() and not fired.all() and potential[fired].mean() <= potential[~fired].mean():
            why = "Likely cause: it is read after the reset"
            raise _broken(
                adapter, f"{name}: the membrane potential is no higher where a channel fired. {why}."
            )


def _check_identities(trial: _Trial) -> None:
    adapter, model = trial.adapter, trial.model
    shapes: list[torch.Size] = []

    def fire(neuron: nn.Module, current: Tensor) -> Tensor:
        shapes.append(current.shape)
        return current * 0.0 + 0.5

    plain = trial.run()
    with ExitStack() as stack:
        ran = set(trial.listen(stack))
        ran_before = trial.listen(stack)
        trial.run()
        ran = set(ran_before)
    adapter.reset(model)
    before = _fingerprint(model)
    with ExitStack() as stack:
        heard = trial.listen(stack)
        with _calling(adapter, "identities()"), adapter.identities(model, fire):
            output = trial.run(grad=True)
    if set(heard) != ran or any(bool((t != 0.5).any()) for outputs in heard.values() for t in outputs):
        raise _broken(adapter, "inside identities(), a neuron puts out something else than fire() returns.")
    if trial.timesteps is not None and any(len(shape) < 2 or shape[0] != len(trial.x) for shape in shapes):
        raise _broken(
            adapter, f"fire() must get one timestep [{len(trial.x)}, C, ...], not {list(shapes[0])}."
        )
    if any(p.requires_grad for p in model.parameters()) and not any(t.requires_grad for t in output):
        raise _broken(adapter, "inside identities(), the output must be differentiable.")
    _check_restored(trial, before, plain, "after identities()")

    class Halfway(Exception):
        pass

    try:
        with adapter.identities(model, fire):
            raise Halfway
    except Halfway:
        _check_restored(trial, before, plain, "after an exception inside identities()")
    else:
        raise _broken(adapter, "identities() swallows exceptions.")


def _check_restored(trial: _Trial, before: dict[str, Any], plain: list[Tensor], when: str) -> None:
    trial.adapter.reset(trial.model)
    now = _fingerprint(trial.model)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise _broken(trial.adapter, f"{when}, {changed[0] or 'the model'} isn't as it was before.")
    if not _equal(plain, trial.run()):
        raise _broken(trial.adapter, f"{when}, the output isn't what it was before.")


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Type, mode, attributes, children and number of hooks of every module, by name."""
    return {
        name: (id(module), type(module), {k: _plain(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # parameters, buffers, children, hooks: which, not what
        return list(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value)


@dataclass
class _Activity:
    """A layer, and what its neurons did in two batches: spikes and membrane [T, N, C, ...], a weight gradient."""

    module: nn.Module
    norm: nn.Module
    batches: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def random(cls, maps: tuple[int, ...], seed: int) -> _Activity:
        torch.manual_seed(seed)
        module, norm = {
            2: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
            1: (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
            0: (nn.Linear(3, 6), nn.BatchNorm1d(6)),
        }[len(maps)]
        nn.init.uniform_(norm.weight)
        batches = []
        for samples in (3, 2):
            membrane = 2 * torch.rand(_T, samples, 6, *maps) - torch.rand(6, *maps)
            batches.append(((membrane > 0.8).float(), membrane, torch.randn_like(module.weight)))
        return cls(module, norm, batches)

    def silent(self) -> _Activity:
        """The same layer with neurons that do nothing, and no gradient to speak of."""
        return _Activity(
            self.module, self.norm, [tuple(map(torch.zeros_like, batch)) for batch in self.batches]
        )  # type: ignore[misc]

    def tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.norm.parameters(), *itertools.chain(*self.batches)]


def _fold(criterion: Criterion, activity: _Activity, chunk: int) -> Generator[None, None, Tensor]:
    """The calls that calibration makes, one per ``next``; returns the scores."""
    generator = torch.Generator().manual_seed(7)

    def layer(gradient: Tensor | None = None) -> Layer:
        weight = activity.module.weight
        neurons, norm = ("neuron",), activity.norm
        return Layer("layer", activity.module, weight.detach(), gradient, norm, neurons, generator)  # type: ignore[arg-type, operator]

    with _calling(criterion, "begin()"):
        state = criterion.begin(layer())
    yield
    for spikes, membrane, gradient in activity.batches if criterion.needs else ():
        if criterion.needs & {"spikes", "membrane"}:
            for start in range(0, _T, chunk):
                steps = slice(start, start + chunk)
                with _calling(criterion, "observe()"):
                    shown = membrane[steps] if "membrane" in criterion.needs else None
                    state = criterion.observe(layer(), state, spikes[steps], shown)
                yield
        with _calling(criterion, "end_batch()"):
            state = criterion.end_batch(layer(gradient if "gradients" in criterion.needs else None), state)
        yield
    with _calling(criterion, "score()"), torch.no_grad():
        scores = criterion.score(layer(), state)
    if not isinstance(scores, Tensor):
        raise _broken(criterion, f"score() must return a tensor, not {type(scores).__name__}.")
    if scores.shape != (6,):
        raise _broken(
            criterion, f"score() must return one score per output channel, [6], not {list(scores.shape)}."
        )
    if not bool(torch.isfinite(scores).all()):
        raise _broken(criterion, f"scores must be finite, not {scores.tolist()}.")
    return scores.detach().double()


def _in_turns(*folds: Generator[None, None, Tensor]) -> list[Tensor]:
    scores: dict[int, Tensor] = {}
    while len(scores) < len(folds):
        for number, fold in enumerate(folds):
            if number not in scores:
                try:
                    next(fold)
                except StopIteration as stop:
                    scores[number] = stop.value
    return [scores[number] for number in range(len(folds))]


def _quantized(quantizer: Quantizer, bits: int, weight: Tensor) -> tuple[Tensor, ...]:
    with _calling(quantizer, f"tensor_quant({bits})"):
        module = quantizer.tensor_quant(bits)
        if not isinstance(module, nn.Module):
            raise _broken(
                quantizer, f"tensor_quant({bits}) must return a module, not {type(module).__name__}."
            )
        result = copy.deepcopy(module)(weight)
    if not (isinstance(result, tuple) and len(result) == 4 and all(isinstance(t, Tensor) for t in result)):
        raise _broken(quantizer, "the module must return four tensors: value, scale, zero_point, bit_width.")
    return result


def _check_name(plugin: Any, attribute: str = "name") -> None:
    name = getattr(type(plugin), attribute, None)
    if not isinstance(name, str) or not name:
        raise _broken(plugin, f"{attribute!r} must be the name that users write, not {name!r}.")


def _check_options(plugin: Criterion | Quantizer | Scheduler | EnergyModel) -> dict[str, Any]:
    with _calling(plugin, "options()"):
        options = plugin.options()
        try:
            again = json.loads(json.dumps(options, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise _broken(plugin, f"its options {options!r} can't be stored as JSON: {error}") from error
    if not isinstance(options, dict) or again != options:
        raise _broken(plugin, f"its options {options!r} come back from JSON as {again!r}: use plain values.")
    return options


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.allclose(s, t, rtol=1e-4, atol=1e-5) for s, t in zip(a, b, strict=True)
    )


def _flat(tensors: Iterator[Tensor] | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _broken(plugin: object, what: str) -> PluginError:
    return PluginError(f"{type(plugin).__name__}: {what}")


@contextmanager
def _calling(plugin: object, what: str) -> Iterator[None]:
    try:
        yield
    except SNNCompressError:
        raise
    except Exception as error:
        raise _broken(plugin, f"{what} failed: {type(error).__name__}: {error}") from error
