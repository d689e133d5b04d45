"""SCA: score a channel by the mean size of its membrane potentials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from snncompress.extend import Criterion, Layer, PluginError, Signal


@dataclass
class _State:
    total: Tensor  # [C], Σ over batches, samples and timesteps of ‖Ũ‖₁
    observations: int = 0  # samples times timesteps


class SCA(Criterion):
    """Spiking channel activity: the mean L1 norm of a channel's membrane potential map.

    The equation, for channel f of B samples and T timesteps::

        score(f) = 1/(B·T) Σ_b Σ_t ‖Ũ[t, b, f]‖₁

    Ũ is the membrane potential after charging and before reset; the norm sums over the map.

    **Trap.** The norm forgets the sign: a channel that is held far below zero and never fires scores *high*
    and is kept. Where channels are silent, compare with ``firing_rate`` or ``svs``.

    Shapes:
        membrane [T, N, C, *map] → score [C], in units of membrane potential (the threshold is in the same
        unit).

    Raises:
        PluginError: no membrane potential was recorded for the layer.

    Source: Li et al., ICML 2024; restated as Eq. 7 of QP-SNN (ICLR 2025).

    Example:
        Two channels of a 1 × 2 map, one sample, T = 2: |0.5| + |-0.5| at every step, and a silent channel at
        -3.

        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("conv", torch.nn.Identity(), torch.ones(2, 1), None, None, (), torch.Generator())
        >>> membrane = torch.tensor([[0.5, -0.5], [-3.0, -3.0]]).expand(2, 1, 2, 2)
        >>> sca = SCA()
        >>> sca.score(layer, sca.observe(layer, sca.begin(layer), (membrane > 1).float(), membrane))
        tensor([1., 6.], dtype=torch.float64)
    """

    name: ClassVar[str] = "sca"
    needs: ClassVar[frozenset[Signal]] = frozenset({"membrane"})

    def begin(self, layer: Layer) -> _State:
        """Nothing seen yet."""
        return _State(torch.zeros(layer.channels, dtype=torch.float64, device=layer.weight.device))

    def observe(self, layer: Layer, state: _State, spikes: Tensor, membrane: Tensor | None) -> _State:
        """Add ‖Ũ[t]‖₁ of every sample and timestep."""
        if membrane is None:
            raise PluginError(
                f"sca: no membrane potential was recorded for layer {layer.name!r}. sca names it in its "
                "needs, so the adapter of the model's framework can't read it from this neuron; choose a "
                "criterion that needs spikes only, such as 'svs'."
            )
        # over the map in the tensor's own dtype, over samples and steps in float64
        per_map = membrane.detach().flatten(3).abs().sum(3) if membrane.dim() > 3 else membrane.detach().abs()
        state.total += per_map.double().sum((0, 1))
        state.observations += membrane.shape[0] * membrane.shape[1]
        return state

    def merge(self, layer: Layer, state: _State, other: _State) -> _State:
        """Add up."""
        return _State(state.total + other.total, state.observations + other.observations)

    def score(self, layer: Layer, state: _State) -> Tensor:
        """Mean over samples and timesteps, [C]."""
        if state.observations == 0:
            raise PluginError(
                f"sca: no membrane potential was recorded for layer {layer.name!r}: the neurons that it "
                "drives didn't run. Leave the layer out or choose a criterion that looks at weights, such "
                "as 'magnitude'."
            )
        return torch.div(state.total, state.observations)
