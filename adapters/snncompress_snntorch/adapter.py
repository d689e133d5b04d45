"""What snncompress must know of snnTorch ≥ 1.0: neurons, hidden states, recurrent weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snncompress.extend import (
    Adapter,
    Dynamics,
    Emission,
    ModelError,
    Observer,
    StandIn,
    StateGrid,
    all_steps,
    first_step,
    patched,
    remove_along,
    remove_from_layer,
    stacked,
    through,
    without,
)

from . import equations, stepping

_STATES = {"mem", "syn", "spk", "syn_exc", "syn_inh"}


class SNNTorchAdapter(Adapter):
    """Models whose neurons derive from snnTorch's SpikingNeuron.

    Where every neuron keeps its own state (``init_hidden=True``), the time loop is outside the model: ``timesteps`` =
    T calls it T times and stacks the outputs. Else the model loops itself: ``timesteps`` = T hands it [T, N, ...].
    """

    framework = "snntorch"

    def is_neuron(self, module: nn.Module) -> bool:
        """SpikingNeuron in the class's ancestry, or LeakyParallel; but for those of all timesteps that put out Ũ."""
        if _derives(module, "SpikingNeuron"):
            return not _derives(module, "StateLeaky") or bool(module.output)
        return _derives(module, "LeakyParallel")

    def reset(self, model: nn.Module) -> None:
        """States back to the empty tensors that a new neuron has; they take the next input's shape."""
        for neuron in self.neurons(model).values():
            if _derives(neuron, "DeltaLeaky"):
                vars(neuron).update(mem_prev=None)
                neuron._buffers["mem"] = None
            for name in _STATES & {*neuron._non_persistent_buffers_set, *vars(neuron)}:
                state = getattr(neuron, name)
                if isinstance(state, Tensor):
                    setattr(neuron, name, state.detach().new_zeros(0))
            vars(neuron).pop("reset", None)  # the reset signal of the last step
            _keep_diagonal(neuron)
        self.reset_memories(model)

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """Loops over T where the neurons keep their state, else leaves the loop to the model."""
        if timesteps is None:
            return model(x)
        if all(getattr(n, "init_hidden", False) for n in self.neurons(model).values()):
            return stacked([model(x.clone()) for _ in range(timesteps)])
        return model(x.unsqueeze(0).repeat(timesteps, *[1] * x.dim()))

    @contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        """Each neuron runs for the form of what it returns; all of it is replaced by ``stand_in``'s output.

        One that holds layers, as SLSTM does, computes as it does, firing by a wire. What LeakyParallel's layer puts out
        is a current that goes into its neurons.
        """
        with ExitStack() as stack:
            for neuron in self.neurons(model).values():
                if _decays(neuron) is not None:
                    stack.enter_context(patched(neuron, "forward", _parallel(neuron, stand_in)))
                elif _layers(neuron):
                    stack.enter_context(patched(neuron, "spike_grad", _wire))
                    stack.enter_context(patched(neuron, "forward", through(neuron.forward)))
                else:
                    stack.enter_context(patched(neuron, "forward", _firing(neuron, neuron.forward, stand_in)))
            yield
        self.reset(model)

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Spikes from a forward hook; Ũ by standing in for ``fire``, which is called with Ũ once per step.

        DeltaLeaky returns Ũ, and LeakyParallel fires where Ũ - θ > 0.
        """
        delta = _derives(neuron, "DeltaLeaky")
        if not membrane or delta:

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                spikes = output[0] if isinstance(output, tuple) else output
                if membrane:
                    observer(_timed(neuron, spikes.detach()), _timed(neuron, output[1][0].detach()))
                else:
                    observer(_timed(neuron, spikes), None)

            return neuron.register_forward_hook(hook).remove

        def tapped(fire: Any, offset: Any = 0) -> Callable[..., Tensor]:
            def call(*args: Any) -> Tensor:
                spikes: Tensor = fire(*args)
                observer(_timed(neuron, spikes.detach()), _timed(neuron, args[-1].detach()) + offset)
                return spikes

            return call

        taps = ExitStack()
        if _derives(neuron, "LeakyParallel"):
            fire = tapped(neuron.spike_grad, cast(Tensor, neuron.threshold).detach())
            taps.enter_context(patched(neuron, "spike_grad", fire))
        else:
            for name in ("fire", "fire_inhibition"):
                taps.enter_context(patched(neuron, name, tapped(getattr(neuron, name))))
        return taps.close

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """β, α, threshold, V along the channel axis; all-to-all recurrent weights on both sides.

        Of a LeakyParallel all but the weight of its input, which is a layer.
        """
        if _derives(neuron, "LeakyParallel"):  # whatever its decays are: on a blank network a plan is replayed
            _remove_units(neuron, indices)
            remove_along(neuron, indices, width=width, axis=axis)
            return
        if _layers(neuron):
            raise ModelError(f"{type(neuron).__name__} holds layers of its own, so its channels stay.")
        if neuron.inhibition:
            raise ModelError("inhibition lets only the strongest neuron fire, so its channels depend on one another")
        recurrent = getattr(neuron, "recurrent", None)
        remove_along(neuron, indices, width=width, axis=axis)
        if recurrent is None:
            return
        if not isinstance(recurrent, (nn.Linear, nn.Conv2d)):  # one-to-one: shares the neuron's V
            recurrent.V = neuron.V
            return
        remove_from_layer(recurrent, "out", indices)
        remove_from_layer(recurrent, "in", indices)
        if isinstance(recurrent, nn.Linear):
            vars(neuron)["linear_features"] = recurrent.out_features
        else:
            vars(neuron)["conv2d_channels"] = recurrent.out_channels

    def make_neuron(self, kind: Literal["lif", "if"]) -> nn.Module:
        """Leaky with hidden state: β = 1 - 1/τ = 0.5, or 1. Its input comes in whole, not divided by τ."""
        try:
            from snntorch import Leaky, surrogate
        except ImportError as error:
            raise ModelError(f"snnTorch can't be imported ({error}): pip install 'snntorch>=1.0'.") from error
        beta, reset = (0.5, "zero") if kind == "lif" else (1.0, "subtract")
        made: nn.Module = Leaky(
            beta=beta, threshold=1.0, reset_mechanism=reset, spike_grad=surrogate.atan(), init_hidden=True
        )
        return made

    def make_traceable(self, model: nn.Module) -> None:
        """Ũ - θ > 0, as the surrogate functions have it; the kind of reset, which is asked for, as a plain number."""
        neuron: Any
        for neuron in self.neurons(model).values():
            if _all_steps(neuron):
                raise ModelError(
                    f"{type(neuron).__name__} needs all timesteps at once, so it can't be exported as one."
                )
            if not hasattr(neuron, "state_grid"):
                vars(neuron).pop("forward", None)  # a fast one
            neuron.spike_grad = stepping.above_zero
            vars(neuron)["reset_mechanism_val"] = int(neuron._buffers.pop("reset_mechanism_val"))

    def single_step(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Tensor:
        """A model whose neurons keep their state is called step by step anyway; others loop over time themselves."""
        for name, neuron in self.neurons(model).items():
            if not getattr(neuron, "init_hidden", False):
                raise ModelError(
                    f"{name} ({type(neuron).__name__}) gets its state from {type(model).__name__}.forward, which loops "
                    f"over time itself, so there is no single timestep to export. Build the neurons with "
                    f"init_hidden=True and loop outside the model."
                )
        return x

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        """The hidden states; empty tensors mean zeros."""
        names = sorted(_STATES & neuron._non_persistent_buffers_set)
        states = {name: getattr(neuron, name) for name in names}
        if any(state is None for state in states.values()):
            raise ModelError(f"{type(neuron).__name__} remembers more than its membrane potential")
        return {name: state if state.numel() else state.new_zeros(()) for name, state in states.items()}

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        """As buffers."""
        for name, state in states.items():
            setattr(neuron, name, state)

    def leak(self, neuron: nn.Module) -> Tensor:
        """1 - β of Leaky, RLeaky and Lapicque, however they are reset."""
        return equations.leak(neuron)

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        """Of Leaky, RLeaky, Lapicque, Synaptic and RSynaptic (:mod:`snncompress_snntorch.equations`)."""
        return equations.dynamics(neuron)

    def reset_rule(self, neuron: nn.Module) -> Literal["subtract", "value", ""]:
        """What ``reset_mechanism`` says."""
        rules: dict[Any, Literal["subtract", "value"]] = {"subtract": "subtract", "zero": "value"}
        return rules.get(getattr(neuron, "reset_mechanism", None), "")

    def make_fast(self, neuron: nn.Module, emitted: Callable[[Tensor], Emission]) -> None:
        """Leaky and Lapicque, with all three resets; with ``reset_delay``, or reset to zero."""
        stepping.make_fast(neuron, emitted)

    def state_bits(self, neuron: nn.Module) -> int | None:
        """Also of ``state_quant``: as many as its levels need."""
        cells = getattr(getattr(neuron, "state_quant", None), "__closure__", None) or ()
        for levels in (cell.cell_contents for cell in cells):
            if isinstance(levels, Tensor) and levels.dim() == 1 and len(levels) > 1:
                return (len(levels) - 1).bit_length()
        return super().state_bits(neuron)

    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        """Leaky, Lapicque and Synaptic, with all three resets; with ``reset_delay``, or of Leaky reset to zero.

        Synaptic's current lies on the grid of its membrane potential.
        """
        stepping.step_on(neuron, grid)

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """``utils.reset`` in a user's code then resets this model, and not the one that it was copied from."""
        base = sys.modules["snntorch._neurons.neurons"].SpikingNeuron
        before, own = base.instances, self._listed(model)
        base.instances = list(own)
        try:
            yield
        finally:
            known = {id(n) for n in own}
            before.extend(n for n in base.instances if id(n) not in known)  # built meanwhile
            base.instances = before

    def adopt(self, model: nn.Module) -> None:
        """snnTorch's ``utils.reset`` and ``backprop`` only see neurons in the class's list; copies must be added."""
        instances = sys.modules["snntorch._neurons.neurons"].SpikingNeuron.instances
        known = {id(n) for n in instances}
        instances.extend(n for n in self._listed(model) if id(n) not in known)

    def _listed(self, model: nn.Module) -> list[nn.Module]:
        """Those that snnTorch itself keeps in its list."""
        return [n for n in self.neurons(model).values() if _derives(n, "SpikingNeuron")]


def _derives(module: nn.Module, name: str) -> bool:
    cls: Any = type(module)
    return name in _ancestors(cls)


@lru_cache(maxsize=1024)  # it is asked of every module, often
def _ancestors(cls: type) -> tuple[str, ...]:
    # By name, so that snnTorch isn't imported for a model of another framework.
    return tuple(c.__name__ for c in cls.__mro__ if c.__module__.startswith("snntorch._neurons."))


def _layers(neuron: nn.Module) -> bool:
    """Does it hold layers, other than the connections from its own output?"""
    return any(name != "recurrent" and any(True for _ in child.parameters()) for name, child in neuron.named_children())


def _keep_diagonal(neuron: Any) -> None:
    """Give a LeakyParallel back the hook that lets it learn decays alone; a copy's parameters have none."""
    decay: Any = _decays(neuron)
    if decay is not None and decay.requires_grad and not decay._backward_hooks:
        decay.register_hook(neuron.grad_hook)


def _decays(neuron: Any) -> nn.Parameter | None:
    """The decays of a LeakyParallel, a diagonal matrix; None where it is full, and of other neurons."""
    if not _derives(neuron, "LeakyParallel"):
        return None
    decay: nn.Parameter | None = neuron.rnn._parameters.get("weight_hh_l0")
    return decay if decay is not None and torch.equal(decay, decay.diag().diag()) else None


def _remove_units(neuron: Any, indices: list[int]) -> None:
    rnn = neuron.rnn
    for name in rnn._flat_weights_names:
        if name != "weight_ih_l0":
            kept = getattr(rnn, name)
            for axis in range(-kept.dim(), 0):
                kept = without(kept.detach(), indices, axis)
            setattr(rnn, name, nn.Parameter(kept, getattr(rnn, name).requires_grad))
    rnn.hidden_size = neuron.hidden_size = rnn.hidden_size - len(indices)
    _keep_diagonal(neuron)


def _parallel(neuron: Any, stand_in: StandIn) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        current = neuron.rnn(x)[0]
        return all_steps(stand_in(neuron, first_step(current, 0)), len(current), 0)

    return call


def _all_steps(neuron: nn.Module) -> bool:
    """Does it take [T, N, ...]?"""
    return any(_derives(neuron, name) for name in ("StateLeaky", "LeakyParallel", "AssociativeLeaky"))


def _timed(neuron: nn.Module, x: Tensor) -> Tensor:
    """[T', N, ...]."""
    return x if _all_steps(neuron) else x.unsqueeze(0)


def _wire(x: Tensor) -> Tensor:
    return x * 1.0


def _firing(neuron: nn.Module, forward: Callable[..., Any], stand_in: StandIn) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        x: Tensor = args[0] if args else named["input_"]
        with torch.no_grad():
            form = forward(*args, **named)
        y = all_steps(stand_in(neuron, first_step(x, 0)), len(x), 0) if _all_steps(neuron) else stand_in(neuron, x)
        if getattr(neuron, "init_hidden", False):  # forward may read what the neuron keeps
            for name in _STATES & neuron._non_persistent_buffers_set:
                setattr(neuron, name, y + 1)
        return _like(form, y)

    return call


def _like(form: Any, y: Tensor) -> Any:
    """``y`` for the spikes; states behind them don't fall silent with them."""
    return (y, *(_state(part, y) for part in form[1:])) if isinstance(form, tuple) else y


def _state(form: Any, y: Tensor) -> Any:
    return tuple(_state(part, y) for part in form) if isinstance(form, tuple) else y + 1
