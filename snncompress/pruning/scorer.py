"""What one layer, or one neuron population that it drives, does in calibration, folded into scores by a criterion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered
from snncompress.errors import PluginError, SNNCompressError
from snncompress.interfaces import Criterion, Inputs, Layer, Reader
from snncompress.model.cells import layer_at
from snncompress.model.network import WEIGHT_LAYERS, ChannelGroup, Member, Network, Side, outputs_first, width
from snncompress.model.parametrizations import float_weight, stored_weight

Groups = Sequence[ChannelGroup]
"""The groups that a layer's channels stand in: one, or several parts; none where single weights are scored."""


def any_of(tensor: Tensor) -> bool:
    """Whether a number isn't 0; a small part often tells."""
    return bool(tensor[:1, :1].any()) or bool(tensor.any())


class Scorer:
    """Folds what one layer, or one neuron population that it drives, does into scores of that layer."""

    def __init__(
        self, model: nn.Module, network: Network, name: str, neuron: str | None, groups: Groups,
        criterion: Criterion, seed: int,
    ) -> None:  # fmt: skip
        self.layer_name, self.neuron, self.criterion = name, neuron, criterion
        self._module = layer_at(model, name)
        self._norm = model.get_submodule(network.norms[name]) if name in network.norms else None
        self._neurons = network.drives.get(name, ())
        self._weight = outputs_first(float_weight(self._module), self._module)
        self.heard = torch.ones(len(self._weight), dtype=torch.bool)
        """The channels that drive this neuron."""
        self.readers = readers_of(model, network, name, groups, len(self._weight)) if self.needs_readers else ()
        self._site: Member | None = None
        self._columns: Tensor | None = None
        if groups and neuron is not None:
            self._site = next((m for g in groups if (m := g.member(neuron, "neuron")) is not None), None)
            self._columns, self.heard = _columns(groups, name, neuron, len(self._weight))
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._chance = self._generator.get_state()
        self.any_gradient = False
        """In any batch, whether or not the recording restarted behind it."""
        self.restart()

    @property
    def needs_membrane(self) -> bool:
        """Whether the criterion asked for potentials."""
        return "membrane" in self.criterion.needs

    @property
    def needs_readers(self) -> bool:
        """Whether the criterion asked for what is read of the layer's channels."""
        return "readers" in self.criterion.needs

    def restart(self) -> None:
        """Forget the data."""
        self.hear({})
        self._generator.set_state(self._chance)
        self._state = self._guarded(self.criterion.begin, self.layer())

    def reading(self) -> set[str]:
        """The layers whose inputs are to be recorded."""
        return {r.name for r in self.readers} | ({self.layer_name} if "inputs" in self.criterion.needs else set())

    def hear(self, inputs: Mapping[str, Inputs | None]) -> None:
        """What these layers read in calibration."""
        self.inputs = inputs.get(self.layer_name) if "inputs" in self.criterion.needs else None
        self.readers = tuple(replace(reader, inputs=inputs.get(reader.name)) for reader in self.readers)

    def parameters(self) -> list[nn.Parameter]:
        """What a criterion may ask the gradients of."""
        return [stored_weight(self._module), *(() if self._norm is None else self._norm.parameters())]

    def layer(self) -> Layer:
        """As the criterion sees it now."""
        gradient = stored_weight(self._module).grad if "gradients" in self.criterion.needs else None
        if gradient is not None:
            gradient = outputs_first(gradient, self._module)
        return Layer(
            self.layer_name,
            self._module,
            self._weight,
            gradient,
            self._norm,
            self._neurons,
            self._generator,
            self.inputs,
            self.readers,
        )

    def observe(self, spikes: Tensor, membrane: Tensor | None) -> None:
        """Consecutive timesteps of the neuron, [T', N, C, ...]: those of the layer's channels are folded."""
        if self._site is not None:
            spikes = self._site.observed(spikes)
            membrane = None if membrane is None else self._site.observed(membrane)
        if self._columns is not None:
            spikes = _select(spikes, self._columns)
            membrane = None if membrane is None else _select(membrane, self._columns)
        before = self._state
        self._state = self._guarded(self.criterion.observe, self.layer(), before, spikes, membrane)
        if self._state is None and before is not None:
            raise PluginError(f"Criterion {self.criterion.name!r}: observe() returned None; it must return the state.")

    def end_batch(self) -> None:
        """Close a batch."""
        gradient = stored_weight(self._module).grad
        self.any_gradient = self.any_gradient or (gradient is not None and any_of(gradient))
        self._state = self._guarded(self.criterion.end_batch, self.layer(), self._state)

    def reduce(self) -> None:
        """Put the states of all processes together, in the order of their ranks."""
        found = gathered((self._state, self.any_gradient), self._weight.device)
        (self._state, _), *others = found
        for state, _ in others:
            if self._state is not None or state is not None:
                self._state = self._guarded(self.criterion.merge, self.layer(), self._state, state)
        self.any_gradient = any(reached for _, reached in found)

    def score(self, method: Callable[[Layer, Any], Tensor]) -> Tensor:
        """What the method makes of the state; raises PluginError for anything but finite scores of the right shape."""
        layer = self.layer()
        chance = self._generator.get_state()
        with torch.no_grad():
            scores = self._guarded(method, layer, self._state)
        self._generator.set_state(chance)
        where, what = f"Criterion {self.criterion.name!r}, layer {layer.name}", f"{method.__name__}()"
        single = self.criterion.granularity == "weight"
        shape = layer.weight.shape if single else layer.weight.shape[:1]
        if not isinstance(scores, Tensor):
            raise PluginError(f"{where}: {what} must return a tensor {list(shape)}, not {type(scores).__name__}.")
        if scores.shape != shape:
            per = "weight" if single else "output channel"
            raise PluginError(
                f"{where}: {what} must return one score per {per}, {list(shape)}, not {list(scores.shape)}."
            )
        if scores.is_complex() or scores.layout != torch.strided or scores.is_meta:
            raise PluginError(
                f"{where}: scores must be real numbers in a dense tensor, not {scores.dtype} {scores.layout} on "
                f"{scores.device}."
            )
        # a finite sum tells of all, five times as fast
        if not bool(torch.isfinite(scores.sum())) and not bool(torch.isfinite(scores).all()):
            raise PluginError(
                f"{where}: scores hold NaN or infinite values. Check for a division by zero, a silent layer or a "
                f"diverged model."
            )
        if single:  # as many as weights, so in their own precision and place
            return outputs_first(scores.detach(), self._module)
        return scores.detach().double().cpu()

    def _guarded(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except SNNCompressError:
            raise
        except Exception as error:
            raise PluginError(
                f"Criterion {self.criterion.name!r} failed in {method.__name__}() on layer {self.layer_name}: "
                f"{type(error).__name__}: {error}"
            ) from error


def listens(criterion: Criterion) -> bool:
    """Does it score what neurons do?"""
    return bool(criterion.needs & {"spikes", "membrane"})


def heard_by(network: Network, layer: str, groups: Groups) -> tuple[str, ...]:
    """The neurons that a layer drives; where it writes last into a stream and drives none, those that read before."""
    driven = network.drives.get(layer, ())
    if not groups:
        return driven
    traced = dict.fromkeys(name for group in groups for name in group.names("neuron"))
    return tuple(name for name in driven if name in traced) or tuple(traced)


def readers_of(model: nn.Module, network: Network, layer: str, groups: Groups, channels: int) -> tuple[Reader, ...]:
    """The convolutions and linear layers that a layer's channels go into; none that only pass on what they take in."""
    found = []
    for name in dict.fromkeys(name for group in groups for name in group.names("in")):
        reader = layer_at(model, name)
        split = int(getattr(reader, "groups", 1))
        through = any(g.member(name, "in") and g.member(name, "out") for g in groups)
        if not isinstance(reader, WEIGHT_LAYERS) or (through and split > 1 and split == reader.in_channels):
            continue
        weight = outputs_first(float_weight(reader), reader)
        table, reads = columns_in(groups, layer, name, "in", channels)
        each = weight[0].numel() * split // width(reader, "in")  # weights of an output for one input
        columns = (table.unsqueeze(2) * each + torch.arange(each)).flatten(1)
        norm = model.get_submodule(network.norms[name]) if name in network.norms else None
        found.append(Reader(name, reader, weight, norm, columns.to(weight.device), reads.to(weight.device), None))
    return tuple(found)


def mean_over(scores: list[Tensor], heard: list[Tensor]) -> Tensor:
    """Over neurons, each of which hears all of the layer's channels or some."""
    if all(bool(channels.all()) for channels in heard):
        return torch.stack(scores).mean(0)
    weights = torch.stack(heard).double()
    return (torch.stack(scores) * weights).sum(0) / weights.sum(0).clamp_min(1)


def _columns(groups: Groups, layer: str, neuron: str, channels: int) -> tuple[Tensor | None, Tensor]:
    """As :func:`columns_in` a neuron; None where the columns are the same, [0 … C-1], and all heard if none is."""
    table, heard = columns_in(groups, layer, neuron, "neuron", channels)
    if not bool(heard.any()):
        return None, ~heard
    width = next(m.width for g in groups if (m := g.member(neuron, "neuron")) is not None)
    same = width == channels and torch.equal(table.flatten(), torch.arange(channels))
    return (None if same else table), heard


def columns_in(groups: Groups, layer: str, module: str, side: Side, channels: int) -> tuple[Tensor, Tensor]:
    """For each channel of the layer the columns of a neuron, or a reader's inputs [C, k]; which it has any for [C].

    Those of a channel that isn't heard are the first ones; one of fewer than others has them more than once.
    """
    heard, table = torch.zeros(channels, dtype=torch.bool), torch.zeros(channels, 1, dtype=torch.long)
    for group in groups:
        own, driven = group.member(layer, "out"), group.member(module, side)
        if own is None or driven is None:
            continue
        parts, k = own.index.shape[1], driven.index.shape[1]
        rows = (
            driven.index.repeat_interleave(parts, 0) if k % parts else driven.index.reshape(len(own.index) * parts, -1)
        )
        most = max(table.shape[1], rows.shape[1])
        table, rows = (t[:, torch.arange(most) % t.shape[1]] for t in (table, rows))
        heard[own.index.flatten()] = True
        table[own.index.flatten()] = rows
    return table, heard


def _select(activity: Tensor, columns: Tensor) -> Tensor:
    picked = activity.index_select(2, columns.flatten().to(activity.device))
    if columns.shape[1] == 1:
        return picked
    maps = picked.shape[3:]  # several of a channel stand below one another
    return picked.reshape(*picked.shape[:2], len(columns), -1, *maps[1:])
