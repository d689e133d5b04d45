"""Exact operation counts of weight layers, streamed: a running sum per layer and no history.

An input position's *fan-out* is the number of synapses that start there: the output positions it reaches
through a weight that exists. The operations of a layer are then one elementwise product,

    Σ_i |x_i| · fan_out_i       spikes: accumulates
    Σ_i [x_i ≠ 0] · fan_out_i   analog: multiply-accumulates ([x_i ≠ 0] → 1 where zero inputs count)

and fan_out is the gradient of Σ layer(x; W → [W ≠ 0], bias → 0) with respect to x, a transposed convolution
that is computed once per layer and input shape, in float64, where whole numbers up to 2⁵³ are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from snncompress.errors import DataError, ModelError, PluginError, SNNCompressError
from snncompress.interfaces import EnergyModel, MemoryUse, OperationCounts
from snncompress.model.network import POOLS, WEIGHT_LAYERS
from snncompress.model.weights_in_use import weight_in_use

from .conventions import Conventions, SpikeValues, resolve_conventions
from .direct_encoding import Clock, Repetition

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
FLOAT_BITS = 32
_EXACT = 2**24  # all whole numbers up to it are float32s
_SUMS = (
    "spiking", "input_sum", "input_elements", "_ac", "_mac", "_bias", "_values", "_outputs", "_before", "_once",
)  # fmt: skip
_MAPS_KEPT = 16  # shapes per layer; more only where every batch has a size of its own


def is_spikes(x: Tensor, values: SpikeValues = "integers") -> bool:
    """Whether every value of ``x`` is a spike in the sense of :attr:`Conventions.spike_values`.

    NaN and infinity never are.

    >>> [is_spikes(torch.tensor([0.0, v])) for v in (0.0, 1.0, 2.0, -1.0, 0.5)]
    [True, True, True, True, False]
    >>> [is_spikes(torch.tensor([0.0, 0.5]), v) for v in ("integers", "ternary", "binary", "two_valued")]
    [False, False, False, True]
    """
    if values == "integers":
        if not x.is_floating_point() or not x.numel():
            return True
        low, high = torch.aminmax(x.frac())  # one pass each, where comparing takes two; NaN stays NaN
        return bool(low == 0) and bool(high == 0)
    if values == "two_valued":
        low, high = torch.aminmax(x)
        return bool(low >= 0) and bool(high <= 1) and bool((x.eq(low) | x.eq(high)).all())
    unit = x.eq(1) if values == "binary" or x.dtype == torch.bool else x.abs().eq(1)
    return bool((x.eq(0) | unit).all())


def fan_out(
    layer: nn.Module,
    sample_shape: Sequence[int],
    output_shape: Sequence[int] | None = None,
    *,
    zero_weights: bool = False,
) -> Tensor:
    """Synapses per input position of one sample, float64, shaped ``sample_shape``.

    ``sample_shape`` is [C, *spatial] for a convolution and [in_features] for a linear layer. ``output_shape``
    (its spatial part at least) settles the size of a transposed convolution that was called with
    ``output_size``. Weights that are exactly 0 are no synapses unless ``zero_weights``; padding starts no
    synapses, unless ``padding_mode`` fills it with copies of real inputs. A parametrized weight is taken as
    the layer sees it.

    Raises:
        ModelError: ``layer`` is not a convolution, transposed convolution or linear layer.

    >>> layer = nn.Conv2d(1, 1, 2)          # 4 output positions; the centre reaches them all
    >>> fan_out(layer, (1, 3, 3))
    tensor([[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]], dtype=torch.float64)
    """
    weight = _weight(layer).detach()
    # In float64; on the CPU where the device has none.
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    # in float32, where the sum of a layer's outputs is a whole number that is exact, as summing booleans takes long
    mask = torch.empty_like(weight, dtype=torch.float32, device=device)
    mask = mask.fill_(1) if zero_weights else torch.ne(weight.to(device), 0, out=mask)
    mask = _summed_outputs(layer, mask).double()
    if isinstance(layer, nn.Linear):
        return mask[0]
    # Users may run their model in inference mode, where no gradient could be taken.
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, *sample_shape, dtype=torch.float64, device=device, requires_grad=True)
        total = _convolve(cast(_ConvNd, layer), x, mask.clone(), output_shape).sum()
        return torch.autograd.grad(total, x)[0][0].round()  # some GPU convolutions are whole only to rounding


def count_operations(layer: nn.Module, x: Tensor, conventions: Conventions | str | None = None) -> OperationCounts:
    """Operations of ``layer`` on ``x``, in all: not divided by samples.

    ``x`` has any number of leading dimensions: [C, H, W], [N, C, H, W] or [T, N, C, H, W] for a 2-D
    convolution.

    Raises:
        ModelError: ``layer`` is not a convolution, transposed convolution or linear layer.
        DataError: ``x`` doesn't fit the layer.

    >>> layer = nn.Linear(3, 4)
    >>> count_operations(layer, torch.tensor([[1.0, 0.0, 2.0]]))         # 3 spikes × 4 synapses
    OperationCounts(n_ac=12, n_mac=0, n_neuron_updates=0.0)
    >>> count_operations(layer, torch.tensor([[1.0, 0.0, 0.5]]))         # analog: 3 × 4 products
    OperationCounts(n_ac=0, n_mac=12, n_neuron_updates=0.0)
    >>> count_operations(layer, torch.tensor([[1.0, 0.0, 0.5]]), "neurobench")
    OperationCounts(n_ac=0, n_mac=8, n_neuron_updates=0.0)
    """
    _weight(layer)
    flat = x.reshape(-1, *x.shape[x.dim() - _sample_dims(layer) :])
    try:
        with torch.no_grad():
            mask, like = _weight(layer), flat[:1]
            output = (
                F.linear(like, mask) if isinstance(layer, nn.Linear) else _convolve(cast(_ConvNd, layer), like, mask)
            )
    except RuntimeError as error:
        raise DataError(f"{type(layer).__name__} can't take an input of shape {list(x.shape)}: {error}") from error
    counter = WeightCounter(layer, resolve_conventions(conventions))
    counter.add(x, (len(flat), *output.shape[1:]))
    return OperationCounts(*counter.totals())


class WeightCounter:
    """Running operation counts of one weight layer: :meth:`add` once per call, then :meth:`totals`.

    :meth:`end_batch` tells what time it was, so that a constant input can be charged once.

    In an ``analog`` network no input is taken for spikes, whatever its values.
    """

    def __init__(self, layer: nn.Module, conventions: Conventions, analog: bool = False) -> None:
        self.layer, self.conventions, self.analog = layer, conventions, analog
        self.spiking = not analog
        """Whether every input so far was spikes."""
        self.input_sum, self.input_elements = 0.0, 0
        self._ac: float = 0
        self._mac = self._bias = self._values = self._outputs = 0
        self._repetition = Repetition()
        self._before: tuple[int, ...] = (0, 0, 0, 0)
        self._once: tuple[int, ...] = (0, 0, 0, 0)
        """Multiply-accumulates, biases, values read and outputs up to this batch; those that a constant input needs."""
        self._shapes: tuple[Sequence[int], Sequence[int]] = ((1, 0), (1, 0))
        self._sizes = (0.0, 0.0)
        self._maps: dict[tuple[int, ...], Tensor] = {}
        self._synapses: int | None = None

    def add(self, x: Tensor, output_shape: Sequence[int], sums: Tensor | None = None) -> None:
        """Count one call of the layer: input ``x`` [..., C, *spatial], the shape of its output.

        Where ``x`` is an average of spikes, ``sums`` is how many of them each value stands for.
        """
        c, x = self.conventions, x.detach()
        # Decided per run, a layer that was analog once stays so and needs no further look.
        undecided = not self.analog and (self.spiking or c.spike_scope == "call")
        spiking = undecided and (sums is not None or is_spikes(x, c.spike_values))
        self.spiking = self.spiking and spiking
        has_bias = getattr(self.layer, "bias", None) is not None
        bias = math.prod(output_shape) if c.bias and has_bias else 0
        ac: float = 0
        per_position = spike_sum(x if sums is None else sums, _sample_dims(self.layer)) if spiking else None
        if c.direct_encoding == "once" and not self.analog:
            self._repetition.add(x, per_position)
        if per_position is not None:
            total = float(per_position.sum())
            self.input_sum, self.input_elements = self.input_sum + total, self.input_elements + x.numel()
            if c.counting == "exact":
                ac = self._weighted(per_position, output_shape)
            else:
                ac = (self._dense(x, output_shape) + bias) * (total / x.numel())
        mac = 0
        # Decided per run, both are kept: a later batch may still turn a spiking layer into an analog one.
        if not spiking or c.spike_scope == "run":
            mac = self._macs(x, output_shape) if c.counting == "exact" else self._dense(x, output_shape) + bias
            self._values += x.numel()
        if c.counting == "exact":
            self._bias += bias
        self._outputs += math.prod(output_shape)
        self._shapes = x.shape, output_shape
        self._ac, self._mac = self._ac + ac, self._mac + mac

    def end_batch(self, clock: Clock) -> None:
        """The calls since the last batch were all of one, in which the neurons saw this."""
        steps, counts = self._repetition.end_batch(clock), self._foreseen
        new = (now - before for now, before in zip(counts, self._before, strict=True))
        self._once = tuple(once + count // steps for once, count in zip(self._once, new, strict=True))
        self._before = counts
        rows = clock.rows(self._shapes[0])
        self._sizes = math.prod(self._shapes[0]) / max(rows, 1), math.prod(self._shapes[1]) / max(rows, 1)

    def sums(self) -> dict[str, Any]:
        """What :meth:`take` takes, of this process; what several have is added."""
        return {**{name: getattr(self, name) for name in _SUMS}, "holds": self._repetition.holds}

    def take(self, sums: Mapping[str, Any]) -> None:
        """Go on as if all of it had been counted here."""
        for name in _SUMS:
            setattr(self, name, sums[name])
        self._repetition.holds = sums["holds"]

    @property
    def _foreseen(self) -> tuple[int, ...]:
        """What a constant input needs once, of all timesteps."""
        return self._mac, self._bias, self._values, self._outputs

    @property
    def _needed(self) -> tuple[int, ...]:
        """The same, once where the input was constant."""
        if self.spiking or not self._repetition.holds:
            return self._foreseen
        new = (now - before for now, before in zip(self._foreseen, self._before, strict=True))
        return tuple(once + count for once, count in zip(self._once, new, strict=True))

    def memory(self, divisor: float, bits: int) -> MemoryUse:
        """What the layer holds, takes in and puts out, over a divisor."""
        _, _, values, outputs = self._needed
        by_call = self.conventions.spike_scope == "call"
        return MemoryUse(
            input_size=self._sizes[0],
            output_size=self._sizes[1],
            n_spikes_in=self.input_sum / divisor if self.spiking or by_call else 0.0,
            n_values_in=values / divisor if by_call or not self.spiking else 0.0,
            n_outputs=outputs / divisor,
            n_values_out=outputs / divisor if self.analog else 0.0,
            **_stored(self.layer, bits),
        )

    def totals(self) -> tuple[float, float]:
        """Accumulates and multiply-accumulates so far, over all calls and samples."""
        mac, bias, _, _ = self._needed
        if self.conventions.spike_scope == "call":
            return self._ac + bias, mac
        return (self._ac + bias, 0) if self.spiking else (bias, mac)

    @property
    def input_rate(self) -> float | None:
        """Spikes per input and timestep; None where the input isn't spikes, or the layer never ran."""
        return self.input_sum / self.input_elements if self.spiking and self.input_elements else None

    def _macs(self, x: Tensor, output_shape: Sequence[int]) -> int:
        if self.conventions.zero_inputs:
            return self._dense(x, output_shape)
        return self._weighted(spike_sum(x.ne(0), _sample_dims(self.layer)), output_shape)

    def _dense(self, x: Tensor, output_shape: Sequence[int]) -> int:
        """Synapses of all inputs, zeros too."""
        dims = _sample_dims(self.layer)
        samples = math.prod(x.shape[: x.dim() - dims])
        if not self.conventions.padding:
            return samples * int(self._map(x.shape[x.dim() - dims :], output_shape).sum())
        if self._synapses is None:
            weight = _weight(self.layer)
            self._synapses = weight.numel() if self.conventions.zero_weights else int(weight.count_nonzero())
        # With padding, every weight meets every output position (transposed: every input position).
        shape = x.shape if isinstance(self.layer, _ConvTransposeNd) else output_shape
        return samples * self._synapses * math.prod(shape[len(shape) - dims + 1 :])

    def _weighted(self, per_position: Tensor, output_shape: Sequence[int]) -> int:
        return int((per_position * self._map(per_position.shape, output_shape)).sum())

    def _map(self, sample_shape: Sequence[int], output_shape: Sequence[int]) -> Tensor:
        key = (*sample_shape, *output_shape[len(output_shape) - len(sample_shape) :])
        if key not in self._maps:
            if len(self._maps) >= _MAPS_KEPT:
                self._maps.clear()
            self._maps[key] = fan_out(
                self.layer, sample_shape, output_shape, zero_weights=self.conventions.zero_weights
            )
        return self._maps[key]


def energy_of(energy: EnergyModel, counts: OperationCounts) -> float:
    """What a plugin takes these operations to cost, in pJ; raises PluginError for what is no energy."""
    try:
        value = energy.energy_pj(counts)
    except SNNCompressError:
        raise
    except Exception as error:  # it is a plugin's: anything can come out of it
        raise PluginError(f"Energy model {energy.name!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise PluginError(
            f"Energy model {energy.name!r}: energy_pj({counts}) must be a number of at least 0, not {value!r}."
        )
    return float(value)


class PlainCounter:
    """Running operation counts of a normalization or pooling layer, for conventions that count them."""

    def __init__(self, layer: nn.Module, conventions: Conventions, analog: bool = False) -> None:
        self.conventions, self.analog = conventions, analog
        # A normalization without an affine part saves one operation per element.
        affine = getattr(layer, "weight", None) is not None
        self.is_pool = isinstance(layer, POOLS)
        self.per_element = (
            int(conventions.pooling) if self.is_pool else max(conventions.batch_norm_ops - (not affine), 0)
        )
        self.n_ac, self.n_mac = 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Count one call on input ``x``."""
        c = self.conventions
        if not self.analog and (self.is_pool or c.counting == "rate") and is_spikes(x, c.spike_values):
            self.n_ac += self.per_element * float(spike_sum(x))
        else:
            self.n_mac += self.per_element * x.numel()


def _stored(layer: nn.Module, bits: int) -> dict[str, Any]:
    """What is known of a layer without running it, as fields of a :class:`MemoryUse`."""
    weight, bias = _weight(layer), getattr(layer, "bias", None)
    kernel = () if isinstance(layer, nn.Linear) else tuple(cast(_ConvNd, layer).kernel_size)
    return {
        "n_weights": weight.numel(),
        "weight_bits": bits,
        "n_biases": 0 if bias is None else bias.numel(),
        "kernel_size": kernel,
        "out_channels": cast(_ConvNd, layer).out_channels if kernel else cast(nn.Linear, layer).out_features,
    }


def _sample_dims(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Linear) else 1 + len(cast(_ConvNd, layer).kernel_size)


def _weight(layer: nn.Module) -> Tensor:
    if not isinstance(layer, WEIGHT_LAYERS):
        raise ModelError(
            f"Operations are counted for convolutions, transposed convolutions and linear layers, not for "
            f"{type(layer).__name__}."
        )
    used = weight_in_use(layer)
    return layer.weight if used is None else used


def spike_sum(x: Tensor, dims: int = 0) -> Tensor:
    """Σ |x| over all but the last ``dims`` dimensions, as float64; exact for whole numbers.

    Summed in float32, which takes a tenth of the time, where that is as exact: up to 2²⁴.

    >>> spike_sum(torch.tensor([[2.0, -1.0], [0.0, 1.0]]), 1)
    tensor([2., 2.], dtype=torch.float64)
    """
    if x.device.type == "mps":  # has no float64
        x = x.cpu()
    x = x.reshape(-1, *x.shape[x.dim() - dims :])
    if x.dtype == torch.bool:
        return x.view(torch.uint8).sum(0, dtype=torch.int64).double()
    x = x.abs()
    if x.dtype == torch.float32:
        total = x.sum(0)
        if not total.numel() or bool(total.max() < _EXACT):
            return total.double()
    return x.sum(0, dtype=torch.float64)


def _summed_outputs(layer: nn.Module, mask: Tensor) -> Tensor:
    """The synapses of all outputs of a group in one: a weight like the layer's, with one output per group."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):
        return mask.sum(1, keepdim=True)
    return mask.view(groups, -1, *mask.shape[1:]).sum(1)


def _convolve(layer: _ConvNd, x: Tensor, weight: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
    """What ``layer`` computes with this weight and without bias."""
    dims = len(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        padding = cast(tuple[int, ...], layer.padding)
        extra = layer.output_padding
        if output_shape is not None:
            extra = tuple(
                out - ((size - 1) * s - 2 * p + d * (k - 1) + 1)
                for out, size, s, p, d, k in zip(
                    output_shape[len(output_shape) - dims :], x.shape[2:],
                    layer.stride, padding, layer.dilation, layer.kernel_size, strict=True,
                )
            )  # fmt: skip
        return cast(
            Tensor,
            _CONV_TRANSPOSE[dims](x, weight, None, layer.stride, padding, extra, layer.groups, layer.dilation),
        )
    # Padded by hand also where the layer's padding is "same": F.conv would warn of a copy for even kernels.
    x = F.pad(x, _pads(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    return cast(Tensor, _CONV[dims](x, weight, None, layer.stride, 0, layer.dilation, layer.groups))


def _pads(layer: _ConvNd) -> list[int]:
    """``layer.padding`` as F.pad wants it: last dimension first, both sides."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(p, p) for p in cast(tuple[int, ...], layer.padding)]
    return [side for pair in reversed(sides) for side in pair]
