"""The criterion ``peak``: a channel whose membrane potential never came near its threshold goes first."""

from snncompress.extend import Criterion, hookimpl


class Peak(Criterion):
    """The highest membrane potential of a channel: score(f) = max over samples, timesteps and map of Ũ[f]."""

    name = "peak"
    needs = frozenset({"membrane"})

    def begin(self, layer):
        return layer.weight.new_full((layer.channels,), -float("inf"))

    def observe(self, layer, state, spikes, membrane):
        return state.maximum(membrane.transpose(0, 2).flatten(1).amax(1))  # [T, N, C, ...] → [C]

    def merge(self, layer, state, other):
        return state.maximum(other)

    def score(self, layer, state):
        return state


@hookimpl
def register_criteria(register):
    register(Peak)
