"""Xylo of SynSense: one core of leaky neurons for 16 input channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from snncompress.extend import Limit, Placement, Stage, Target

_OVERVIEW = "Rockpool documentation, Overview of the Xylo family (rockpool.ai/devices/xylo-overview.html), 2026-11-26"
_QUANTIZE = "Rockpool 3.1.0, rockpool/transform/quantize_methods.py, channel_quantize(), 2026-11-26"
_MAPPER = "Rockpool 3.1.0, rockpool/devices/xylo/syns61201/xylo_mapper.py, design rules, 2026-11-26"
_SOURCES = MappingProxyType(
    {
        "layers": f"{_OVERVIEW}; convolutions would have to be written out",
        "weight_bits": _OVERVIEW,
        "scales": f"thresholds are set neuron by neuron: {_OVERVIEW}",
        "state_bits": "Rockpool 3.1.0, rockpool/devices/xylo/syns61201/xa2_devkit_utils.py, int16, 2026-11-26",
        "threshold_bits": _QUANTIZE,
        "neuron_models": f"{_OVERVIEW}; a shift that is too large takes one in a timestep",
        "resets": _OVERVIEW,
        "inputs": _OVERVIEW,
        "events": _OVERVIEW,
        "operations": f"recurrent and residual spiking networks: {_OVERVIEW}",
        "rules": f"{_OVERVIEW}; {_MAPPER}",
    }
)


@dataclass(frozen=True)
class XyloAudio2(Target):
    """Xylo Audio 2 (SYNS61201): 16 inputs, 1,000 hidden neurons, 8 outputs; a hidden neuron reaches up to 64 others.

    The network is written out: every layer but the last is a part of the hidden population. Two layers at least, and
    biases are left out, as Rockpool's mapper has it. What its neurons do is seen in SynSense's simulation, xylosim
    0.1.3, run by Rockpool 3.1.0's XyloSim, 2026-11-26: a synapse leaks behind what it gets, dash 0 leaves nothing and
    dash 1 half; dash 15, a shift too large for 16 bits, takes one; a potential of n thresholds is n spikes.
    """

    name: ClassVar[str] = "xylo_audio2"
    sources: ClassVar[Mapping[str, str]] = _SOURCES
    caveat: ClassVar[str] = (
        "Neurons have a synaptic current beside their potential, leaks are shifts, and take one at least; average "
        "fan-outs aren't looked at."
    )
    unlike: ClassVar[str] = (
        "each of its neurons has a synaptic current that no setting leaves out (8 comes in as 4, 2 and 1, or not at "
        "all), current and potential lose one in every timestep at least, and it fires up to 31 times in one"
    )
    hidden: ClassVar[int] = 1000
    outputs: ClassVar[int] = 8
    fan_out: ClassVar[int] = 64
    projected: ClassVar[int] = 1000
    """Hidden neurons that inputs reach, and those that reach outputs."""

    layers: tuple[str, ...] | None = ("linear",)
    weight_bits: int | None = 8
    scales: Literal["layer", "channel"] | None = "channel"
    state_bits: int | None = 16
    threshold_bits: int | None = 16
    neuron_models: tuple[str, ...] | None = ("if", "lif")
    resets: tuple[str, ...] | None = ("subtract",)
    inputs: int | None = 16
    events: bool | None = True
    operations: tuple[str, ...] | None = ("sum", "recurrence")

    def limits(self, stage: Stage) -> Iterator[Limit]:
        """And where it stands: what inputs reach, what reaches outputs, how many others a hidden neuron reaches."""
        yield from super().limits(stage)
        if stage.biased:
            yield Limit("biases", "some", "none", False, "train it without biases and batch norms")
        if not stage.reads and stage.feeds:
            yield Limit.most("neurons that inputs reach", stage.neurons, self.projected)
        if not stage.feeds:
            yield Limit.most("outputs", stage.neurons, self.outputs, "let the network tell fewer classes apart")
            if stage.reads:
                yield Limit.most("neurons that reach outputs", stage.fan_in, self.projected)
        elif stage.reads or stage.recurrent:
            yield Limit.most("neurons that a neuron reaches", stage.neurons, self.fan_out)

    def place(self, stages: Sequence[Stage]) -> Placement:
        """All on the one core, if there are few enough."""
        hidden = sum(stage.neurons for stage in stages if stage.feeds)
        limits = (
            Limit.most("hidden neurons", hidden, self.hidden),
            Limit("layers", len(stages), "2 or more", len(stages) > 1, "put a layer of hidden neurons before the last"),
        )
        return Placement({stage.name: (0,) for stage in stages}, limits)


@dataclass(frozen=True)
class XyloAudio3(XyloAudio2):
    """Xylo Audio 3 (SYNS65302): 16 inputs into 128 of 992 hidden neurons, 32 outputs of 128 of them."""

    name: ClassVar[str] = "xylo_audio3"
    hidden: ClassVar[int] = 992
    outputs: ClassVar[int] = 32
    fan_out: ClassVar[int] = 1024
    projected: ClassVar[int] = 128


@dataclass(frozen=True)
class XyloIMU(XyloAudio2):
    """Xylo IMU (SYNS63300): 16 inputs into 128 of 496 hidden neurons, 16 outputs of 128 of them; 31,744 weights."""

    name: ClassVar[str] = "xylo_imu"
    hidden: ClassVar[int] = 496
    outputs: ClassVar[int] = 16
    fan_out: ClassVar[int] = 512
    projected: ClassVar[int] = 128
    weights: ClassVar[int] = 31_744
    """Between hidden neurons."""
    sources: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **_SOURCES,
            "rules": f"{_SOURCES['rules']}; Rockpool documentation, Introduction to Xylo IMU, 2026-11-26",
        }
    )

    def place(self, stages: Sequence[Stage]) -> Placement:
        """And the weights between hidden neurons."""
        found = super().place(stages)
        inner = sum((stage.weights if stage.reads else stage.recurrent) for stage in stages if stage.feeds)
        return Placement(
            found.cores, (*found.limits, Limit.most("weights between hidden neurons", inner, self.weights))
        )
