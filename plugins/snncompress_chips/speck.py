"""Speck and DYNAP-CNN of SynSense: nine cores, each a convolution with its neurons and a sum pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from snncompress.extend import Limit, Placement, Stage, Target

_KI = 1024
_KERNEL = tuple(n * _KI for n in (16, 16, 16, 32, 32, 64, 64, 16, 16))
_NEURON = tuple(n * _KI for n in (64, 64, 64, 32, 32, 16, 16, 16, 16))
_BIAS = _KI
_OVERVIEW = "sinabs documentation, Speck, Overview (sinabs.readthedocs.io/en/main/speck/overview.html), 2026-11-26"
_BUILDER = "sinabs 2.0.3, sinabs/backend/dynapcnn/chips/dynapcnn.py, get_constraints(), 2026-11-26"
_CONFIG = "sinabs 2.0.3, sinabs/backend/dynapcnn/chips/dynapcnn.py, get_dynapcnn_layer_config_dict(), 2026-11-26"
_LAYER = "sinabs 2.0.3, sinabs/backend/dynapcnn/dynapcnn_layer.py, memory_summary(), 2026-11-26"
_DISCRETIZE = "sinabs 2.0.3, sinabs/backend/dynapcnn/discretize.py, 2026-11-26"
_NETWORK = "sinabs documentation, Speck, Available network architecture, 2026-11-26"
_SOURCES = MappingProxyType(
    {
        "layers": "sinabs documentation, Speck, Available operations, 2026-11-26",
        "weight_bits": _OVERVIEW,
        "scales": f"one threshold_high per layer: {_CONFIG}",
        "state_bits": _OVERVIEW,
        "threshold_bits": _DISCRETIZE,
        "cores": _OVERVIEW,
        "destinations": _OVERVIEW,
        "kernel_sizes": _OVERVIEW,
        "strides": _OVERVIEW,
        "paddings": _OVERVIEW,
        "dilations": f"kernels have no dilation: {_LAYER}",
        "pooling": "sinabs documentation, Speck, Available operations, 2026-11-26; averages become sums",
        "pool_sizes": _OVERVIEW,
        "channels": _OVERVIEW,
        "in_size": _OVERVIEW,
        "out_size": _NETWORK,
        "neuron_models": "sinabs 2.0.3, sinabs/backend/dynapcnn/utils.py, construct_next_dynapcnn_layer(), 2026-11-26",
        "resets": f"return_to_zero: {_CONFIG}",
        "events": "sinabs documentation, Speck, Overview: layers communicate in events only, 2026-11-26",
        "operations": f"several cores may feed one, which adds, or concatenates by shifting channels: {_NETWORK}",
        "rules": f"{_BUILDER}; {_LAYER}",
    }
)


@dataclass(frozen=True)
class DynapCNN(Target):
    """DYNAP-CNN: nine cores, each with a kernel memory and a neuron memory of its own size.

    A core holds one layer. Addresses are put together from those of channels and positions, so that a layer of c
    channels in, f channels out, a kernel of k_x · k_y and a map of f_x · f_y neurons takes, in words of 8 and 16 bits,

        kernel memory   c · 2^(⌈log2 k_x k_y⌉ + ⌈log2 f⌉)        neuron memory   f · 2^(⌈log2 f_y⌉ + ⌈log2 f_x⌉)

    Cores 0 to 2 have 16 Ki and 64 Ki of them, 3 and 4 32 Ki each, 5 and 6 64 Ki and 16 Ki, 7 and 8 16 Ki each; and
    1,024 biases each. Which layer goes on which core is a matching of the two, found by augmenting paths.
    """

    name: ClassVar[str] = "dynapcnn"
    sources: ClassVar[Mapping[str, str]] = _SOURCES
    caveat: ClassVar[str] = (
        "Events come one by one on the chip, and not by timesteps; biases act at the pace of a clock of their own; "
        "synaptic operations per second are limited, too."
    )

    layers: tuple[str, ...] | None = ("convolution", "linear")
    weight_bits: int | None = 8
    scales: Literal["layer", "channel"] | None = "layer"
    state_bits: int | None = 16
    threshold_bits: int | None = 16
    cores: int | None = 9
    destinations: int | None = 2
    kernel_sizes: tuple[int, ...] | None = tuple(range(1, 17))
    strides: tuple[int, ...] | None = (1, 2, 4, 8)
    paddings: tuple[int, ...] | None = tuple(range(8))
    dilations: tuple[int, ...] | None = (1,)
    pooling: tuple[str, ...] | None = ("average", "sum")
    pool_sizes: tuple[int, ...] | None = (1, 2, 4)
    channels: int | None = 1024
    in_size: int | None = 128
    out_size: int | None = 64
    neuron_models: tuple[str, ...] | None = ("if",)
    resets: tuple[str, ...] | None = ("subtract", "value")
    events: bool | None = True
    operations: tuple[str, ...] | None = ("sum", "concatenation")

    def limits(self, stage: Stage) -> Iterator[Limit]:
        """And the memories, of which the largest must be large enough."""
        yield from super().limits(stage)
        kernel, neuron = _memory(stage)
        yield Limit.most("words of kernel memory", kernel, max(_KERNEL))
        yield Limit.most("words of neuron memory", neuron, max(_NEURON))
        if stage.biased:
            yield Limit.most("biases", stage.out_channels, _BIAS)

    def place(self, stages: Sequence[Stage]) -> Placement:
        """One core for each stage: as many stages as can have one."""
        fitting = {stage.name: self._fitting(stage) for stage in stages}
        holder: dict[int, str] = {}

        def settle(name: str, tried: set[int]) -> bool:
            for core in fitting[name]:
                if core not in tried:
                    tried.add(core)
                    if core not in holder or settle(holder[core], tried):
                        holder[core] = name
                        return True
            return False

        for name in fitting:
            settle(name, set())
        cores = {name: (core,) for core, name in sorted(holder.items())}
        return Placement(cores, (Limit.most("cores", len(stages), len(_KERNEL)),))

    @staticmethod
    def _fitting(stage: Stage) -> list[int]:
        kernel, neuron = _memory(stage)
        return [core for core in range(len(_KERNEL)) if kernel <= _KERNEL[core] and neuron <= _NEURON[core]]


@dataclass(frozen=True)
class Speck(DynapCNN):
    """Speck (2e, 2f): DYNAP-CNN's nine cores beside a vision sensor of 128 × 128 pixels."""

    name: ClassVar[str] = "speck"


def _memory(stage: Stage) -> tuple[int, int]:
    kernel = stage.in_channels * 2 ** (_bits(math.prod(stage.kernel_size)) + _bits(stage.out_channels))
    neuron = stage.out_channels * math.prod(2 ** _bits(side) for side in stage.out_size)
    return kernel, neuron


def _bits(count: int) -> int:
    """⌈log2 count⌉."""
    return max(0, count - 1).bit_length()
