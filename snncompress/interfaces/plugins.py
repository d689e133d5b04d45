"""What criteria, quantizers, schedulers and energy models must do, and what they are handed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Granularity = Literal["channel", "weight", "block"]
Scope = Literal["layer", "global"]
Signal = Literal["spikes", "membrane", "gradients", "inputs", "readers"]


@dataclass(frozen=True)
class Inputs:
    """What the outputs of a layer read in calibration, u [D] each, as sums over samples, timesteps and positions.

        u[t] = (1 - leak) · u[t-1] + x[t]        what the leaky neurons behind the layer integrate, without reset

    where the leak is known, else u = x. A grouped convolution has G groups, any other layer one; D is in the order of
    :attr:`Layer.rows`. Of an output map up to 64 positions of every sample count. All in float64.

    Fields:
        square: Σ u², [G, D].
        total: Σ u · 1, [G, D], where 1 is a constant input, integrated in the same way: what a bias adds.
        count: Σ 1 · 1.
        gram: Σ u uᵀ, [G, D, D]; None where D is over 8,192.
    """

    square: Tensor
    total: Tensor
    count: float
    gram: Tensor | None

    def inverse(self, damping: float = 1e-2) -> Tensor | None:
        """(H + damping · mean(diag H) · I)⁻¹, [G, D, D]; H = Σ u uᵀ less what a bias that is fitted along explains.

        None without ``gram``.
        """
        if self.gram is None:
            return None
        variance, least = self._variance()
        ridge = damping * variance.mean(1, keepdim=True).clamp_min(least)
        centred = self.gram - self.total[:, :, None] * self.total[:, None, :] / self.count
        for _ in range(16):
            factor, failed = torch.linalg.cholesky_ex(centred + torch.diag_embed(ridge.expand_as(variance)))
            if not bool(failed.any()):
                break
            ridge = ridge * 10 + least
        return torch.cholesky_inverse(factor)

    def inverse_diagonal(self, damping: float = 1e-2) -> Tensor:
        """The diagonal of :meth:`inverse`, [G, D]; without ``gram``, the inputs are taken to be independent.

        >>> u = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> Inputs(u.diagonal()[None], torch.zeros(1, 2), 4.0, u[None]).inverse_diagonal(0.0)
        tensor([[0.5000, 1.0000]], dtype=torch.float64)
        """
        if (inverse := self.inverse(damping)) is not None:
            return inverse.diagonal(dim1=1, dim2=2)
        variance, least = self._variance()
        return 1 / (variance + damping * variance.mean(1, keepdim=True).clamp_min(least)).clamp_min(least)

    def _variance(self) -> tuple[Tensor, float]:
        """Σ u² less what a bias explains, [G, D], and the least that is taken for more than none."""
        return (self.square - self.total**2 / self.count).clamp_min(0), 1e-12 * self.count


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    groups = int(getattr(module, "groups", 1))
    return weight.reshape(groups, len(weight) // groups, -1)


@dataclass(frozen=True)
class Reader:
    """A weight layer that reads the channels that another one puts out.

    Fields:
        name, module: of the reader.
        weight: outputs first, [O, ...].
        norm: the batch normalization between the reader and its neurons, if any.
        columns: the inputs that each channel of the layer that is scored makes up, [C, K], among those of all groups
            of ``rows``, one after the other: g · D + d. A channel that makes up fewer than others has some twice.
        reads: which channels it reads at all, bool [C]; the columns of any other say nothing.
        inputs: what its outputs read; None where it wasn't called in calibration.
    """

    name: str
    module: nn.Module
    weight: Tensor
    norm: nn.Module | None
    columns: Tensor
    reads: Tensor
    inputs: Inputs | None

    @property
    def rows(self) -> Tensor:
        """The weight as [G, R, D]: for each of G groups R outputs that read D inputs, as ``inputs`` has it."""
        return _rows(self.module, self.weight)


@dataclass(frozen=True)
class Layer:
    """One weight layer as a criterion sees it.

    ``weight`` is the float weight with the output channels first, [C, ...], also for a transposed convolution or a
    quantized layer, and 0 where a weight was removed; ``weight_grad`` its gradient, None unless the criterion asked
    for gradients. ``norm`` is the batch normalization between the layer and its neurons, whose parameters have theirs
    then too. ``generator`` is seeded from
    the seed of ``apply`` and the layer's name: the only source of chance a criterion may use. ``inputs`` is None unless
    the criterion asked for inputs, or where the layer wasn't called. ``readers`` are the weight layers that its
    channels go into, () unless the criterion asked for them.
    """

    name: str
    module: nn.Module
    weight: Tensor
    weight_grad: Tensor | None
    norm: nn.Module | None
    neurons: tuple[str, ...]
    generator: torch.Generator
    inputs: Inputs | None = None
    readers: tuple[Reader, ...] = ()

    @property
    def channels(self) -> int:
        """Number of output channels (features of a linear layer)."""
        return int(self.weight.shape[0])

    @property
    def rows(self) -> Tensor:
        """The weight as [G, R, D]: for each of G groups R output channels that read D inputs, as ``inputs`` has it.

        >>> conv = nn.Conv2d(4, 6, 3, groups=2)
        >>> Layer("conv", conv, conv.weight.detach(), None, None, (), torch.Generator()).rows.shape
        torch.Size([2, 3, 18])
        """
        return _rows(self.module, self.weight)


class Plugin(ABC):
    """What all of them have, but for adapters."""

    name: ClassVar[str]
    """What users write: ``criterion="svs"``."""

    def options(self) -> dict[str, Any]:
        """The settings of this instance as plain JSON values: the fields of a dataclass, else nothing."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}


class Criterion(Plugin):
    """Scores the output channels of a layer, or its single weights (``granularity``); higher = keep.

    The one is structured pruning, the other unstructured.

    A criterion is a fold over calibration: ``begin`` makes a layer's empty state, ``observe`` adds what its neurons
    did in some timesteps, ``end_batch`` closes a batch, ``score`` turns the state into scores. States
    are plain values, so the same criterion serves many layers and many calls, and memory doesn't grow with the
    number of batches. A criterion that needs no recording only writes ``score``. With ``merge``, which makes one state
    of two, it calibrates on several processes, too, each of which sees a part of the data.

    ``needs`` says what must be recorded: ``"spikes"`` S[t], ``"membrane"`` Ũ[t] (after charging, before reset),
    ``"gradients"`` (one backward pass per batch through the surrogate gradient: ``layer.weight_grad`` is that batch's
    gradient in ``end_batch``; labels are then required), ``"inputs"`` (second moments of what the layer reads:
    ``layer.inputs`` in ``score``), ``"readers"`` (second moments of what the layers read that its channels go into:
    ``layer.readers`` in ``score``; for channels only).

    Single weights are compared within their layer, or with ``scope`` "global" across all layers of the same ratio.
    """

    granularity: ClassVar[Granularity] = "channel"
    scope: Scope = "layer"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    def begin(self, layer: Layer) -> Any:
        """The empty state of one layer."""

    def observe(self, layer: Layer, state: Any, spikes: Tensor, membrane: Tensor | None) -> Any:
        """Add consecutive timesteps, ``spikes`` and ``membrane`` each [T', N, C, ...]; return the new state.

        C is the layer's channels. T' is 1 in networks that step through time and may be all T in multi-step ones. The
        tensors may be views: don't write to them or keep them. ``membrane`` is None unless ``needs`` names it.
        """
        return state

    def end_batch(self, layer: Layer, state: Any) -> Any:
        """Close a batch: all its timesteps were observed, and its gradient, if asked for, is there."""
        return state

    def merge(self, layer: Layer, state: Any, other: Any) -> Any:
        """The state of two parts of the data, from that of each, as if one fold had gone through both.

        The batches of both are closed. Sums are added, extremes compared; ``state`` may be changed and returned. By
        default states can't be put together, since nothing tells a sum from a maximum.
        """
        raise NotImplementedError(f"{self.name} has no merge()")

    @abstractmethod
    def score(self, layer: Layer, state: Any) -> Tensor:
        """One score per output channel, [C], float64 where counts or sums matter; finite; higher = keep.

        With granularity "weight" one per weight, shaped like ``layer.weight``.
        """

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Which single weights go, given all their scores [n]: bool [n]; weights removed before score -inf.

        By default exactly the ``count`` lowest, of equal ones the first.
        """
        gone = torch.zeros_like(scores, dtype=torch.bool)
        if count > 0:  # in linear time
            cut = scores.kthvalue(count).values
            gone = scores < cut
            gone[(scores == cut).nonzero().flatten()[: count - int(gone.sum())]] = True
        return gone


class CriticalityCriterion(Criterion):
    """Scores single weights, and protects those that are more critical than a threshold ``tau``.

    :func:`snncompress.threshold_sweep` varies the threshold. A subclass is a dataclass with a field ``tau`` in [0, 1].
    Only ``score`` and ``select`` may depend on it, since a state is recorded once for all thresholds.
    """

    granularity: ClassVar[Granularity] = "weight"
    tau: float = 1.0

    @abstractmethod
    def criticality(self, layer: Layer, state: Any) -> Tensor:
        """How critical each weight is, in [0, 1], shaped like ``layer.weight``; above ``tau`` it is protected."""


class BlockCriterion(Criterion):
    """Scores whole blocks of layers; higher = keep.

    ``blocks`` are the names or globs of the modules that may go, None those found by structure, of the ``kinds``
    "fire" (one layer squeezes, others expand side by side) and "residual" (the input plus something).
    """

    granularity: ClassVar[Granularity] = "block"
    kinds: ClassVar[frozenset[str]] = frozenset({"fire", "residual"})
    blocks: tuple[str, ...] | None = None

    @abstractmethod
    def score_blocks(self, blocks: Sequence[str], loss_without: Callable[[Collection[str]], float]) -> Sequence[float]:
        """One score per block, which come in order of execution.

        ``loss_without(names)`` is the mean calibration loss with these blocks bypassed: one pass over the data, for
        which labels are required if it is called.
        """

    def score(self, layer: Layer, state: Any) -> Tensor:
        """Blocks aren't scored layer by layer: the core calls ``score_blocks`` instead."""
        raise NotImplementedError(f"{self.name} scores blocks, not layers: call score_blocks().")


class Quantizer(Plugin):
    """Turns (weight, bits) into a fake-quantized weight, as a Brevitas tensor quantizer."""

    @abstractmethod
    def tensor_quant(self, bits: int) -> nn.Module:
        """A module that maps a weight [C, ...] to Brevitas' (value, scale, zero_point, bit_width).

        ``value`` has the weight's shape, at most 2^bits distinct values per scale, and a straight-through gradient.
        The grid is ``scale * (n - zero_point)`` for n = 0 … 2^bits - 1.
        """


class Scheduler(Plugin):
    """A pure function that spreads a target over pruning steps.

    Where it names criteria by which something ``grows``, what goes is only masked until the last step: in every step
    before, what scores lowest is masked beyond the step's share, and of all that is masked, what this other criterion
    scores highest comes back, until the share is met exactly. Gradients reach what is masked as if it were there.
    """

    default_steps: ClassVar[int] = 1
    grows: ClassVar[Mapping[Granularity, str]] = MappingProxyType({})
    """The criterion by which masked channels or weights come back, by its name; without any, what goes is gone."""

    @abstractmethod
    def ratio(self, target: float, step: int, steps: int) -> float:
        """The share removed in all after ``step`` = 1 … ``steps``; non-decreasing, and ``target`` at the last."""

    def regrown(self, step: int, steps: int) -> float:
        """The share of what is masked (of what is left, where that is less) that comes back in ``step``, in [0, 1].

        It isn't asked for the last step, after which what is masked is cut out.
        """
        return 0.0

    @property
    def n_steps(self) -> int:
        """How many pruning steps this instance takes."""
        return int(getattr(self, "steps", self.default_steps))


@dataclass(frozen=True)
class MemoryUse:
    """What one layer, or one population of neurons, holds in memory, and what it takes in and puts out for one sample.

    Fields:
        n_weights, weight_bits, n_biases: what a layer stores; 0 for neurons.
        kernel_size, out_channels: of a convolution; () for a linear layer and for neurons.
        input_size, output_size: values in its input and its output in one timestep; a neuron has one potential each.
        n_spikes_in: spikes that arrive, over all timesteps.
        n_values_in: analog values that are read. Where a constant input is multiplied once, those of one timestep.
        n_outputs: values that are computed, or potentials that are updated; once where the input is multiplied once.
        n_spikes_out: spikes that are fired; neurons only.
        n_values_out: analog values that are written; layers of networks without neurons only.
    """

    n_weights: int = 0
    weight_bits: int = 32
    n_biases: int = 0
    kernel_size: tuple[int, ...] = ()
    out_channels: int = 0
    input_size: float = 0.0
    output_size: float = 0.0
    n_spikes_in: float = 0.0
    n_values_in: float = 0.0
    n_outputs: float = 0.0
    n_spikes_out: float = 0.0
    n_values_out: float = 0.0


@dataclass(frozen=True)
class OperationCounts:
    """What one layer does for one sample: accumulates, multiply-accumulates, neuron updates (mean over samples).

    ``memory`` says what it takes for that from memory, where it is a layer with weights or a population of neurons.
    """

    n_ac: float
    n_mac: float
    n_neuron_updates: float = 0.0
    memory: MemoryUse | None = dataclasses.field(default=None, repr=False)


class EnergyModel(Plugin):
    """Turns operation counts into energy.

    ``covers`` is printed with what it gives, in words: what the energy is that of.
    """

    covers: ClassVar[str] = "arithmetic alone"

    @abstractmethod
    def energy_pj(self, counts: OperationCounts) -> float:
        """Energy of these operations in picojoules."""
