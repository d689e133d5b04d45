"""Energy of arithmetic, addressing and memory, after Lemaire et al."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from snncompress.extend import EnergyModel, MemoryUse, OperationCounts, OptionError

_WORD = 4.0  # bytes
_SRAM = ((0.0, 0.0), (8192.0, 10.0), (32768.0, 20.0), (1048576.0, 100.0))
"""Bytes that a memory holds, and picojoules for 32 bits read from it or written to it."""


@dataclass(frozen=True)
class Lemaire45nm(EnergyModel):
    """E = E_arithmetic + E_addressing + E_memory, with memories as large as what each layer holds.

    Memory, 32 bits at a time, at a price that grows with the memory's size from 0 to 10 pJ (8 KiB), 20 pJ (32 KiB) and
    100 pJ (1 MiB and above), linearly in between; weights of b bits cost b/32 of it:

        every synapse met    reads a weight; for a spike, also reads and writes a potential
        every output         reads its bias
        every spike          is read from a queue, and written to one where it is fired
        every analog value   is read once by a linear layer, by a convolution for every product
        every neuron update  reads and writes its potential

    Addressing: an addition per synapse that a spike meets, and per spike two multiply-accumulates in a convolution; per
    analog value, output and tap of a convolution's filters an addition. Arithmetic: an addition per accumulate, bias
    and reset, a multiply-accumulate per product, and per neuron update where neurons leak. Where a network is ordinary,
    its outputs are written. What is neither a layer with weights nor neurons (normalizations and poolings that are
    counted, products outside layers) costs arithmetic alone.

    Args:
        add_pj: picojoules per addition, 32-bit integers.
        mul_pj: picojoules per multiplication.
        queue: spikes that a queue holds, at 4 bytes each.
        leaky: whether a neuron update takes a multiplication.

    Raises:
        OptionError: an energy or the queue is negative, infinite or NaN.

    Source: E. Lemaire et al., "An Analytical Estimation of Spiking Neural Networks Energy Efficiency", ICONIP 2022
    (arXiv 2210.13107), with energies of M. Horowitz, ISSCC 2014, as SpikingJelly 2.0 reads it. Where the paper's
    equation for linear layers multiplies by the inputs once more, each spike meets its synapses once. Its convolutions
    let a spike at the border meet as many weights as one in the middle, and count all taps whatever the stride; here
    synapses are those that exist.

    Example:
        10 spikes that meet 4 synapses each, of 12 × 4 weights: 192 bytes of weights, 16 of potentials, 4,000 of queue.

        >>> from snncompress.extend import MemoryUse, OperationCounts
        >>> use = MemoryUse(n_weights=48, out_channels=4, input_size=12, output_size=4, n_spikes_in=10, n_outputs=40)
        >>> memory = 40 * (10 * 192 / 8192 + 2 * 10 * 16 / 8192) + 10 * 10 * 4000 / 8192
        >>> energy = Lemaire45nm().energy_pj(OperationCounts(n_ac=40, n_mac=0, memory=use))
        >>> round(energy - memory, 9)                                    # 40 additions, 40 addresses
        8.0
    """

    name: ClassVar[str] = "lemaire_45nm"
    covers: ClassVar[str] = "arithmetic, addressing and memory"

    add_pj: float = 0.1
    mul_pj: float = 3.1
    queue: int = 1000
    leaky: bool = True

    def __post_init__(self) -> None:
        for field, value in (("add_pj", self.add_pj), ("mul_pj", self.mul_pj), ("queue", self.queue)):
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"lemaire_45nm: {field} must be a number ≥ 0, not {value!r}.")

    def energy_pj(self, counts: OperationCounts) -> float:
        """Energy of these operations and of what they take from memory, in picojoules."""
        mac_pj, use = self.mul_pj + self.add_pj, counts.memory
        energy = counts.n_ac * self.add_pj + counts.n_mac * mac_pj
        if self.leaky:
            energy += counts.n_neuron_updates * mac_pj
        if use is None:
            return energy
        if not use.n_weights:
            return energy + self._neurons(use)
        return energy + self._layer(counts.n_ac, counts.n_mac, use)

    def _neurons(self, use: MemoryUse) -> float:
        potentials = 2 * use.n_outputs * _access(use.output_size * _WORD)
        return potentials + use.n_spikes_out * (self.add_pj + self._queue_pj)

    def _layer(self, n_ac: float, n_mac: float, use: MemoryUse) -> float:
        weight = use.weight_bits / 32
        parameters = _access(use.n_weights * weight * _WORD + use.n_biases * _WORD)
        taps = use.out_channels * math.prod(use.kernel_size) if use.kernel_size else 0
        energy = (n_ac + n_mac) * weight * parameters
        if use.n_biases:
            energy += use.n_outputs * (parameters + self.add_pj)
        energy += use.n_spikes_in * self._queue_pj + 2 * n_ac * _access(use.output_size * _WORD)
        energy += n_ac * self.add_pj
        if use.kernel_size:
            energy += 2 * use.n_spikes_in * (self.mul_pj + self.add_pj)
        if n_mac:
            reads = n_mac if use.kernel_size else use.n_values_in
            energy += reads * _access(use.input_size * _WORD)
            energy += (use.n_values_in + use.n_outputs + taps) * self.add_pj
        return energy + use.n_values_out * _access(use.output_size * _WORD)

    @property
    def _queue_pj(self) -> float:
        return _access(self.queue * _WORD)


def _access(size: float) -> float:
    """Picojoules for 32 bits of a memory of that many bytes."""
    for (low, before), (high, after) in itertools.pairwise(_SRAM):
        if size <= high:
            return before + (after - before) * (size - low) / (high - low)
    return _SRAM[-1][1]
