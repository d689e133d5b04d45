"""What the core must know of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from snncompress.errors import ModelError

Forward = Callable[[nn.Module, Any], Any]
"""How to run a model on one batch: ``forward(model, batch) -> output``."""
Loss = Callable[[Any, Any], Tensor]
"""A user's own loss: ``loss(output, y) -> scalar``, with the model's output as it comes and the batch's labels."""
StandIn = Callable[[nn.Module, Tensor], Tensor]
"""Stands in for a neuron while channels are traced: ``stand_in(neuron, input) -> output`` of the same shape."""
Observer = Callable[[Tensor, "Tensor | None"], None]
"""Called with spikes S and membrane potential Ũ, each [T', N, C, ...]; T' consecutive timesteps at once."""


@dataclass(frozen=True)
class Dynamics:
    """One timestep of a leaky neuron with input x, threshold θ and state v, which starts at ``reset``, else at 0.

        v ← v + leak · (rest - v) + gain · x;   it fires where v > θ, or v ≥ θ if ``inclusive``;   there v ← ``reset``

    ``reset`` None subtracts θ instead: at once, or with ``late`` in the next timestep, from what is left then. The
    tensors broadcast against x [N, C, ...]; a leak of 0 integrates.

    ``recurrent`` is what hands a neuron's spikes of the last timestep on to it: a layer, or a factor for each neuron;
    what comes of it is added to x. With ``synapse`` = α, v gets a current in the place of x, which starts at 0:

        i ← α · i + x
    """

    leak: Tensor
    gain: Tensor
    threshold: Tensor
    rest: float
    reset: float | None
    inclusive: bool
    late: bool = False
    synapse: Tensor | None = None
    recurrent: nn.Module | Tensor | None = None


class StateGrid(Protocol):
    """Fixed-point arithmetic for a neuron that an adapter makes ``step_on`` it: all that it holds are multiples of δ.

    A neuron's step is then ``v = charge(v, x, leak(l), gain)``, ``s = fire(v, θ, surrogate)``, and where s = 1 it is
    reset to ``reset_value(r)``, or ``s * threshold(θ)`` is subtracted. Potentials are what a grid says they are, floats
    or whole numbers of δ: an adapter computes with nothing but products with spikes, sums and differences.
    """

    @property
    def synapse(self) -> StateGrid:
        """That of a synaptic current, which ``charge`` of this one takes in the place of x."""

    def leak(self, leak: Tensor | float) -> Any:
        """The leak that is taken for this one."""

    def threshold(self, threshold: Tensor | float) -> Tensor:
        """The threshold on the grid."""

    def reset_value(self, value: float) -> Tensor:
        """On the grid, what a potential is reset to."""

    def charge(self, v: Any, x: Tensor, leak: Any, gain: Any, rest: float = 0.0, less: Any = None) -> Tensor:
        """v + leak · (rest - v) + gain · x - less, on the grid and within its range; ``less`` is on the grid.

        ``leak`` comes from :meth:`leak`. A first ``v`` may be a number.
        """

    def fire(self, v: Tensor, threshold: Tensor | float, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        """The spikes, ``surrogate(v - threshold)`` with the threshold on the grid."""


class Emission(Protocol):
    """The spikes of consecutive timesteps, which a fast neuron fills in, in what form the network wants them."""

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each timestep its current, and floats of the same shape, to be set to 1 where the neuron fires, else 0.

        They are taken over when the next timestep is asked for; the current stays as it is.
        """

    @property
    def spikes(self) -> Tensor:
        """All timesteps, [T, N, ...]."""


class Memory(ABC):
    """A module of the library's own that remembers from timestep to timestep, as a framework's neurons do."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""


class Adapter(ABC):
    """Everything the core must know of one framework. The core never imports the framework itself.

    An adapter must be importable where its framework isn't installed. It must do what stands under *required*; each
    group of methods in ``OPTIONAL`` opens one more part of the library, and :meth:`offers` says which it has.
    """

    framework: ClassVar[str]

    OPTIONAL: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "books": ("alone", "adopt"),
            "conversion": ("make_neuron",),
            "export": ("make_traceable", "single_step"),
            "states": ("states", "set_states"),
            "equations": ("dynamics",),
            "inference": ("make_fast",),
            "fixed point": ("step_on",),
        }
    )
    """Groups of methods that an adapter may leave as they are."""

    def offers(self) -> dict[str, bool]:
        """For each group of ``OPTIONAL``, whether this adapter has all its methods.

        For a certain model or neuron a method may still raise ModelError.
        """
        return {
            group: all(getattr(type(self), method) is not getattr(Adapter, method) for method in methods)
            for group, methods in self.OPTIONAL.items()
        }

    # --- required: recognising, running, reading, shrinking ---

    @abstractmethod
    def is_neuron(self, module: nn.Module) -> bool:
        """Is this module one of the framework's spiking neurons? Must not import the framework."""

    @abstractmethod
    def reset(self, model: nn.Module) -> None:
        """Put every neuron back to its state before the first timestep, and cut it from any graph.

        ``self.reset_memories(model)`` does so for what :func:`snncompress.convert` gives a memory.
        """

    @abstractmethod
    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """Run one batch through time and return the model's output.

        With ``timesteps`` = T, ``x`` [N, ...] is fed as constant current for T steps; with None it goes in as it is.
        Where the steps are driven from outside the model, the outputs are stacked to [T, N, ...].
        """

    @abstractmethod
    def identities(self, model: nn.Module, stand_in: StandIn) -> AbstractContextManager[None]:
        """Inside, every neuron outputs ``stand_in(neuron, input)`` instead of spikes, and one timestep stands for all.

        Used on a private copy, to see how channels flow: what remains is a feed-forward network. ``stand_in`` gets one
        timestep [N, C, ...] and returns a tensor of that shape.
        """

    @abstractmethod
    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Call ``observer`` at every step of this neuron until the returned function is called.

        Without ``membrane`` the spikes are what the neuron puts out, as a part of autograd's graph where that records:
        training punishes and matches firing rates. Observers detach what they keep.
        """

    @abstractmethod
    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """Remove channels from the neuron's own per-channel tensors (threshold, decay, recurrent weights).

        The neuron has ``width`` channels, which stand on ``axis`` < 0 of its input: -1 in [N, C], -3 in
        [N, C, H, W]. A tensor that broadcasts along that axis has nothing to remove. Raises ModelError for a neuron
        that can't be shrunk.
        """

    # --- given: for adapters to use, and for the core; all but ``stateful`` and ``time_axis`` stay as they are ---

    def neurons(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's spiking neurons by name."""
        return {name: m for name, m in model.named_modules() if self.is_neuron(m)}

    def stateful(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that ``states`` may be asked for, by name: the neurons.

        An adapter adds what else remembers in its framework, such as leaky integrators that never fire.
        """
        return self.neurons(model)

    def time_axis(self, neuron: nn.Module) -> int | None:
        """The axis of time in what a neuron takes, where it doesn't stand in front; None where it does, or is no axis.

        Behind the channels it moves them: on -3 of one timestep [N, C, H, W], they stand on -4 of [N, C, H, W, T].
        """
        return None

    def reset_memories(self, model: nn.Module) -> None:
        """Make every :class:`Memory` forget; to be called by ``reset``."""
        for module in model.modules():
            if isinstance(module, Memory):
                module.reset()

    def beside(self, model: nn.Module, others: Iterable[Adapter]) -> Adapter:
        """The adapter to take for this model: one that leaves a part of it to one of ``others`` may say so here."""
        return self

    def differentiable(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, neurons have their surrogate gradient and call their surrogate function, in eval mode too.

        For frameworks that leave it out there; by default nothing is changed.
        """
        return nullcontext()

    def refusal(self, model: nn.Module) -> str:
        """Why a model in which no neuron is known is of this framework all the same, and what to do; empty if it isn't.

        For versions of the framework that the adapter doesn't take.
        """
        return ""

    def state_bits(self, neuron: nn.Module) -> int | None:
        """How many bits a membrane potential has that a neuron keeps in fixed point; None for floats.

        By default those of the grid that it was made to ``step_on``. An adapter whose framework rounds states itself
        tells those, too; such a neuron keeps them.
        """
        return getattr(getattr(neuron, "state_grid", None), "bits", None)

    def leak(self, neuron: nn.Module) -> Tensor:
        """The share of the membrane potential that is lost in a timestep, [] or per channel, for ``repair``.

        By default that of ``dynamics``; a neuron that follows another equation may still have one. Raises ModelError
        where nothing can be said.
        """
        return self.dynamics(neuron).leak

    def reset_rule(self, neuron: nn.Module) -> Literal["subtract", "value", ""]:
        """Whether a spike subtracts the threshold or sets the potential to a value; "" where that can't be said.

        By default as ``dynamics`` has it; a neuron that follows another equation may still have a known reset.
        """
        try:
            return "subtract" if self.dynamics(neuron).reset is None else "value"
        except ModelError:
            return ""

    # --- optional, "books": for frameworks that keep a list of their modules ---

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the framework's own books, where it keeps any, list this model's neurons only."""
        return nullcontext()

    def adopt(self, model: nn.Module) -> None:  # noqa: B027 - most frameworks keep no books
        """Called with a finished copy of a model, for frameworks that keep a list of their modules."""

    # --- optional, "conversion": snncompress.convert, of which a CNN becomes spiking ---

    def make_neuron(self, kind: Literal["lif", "if"]) -> nn.Module:
        """A new neuron with threshold 1 that keeps its own state, for :func:`snncompress.convert`.

        "lif" leaks with τ = 2.0 and is reset to 0; "if" doesn't leak, and its reset subtracts the threshold. Surrogate
        gradient: ATan. Raises ModelError where the framework isn't installed, or the adapter makes no neurons.
        """
        raise ModelError(f"The adapter of {self.framework} makes no neurons. Pass neuron=, a callable that makes one.")

    # --- optional, "export": snncompress.export, for which a model becomes a single timestep ---

    def make_traceable(self, model: nn.Module) -> None:
        """Let the neurons of a private copy fire by a plain comparison, in any dtype, so that exporters can follow."""
        raise ModelError(f"The adapter of {self.framework} can't prepare a model for export.")

    def single_step(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Tensor:
        """Make a private copy one that is called once per timestep, in place; return the first step's input.

        ``x`` and ``timesteps`` are what ``run`` gets. Raises ModelError where the model loops over time itself.
        """
        raise ModelError(f"The adapter of {self.framework} can't take a model apart into timesteps.")

    # --- optional, "states": snncompress.export, and what stays out of saved files ---

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        """What the neuron remembers from step to step, by name: [N, C, ...], or [] before the first step.

        Where a name is that of a persistent buffer, the buffer holds no more than a moment of the last run:
        :func:`snncompress.save` leaves it out of files, which hold what a network has learned. Raises ModelError for a
        neuron that remembers anything else.
        """
        raise ModelError(f"The adapter of {self.framework} can't read a neuron's state.")

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        """Put what ``states`` returned, or tensors like it, in the place of what the neuron remembers."""
        raise ModelError(f"The adapter of {self.framework} can't set a neuron's state.")

    # --- optional, "equations": the NIR format ---

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        """The neuron's equation; raises ModelError, with the reason, for a neuron that follows another one."""
        raise ModelError(f"the adapter of {self.framework} doesn't know its equation")

    # --- optional, "inference": snncompress.freeze ---

    def make_fast(self, neuron: nn.Module, emitted: Callable[[Tensor], Emission]) -> None:
        """Let a neuron of a frozen copy compute in place, and put out ``emitted(currents).spikes``, both [T, N, ...].

        It is called as before, with the same memory before and after each call, and fires alike but for rounding. Where
        it is observed, differentiated or made traceable it computes as it did. Another call takes the place of the
        first. Raises ModelError, with the reason, for a neuron that it can't be done for.
        """
        raise ModelError(f"the adapter of {self.framework} has no fast neurons")

    # --- optional, "fixed point": state_bits of snncompress.apply ---

    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        """Let a neuron do its steps by ``grid``, in either step mode, trained or not; another call takes its place.

        ``neuron.state_grid`` is that grid from then on, and ``dynamics`` are those that it makes of the neuron's.
        ``make_fast`` refuses it then, and after ``make_traceable`` it still computes on the grid. Raises ModelError,
        with the reason, for a neuron that it can't be done for, which then stays as it was.
        """
        raise ModelError(f"the adapter of {self.framework} has no fixed-point neurons")
