"""Counting conventions: what counts as an operation, and what the counters of the field take it for.

    E = N_AC · 0.9 pJ + N_MAC · 4.6 pJ        (Horowitz, ISSCC 2014: 45 nm, 32-bit floating point)

An AC is one addition caused by one spike through one existing synapse; a layer whose input isn't spikes costs
MACs. That leaves questions which the counters in use answer differently, so that their numbers can't be
compared. Here each answer is a field of :class:`Conventions`, printed with every profile, and :data:`PRESETS`
holds the answers of a paper and of three counters. The counting itself is in :mod:`snncompress.measuring.counting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from snncompress.errors import OptionError, UnknownNameError

Per = Literal["sample", "batch"]
SpikeValues = Literal["integers", "ternary", "binary", "two_valued"]
SpikeScope = Literal["run", "call"]
Counting = Literal["exact", "rate"]
NeuronUpdates = Literal["apart", "in_totals"]
DirectEncoding = Literal["once", "every step"]
AveragedSpikes = Literal["additions", "multiplications"]
Attention = Literal["counted", "not counted"]


@dataclass(frozen=True)
class Conventions:
    """What is counted, and how. The defaults are the ``"snncompress"`` preset.

    Fields:
        per: ``"sample"`` divides the counts by the number of samples, ``"batch"`` by the number of batches.
        zero_weights: whether a weight that is exactly 0 (pruned, or quantized to 0) is a synapse.
        padding: whether the zeros that a convolution pads with are inputs (for a transposed convolution:
            whether the products that its padding cuts off are counted). It matters only where zeros are
            counted at all: in MAC layers with ``zero_inputs``, and with ``counting="rate"``. Values that
            ``padding_mode`` "circular", "reflect" or "replicate" copies are real inputs and always counted.
        zero_inputs: whether an input that is exactly 0 costs MACs. True is what dense hardware does, and
            doesn't let the count depend on the data.
        spike_values: which inputs are spikes. ``"integers"``: every value is a whole number; the value 2, the
            sum of two spikes in a SEW block, is two ACs per synapse, −1 is one. Consequences: an input that
            is all zeros is spikes (it costs nothing); an input of {0, 0.5} isn't (MACs; but see
            ``averaged_spikes``); an image of {0, 1} or of whole grey levels 0 … 255 is, so scale images to [0, 1] as
            one does anyway. ``"ternary"``: {−1, 0, 1}. ``"binary"``: {0, 1}. ``"two_valued"``: at most two
            different values, all in [0, 1], so that {0, 0.5} passes for spikes of half the rate.
        spike_scope: ``"run"`` decides once per layer, on everything that the layer saw in the whole run: one
            fraction anywhere makes it a MAC layer. ``"call"`` decides anew at each call of the layer, which
            is each timestep in networks that step through time: an analog layer is then an AC layer in every
            step in which its input happens to be whole numbers.
        counting: ``"exact"`` adds up, over the spikes that occurred, the synapses of each: Σ |x| · fan-out.
            ``"rate"`` multiplies the dense count by the mean input, as if spikes were spread evenly.
        batch_norm_ops: operations per element of a normalization. 0: folded into the preceding convolution,
            as one does for inference. 1: scale and shift as one MAC. 2: normalization and scale and shift as
            two. One less where the normalization has no affine part. MACs; with ``counting="rate"`` ACs if
            the input is spikes.
        pooling: whether pooling costs one operation per input element (one AC per spike, one MAC per analog
            value).
        bias: whether adding a bias costs one AC per output element (with ``counting="rate"``: the layer's own
            kind of operation, scaled like the rest of the layer).
        direct_encoding: what a layer costs whose analog input is the same at every timestep in the whole run, as the
            first layer's is where an image is fed as constant current. ``"once"``: its multiplications are needed once,
            and their result serves all timesteps, as QP-SNN counts. ``"every step"``: T times. Spikes are counted at
            every step in any case.
        averaged_spikes: what a layer costs whose input is an average of spikes, as an average pooling or a mean over
            positions or time makes it, or spikes of another height, {0, θ}, as those of converted networks.
            ``"additions"``: with 1/n or θ folded into the weights, k spikes in a window of n are k additions per
            synapse. ``"multiplications"``: fractions, so MACs; {0, θ} by its values. They are found where the network
            takes averages, or multiplies spikes (−1, 0 and 1) with one number, or one of its own for each channel, not
            by their values, and followed as far as they are moved about or scaled; what passed a normalization or
            another product is analog again.
        attention: whether products of tensors outside layers are counted, such as q·kᵀ and attn·v: an AC for each spike
            that meets a number other than 0 in the other operand (any number, 0 too, with ``zero_weights``, unless both
            are spikes); MACs where neither operand is spikes, all of them or, without ``zero_inputs``, those of two
            numbers other than 0. Decided at each product, whatever ``spike_scope``. What isn't counted is named in the
            table, and always so are products that torch's attention functions compute inside.
        neuron_updates: ``"apart"`` reports neuron updates in a field of their own; ``"in_totals"`` also
            counts each as one AC.

    Raises:
        OptionError: a field has a value that isn't listed here.

    Examples:
        >>> Conventions()
        Conventions('snncompress')
        >>> Conventions(zero_weights=True, bias=True)
        Conventions(zero_weights=True, bias=True)
        >>> print(PRESETS["neurobench"].describe()[:62])
        neurobench: per sample, exact counts, zero weights not counted
    """

    per: Per = "sample"
    zero_weights: bool = False
    padding: bool = False
    zero_inputs: bool = True
    spike_values: SpikeValues = "integers"
    spike_scope: SpikeScope = "run"
    counting: Counting = "exact"
    batch_norm_ops: int = 0
    pooling: bool = False
    bias: bool = False
    direct_encoding: DirectEncoding = "once"
    averaged_spikes: AveragedSpikes = "additions"
    attention: Attention = "counted"
    neuron_updates: NeuronUpdates = "apart"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "per": get_args(Per),
            "spike_values": get_args(SpikeValues),
            "spike_scope": get_args(SpikeScope),
            "counting": get_args(Counting),
            "batch_norm_ops": (0, 1, 2),
            "direct_encoding": get_args(DirectEncoding),
            "averaged_spikes": get_args(AveragedSpikes),
            "attention": get_args(Attention),
            "neuron_updates": get_args(NeuronUpdates),
        }
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), choices.get(field.name, (False, True))
            # 1 == True, so the type is compared too.
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                listed = ", ".join(repr(choice) for choice in allowed)
                raise OptionError(f"Conventions: {field.name} must be one of {listed}, not {value!r}.")

    @property
    def name(self) -> str:
        """The preset that has these answers, or ``"custom"``."""
        return next((name for name, preset in PRESETS.items() if preset == self), "custom")

    def describe(self) -> str:
        """All answers in one line."""

        def counted(yes: bool) -> str:
            return "counted" if yes else "not counted"

        norm = {0: "folded", 1: "1 operation per element", 2: "2 operations per element"}[self.batch_norm_ops]
        counting = "exact counts" if self.counting == "exact" else "mean rate × dense counts"
        return (
            f"{self.name}: per {self.per}, {counting}, zero weights {counted(self.zero_weights)}, "
            f"padding {counted(self.padding)}, zero inputs of MAC layers {counted(self.zero_inputs)}, "
            f"spikes are {self.spike_values.replace('_', '-')} (decided per {self.spike_scope}), "
            f"batch norm {norm}, pooling {counted(self.pooling)}, bias {counted(self.bias)}, "
            f"constant inputs multiplied {self.direct_encoding}, averaged spikes are {self.averaged_spikes}, "
            f"attention {self.attention}, neuron updates {self.neuron_updates.replace('_', ' ')}"
        )

    def __repr__(self) -> str:
        if self.name != "custom":
            return f"Conventions({self.name!r})"
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return f"Conventions({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


PRESETS: Mapping[str, Conventions] = MappingProxyType(
    {
        "snncompress": Conventions(),
        "qp_snn": Conventions(zero_weights=True, padding=True),
        "neurobench": Conventions(
            zero_inputs=False,
            spike_values="ternary",
            spike_scope="call",
            direct_encoding="every step",
            averaged_spikes="multiplications",
            attention="not counted",
        ),
        "spikingjelly": Conventions(
            zero_weights=True,
            padding=True,
            spike_values="binary",
            spike_scope="call",
            batch_norm_ops=1,
            direct_encoding="every step",
            averaged_spikes="multiplications",
        ),
        "syops": Conventions(
            zero_weights=True,
            padding=True,
            spike_values="two_valued",
            spike_scope="call",
            counting="rate",
            batch_norm_ops=2,
            pooling=True,
            bias=True,
            direct_encoding="every step",
            averaged_spikes="multiplications",
            attention="not counted",
            neuron_updates="in_totals",
        ),
    }
)
"""Named conventions.

``"snncompress"``
    The default: an AC is a spike, a MAC an analog value (0 included) that meets a synapse which exists; a constant
    input is multiplied once, averaged spikes are additions, attention is counted.
``"qp_snn"``
    QP-SNN (ICLR 2025), Table 6: E = 0.9 pJ · T · SOPs + 4.6 pJ · MACs of the first layer, once, which gives the printed
    energies to the last digit. Its SOPs are per timestep; ``n_ac`` here is of all T. What the paper leaves open:
    padding and zero weights are counted, as in the dense counts of such tables; without padding the three energies
    come out alike.
``"neurobench"``
    NeuroBench 2.3 ``SynapticOperations``: ``n_ac`` = Effective_ACs, ``n_mac`` = Effective_MACs. Zero weights,
    zero inputs and padding excluded, no bias, normalization or pooling; {−1, 0, 1} are spikes, decided at
    each call; an input that doesn't change is multiplied at every step, averages are fractions, attention isn't
    looked at. Not reproduced: its float32 sums lose single operations beyond 2²⁴ per call; transposed
    convolutions, which NeuroBench leaves out, are counted here; ``nn.RNNCell`` and the like aren't.
``"spikingjelly"``
    SpikingJelly 2.0 op_counter: ``n_ac`` = ``SynOpCounter``, ``n_mac`` = ``MACCounter``, both divided by the
    samples. Exact fan-out of {0, 1} spikes, decided at each call (so one all-zero timestep of an analog input
    costs nothing in single-step mode); zero weights counted; MAC layers dense with padding; BN one MAC per
    element; averages are fractions. Of matrix products (attention) the pairs of two spikes, or, where one operand is
    all 0 and 1, all that its spikes meet. Not reproduced: layers whose *weights* are all 0 or 1 (taken for spikes
    there), and the additions inside neurons and poolings that its ``ACCounter`` has.
``"syops"``
    syops-counter 0.0.5: dense counts with padding × mean input, bias with the layer, BN two operations,
    pooling one per input, one AC per neuron update; two values in [0, 1] are spikes. Not reproduced: it adds
    a linear layer's bias once per call instead of once per sample; it takes the first dimension of the
    model's input for the samples, which is T in multi-step mode; it uses output positions for transposed
    convolutions; it knows exact module types only, so that SpikingJelly's own layers count as nothing; ReLU
    and upsampling, which it counts, aren't weight layers.
"""


def resolve_conventions(value: Conventions | str | None) -> Conventions:
    """The conventions a user means: None is the default, a string a preset.

    Raises:
        UnknownNameError: there is no preset of that name.
        OptionError: neither None, a string nor Conventions.

    Examples:
        >>> resolve_conventions("neurobench").zero_inputs
        False
    """
    if value is None:
        return PRESETS["snncompress"]
    if isinstance(value, Conventions):
        return value
    if not isinstance(value, str):
        raise OptionError(f"conventions must be None, a preset's name or snncompress.Conventions, not {value!r}.")
    if value not in PRESETS:
        raise UnknownNameError(
            f"There are no conventions {value!r}. Available: {', '.join(PRESETS)}; or pass "
            f"snncompress.Conventions(...)."
        )
    return PRESETS[value]
