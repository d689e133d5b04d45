"""Neurons of the user's own: a class that is named, beside the framework that the rest of the model is of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snncompress.contract.plain import PlainAdapter
from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter, Dynamics, Observer, StandIn, StateGrid

from .modules import patched, remove_along, stacked
from .network import WEIGHT_LAYERS
from .network import width as module_width
from .one_step import all_steps, first_step, through
from .potentials import watch_potential
from .resizing import remove_from_layer

Neurons = type[nn.Module] | Iterable[type[nn.Module]]
_RESETS = ("reset", "reset_state", "reset_states", "reset_mem", "reset_membrane", "reset_hidden", "init_state")


class OwnNeurons(Adapter):
    """Spiking neurons of your own, for ``adapter=``: what ``neurons=`` and ``time_dim=`` make.

    A neuron takes currents and returns spikes of the same shape, alone or first in a tuple. Where it takes all
    timesteps at once, ``time_dim`` is the axis of time in its input: 1 in [N, T, C, ...], 0 in [T, N, C, ...]. None: it
    takes one timestep, or all of them folded into the batch. Parameters, buffers and plain tensors with an entry for
    each channel shrink with the channels, those of norms within it too, and so does a layer, or a matrix, from all
    channels to all, by which spikes come back; with other layers it stays whole. State that it keeps from call to call
    is put back by its method ``reset()`` (or ``reset_state``, ``reset_mem`` ...), if it has one without arguments. Its
    membrane potential is what it compares, in each timestep, with a threshold, or with 0 after the threshold was
    subtracted.

    Everything else follows the framework that the rest of the model is of, if any: layers of SpikingJelly in multi-step
    mode, say.

    Raises:
        OptionError: ``neurons`` holds anything but classes of modules, or ``time_dim`` isn't a whole number, or no axis
            of what they return.

    Example:
        >>> import snncompress
        >>> class LIF(nn.Module):
        ...     def forward(self, x):  # [N, T, C]
        ...         v, out = 0.0, []
        ...         for current in x.unbind(1):
        ...             v = 0.5 * v + current
        ...             out.append((v > 0.2).float())
        ...             v = v * (1 - out[-1])
        ...         return torch.stack(out, 1)
        >>> net = nn.Sequential(nn.Linear(4, 8), LIF(), nn.Linear(8, 6), LIF(), nn.Linear(6, 3))
        >>> mine = snncompress.OwnNeurons(LIF, time_dim=1)
        >>> x = torch.rand(5, 7, 4)
        >>> small = snncompress.apply(net, "magnitude", 0.5, None, data=x, adapter=mine, skip=[])
        >>> small[0], snncompress.profile(small, x, adapter=mine).is_spiking
        (Linear(in_features=4, out_features=4, bias=True), True)
    """

    framework = "own"

    def __init__(self, neurons: Neurons, time_dim: int | None = None) -> None:
        classes = (neurons,) if isinstance(neurons, type) else neurons
        found = tuple(classes) if isinstance(classes, Iterable) else ()
        if not found or not all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in found):
            raise OptionError(f"neurons must be a class of modules, such as LIFSpike, or several; not {neurons!r}.")
        if time_dim is not None and type(time_dim) is not int:
            raise OptionError(f"time_dim must be the number of an axis, or None, not {time_dim!r}.")
        self.classes, self.time_dim = found, time_dim
        self.base: Adapter = PlainAdapter()

    def described(self) -> str:
        """The call that makes it."""
        classes = ", ".join(cls.__name__ for cls in self.classes)
        named = classes if len(self.classes) == 1 else f"({classes})"
        return f"snncompress.OwnNeurons({named}, time_dim={self.time_dim})"

    def beside(self, model: nn.Module, others: Iterable[Adapter]) -> OwnNeurons:
        """The same, beside the framework that the rest of the model is of."""
        own = OwnNeurons(self.classes, self.time_dim)
        packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        near = [adapter for adapter in others if adapter.framework in packages]
        own.base = next((a for a in near if a.neurons(model)), near[0] if near else own.base)
        return own

    def refusal(self, model: nn.Module) -> str:
        """No module is of a class that was named."""
        names = " or ".join(cls.__name__ for cls in self.classes)
        return f"none of its modules is a {names}, which neurons= names."

    def is_own(self, module: nn.Module) -> bool:
        """Is it one of the classes that were named?"""
        return isinstance(module, self.classes)

    def is_neuron(self, module: nn.Module) -> bool:
        """One of the classes that were named, or a neuron of the framework's."""
        return self.is_own(module) or self.base.is_neuron(module)

    def reset(self, model: nn.Module) -> None:
        """By the neuron's own method, where it has one."""
        self.base.reset(model)
        for neuron in self._own(model).values():
            for name in _RESETS:
                method = getattr(neuron, name, None)
                if inspect.ismethod(method) and not _wants_more(method):
                    method()
                    break
        self.reset_memories(model)

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """Steps are driven from outside where the neurons take one at a time, else repeated along ``time_dim``."""
        if timesteps is None or not isinstance(self.base, PlainAdapter):
            return self.base.run(model, x, timesteps)
        if self.time_dim is None:
            return stacked([model(x.clone()) for _ in range(timesteps)])
        return model(torch.stack([x] * timesteps, self.time_dim))

    @contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        """One timestep stands for all; a neuron that holds layers, other than over time, computes as it does."""
        with self.base.identities(model, stand_in), ExitStack() as stack:
            for neuron in self._own(model).values():
                stack.callback(_detach, neuron)
                stack.enter_context(patched(neuron, "forward", self._firing(neuron, stand_in)))
            yield
        self.reset(model)

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Spikes from a forward hook; Ũ from what is compared to make them."""
        if not self.is_own(neuron):
            return self.base.observe(neuron, observer, membrane=membrane)
        if membrane:
            stack = ExitStack()
            stack.enter_context(watch_potential(neuron, self.time_dim, observer, lambda: _unreadable(neuron)))
            return stack.close

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spikes = self._spikes(module, output)
            observer(spikes.unsqueeze(0) if self.time_dim is None else spikes.movedim(self.time_dim, 0), None)

        return neuron.register_forward_hook(hook).remove

    def _spikes(self, neuron: nn.Module, output: Any) -> Tensor:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
        what = type(neuron).__name__
        if not isinstance(found, Tensor):
            raise ModelError(
                f"{what} returned a {type(output).__name__}. What neurons= names returns spikes, as a tensor or first "
                f"in a tuple. Let its forward do so, and what else it returns come behind."
            )
        if self.time_dim is not None and not -found.dim() <= self.time_dim < found.dim():
            raise OptionError(
                f"time_dim={self.time_dim} is no axis of what {what} returned, {list(found.shape)}. It is the axis of "
                f"time there, or None where the neuron takes one timestep."
            )
        return found

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """What has an entry for each channel."""
        if not self.is_own(neuron):
            self.base.remove_channels(neuron, indices, width=width, axis=axis)
            return
        for layer in _layers(neuron):
            if _feeds_back(layer) and module_width(layer, "out") == width:
                remove_from_layer(layer, "out", indices)
                remove_from_layer(layer, "in", indices)
            elif any(width in p.shape for p in layer.parameters()):
                raise ModelError(f"{type(neuron).__name__} holds layers of its own, so its channels stay.")
        remove_along(neuron, indices, width=width, axis=axis, anywhere=True)

    def time_axis(self, neuron: nn.Module) -> int | None:
        """As it was named."""
        return self.time_dim if self.is_own(neuron) else self.base.time_axis(neuron)

    # What only the framework can do, for what is its own.

    def stateful(self, model: nn.Module) -> dict[str, nn.Module]:
        """Those of the framework, and these."""
        return {**self.base.stateful(model), **self._own(model)}

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        """Of a neuron of the framework."""
        return super().states(neuron) if self.is_own(neuron) else self.base.states(neuron)

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        """Of a neuron of the framework."""
        self.base.set_states(neuron, states)

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        """Of a neuron of the framework."""
        return super().dynamics(neuron) if self.is_own(neuron) else self.base.dynamics(neuron)

    def leak(self, neuron: nn.Module) -> Tensor:
        """Of a neuron of the framework."""
        return super().leak(neuron) if self.is_own(neuron) else self.base.leak(neuron)

    def reset_rule(self, neuron: nn.Module) -> Literal["subtract", "value", ""]:
        """Of a neuron of the framework."""
        return super().reset_rule(neuron) if self.is_own(neuron) else self.base.reset_rule(neuron)

    def state_bits(self, neuron: nn.Module) -> int | None:
        """Of a neuron of the framework."""
        return self.base.state_bits(neuron)

    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        """A neuron of the framework."""
        if self.is_own(neuron):
            raise ModelError("it is a class of your own, whose equation isn't known")
        self.base.step_on(neuron, grid)

    def make_neuron(self, kind: Literal["lif", "if"]) -> nn.Module:
        """One of the framework."""
        return self.base.make_neuron(kind)

    def differentiable(self, model: nn.Module) -> AbstractContextManager[None]:
        """As the framework has it."""
        return self.base.differentiable(model)

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """As the framework has it."""
        return self.base.alone(model)

    def adopt(self, model: nn.Module) -> None:
        """As the framework has it."""
        self.base.adopt(model)

    def _own(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: m for name, m in model.named_modules() if self.is_own(m)}

    def _firing(self, neuron: nn.Module, stand_in: StandIn) -> Callable[..., Any]:
        forward = neuron.forward

        def call(*args: Any, **named: Any) -> Any:
            x: Tensor = next(iter((*args, *named.values())))
            steps = 1 if self.time_dim is None else x.shape[self.time_dim]
            if not all(_apart(layer, x, steps) for layer in _layers(neuron)):
                return through(forward)(*args, **named)
            with torch.no_grad():
                form = forward(*args, **named)
            if self.time_dim is None:
                y = stand_in(neuron, x)
            else:
                y = all_steps(stand_in(neuron, first_step(x, self.time_dim)), x.shape[self.time_dim], self.time_dim)
            _remember(neuron, y, form[0] if isinstance(form, tuple) else form)
            return (y, *form[1:]) if isinstance(form, tuple) else y

        return call


def _remember(neuron: nn.Module, y: Tensor, spikes: Any) -> None:
    """Put ``y`` where the neuron keeps its spikes, and something that doesn't fall silent with it for a potential."""
    for home in (vars(neuron), neuron._buffers):
        for name, held in home.items():
            if isinstance(held, Tensor) and held.shape == y.shape and held.is_floating_point():
                home[name] = y if isinstance(spikes, Tensor) and torch.equal(held, spikes) else y + 1


def _detach(neuron: nn.Module) -> None:
    for home in (vars(neuron), neuron._buffers):
        home.update({name: held.detach() for name, held in home.items() if isinstance(held, Tensor) and held.grad_fn})


def _unreadable(neuron: nn.Module) -> ModelError:
    return ModelError(
        f"The membrane potential of a {type(neuron).__name__} can't be read: its spikes aren't the result of comparing "
        f"a tensor of their shape with a threshold. Take a criterion that needs spikes or gradients, such as 'svs' or "
        f"'taylor', or write an adapter, whose observe() shows it."
    )


def named_neurons(adapter: Adapter | str | None, neurons: Neurons | None, time_dim: int | None) -> Any:
    """What ``adapter=``, ``neurons=`` and ``time_dim=`` of one call come to."""
    if neurons is None:
        if time_dim is not None:
            raise OptionError("time_dim is the axis of time in what neurons= take. Name their class: neurons=LIFSpike.")
        return adapter
    if adapter is not None:
        raise OptionError("Give neurons= or adapter=, not both; adapter=OwnNeurons(...) is the same as neurons=.")
    return OwnNeurons(neurons, time_dim)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Modules within a neuron that connect channels, or timesteps, with one another."""
    for child in module.children():
        held = (*child.parameters(recurse=False), *child.buffers(recurse=False))
        if isinstance(child, WEIGHT_LAYERS) or any(tensor.squeeze().dim() > 1 for tensor in held):
            yield child
        else:
            yield from _layers(child)


def _feeds_back(layer: nn.Module) -> bool:
    """Has it as many outputs as inputs, and any from any?"""
    square = isinstance(layer, WEIGHT_LAYERS) and module_width(layer, "in") == module_width(layer, "out")
    return square and getattr(layer, "groups", 1) == 1


def _apart(layer: nn.Module, x: Tensor, steps: int) -> bool:
    """Is it of timesteps, or does it feed spikes back? A trial of the neuron alone shows whether it does."""
    of_time = all({1, steps}.issuperset(t.shape) for t in (*layer.parameters(), *layer.buffers()))
    return of_time or (_feeds_back(layer) and module_width(layer, "in") in x.shape)


def _wants_more(method: Callable[..., Any]) -> bool:
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        for p in inspect.signature(method).parameters.values()
    )
