"""A network as a chip sees it: one stage per weight layer, with its neurons and the pooling behind them.

What lies between a layer and what feeds it is read off autograd's graph, so that it doesn't matter whether it is
written as a module or as a function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter, Pooling, Stage
from snncompress.model.brevitas_layers import brevitas_bits
from snncompress.model.copying import plain_copy
from snncompress.model.grids import Grid
from snncompress.model.modules import tensors_in
from snncompress.model.network import WEIGHT_LAYERS, channel_axis, width
from snncompress.model.parametrizations import compression_of, gridded, stored_weight, weight_bits
from snncompress.running.data import Run
from snncompress.running.sameness import wire

from .axes import name_of, signed
from .calls import Calls, upstream

_FLOAT = 32
_MOVES = re.compile(
    r"(Reshape|Unsafe)?(View|Alias)|Permute|Transpose|T|Squeeze|Unsqueeze|Expand|Clone|ToCopy|Select|Slice|Stack|Unbind"
    r"|AsStrided|Repeat|CopyS(lices)?|AccumulateGrad|_(First|All)|ConstantPadNd|Cat|Add|Mul|Div"
    r"|(Native|Cudnn|Miopen)BatchNorm|Dropout"
)
"""What only moves values about, or is looked at on its own below."""


def stages(model: nn.Module, adapter: Adapter, run: Run) -> tuple[Stage, ...]:
    """The weight layers of a model in order of execution; the model itself is not touched.

    Raises ModelError where no weight layer is called. ``analog`` isn't known.
    """
    with torch.inference_mode(False), torch.enable_grad():
        seen = _Seen(plain_copy(model, adapter), adapter, run)
    if not seen.layers:
        raise ModelError(f"{type(model).__name__} calls no convolution or linear layer on this input.")
    return tuple(_stage(seen, name, model, adapter) for name in seen.layers)


@dataclass
class _Way:
    """What a layer, or neurons, read: from where, and what was done with it since."""

    sources: set[str] = field(default_factory=set)
    pooling: list[Pooling] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    norm: bool = False
    flattened: tuple[int, ...] = ()


class _Seen:
    """One run of a copy, whose neurons are wires."""

    def __init__(self, copy: nn.Module, adapter: Adapter, run: Run) -> None:
        self.model = copy
        self.neurons = adapter.neurons(copy)
        self.inside = {f"{n}.{sub}" for n in self.neurons for sub, _ in self.neurons[n].named_modules() if sub}
        weights = {n: m for n, m in copy.named_modules() if isinstance(m, WEIGHT_LAYERS) and n not in self.inside}
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        calls = Calls({name: channel_axis(layer) for name, layer in weights.items()})
        handles = [layer.register_forward_hook(partial(self._note, name)) for name, layer in weights.items()]
        with adapter.identities(copy, wire), calls.watching({**weights, **self.neurons}):
            outputs = [t for t in tensors_in(run(copy)) if t.grad_fn is not None]
        for handle in handles:
            handle.remove()
        stops = calls.named([*weights, *self.neurons])
        drivers = calls.named(weights)
        self.layers = [name for name in calls.inputs if name in weights]
        self.ways = {name: _ways(nodes, stops) for name, nodes in calls.inputs.items()}
        self.driven = {
            name: [n for n in self.neurons if n in calls.inputs and name in self.ways[n].sources] for name in weights
        }
        self.fed = {n: upstream(nodes, drivers) for n, nodes in calls.inputs.items()}
        self.last = _ways([o.grad_fn for o in outputs], stops)

    def _note(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        x = next(tensors_in(args))
        self.shapes[name] = tuple(x.shape), tuple(output.shape)


def _ways(nodes: list[Any], stops: Mapping[Any, str]) -> _Way:
    """Of what is called again and again, the first way, and the sources of all of them."""
    way = _way(nodes[:1], stops)
    way.sources |= upstream(nodes[1:], dict(stops))
    return way


def _way(nodes: list[Any], stops: Mapping[Any, str]) -> _Way:
    """What lies between some nodes of the graph and the first stops behind them."""
    way, met, stack = _Way(), set(), [node for node in nodes if node is not None]
    while stack:
        node = stack.pop()
        if node in met:
            continue
        met.add(node)
        if node in stops:
            way.sources.add(stops[node])
            continue
        _read(node, way)
        stack.extend(before for before, _ in node.next_functions if before is not None)
    way.pooling.reverse()
    return way


def _read(node: Any, way: _Way) -> None:
    name = name_of(node)
    kind = re.sub(r"Backward\d*$", "", name.rpartition(":")[2])
    before = [source for source, _ in node.next_functions if source is not None]
    if (pool := _pooling(node, kind)) is not None:
        way.pooling.append(pool)
    elif kind in ("Add", "Sub") and len(before) > 1:
        way.operations.append("sum")
    elif kind == "Cat":
        way.operations.append("concatenation")
    elif kind in ("Mul", "Div") and len(before) > 1:
        way.operations.append("product")
    elif kind.endswith("BatchNorm"):
        way.norm = True
    elif not _MOVES.fullmatch(kind):
        way.operations.append(kind)
    if "View" in kind or kind == "ReshapeAlias":
        sizes, after = tuple(node._saved_self_sym_sizes), tuple(node._input_metadata[0].shape)
        if len(sizes) > 2 and after and math.prod(sizes[-3:]) == after[-1]:
            way.flattened = sizes[-3:]


def _pooling(node: Any, kind: str) -> Pooling | None:
    found = re.fullmatch(r"(Adaptive)?(Avg|Max)Pool(\d)D(WithIndices)?", kind)
    if found is not None and not found[1]:
        size = tuple(node._saved_kernel_size)
        stride, padding = tuple(node._saved_stride) or size, tuple(node._saved_padding)
        summed = getattr(node, "_saved_divisor_override", None) == 1
        name: Literal["average", "max", "sum"] = "sum" if summed else "average" if found[2] == "Avg" else "max"
        return Pooling(name, size, stride, padding)
    if found is not None or kind == "Mean":
        before = tuple(node._saved_self.shape if found is not None else node._saved_self_sym_sizes)
        dims = 2 if found is None else int(found[3])
        if found is None:  # over the map, or over something else
            places = sorted(signed(d) % len(before) - len(before) for d in node._saved_dim or range(len(before)))
            if places != [-2, -1]:
                return None
        after = (1,) * dims if found is None else tuple(node._input_metadata[0].shape[-dims:])
        size = tuple(-(-old // new) for old, new in zip(before[-dims:], after, strict=True))
        return Pooling("max" if found is not None and found[2] == "Max" else "average", size, size, (0,) * dims)
    return None


def _stage(seen: _Seen, name: str, model: nn.Module, adapter: Adapter) -> Stage:
    copy, layer = seen.model.get_submodule(name), model.get_submodule(name)
    way, neurons = seen.ways[name], seen.driven[name]
    into, out = seen.shapes[name]
    own = [seen.ways[neuron] for neuron in neurons]
    readers = [other for other in seen.layers if name in _producers(seen, other)]
    pooling = next((seen.ways[r].pooling for r in readers), [] if readers or not neurons else seen.last.pooling)
    operations = [*way.operations, *(o for w in own for o in w.operations)]
    operations += ["pooling before the neurons" for w in own if w.pooling]
    norm = any(w.norm for w in own) or any(seen.ways[r].norm for r in readers if name in seen.ways[r].sources)
    inner = [m.weight.numel() for n in neurons for m in seen.neurons[n].modules() if isinstance(m, WEIGHT_LAYERS)]
    reads = _producers(seen, name)
    if inner or name in reads:
        operations.append("recurrence")
    bits, scales = _grid(layer, norm=norm)
    kind, reset, several = _neuron(adapter, seen.neurons, neurons)
    states = [adapter.state_bits(model.get_submodule(neuron)) for neuron in neurons]
    held = None if not states or None in states else max(bits for bits in states if bits is not None)
    if scales == "layer" and several:
        scales = "channel"
    return Stage(
        name=name,
        out_channels=width(copy, "out"),
        **_shape(copy, into, out, way),
        reads=reads,
        feeds=tuple(readers),
        operations=tuple(dict.fromkeys(operations)),
        pooling=tuple(pooling),
        neuron=kind,
        reset=reset,
        weight_bits=bits,
        scales=scales,
        state_bits=held,
        threshold_bits=held,
        biased=norm or getattr(layer, "bias", None) is not None,
        recurrent=sum(inner),
    )


def _producers(seen: _Seen, name: str) -> tuple[str, ...]:
    """Layers whose spikes, or sums, it reads."""
    sources = seen.ways[name].sources
    feeding = {s for s in sources if s in seen.driven}.union(*(seen.fed[s] for s in sources if s not in seen.driven))
    return tuple(other for other in seen.layers if other in feeding)


def _shape(layer: nn.Module, into: tuple[int, ...], out: tuple[int, ...], way: _Way) -> dict[str, Any]:
    if isinstance(layer, _ConvNd):
        dims = len(layer.kernel_size)
        transposed = "transposed " if isinstance(layer, _ConvTransposeNd) else ""
        return {
            "kind": f"{transposed}convolution" if dims == 2 else f"{dims}-D {transposed}convolution",
            "in_channels": layer.in_channels,
            "in_size": into[-dims:],
            "out_size": out[-dims:],
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": _padding(layer),
            "dilation": layer.dilation,
        }
    features = int(cast(nn.Linear, layer).in_features)
    if way.flattened and math.prod(way.flattened[1:]) > 1:
        channels, *size = way.flattened
        return {"kind": "linear", "in_channels": channels, "in_size": tuple(size), "kernel_size": tuple(size)}
    return {"kind": "linear", "in_channels": features}


def _padding(layer: _ConvNd) -> tuple[int, ...]:
    if layer.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else tuple(map(int, layer.padding))


def _grid(layer: nn.Module, *, norm: bool) -> tuple[int, Literal["layer", "channel"] | None]:
    """Bits of the signed integers that the weight is, and whether each channel has a scale of its own."""
    compression = compression_of(layer)
    if compression is None or compression.bits is None:
        known = weight_bits(layer) or brevitas_bits(layer)
        return (_FLOAT, None) if known is None else (known, "channel")
    found = gridded(compression, stored_weight(layer))
    if found is None:
        return _FLOAT, None
    several = norm or (found[0].scale.numel() > 1 and bool((found[0].scale != found[0].scale.flatten()[0]).any()))
    return signed_bits(found[0]), "channel" if several else "layer"


def signed_bits(grid: Grid) -> int:
    """Bits of the smallest signed integers that hold the grid; odd ones where 0 lies between two of its numbers.

    >>> signed_bits(Grid(torch.tensor(1.0), 8.0, 4)), signed_bits(Grid(torch.tensor(1.0), 7.5, 4))
    (4, 5)
    """
    times = 1 if float(grid.zero_point).is_integer() else 2
    low, high = -grid.zero_point * times, (2**grid.bits - 1 - grid.zero_point) * times
    return next(bits for bits in range(1, 64) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))


def _neuron(adapter: Adapter, neurons: Mapping[str, nn.Module], names: list[str]) -> tuple[str | None, str, bool]:
    """What kind, how it is reset, and whether its thresholds differ."""
    if not names:
        return None, "", False
    neuron = neurons[names[0]]
    return _kind(adapter, neuron), adapter.reset_rule(neuron), any(map(_differ, _thresholds(adapter, neuron)))


def _kind(adapter: Adapter, neuron: nn.Module) -> str:
    try:
        return "lif" if bool(adapter.leak(neuron).any()) else "if"
    except ModelError:
        return type(neuron).__name__


def _thresholds(adapter: Adapter, neuron: nn.Module) -> Iterator[Tensor]:
    try:
        yield adapter.dynamics(neuron).threshold
    except ModelError:
        return


def _differ(values: Tensor) -> bool:
    return bool((values != values.flatten()[0]).any())
