"""Which grid a neuron's state gets: the step of least error on the potentials that the data drive it to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from snncompress.base.progress import Progress, tracked
from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Observer
from snncompress.model.chance import seeded
from snncompress.model.computed_once import evaluating
from snncompress.model.copying import private_copy
from snncompress.model.edits import QuantizeStates
from snncompress.model.edits.states import FEWEST, MOST_BITS
from snncompress.model.fixed_point import FixedPoint, Leak, Overflow, nearest
from snncompress.model.network import Network
from snncompress.model.parametrizations import compression_of, gridded, stored_weight
from snncompress.model.patches import weight_dims
from snncompress.running.data import Feed

_SAMPLES = 256
"""Of whose potentials are looked at, at least."""
_MOST = 48
"""Grids that are compared, at most."""


@dataclass(frozen=True)
class StateSettings:
    """What was asked for; raises OptionError for what can't be."""

    bits: Any = None
    overflow: Overflow = "saturate"
    leak: Leak = "exact"
    shared: Mapping[str, float] | None = None
    """Layer → of how many spikes its inputs are averages, where neurons must count in what their weights do."""

    def __post_init__(self) -> None:
        if self.overflow not in ("saturate", "wrap"):
            raise OptionError(f"state_overflow must be 'saturate' or 'wrap', not {self.overflow!r}.")
        if self.leak not in ("exact", "shift"):
            raise OptionError(f"state_leak must be 'exact' or 'shift', not {self.leak!r}.")

    def origin(self) -> dict[str, Any]:
        """As a plan remembers it; empty where no states were asked for."""
        if self.bits is None:
            return {}
        if self.shared is not None:
            return {}
        bits = dict(self.bits) if isinstance(self.bits, Mapping) else self.bits
        return {"state_bits": bits, "state_overflow": self.overflow, "state_leak": self.leak}


FLOAT_STATES = StateSettings()


def check_state_bits(value: Any, what: str) -> int | None:
    """A bit width from 3 to 32, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not FEWEST <= value <= MOST_BITS:
        raise OptionError(
            f"{what} must be a whole number from {FEWEST} to {MOST_BITS}, or None for states in float; not {value!r}."
        )
    return value


def kept_states(model: nn.Module, feed: Feed, bits: Mapping[str, int | None]) -> dict[str, str]:
    """Neurons that the framework has round their states already, and what is said of them.

    Raises ModelError for others whose state can't be in fixed point; the model stays as it is.
    """
    asked, kept = {name: wanted for name, wanted in bits.items() if wanted is not None}, dict[str, str]()
    copy = private_copy(model, feed.adapter) if asked else model
    for name, wanted in asked.items():
        QuantizeStates(name, wanted, (1.0,)).check(copy)
        neuron = copy.get_submodule(name)
        if (own := feed.adapter.state_bits(neuron)) is not None:
            kept[name] = f"its state has {own} bits by {feed.adapter.framework}'s own means, and keeps them"
            continue
        try:
            feed.adapter.step_on(neuron, FixedPoint(torch.tensor(1.0), wanted))
        except ModelError as error:
            raise ModelError(
                f"The state of {name} ({type(neuron).__name__}) can't be put on a grid of {wanted} bits: {error}. "
                f"Leave it out: state_bits is a mapping then, such as {{'*': {wanted}, {name!r}: None}}."
            ) from error
    return kept


def fixed_point_states(
    model: nn.Module,
    network: Network,
    feed: Feed,
    bits: Mapping[str, int | None],
    settings: StateSettings,
    seed: int,
    progress: Progress | None = None,
    what: str = "",
) -> list[QuantizeStates]:
    """The edits that put these neurons' states on grids, from the potentials of one pass over some of the data.

    Where one quantized layer drives a neuron, its step is that of the layer's weights, behind the batch norm, times a
    power of two for each channel: what the layer adds up is then whole, or rounded as a shift rounds. Elsewhere a layer
    of neurons has one step. Of these steps the one is taken for which

        mean (Ũ - grid(Ũ))² + (θ - grid(θ))²

    is least, Ũ being the recorded potentials, without what they exceed the threshold by where they are reset to a
    value.

    With ``settings.shared`` there is nothing to choose: one step is one in a sum of spikes and whole weights. Neurons
    that can't count so, such as those of two layers, or whose threshold is larger than their bits, are left out.
    """
    wanted = {name: b for name, b in bits.items() if b is not None}
    if not wanted:
        return []
    if settings.shared is not None:
        made = (_shared(model, network, feed, name, b, settings) for name, b in wanted.items())
        return [edit for edit in made if edit is not None]
    ranges = {name: _Range(model, network, feed, name, b, settings) for name, b in wanted.items()}
    samples = 0
    with ExitStack() as stack:
        stack.callback(feed.adapter.reset, model)
        for name, found in ranges.items():
            stack.callback(feed.adapter.observe(model.get_submodule(name), found.observer(), membrane=True))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for batch in tracked(feed, progress, f"{what}recording potentials"):
            with seeded(model, seed), feed.adapter.alone(model):
                feed(model, batch)
            feed.adapter.reset(model)
            samples += len(batch.x)
            if samples >= _SAMPLES:
                break
    return [found.edit() for found in ranges.values()]


def _shared(
    model: nn.Module, network: Network, feed: Feed, name: str, bits: int, settings: StateSettings
) -> QuantizeStates | None:
    drivers = [layer for layer in network.layers if name in network.drives.get(layer, ())]
    unit = _unit(model, network, drivers[0]) if len(drivers) == 1 else None
    count = (settings.shared or {}).get(drivers[0]) if len(drivers) == 1 else None
    if unit is None or count is None:
        return None
    theta, gain, _ = _equation(feed, model.get_submodule(name), settings)
    steps = (unit * gain.to(unit).flatten() / count).float()
    if bool((steps != steps[0]).any()) or bool((theta.abs() / steps[0] > 2 ** (bits - 1) - 2).any()):
        return None
    return QuantizeStates(name, bits, (float(steps[0]),), -1, settings.overflow, settings.leak)


class _Range:
    """The errors of one population's potentials on each grid that it might get."""

    def __init__(
        self, model: nn.Module, network: Network, feed: Feed, name: str, bits: int, settings: StateSettings
    ) -> None:
        self.name, self.bits, self.settings = name, bits, settings
        neuron = model.get_submodule(name)
        drivers = [layer for layer in network.layers if name in network.drives.get(layer, ())]
        layer: Any = model.get_submodule(drivers[0]) if len(drivers) == 1 else None
        unit = None if layer is None else _unit(model, network, drivers[0])
        self.threshold, gain, self._cut = _equation(feed, neuron, settings)
        self.axis = -1 if layer is None else -1 - weight_dims(layer)
        self._top = 2 ** (bits - 1) - 1
        fits = unit is not None and gain.numel() in (1, len(unit))
        self._steps = self._candidates(unit * gain.to(unit).flatten() if unit is not None and fits else None)
        self._errors, self._count = torch.zeros_like(self._steps), 0

    def _candidates(self, unit: Tensor | None) -> Tensor:
        """Steps [K, 1] or [K, C]: the finest on which the threshold fits, and coarser ones, until it is 1.

        Powers of two times a unit per channel, or without any, eight to an octave.
        """
        largest, per_octave = self.threshold.abs().amax().clamp_min(1e-12), 8
        base = (largest / (self._top - 1)).view(1)
        first = torch.zeros(1, device=base.device)
        if unit is not None:
            base, per_octave = unit if bool((unit != unit[0]).any()) else unit[:1], 1
            first = torch.ceil(torch.log2(largest / (self._top - 0.5) / base))
        count = min(_MOST, (self.bits - 1) * per_octave)
        exponents = first + torch.arange(count, device=base.device)[:, None] / per_octave
        found: Tensor = base * 2.0**exponents
        return found.float().double()  # as a plan keeps them

    def observer(self) -> Observer:
        """Adds up the errors of potentials [T, N, C, …]."""

        def observe(spikes: Tensor, potential: Tensor | None) -> None:
            v = cast(Tensor, potential).detach()
            if self._cut:
                v = torch.minimum(v, self.threshold.to(v))
            channels = v.movedim(self.axis, 0).flatten(1)
            self._count += channels.shape[1]
            for number, step in enumerate(self._steps.to(v)):
                size = step[:, None]
                on_grid = nearest(channels / size).clamp(-self._top - 1, self._top) * size
                error = (channels - on_grid).square_().mean(1, dtype=torch.float64) * channels.shape[1]
                self._errors[number] += error if len(size) > 1 else error.mean()

        return observe

    def edit(self) -> QuantizeStates:
        """With the step of least error, of equal ones the finest."""
        theta = self.threshold.double()
        theta = theta.flatten() if self._steps.shape[1] > 1 else theta.flatten()[:, None]
        rounded = nearest(theta / self._steps[:, None]).clamp(-self._top, self._top - 1) * self._steps[:, None]
        missed = (rounded - theta).square()
        missed = missed.flatten(2).mean(1) if self._steps.shape[1] > 1 else missed.mean((1, 2), keepdim=True)[..., 0]
        chosen = (self._errors / max(self._count, 1) + missed).argmin(0, keepdim=True)
        step = self._steps.gather(0, chosen).flatten().tolist()
        return QuantizeStates(self.name, self.bits, tuple(step), self.axis, self.settings.overflow, self.settings.leak)


def _equation(feed: Feed, neuron: nn.Module, settings: StateSettings) -> tuple[Tensor, Tensor, bool]:
    """θ, what a current is multiplied with on a grid, and whether a potential above θ is reset to a value."""
    held: Any = neuron
    theta = torch.as_tensor(getattr(held, "v_threshold", getattr(held, "threshold", 1.0))).detach().double()
    probe = private_copy(neuron, feed.adapter)
    fine = FixedPoint(torch.tensor(2.0**-16, device=theta.device), MOST_BITS, settings.overflow, settings.leak)
    feed.adapter.step_on(probe, fine)
    try:
        equation = feed.adapter.dynamics(probe)
    except ModelError:
        return theta, torch.ones_like(theta), False
    return theta, equation.gain.to(theta), equation.reset is not None


def _unit(model: nn.Module, network: Network, name: str) -> Tensor | None:
    """|the step| of a quantized layer's weights, behind the batch norm, per channel [C]; None where there is none."""
    layer: Any = model.get_submodule(name)
    compression = compression_of(layer)
    found = None if compression is None else gridded(compression, stored_weight(layer))
    if found is None:
        return None
    grid = found[0]
    step = grid.scale.detach().double() * (1.0 if float(grid.zero_point).is_integer() else 0.5)
    norm: Any = None if name not in network.norms else model.get_submodule(network.norms[name])
    wide = int(getattr(layer, "out_channels", getattr(layer, "out_features", 0)))
    step = step.flatten().expand(wide)
    if norm is None:
        return step.abs() if bool((step != 0).all()) else None
    if getattr(norm, "running_var", None) is None or len(norm.running_var) != wide:
        return None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    step = (step * gain).abs()
    return step if bool((step > 0).all()) else None
