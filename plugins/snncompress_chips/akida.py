"""Akida 1 (AKD1000) and Akida 2 of BrainChip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from snncompress.extend import Limit, Stage, Target

_ONE = "BrainChip, Akida 1.0 hardware constraints (brainchip-inc.github.io/akida_examples, user guide), 2026-11-26"
_TWO = "BrainChip, Akida 2.0 capabilities (doc.brainchipinc.com/user_guide/hardware/2.0.html), 2026-11-26"
_FILTERS = {(1, 3): 512, (1, 5): 192, (1, 7): 96, (3, 3): 192, (3, 5): 64, (3, 7): 32}
_FIELDS = ("layers", "weight_bits", "kernel_sizes", "strides", "dilations", "pooling", "pool_sizes")
_CAVEAT = (
    "Layers alone are looked at. Akida's tools take quantized networks of theirs (CNN2SNN), whose spikes carry numbers "
    "of 1 to 8 bits; how many layers its processors hold isn't looked at."
)


@dataclass(frozen=True)
class Akida1(Target):
    """Akida 1 (AKD1000): weights of up to 4 bits, kernels of 1, 3, 5 and 7, max pooling of 2 × 2.

    The first convolution, which reads images of 1 or 3 channels, has other limits: 8 bits, kernels from 3 on, strides
    up to 3, and for each kernel a greatest number of filters.
    """

    name: ClassVar[str] = "akida1"
    sources: ClassVar[Mapping[str, str]] = MappingProxyType({**dict.fromkeys(_FIELDS, _ONE), "rules": _ONE})
    caveat: ClassVar[str] = _CAVEAT

    layers: tuple[str, ...] | None = ("convolution", "linear")
    weight_bits: int | None = 4
    kernel_sizes: tuple[int, ...] | None = (1, 3, 5, 7)
    strides: tuple[int, ...] | None = (1, 2)
    dilations: tuple[int, ...] | None = (1,)
    pooling: tuple[str, ...] | None = ("max",)
    pool_sizes: tuple[int, ...] | None = (1, 2)

    def limits(self, stage: Stage) -> Iterator[Limit]:
        """With those of the first layer where it is a convolution, and those of a linear one."""
        if stage.kind == "linear":
            plain = dataclasses.replace(stage, kernel_size=(), stride=(), padding=(), dilation=())
            yield from super().limits(plain)
            yield Limit.most("inputs of the layer", stage.fan_in, 57_334)
        elif stage.reads:
            yield from super().limits(stage)
            yield from _same(stage)
            if max(stage.stride, default=1) == 2:
                yield Limit.among("kernel size at stride 2", stage.kernel_size[0], (3,), "take a kernel of 3 × 3")
        else:
            other = dataclasses.replace(self, weight_bits=8, kernel_sizes=(3, 5, 7), strides=(1, 2, 3))
            yield from super(Akida1, other).limits(stage)
            yield from _image(stage)
            yield Limit.most("width of the image", stage.in_size[-1], 256, "take smaller images")
            filters = _FILTERS.get((stage.in_channels, stage.kernel_size[0]))
            if filters is not None:
                yield Limit.most("filters of the first layer", stage.out_channels, filters)


@dataclass(frozen=True)
class Akida2(Target):
    """Akida 2: weights of 8 bits (or 4), kernels of 1, 3, 5 and 7, max pooling of 2 × 2, 2,048 channels.

    The first convolution, which reads images of 1 or 3 channels, has kernels from 3 on (4 too), and strides up to
    their size, or 6.
    """

    name: ClassVar[str] = "akida2"
    sources: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**dict.fromkeys((*_FIELDS, "channels", "in_size"), _TWO), "rules": _TWO}
    )
    caveat: ClassVar[str] = _CAVEAT

    layers: tuple[str, ...] | None = ("convolution", "transposed convolution", "linear")
    weight_bits: int | None = 8
    kernel_sizes: tuple[int, ...] | None = (1, 3, 5, 7)
    strides: tuple[int, ...] | None = (1, 2)
    dilations: tuple[int, ...] | None = (1,)
    pooling: tuple[str, ...] | None = ("max",)
    pool_sizes: tuple[int, ...] | None = (2,)
    channels: int | None = 2048
    in_size: int | None = 4096

    def limits(self, stage: Stage) -> Iterator[Limit]:
        """With those of the first layer where it is a convolution, of a transposed and of a linear one."""
        if stage.kind == "linear":
            plain = dataclasses.replace(
                stage, kernel_size=(), stride=(), padding=(), dilation=(), in_channels=stage.fan_in
            )
            yield from super().limits(dataclasses.replace(plain, in_size=()))
        elif stage.kind == "transposed convolution":
            yield from super(Akida2, dataclasses.replace(self, kernel_sizes=(3, 4), strides=(2,))).limits(stage)
        elif stage.reads:
            yield from super().limits(stage)
            yield from _same(stage)
        else:
            steps = tuple(range(1, min(stage.kernel_size[0], 6) + 1))
            other = dataclasses.replace(self, kernel_sizes=(3, 4, 5, 7), strides=steps)
            yield from super(Akida2, other).limits(stage)
            yield from _image(stage)


def _image(stage: Stage) -> Iterator[Limit]:
    yield Limit.among("channels of the image", stage.in_channels, (1, 3), "take images of 1 or 3 channels")


def _same(stage: Stage) -> Iterator[Limit]:
    """Behind the first layer, maps keep their size."""
    kernel = stage.kernel_size[0]
    yield Limit.among(f"padding of a kernel of {kernel}", stage.padding[0], (kernel // 2,), "pad by half the kernel")
