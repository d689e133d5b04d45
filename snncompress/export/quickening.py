"""A frozen network made fast: neurons in place, channels last in memory, a constant input read once, integer layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from snncompress.base.tables import Column, Shown, Table
from snncompress.errors import ModelError, SNNCompressError
from snncompress.interfaces import Adapter, Memory
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.spikes import Emitted, EmittedBytes, Spikes, counts_of, in_float
from snncompress.running.data import Run
from snncompress.running.sameness import same

from .integer_layers import Codes, IntegerLayer, instructions, make_float, make_integer
from .mixing import blank, mixed, ways, without
from .sparse_layers import SparseLayer, best_form, make_dense, make_sparse

M = TypeVar("M", bound=nn.Module)
_WHY = "_snncompress_why_float"


@dataclass(frozen=True)
class FrozenLayer:
    """How one weight layer of a frozen network computes.

    Fields:
        name: of the module.
        integer: whether it multiplies bytes, and adds up in 32 bits.
        why: it computes in float; empty where it doesn't.
        n_bytes: of its weight, scales and bias in memory, as far as torch tells: an instruction set may want blocks.
        sparse: what it holds, and multiplies with, of a weight with many zeros: "CSR" for the others alone, "columns"
            for those that have others; "" for all of it.
    """

    name: str
    integer: bool
    why: str
    n_bytes: int
    sparse: str = ""

    @property
    def computes_in(self) -> str:
        """What the printed table says of it."""
        return "integer" if self.integer else ", ".join(filter(None, ("float", self.sparse)))


@dataclass(frozen=True)
class FrozenLayers(Shown):
    """The weight layers of a frozen network; printed as a table."""

    layers: tuple[FrozenLayer, ...]
    instructions: str

    @property
    def n_bytes(self) -> int:
        """Memory of all weight layers."""
        return sum(layer.n_bytes for layer in self.layers)

    def _parts(self) -> Iterator[str | Table]:
        rows = [(row.name, row.computes_in, row.n_bytes, row.why) for row in self.layers]
        columns = (Column("layer"), Column("computes_in", "computes in"), Column("n_bytes", "bytes"), Column("why"))
        yield Table(columns, rows, ("total", None, self.n_bytes, ""))
        yield f"Instructions: {self.instructions}"


def frozen_layers(model: nn.Module) -> FrozenLayers:
    """Which layers of a network that :func:`snncompress.freeze` made compute with integers, and what they hold.

    Example:
        >>> from snncompress import freeze
        >>> from spikingjelly.activation_based import neuron
        >>> net = freeze(nn.Sequential(nn.Linear(4, 2), neuron.IFNode()))
        >>> print(frozen_layers(net).layers)
        (FrozenLayer(name='0', integer=False, why='integer=False', n_bytes=40, sparse=''),)
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            held = [module.scale] if module.bias is None else [module.scale, module.bias]
            n_bytes = module.numbers.numel() + sum(t.numel() * t.element_size() for t in held)
            rows.append(FrozenLayer(name, True, "", n_bytes))
        elif isinstance(module, WEIGHT_LAYERS):
            n_bytes = sum(t.numel() * t.element_size() for t in module.parameters(recurse=False))
            sparse, left = (module.form, module.n_bytes) if isinstance(module, SparseLayer) else ("", 0)
            rows.append(FrozenLayer(name, False, vars(module).get(_WHY, "it isn't frozen"), n_bytes + left, sparse))
    return FrozenLayers(tuple(rows), instructions())


class ConstantInput(nn.Module, Memory):
    """What a layer becomes whose input is the same in every timestep (direct encoding); mixed into its own class.

    Its output is computed once: along the first axis where all entries are equal there, else from call to call.
    """

    _read: Tensor | None
    _made: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """As the layer has it."""
        plain: Callable[[Tensor], Tensor] = cast(Any, super()).forward
        if torch.is_grad_enabled() and x.requires_grad:
            return plain(x)
        if _has_time(self, x):
            return plain(x[:1]).expand(len(x), *[-1] * (x.dim() - 1)) if _constant(x) else plain(x)
        if self._read is None or self._made is None or not _equal(self._read, x):
            self._read, self._made = x.clone(), plain(x)
        return self._made.clone()  # which others may write into

    def reset(self) -> None:
        """Forget the last input."""
        self._read = self._made = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, ways(type(self)), {**vars(self), "_read": None, "_made": None}


def _has_time(layer: Any, x: Tensor) -> bool:
    """Has ``x`` an axis more than [N, C, *]?"""
    return x.dim() > (len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2)


def _constant(x: Tensor) -> bool:
    return len(x) > 1 and (x.stride(0) == 0 or torch.equal(x[1:], x[:-1]))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass
class Seen:
    """What a weight layer was called with in an example."""

    inputs: list[Tensor] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Spikes, or whole numbers that aren't 0 at every call, as those may be chance.

        >>> Seen([torch.zeros(2), torch.ones(2)]).whole, Seen([torch.zeros(2)] * 2).whole
        (True, False)
        """
        spikes = [isinstance(x, Spikes) for x in self.inputs]
        whole = all(known or counts_of(x) is not None for known, x in zip(spikes, self.inputs, strict=True))
        return whole and (any(spikes) or any(bool(x.any()) for x in self.inputs))

    def constant(self, layer: nn.Module) -> bool:
        """The same in every timestep, and not just silent in the example."""
        if any(isinstance(x, Spikes) for x in self.inputs) or not any(bool(x.any()) for x in self.inputs):
            return False
        if all(_has_time(layer, x) for x in self.inputs):
            return all(map(_constant, self.inputs))
        return len(self.inputs) > 1 and all(_equal(self.inputs[0], x) for x in self.inputs[1:])


def quicken(
    model: M, adapter: Adapter, run: Run, found: Mapping[str, Codes | str], *, integer: bool | str, share: int = 1
) -> M:
    """A network with folded batch norms made fast in place; ``found`` has the codes of weights, or why there are none.

    ``share``: a batch of the user's has so many times the samples of the example.

    Raises ModelError where ``integer`` is True, and no layer can be one of integers.
    """
    before = private_copy(model, adapter)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)}
    why = dict.fromkeys(layers, "integer=False")
    already = any(isinstance(layer, IntegerLayer) for layer in layers.values())
    wanted = bool(integer) and (already or any(isinstance(code, Codes) for code in found.values()))
    seen: dict[str, Seen] | None = None
    if integer:
        why = {name: _reason(found.get(name)) for name in layers}
    if wanted and (seen := _tried(model, adapter, run, EmittedBytes, last=True)) is not None:
        for name, layer in layers.items():
            why[name] = _made_integer(layer, found.get(name), seen[name], lightly=integer == "auto")
    elif wanted:
        why = {name: reason or "the network can't hand its spikes on as whole numbers" for name, reason in why.items()}
    made = any(not reason for reason in why.values())
    if integer is True and not made:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items()) or "it has no weight layer"
        wide = not any(isinstance(code, Codes) for code in found.values())
        quantize = (
            "Quantize its weights to at most 8 bits with snncompress.apply(…, bits=…), or take" if wide else "Take"
        )
        raise ModelError(
            f"No layer of this {type(model).__name__} can compute with integers: {reasons}. {quantize} integer='auto' "
            f"or False."
        )
    if made:
        model.register_forward_hook(_handed_out)
    else:
        seen = _tried(model, adapter, run, Emitted, last=True) or _tried(model, adapter, run, Emitted, last=False)
        if seen is None:
            model = before
    for name, layer in layers.items():
        if seen is not None and not isinstance(layer, IntegerLayer):
            _made_sparse(layer, seen[name], share)
            made_constant(layer, seen[name].inputs)
        noted(model.get_submodule(name), why[name])
    return model


def made_constant(layer: nn.Module, inputs: list[Tensor]) -> None:
    """Compute a layer once whose inputs are the same in every timestep."""
    if Seen(inputs).constant(layer):
        vars(layer).update(_read=None, _made=None)
        layer.__class__ = mixed(ConstantInput, cast(Any, type(layer)))


def slowed(layer: nn.Module) -> None:
    """Undo what made a layer of floats fast, in place."""
    make_dense(layer)
    if isinstance(layer, ConstantInput):
        vars(layer).pop("_read"), vars(layer).pop("_made")
        layer.__class__ = cast(Any, without(ConstantInput, type(layer)))


def _made_sparse(layer: nn.Module, seen: Seen, share: int) -> None:
    """Hold what is left of a linear layer's weight alone, if that is as good and pays for so many samples."""
    if not seen.inputs or not isinstance(layer, nn.Linear):
        return
    once = seen.constant(layer)
    read = [x[:1] if once and _has_time(layer, x) else x for x in seen.inputs]
    form = best_form(layer, share * min(x[..., 0].numel() for x in read))
    if form is not None:
        expected = layer.forward(read[0])
        make_sparse(layer, form)
        if not same(expected, layer.forward(read[0])):
            make_dense(layer)


def noted(layer: nn.Module, why: str) -> None:
    """Remember why a layer computes in float, for :func:`frozen_layers`."""
    vars(layer)[_WHY] = why


def _reason(code: Codes | str | None) -> str:
    return "its weight isn't quantized" if code is None else code if isinstance(code, str) else ""


def _tried(
    model: nn.Module, adapter: Adapter, run: Run, emitted: type[Emitted], *, last: bool
) -> dict[str, Seen] | None:
    """Fast neurons, and with ``last`` channels last; what the layers then read in an example, or None if it fails."""
    for neuron in adapter.neurons(model).values():
        try:
            adapter.make_fast(neuron, emitted)
        except ModelError:
            continue  # it stays as it is
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and "weight" in module._parameters:
            flat = isinstance(module, nn.Conv2d)
            order = torch.channels_last if flat else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=order if last else torch.contiguous_format)
    try:
        return inputs_of(model, run)
    except SNNCompressError:  # such as of a view of what isn't contiguous
        return None


def inputs_of(model: nn.Module, run: Run) -> dict[str, Seen]:
    """What each weight layer is called with in an example."""
    seen: dict[str, Seen] = {}

    def taken(kept: Seen, module: nn.Module, args: Any, named: Any) -> None:
        kept.inputs += [x if isinstance(x, Spikes) else x.clone() for x in list(tensors_in([args, named]))[:1]]

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, WEIGHT_LAYERS):
                hook = partial(taken, seen.setdefault(name, Seen()))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run(model)
    return seen


def _made_integer(layer: nn.Module, code: Codes | str | None, seen: Seen, *, lightly: bool) -> str:
    """Make a layer one of integers, or say why not."""
    if isinstance(layer, IntegerLayer):
        return ""
    if not isinstance(code, Codes):
        return _reason(code)
    if not seen.inputs:
        return "the network doesn't call it"
    if not seen.whole:
        return "its input isn't spikes"
    if (
        lightly
        and 1 < getattr(layer, "groups", 1) < cast(Any, layer).out_channels
        and cast(Any, layer).weight.shape[1] == 1
    ):
        return "depthwise, with several outputs of each input, it is faster in float"
    x = seen.inputs[0]
    expected = layer.forward(in_float(x))
    if reason := make_integer(layer, code):
        return reason
    try:
        alike = same(expected, layer.forward(x))
    except RuntimeError:  # of a shape that its weights don't take
        alike = False
    if not alike:
        make_float(layer)
        return f"{type(layer).__name__} computes something else than its weights say"
    return ""


def _handed_out(model: nn.Module, args: Any, output: Any) -> Any:
    """What a network puts out are floats."""
    return in_float(output)
