"""A framework of a few lines: neurons take [N, T, C, ...], and their state is a persistent buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.extend import Adapter, Dynamics, Observer, StandIn, patched, remove_along


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Charge(nn.Module):
    """Integrates, fires above its threshold, is reset to 0; ``v`` takes the shape of the input."""

    def __init__(self, threshold: float | Tensor = 1.0) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.as_tensor(threshold))
        self.register_buffer("v", torch.zeros(()))
        self.seen: Observer | None = None

    def forward(self, x: Tensor) -> Tensor:
        spikes = []
        for current in x.unbind(1):
            self.v = self.v + current
            spike = _Surrogate.apply(self.v - self.threshold)
            if self.seen is not None:
                self.seen(spike.unsqueeze(0), self.v.detach().unsqueeze(0))
            self.v = self.v * (1 - spike)
            spikes.append(spike)
        return torch.stack(spikes, 1)


class BareAdapter(Adapter):
    """Only what every adapter must do."""

    framework = "toy"

    def is_neuron(self, module: nn.Module) -> bool:
        return isinstance(module, Charge)

    def reset(self, model: nn.Module) -> None:
        for neuron in self.neurons(model).values():
            neuron.v = torch.zeros(())
        self.reset_memories(model)

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        if timesteps is None:
            return model(x)
        return model(x.unsqueeze(1).expand(len(x), timesteps, *x.shape[1:])).transpose(0, 1)

    @contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        def forward(neuron: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda x: stand_in(neuron, x[:, 0]).unsqueeze(1).expand(x.shape)

        with ExitStack() as stack:
            for neuron in self.neurons(model).values():
                stack.enter_context(patched(neuron, "forward", forward(neuron)))
            yield

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        stack = ExitStack()
        stack.enter_context(patched(neuron, "seen", lambda spikes, v: observer(spikes, v if membrane else None)))
        return stack.close

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        remove_along(neuron, indices, width=width, axis=axis)


class ToyAdapter(BareAdapter):
    """And the states, which are buffers, and the equation."""

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        return {"v": neuron.v}

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        neuron.v = states["v"]

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        one = torch.ones(())
        return Dynamics(0 * one, one, neuron.threshold, 0.0, 0.0, inclusive=False)


def toy_layers() -> tuple[nn.Module, Tensor]:
    """A model that fires on this input for three timesteps or more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Charge(torch.linspace(0.5, 1.5, 8)), nn.Linear(8, 6), Charge(0.3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
    return model, torch.rand(5, 4)
