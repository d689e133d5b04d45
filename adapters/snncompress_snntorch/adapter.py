"""What snncompress must know of snnTorch ≥ 1.0: neurons, hidden states, recurrent weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snncompress.extend import (
    Adapter,
    Dynamics,
    ModelError,
    Observer,
    StandIn,
    patched,
    remove_along,
    remove_from_layer,
    stacked,
)

_STATES = {"mem", "syn", "spk", "syn_exc", "syn_inh"}


class SNNTorchAdapter(Adapter):
    """Models whose neurons derive from snnTorch's SpikingNeuron.

    Where every neuron keeps its own state (``init_hidden=True``), the time loop is outside the model: ``timesteps`` =
    T calls it T times and stacks the outputs. Else the model loops itself: ``timesteps`` = T hands it [T, N, ...].
    """

    framework = "snntorch"

    def is_neuron(self, module: nn.Module) -> bool:
        """SpikingNeuron in the class's ancestry."""
        return any(
            c.__module__ == "snntorch._neurons.neurons" and c.__name__ == "SpikingNeuron" for c in type(module).__mro__
        )

    def reset(self, model: nn.Module) -> None:
        """States back to the empty tensors that a new neuron has; they take the next input's shape."""
        for neuron in self.neurons(model).values():
            for name in _STATES & neuron._non_persistent_buffers_set:
                state = getattr(neuron, name)
                if isinstance(state, Tensor):
                    setattr(neuron, name, state.detach().new_zeros(0))
            vars(neuron).pop("reset", None)  # the reset signal of the last step
        self.reset_memories(model)

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """Loops over T where the neurons keep their state, else leaves the loop to the model."""
        if timesteps is None:
            return model(x)
        if all(n.init_hidden for n in self.neurons(model).values()):
            return stacked([model(x.clone()) for _ in range(timesteps)])
        return model(x.unsqueeze(0).repeat(timesteps, *[1] * x.dim()))

    @contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        """Each neuron runs for the shape of what it returns; all of it is replaced by ``stand_in``'s output."""
        with ExitStack() as stack:
            for neuron in self.neurons(model).values():
                stack.enter_context(patched(neuron, "forward", _firing(neuron, neuron.forward, stand_in)))
            yield
        self.reset(model)

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Spikes from a forward hook; Ũ by standing in for ``fire``, which is called with Ũ once per step."""
        if not membrane:

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                spikes = output[0] if isinstance(output, tuple) else output
                observer(spikes.detach().unsqueeze(0), None)

            return neuron.register_forward_hook(hook).remove

        def tapped(fire: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*args: Any) -> Tensor:
                spikes = fire(*args)
                observer(spikes.detach().unsqueeze(0), args[-1].detach().unsqueeze(0))
                return spikes

            return call

        taps = ExitStack()
        for name in ("fire", "fire_inhibition"):
            taps.enter_context(patched(neuron, name, tapped(getattr(neuron, name))))
        return taps.close

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """β, α, threshold, V along the channel axis; all-to-all recurrent weights on both sides."""
        if neuron.inhibition:
            raise ModelError("inhibition lets only the strongest neuron fire, so its channels depend on one another")
        recurrent = getattr(neuron, "recurrent", None)
        if recurrent is None and next(neuron.children(), None) is not None:
            raise ModelError(f"{type(neuron).__name__} holds layers of its own, so its channels stay.")
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
            neuron.spike_grad = _above_zero
            vars(neuron)["reset_mechanism_val"] = int(neuron._buffers.pop("reset_mechanism_val"))

    def single_step(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Tensor:
        """A model whose neurons keep their state is called step by step anyway; others loop over time themselves."""
        for name, neuron in self.neurons(model).items():
            if not neuron.init_hidden:
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
        return {name: state if state.numel() else state.new_zeros(()) for name, state in states.items()}

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        """As buffers."""
        for name, state in states.items():
            setattr(neuron, name, state)

    def leak(self, neuron: nn.Module) -> Tensor:
        """1 - β of Leaky, RLeaky and Lapicque, however they are reset."""
        if type(neuron).__name__ not in ("Leaky", "RLeaky", "Lapicque"):
            raise ModelError("of snnTorch's neurons Leaky, RLeaky and Lapicque leak in one step alone")
        beta: Tensor = torch.as_tensor(neuron.beta).detach().double()
        return 1 - beta.clamp(0, 1)

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        """Leaky: β·v + x, reset to zero, or by the threshold where β = 1.

        snnTorch subtracts θ from β·v, where the equation has β·(v - θ); without delay, once more in the next step where
        v is still above θ.
        """
        node: Any = neuron
        if (type(node).__module__, type(node).__name__) != ("snntorch._neurons.leaky", "Leaky"):
            raise ModelError("of snnTorch's neurons only Leaky is known by equation")
        unlike = {
            "inhibition=True": node.inhibition,
            "state_quant": node.state_quant,
            "graded_spikes_factor": bool((node.graded_spikes_factor != 1).any()),
            "reset_mechanism='none'": node.reset_mechanism == "none",
            "a negative threshold": not node.reset_delay and bool((node.threshold < 0).any()),
        }
        if odd := [what for what, found in unlike.items() if found]:
            raise ModelError(f"{odd[0]} isn't part of the leaky neuron's equation")
        leak = 1 - node.beta.detach().double().clamp(0, 1)
        reset = None if node.reset_mechanism == "subtract" else 0.0
        if reset is None and (bool(leak.any()) or not node.reset_delay):
            raise ModelError(
                "it resets by subtracting the threshold, but not at the end of a step, as the equation has it. Use "
                "reset_mechanism='zero', or beta=1.0 with reset_delay=True, and fine-tune"
            )
        threshold = node.threshold.detach().double()
        return Dynamics(leak, torch.ones_like(leak), threshold, 0.0, reset, inclusive=False)

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """``utils.reset`` in a user's code then resets this model, and not the one that it was copied from."""
        base = sys.modules["snntorch._neurons.neurons"].SpikingNeuron
        before, own = base.instances, list(self.neurons(model).values())
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
        instances.extend(n for n in self.neurons(model).values() if id(n) not in known)


def _above_zero(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _firing(neuron: nn.Module, forward: Callable[..., Any], stand_in: StandIn) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        x: Tensor = args[0] if args else named["input_"]
        with torch.no_grad():
            real = forward(*args, **named)
        first = real[0] if isinstance(real, tuple) else real
        if first.shape != x.shape:  # holds weights of its own, as SLSTM does: followed as it is
            return forward(*args, **named)
        y = stand_in(neuron, x)
        return tuple(y for _ in real) if isinstance(real, tuple) else y

    return call
