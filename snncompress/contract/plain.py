"""Networks without spiking neurons: an ordinary CNN, beside which a spiking network is set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter, Observer, StandIn


class PlainAdapter(Adapter):
    """For what needs no neurons: running, training, counting. It knows no time, so a batch goes through once."""

    framework: ClassVar[str] = "torch"

    def is_neuron(self, module: nn.Module) -> bool:
        """None is."""
        return False

    def reset(self, model: nn.Module) -> None:
        """There is no state to put back."""

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """The batch as it is, once, however many timesteps spiking networks get."""
        return model(x)

    def identities(self, model: nn.Module, stand_in: StandIn) -> AbstractContextManager[None]:
        """Nothing to replace."""
        return nullcontext()

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Raises ModelError: no module is a neuron."""
        raise _unknown(neuron)

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """Raises ModelError: no module is a neuron."""
        raise _unknown(neuron)


def _unknown(neuron: nn.Module) -> ModelError:
    kind = type(neuron).__name__
    return ModelError(
        f"{kind} is no spiking neuron of a known framework. Where it is one of your own: "
        f"adapter=snncompress.OwnNeurons({kind}, time_dim), time_dim being the axis of time in what it takes."
    )
