"""check_adapter: a model goes through everything that calibration and tracing do with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.interfaces import Adapter
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in

from .common import broken, calling, check_name

_Shown = list[tuple[Tensor, "Tensor | None"]]


def check_adapter(adapter: Adapter, model: nn.Module, x: Tensor, timesteps: int | None = None) -> None:
    """Resets, runs, observes and traces a model of the adapter's framework.

    ``x`` and ``timesteps`` are those of ``apply``, and the model should fire on them. A copy of it is used,
    in eval mode.

    Checked: neurons are found, and a torch layer isn't one; a run after ``reset`` repeats bitwise, resetting
    twice is resetting once, and a reset neuron is out of the autograd graph; an observer sees the spikes that
    the neuron puts out, every timestep once, and, only when asked for, a membrane potential that is higher
    where the neuron fires (so it is read before the reset); observing changes no output and stops when told;
    inside ``identities`` every neuron puts out what ``stand_in`` returns for one timestep, differentiably, and
    afterwards, also after an exception, all is as it was before.

    Raises:
        PluginError: the first of these that fails, or an exception in the adapter.

    Example:
        >>> import torch
        >>> from snncompress_snntorch import SNNTorchAdapter
        >>> from snntorch import Leaky
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Leaky(beta=0.9, init_hidden=True))
        >>> check_adapter(SNNTorchAdapter(), model, 5 * torch.rand(3, 4), timesteps=2)
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
        with calling(adapter, "reset()"):
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
        with calling(self.adapter, "reset() or run()"), torch.set_grad_enabled(grad):
            for _ in range(resets):
                self.adapter.reset(self.model)
            output = list(tensors_in(self.adapter.run(self.model, self.x, self.timesteps)))
        if not output:
            raise broken(self.adapter, "run() must return a tensor, or tensors in a tuple, list or dict.")
        return output

    def neurons(self) -> dict[str, nn.Module]:
        return self.adapter.neurons(self.model)

    def listen(self, stack: ExitStack) -> dict[str, list[Tensor]]:
        """What each neuron puts out until the stack is left, by name."""
        heard: dict[str, list[Tensor]] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def call(module: nn.Module, args: Any, output: Any) -> None:
                heard.setdefault(name, []).append(next(tensors_in(output)).detach().clone())

            return call

        for name, neuron in self.neurons().items():
            stack.callback(neuron.register_forward_hook(hook(name)).remove)
        return heard


def _check_reset(trial: _Trial) -> None:
    first = trial.run()
    if not _equal(first, trial.run()):
        raise broken(trial.adapter, "a run after reset() doesn't repeat. Likely cause: reset() leaves state behind.")
    if not _equal(first, trial.run(resets=2)):
        raise broken(trial.adapter, "a run after reset() twice isn't the run after reset() once.")
    trial.run(grad=True)
    trial.adapter.reset(trial.model)
    for name, neuron in trial.neurons().items():
        try:
            copy.deepcopy(neuron)
        except RuntimeError as error:
            raise broken(trial.adapter, f"reset() leaves {name} in the autograd graph.") from error


def _check_observe(trial: _Trial, *, membrane: bool) -> None:
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
    if not _equal(plain, observed):
        raise broken(adapter, f"observing changes the output {asked}.")
    if calls != sum(map(len, seen.values())):
        raise broken(adapter, f"what observe() returns doesn't stop the observer {asked}.")
    if not _equal(plain, after):
        raise broken(adapter, f"after observing, the output isn't what it was before {asked}.")
    for name, outputs in heard.items():
        _check_shown(adapter, f"{name} {asked}", outputs, seen.get(name, []), membrane=membrane)
        steps = sum(len(spikes) for spikes, _ in seen[name])
        if trial.timesteps not in (None, steps):
            raise broken(adapter, f"{name} {asked}: {steps} timesteps observed, not {trial.timesteps}.")


def _check_shown(adapter: Adapter, name: str, outputs: list[Tensor], shown: _Shown, *, membrane: bool) -> None:
    if not shown:
        raise broken(adapter, f"{name}: the neuron ran, but its observer wasn't called.")
    if any(spikes.dim() < 3 for spikes, _ in shown):
        raise broken(adapter, f"{name}: spikes must be [T', N, C, ...], not {list(shown[0][0].shape)}.")
    if not torch.equal(_flat(spikes for spikes, _ in shown), _flat(outputs)):
        raise broken(adapter, f"{name}: the spikes observed aren't those that the neuron puts out.")
    potentials = [potential for _, potential in shown if potential is not None]
    if not membrane:
        if potentials:
            raise broken(adapter, f"{name}: the membrane potential wasn't asked for and must be None.")
        return
    if [u.shape for u in potentials] != [s.shape for s, _ in shown] or not _flat(potentials).isfinite().all():
        raise broken(adapter, f"{name}: the membrane potential must be finite and have the spikes' shape.")
    by_channel = zip(_channels(s for s, _ in shown) > 0, _channels(potentials), strict=True)
    for fired, potential in by_channel:
        if fired.any() and not fired.all() and potential[fired].mean() <= potential[~fired].mean():
            cause = "Likely cause: it is read after the reset"
            raise broken(adapter, f"{name}: the membrane potential isn't higher where a channel fires. {cause}.")


def _check_identities(trial: _Trial) -> None:
    adapter, model = trial.adapter, trial.model
    shapes: list[list[int]] = []

    def stand_in(neuron: nn.Module, current: Tensor) -> Tensor:
        shapes.append(list(current.shape))
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
    if set(heard) != set(ran) or bool((_flat(t for ts in heard.values() for t in ts) != 0.5).any()):
        raise broken(adapter, "inside identities(), a neuron puts out something else than stand_in() returns.")
    if trial.timesteps is not None and any(len(s) < 2 or s[0] != len(trial.x) for s in shapes):
        raise broken(adapter, f"stand_in() must get one timestep, [{len(trial.x)}, C, ...], not {shapes[0]}.")
    if any(p.requires_grad for p in model.parameters()) and not any(t.requires_grad for t in output):
        raise broken(adapter, "inside identities(), the output must be differentiable.")
    _check_restored(trial, before, plain, "after identities()")
    _check_passes_on(adapter, model, stand_in)
    _check_restored(trial, before, plain, "after an exception inside identities()")


def _check_passes_on(adapter: Adapter, model: nn.Module, stand_in: Callable[[nn.Module, Tensor], Tensor]) -> None:
    try:
        with adapter.identities(model, stand_in):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return
    raise broken(adapter, "identities() swallows exceptions.")


def _check_restored(trial: _Trial, before: dict[str, Any], plain: list[Tensor], when: str) -> None:
    trial.adapter.reset(trial.model)
    now = _fingerprint(trial.model)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise broken(trial.adapter, f"{when}, {changed[0] or 'the model'} isn't as it was before.")
    if not _equal(plain, trial.run()):
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


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _channels(steps: Iterable[Tensor]) -> Tensor:
    """Pieces [T', N, C, ...] → [C, everything else]."""
    return torch.cat(list(steps)).transpose(0, 2).flatten(1)
