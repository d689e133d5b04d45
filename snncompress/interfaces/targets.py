"""What a chip can hold, and what a network needs of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from .plugins import Plugin


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
class Target(Plugin):
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
