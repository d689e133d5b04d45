"""The contract between the core and its plugins: Criterion, Quantizer, Scheduler, EnergyModel, Target, Adapter.

A plugin subclasses one of these and registers the class (see :mod:`snncompress.contract.hookspecs`). Where a class is a
dataclass, its fields are its options: they are stored in the plan, so they must be plain JSON values.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from .errors import ModelError

Granularity = Literal["channel", "weight", "block"]
Scope = Literal["layer", "global"]
Signal = Literal["spikes", "membrane", "gradients", "inputs", "readers"]
Forward = Callable[[nn.Module, Any], Any]
"""How to run a model on one batch: ``forward(model, batch) -> output``."""
Loss = Callable[[Any, Any], Tensor]
"""A user's own loss: ``loss(output, y) -> scalar``, with the model's output as it comes and the batch's labels."""
StandIn = Callable[[nn.Module, Tensor], Tensor]
"""Stands in for a neuron while channels are traced: ``stand_in(neuron, input) -> output`` of the same shape."""
Observer = Callable[[Tensor, "Tensor | None"], None]
"""Called with spikes S and membrane potential Ũ, each [T', N, C, ...]; T' consecutive timesteps at once."""


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


class _Plugin(ABC):
    name: ClassVar[str]
    """What users write: ``criterion="svs"``."""

    def options(self) -> dict[str, Any]:
        """The settings of this instance as plain JSON values: the fields of a dataclass, else nothing."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}


class Criterion(_Plugin):
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


class Quantizer(_Plugin):
    """Turns (weight, bits) into a fake-quantized weight, as a Brevitas tensor quantizer."""

    @abstractmethod
    def tensor_quant(self, bits: int) -> nn.Module:
        """A module that maps a weight [C, ...] to Brevitas' (value, scale, zero_point, bit_width).

        ``value`` has the weight's shape, at most 2^bits distinct values per scale, and a straight-through gradient.
        The grid is ``scale * (n - zero_point)`` for n = 0 … 2^bits - 1.
        """


class Scheduler(_Plugin):
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


class EnergyModel(_Plugin):
    """Turns operation counts into energy.

    ``covers`` is printed with what it gives, in words: what the energy is that of.
    """

    covers: ClassVar[str] = "arithmetic alone"

    @abstractmethod
    def energy_pj(self, counts: OperationCounts) -> float:
        """Energy of these operations in picojoules."""


@dataclass(frozen=True)
class Pooling:
    """A pooling of spikes: ``kind`` "average", "max" or "sum", and its window, one number per dimension."""

    kind: Literal["average", "max", "sum"]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One weight layer, its neurons and the pooling behind them: what goes onto a chip in one piece.

    A linear layer that reads maps is a convolution as large as they are. Batch norms count as folded in, grouped
    convolutions as one group whose other weights are 0, as NIR holds them.

    Fields:
        name: of the weight layer.
        kind: "linear", "convolution" and "transposed convolution" in two dimensions, in others "1-D convolution", ….
        in_channels, out_channels: of the layer.
        in_size, out_size: positions of what it reads, and of its neurons, before the pooling: (height, width) or ().
        kernel_size, stride, padding, dilation: one number per dimension; () where there is none.
        reads: stages whose spikes it reads; none where it reads the network's input.
        feeds: stages that read its spikes.
        operations: what else is done with what it reads or puts out: "sum", "concatenation", "recurrence", or a name of
            torch's.
        pooling: of its spikes, as its readers see them.
        analog: whether it reads other values than spikes, None where that isn't known.
        neuron: "if", "lif", the class of a neuron whose equation isn't known, or None where there is none.
        reset: "subtract", "value", or "" where it isn't known.
        weight_bits: of the signed integers that hold its weights exactly; 32 for floats. A grid without a zero, such as
            that of ``rescaw``, is one of odd integers, and takes one bit more than it has.
        scales: how many scales these integers have: "layer" for one, "channel" for one per output, None for floats.
        state_bits, threshold_bits: None for floats.
        biased: whether it has biases, its batch norm's included.
        recurrent: weights from its neurons to themselves.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    pooling: tuple[Pooling, ...] = ()
    analog: bool | None = None
    neuron: str | None = None
    reset: str = ""
    weight_bits: int = 32
    scales: Literal["layer", "channel"] | None = None
    state_bits: int | None = None
    threshold_bits: int | None = None
    biased: bool = False
    recurrent: int = 0

    @property
    def neurons(self) -> int:
        """Potentials that it keeps."""
        return self.out_channels * math.prod(self.out_size)

    @property
    def fan_in(self) -> int:
        """Synapses into each neuron."""
        return self.in_channels * math.prod(self.kernel_size)

    @property
    def weights(self) -> int:
        """Weights that it stores."""
        return self.fan_in * self.out_channels + self.recurrent

    @property
    def synapses(self) -> int:
        """Synapses, each counted where its weight is shared; padding included.

        >>> Stage("conv", "convolution", 2, 8, (5, 5), (3, 3), (3, 3)).synapses  # 9 positions, 18 inputs, 8 outputs
        1296
        """
        return self.fan_in * self.neurons + self.recurrent * math.prod(self.out_size)


@dataclass(frozen=True)
class Limit:
    """One thing that a stage, or the network, needs of a chip, and what the chip has.

    Fields:
        what: in words, with the unit.
        needs, has: numbers, of which the first may not be larger; or words, and then ``met`` says whether they agree.
        met: whether it is kept.
        remedy: what to do where it isn't; "" where fewer channels help.
    """

    what: str
    needs: float | str
    has: float | str
    met: bool
    remedy: str = ""

    @classmethod
    def most(cls, what: str, needs: float, has: float, remedy: str = "") -> Limit:
        """Of a number that may not be larger than another.

        >>> Limit.most("channels", 1500, 1024).met
        False
        """
        return cls(what, needs, has, needs <= has, remedy)

    @classmethod
    def among(cls, what: str, needs: Any, has: Sequence[Any], remedy: str = "") -> Limit:
        """Of something that must be one of several."""
        return cls(what, _words(needs), ", ".join(map(_words, has)) or "none", needs in has, remedy)

    @property
    def slack(self) -> float | None:
        """What is left over, below 0 where something is missing; None where nothing can be counted."""
        numbers = isinstance(self.needs, (int, float)) and isinstance(self.has, (int, float))
        return self.has - self.needs if numbers else None  # type: ignore[operator]


@dataclass(frozen=True)
class Placement:
    """Which cores each stage takes, by its name; and what that needs of the chip as a whole.

    A stage that got no core is missing.
    """

    cores: Mapping[str, tuple[int, ...]]
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Target(_Plugin):
    """What a chip can hold. A subclass is a frozen dataclass that gives the fields their values; None is no limit.

    ``limits`` says what a stage needs and the chip has, field by field, and ``place`` lays the stages out on cores. A
    chip with rules of its own, such as memories that are filled to powers of two, adds to either. More of a stage may
    never need less of the chip: what fits is searched for by taking channels away.

    ``sources`` names for each field that has a value where that is written, and when that was looked up; "rules" for
    what ``limits`` and ``place`` add. ``caveat`` is printed with every verdict: what isn't looked at. ``unlike`` says
    what its neurons do that no neuron of a network does, so that no network fires there as it does here, and
    ``export`` writes none for it; empty where some do.

    Fields:
        layers: kinds of weight layers (:attr:`Stage.kind`).
        weight_bits: of signed integers.
        scales: "layer" where a layer has one scale, its threshold; "channel" where each of its outputs may have one.
        state_bits, threshold_bits: of signed integers.
        cores: cores that hold neurons.
        neurons_per_core, synapses_per_core, bytes_per_core: a stage may take several cores. Bytes are those of weights
            and states together.
        neurons, synapses, bytes: of the chip.
        shared_weights: whether the weights of a convolution are stored once.
        fan_in: synapses into a neuron.
        destinations: layers that a layer may feed.
        kernel_sizes, strides, paddings, dilations: that a convolution may have.
        pooling, pool_sizes: kinds, and window sizes; windows don't overlap, and several in a row count as one.
        channels: of what a layer reads or puts out.
        in_size, out_size: longest side of the maps that a layer reads, and of its neurons before pooling.
        neuron_models, resets: (:attr:`Stage.neuron`, :attr:`Stage.reset`); every layer must then drive neurons.
        inputs: values, or pixels of all channels, that the network takes in.
        events: whether the network's input must be spikes.
        operations: what may be done between stages (:attr:`Stage.operations`).
    """

    sources: ClassVar[Mapping[str, str]] = MappingProxyType({})
    caveat: ClassVar[str] = ""
    unlike: ClassVar[str] = ""

    layers: tuple[str, ...] | None = None
    weight_bits: int | None = None
    scales: Literal["layer", "channel"] | None = None
    state_bits: int | None = None
    threshold_bits: int | None = None
    cores: int | None = None
    neurons_per_core: int | None = None
    synapses_per_core: int | None = None
    bytes_per_core: int | None = None
    neurons: int | None = None
    synapses: int | None = None
    bytes: int | None = None
    shared_weights: bool | None = None
    fan_in: int | None = None
    destinations: int | None = None
    kernel_sizes: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    paddings: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    pooling: tuple[str, ...] | None = None
    pool_sizes: tuple[int, ...] | None = None
    channels: int | None = None
    in_size: int | None = None
    out_size: int | None = None
    neuron_models: tuple[str, ...] | None = None
    resets: tuple[str, ...] | None = None
    inputs: int | None = None
    events: bool | None = None
    operations: tuple[str, ...] | None = None

    def options(self) -> dict[str, Any]:
        """The fields whose values aren't the class's own."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def limits(self, stage: Stage) -> Iterator[Limit]:
        """What the stage needs of the chip, field by field."""
        if self.layers is not None:
            yield Limit.among("kind of layer", stage.kind, self.layers, "the chip has no such layer; replace it")
        yield from self._numbers(stage)
        yield from self._sizes(stage)
        yield from self._window(stage)
        yield from self._spikes(stage)

    def place(self, stages: Sequence[Stage]) -> Placement:
        """Stages side by side, each on as many cores as it needs; a core holds one stage."""
        cores: dict[str, tuple[int, ...]] = {}
        taken = 0
        for stage in stages:
            needed = self._cores(stage)
            if self.cores is None or taken + needed <= self.cores:
                cores[stage.name] = tuple(range(taken, taken + needed))
            taken += needed
        totals = (
            ("cores", taken, self.cores),
            ("neurons on the chip", sum(stage.neurons for stage in stages), self.neurons),
            ("synapses on the chip", sum(map(self._synapses, stages)), self.synapses),
            ("bytes on the chip", math.ceil(sum(map(_memory, stages))), self.bytes),
        )
        return Placement(cores, tuple(Limit.most(what, needs, has) for what, needs, has in totals if has is not None))

    def _cores(self, stage: Stage) -> int:
        parts = (
            (stage.neurons, self.neurons_per_core),
            (self._synapses(stage), self.synapses_per_core),
            (_memory(stage), self.bytes_per_core),
        )
        return max([1, *(math.ceil(needs / has) for needs, has in parts if has)])

    def _synapses(self, stage: Stage) -> int:
        return stage.weights if self.shared_weights else stage.synapses

    def _numbers(self, stage: Stage) -> Iterator[Limit]:
        if self.weight_bits is not None:
            most = self.weight_bits
            grid = f"quantize it to {most - 1} bits (odd integers take one more) or fewer"
            yield Limit.most("bits of a weight", stage.weight_bits, most, f"{grid}, or to {most} on a grid with a zero")
        if self.scales == "layer" and stage.scales == "channel":
            yield Limit(
                "scales of its weights", "one per channel", "one per layer", False,
                "quantize it with one scale, ReScaW(per_channel=False), and without a batch norm behind it",
            )  # fmt: skip
        for what, needs, has in (
            ("bits of a state", stage.state_bits, self.state_bits),
            ("bits of a threshold", stage.threshold_bits, self.threshold_bits),
        ):
            if needs is not None and has is not None:
                yield Limit.most(what, needs, has, f"give it {has} bits or fewer")

    def _sizes(self, stage: Stage) -> Iterator[Limit]:
        convolved = stage.kind != "linear"
        smaller = "pool, or stride, before it"
        for what, needs, has, remedy in (
            ("channels out", stage.out_channels, self.channels, ""),
            ("channels in", stage.in_channels, self.channels, ""),
            ("fan-in of a neuron", stage.fan_in, self.fan_in, ""),
            ("side of the map it reads", max(stage.in_size, default=1), self.in_size, smaller),
            ("side of its map of neurons", max(stage.out_size, default=1), self.out_size, smaller),
        ):
            if has is not None and (remedy == "" or convolved or stage.in_size):
                yield Limit.most(what, needs, has, remedy)
        if self.inputs is not None and not stage.reads:
            count = stage.in_channels * math.prod(stage.in_size)
            yield Limit.most("inputs of the network", count, self.inputs, "give it fewer inputs: filters, pooling")

    def _window(self, stage: Stage) -> Iterator[Limit]:
        for what, needs, has in (
            ("kernel size", stage.kernel_size, self.kernel_sizes),
            ("stride", stage.stride, self.strides),
            ("padding", stage.padding, self.paddings),
            ("dilation", stage.dilation, self.dilations),
        ):
            if has is not None and needs:
                odd = next((n for n in needs if n not in has), needs[0])
                yield Limit.among(what, odd, has, f"give it a {what} among these, and train again")
        if self.kernel_sizes is not None and len(set(stage.kernel_size)) > 1:
            yield Limit("shape of its kernel", _words(stage.kernel_size), "square", False, "give it a square kernel")
        for pool in stage.pooling:
            if self.pooling is not None:
                other = next((kind for kind in self.pooling if kind != pool.kind), "no")
                remedy = f"train with {other} pooling in its place"
                yield Limit.among("pooling", pool.kind, self.pooling, remedy)
            if self.pool_sizes is not None:
                odd = next((n for n in pool.size if n not in self.pool_sizes), pool.size[0])
                yield Limit.among("window of the pooling", odd, self.pool_sizes, "pool by one of these")
                if pool.stride != pool.size or any(pool.padding):
                    step = f"{_words(pool.size)} by {_words(pool.stride)}, padding {_words(pool.padding)}"
                    yield Limit("windows of the pooling", step, "side by side", False, "let them not overlap")

        if self.pool_sizes is not None and len(stage.pooling) > 1:
            whole = math.prod(pool.size[0] for pool in stage.pooling)
            yield Limit.among("window of all pooling together", whole, self.pool_sizes, "pool by less")

    def _spikes(self, stage: Stage) -> Iterator[Limit]:
        if self.neuron_models is not None:
            remedy = f"train it with such neurons: {', '.join(self.neuron_models)}"
            yield Limit.among("neurons", stage.neuron or "none", self.neuron_models, remedy)
        if self.resets is not None and stage.reset:
            yield Limit.among("reset", stage.reset, self.resets, "change it, and fine-tune")
        if self.destinations is not None:
            yield Limit.most("layers it feeds", len(stage.feeds), self.destinations, "take away a shortcut")
        if self.events and not stage.reads and stage.analog is not None:
            has = "analog values" if stage.analog else "spikes"
            yield Limit.among("input", has, ("spikes",), "encode the input as spikes, and train on these")
        if self.operations is not None:
            for name in stage.operations:
                yield Limit.among("operation", name, self.operations, "the chip has none such; do without")


def _memory(stage: Stage) -> float:
    """Bytes of weights and states."""
    return stage.weights * stage.weight_bits / 8 + stage.neurons * (stage.state_bits or 32) / 8


def _words(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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

    # --- given: for adapters to use, and for the core; all but ``stateful`` stay as they are ---

    def neurons(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's spiking neurons by name."""
        return {name: m for name, m in model.named_modules() if self.is_neuron(m)}

    def stateful(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that ``states`` may be asked for, by name: the neurons.

        An adapter adds what else remembers in its framework, such as leaky integrators that never fire.
        """
        return self.neurons(model)

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
