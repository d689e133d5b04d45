"""The five edits: all that compression ever does to a network.

Each is immutable, has a JSON form, and is applied in place to a model that has the structure it expects. Where a
module isn't there or has another width, PlanError is raised before anything is changed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.contract.registry import registry
from snncompress.errors import ModelError, OptionError, PlanError
from snncompress.interfaces import Adapter, Quantizer

from .modules import limit_timesteps
from .network import WEIGHT_LAYERS, ChannelGroup, Side, prunable_type, remove_from_layer, resize_inputs, width
from .parametrizations import computed_weight, mask_weight, quantize_weight, stored_weight, weight_bits, weight_mask

REPAIRS = ("project", "slice", "reinit")


@dataclass(frozen=True)
class Edit:
    """One change to a model."""

    kind: ClassVar[str]

    def check(self, model: nn.Module) -> None:
        """Raise PlanError unless the edit fits the model."""
        raise PlanError(f"This version of snncompress can't replay {self.kind!r} edits. Upgrade snncompress.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Change the model, in place."""
        self.check(model)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"edit": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Slice:
    """Indices that one module loses on one side, of ``width`` channels.

    ``axis`` is where a neuron's channels stand (-1 in [N, C], -3 in [N, C, H, W]); 0 for a layer.
    """

    module: str
    side: Side
    indices: tuple[int, ...]
    width: int
    axis: int


@dataclass(frozen=True)
class RemoveChannels(Edit):
    """Remove output channels ``indices`` of ``layer``, and from every coupled module what belongs to them.

    Indices count the channels as they stand when the edit is applied. ``slices`` spells out the whole coupled group,
    the layer included, so that a replay needs no tracing.
    """

    layer: str
    indices: tuple[int, ...]
    slices: tuple[Slice, ...]
    kind: ClassVar[str] = "remove_channels"

    @classmethod
    def of(cls, model: nn.Module, group: ChannelGroup, removed: Tensor) -> RemoveChannels:
        """The edit that removes positions ``removed`` of ``group`` from ``model``; ``layer`` is the group's first."""
        slices = tuple(
            Slice(
                member.module,
                member.side,
                tuple(sorted(member.index[removed].flatten().tolist())),
                member.width or width(model.get_submodule(member.module), member.side),
                member.axis,
            )
            for member in group.members
        )
        own = next(s for s in slices if s.side == "out")
        return cls(own.module, own.indices, slices)

    def check(self, model: nn.Module) -> None:
        """Every module must be there, of a kind that can be shrunk, with the width the edit expects."""
        if not any((s.module, s.side) == (self.layer, "out") for s in self.slices):
            raise PlanError(f"A removal of channels of {self.layer!r} doesn't list that layer.")
        for piece in self.slices:
            module = _find(model, piece.module, "the plan removes channels from it")
            if piece.side == "neuron":  # its tensors may all be scalars, so it doesn't tell its width
                found = piece.width
            elif not prunable_type(module):
                raise PlanError(f"{piece.module} is a {type(module).__name__}, from which channels can't be removed.")
            else:
                found = width(module, piece.side)
            if found != piece.width:
                raise PlanError(
                    f"{piece.module} has {found} {piece.side}put channels, the plan expects {piece.width}. The model "
                    f"isn't of the architecture that the plan was made for, or was compressed already."
                )
            bad = [i for i in piece.indices if not 0 <= i < piece.width]
            if bad or len(set(piece.indices)) != len(piece.indices):
                raise PlanError(
                    f"{piece.module} has no channel {bad[0]}." if bad else f"{piece.module}: an index twice."
                )
            if len(piece.indices) >= piece.width:
                raise PlanError(f"The plan would remove all {piece.width} channels of {piece.module}.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Shrink every module of the group."""
        self.check(model)
        for piece in self.slices:
            if piece.side == "neuron":
                neuron = model.get_submodule(piece.module)
                adapter.remove_channels(neuron, list(piece.indices), width=piece.width, axis=piece.axis)
            else:
                remove_from_layer(model.get_submodule(piece.module), piece.side, list(piece.indices))


@dataclass(frozen=True)
class QuantizeWeights(Edit):
    """Fake-quantize the weight of ``layer`` to ``bits`` bits with the named quantizer and its options."""

    layer: str
    quantizer: str
    bits: int
    options: dict[str, Any]
    kind: ClassVar[str] = "quantize_weights"

    @classmethod
    def of(cls, layer: str, quantizer: Quantizer, bits: int) -> QuantizeWeights:
        """The edit for a quantizer instance."""
        return cls(layer, quantizer.name, bits, quantizer.options())

    def check(self, model: nn.Module) -> None:
        """The layer must be there, have a weight, and not be quantized yet."""
        module = _find(model, self.layer, "the plan quantizes it")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"{self.layer} is a {type(module).__name__} without a weight to quantize.")
        if why := computed_weight(module):
            raise PlanError(
                f"{self.layer} can't be quantized: {why}. Make it a plain parameter first, or skip the layer."
            )
        if (bits := weight_bits(module)) is not None:
            raise PlanError(
                f"{self.layer!r} is already quantized to {bits} bits. Start from the float model, or leave bits=None."
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the quantizer before the layer's weight."""
        self.check(model)
        cls = registry().find("quantizer", self.quantizer)
        try:
            quantizer = cls(**self.options)
        except TypeError as error:
            raise OptionError(f"Quantizer {self.quantizer!r} doesn't take {self.options}: {error}") from error
        quantize_weight(model.get_submodule(self.layer), quantizer, self.bits)


@dataclass(frozen=True)
class MaskWeights(Edit):
    """Hold single weights of ``layer`` at zero.

    ``kept`` is the mask as text: a bit per weight, 1 = it exists, in the order of the weight's memory (first bit
    highest), in base64. A mask that the layer has already stays in force beside it.
    """

    layer: str
    shape: tuple[int, ...]
    kept: str
    kind: ClassVar[str] = "mask_weights"

    @classmethod
    def of(cls, layer: str, kept: Tensor) -> MaskWeights:
        """The edit for a boolean mask of the weight's shape."""
        bits = np.packbits(kept.cpu().numpy())
        return cls(layer, tuple(kept.shape), base64.b64encode(bits.tobytes()).decode())

    def mask(self) -> Tensor:
        """The mask as a boolean tensor; raises PlanError where ``kept`` isn't one of this shape."""
        size = math.prod(self.shape)
        try:
            packed = base64.b64decode(self.kept, validate=True)
        except ValueError as error:
            raise PlanError(f"{self.layer}: its mask isn't base64: {error}.") from error
        if min(self.shape, default=0) < 0 or len(packed) != (size + 7) // 8:
            raise PlanError(f"{self.layer}: a mask of {len(packed)} bytes for a weight of shape {list(self.shape)}.")
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=size)
        return torch.from_numpy(bits.astype(bool)).view(self.shape)

    def check(self, model: nn.Module) -> None:
        """The layer must be there, with a weight of this shape that is its own parameter."""
        module = _find(model, self.layer, "the plan removes weights of it")
        if not isinstance(module, WEIGHT_LAYERS):
            raise PlanError(f"{self.layer} is a {type(module).__name__}, of which no single weights can be removed.")
        if why := computed_weight(module):
            raise PlanError(f"Weights of {self.layer} can't be removed: {why}. Make it a plain parameter first.")
        if (found := tuple(stored_weight(module).shape)) != self.shape:
            raise PlanError(
                f"{self.layer} has a weight of shape {list(found)}, the plan's mask is {list(self.shape)}. The model "
                f"isn't of the architecture that the plan was made for, or was compressed already."
            )
        self.mask()

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the mask before the layer's weight."""
        self.check(model)
        mask_weight(model.get_submodule(self.layer), self.mask())


@dataclass(frozen=True)
class Repair:
    """A weight layer whose inputs change from ``before`` to ``after`` channels (features of a linear layer)."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class RemoveBlock(Edit):
    """Put a wire in the place of module ``name``, and mend the widths of the layers that read it.

    ``repair`` says how their weights came about: "slice" keeps the first input channels (zeros where there are more
    than before), "reinit" draws new ones, "project" fits them to calibration data. A replay can't know the data, so
    it slices; loading the state_dict brings the weights.
    """

    name: str
    repairs: tuple[Repair, ...]
    repair: str
    kind: ClassVar[str] = "remove_block"

    def check(self, model: nn.Module) -> None:
        """The block must be there, and the layers behind it have the widths that the edit expects."""
        if not self.name or isinstance(_find(model, self.name, "the plan removes it"), nn.Identity):
            raise PlanError(f"There is no block {self.name!r} to remove, or it is gone already.")
        for piece in self.repairs:
            module = _find(model, piece.layer, "the plan changes its inputs")
            if not isinstance(module, WEIGHT_LAYERS):
                raise PlanError(f"{piece.layer} is a {type(module).__name__}, whose inputs can't be changed.")
            if (found := width(module, "in")) != piece.before:
                raise PlanError(f"{piece.layer} has {found} inputs, the plan expects {piece.before}.")
            if piece.after < 1 or getattr(module, "groups", 1) != 1 or weight_mask(module) is not None:
                raise PlanError(
                    f"{piece.layer} can't be given {piece.after} inputs: it is a grouped convolution, or weights of it "
                    f"are masked. Remove blocks first, then single weights."
                )

    def check_growth(self, model: nn.Module, largest: int) -> None:
        """Raise PlanError where a layer would get more than ``largest`` weights."""
        for piece in self.repairs:
            size = stored_weight(_find(model, piece.layer, "the plan changes its inputs")).numel()
            if size * piece.after > largest * max(1, piece.before):
                raise PlanError(f"{piece.layer} would grow from {piece.before} to {piece.after} inputs.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Replace the block, resize what reads it."""
        self.check(model)
        model.set_submodule(self.name, nn.Identity())
        for piece in self.repairs:
            resize_inputs(model.get_submodule(piece.layer), piece.after, fresh=self.repair == "reinit")


@dataclass(frozen=True)
class TruncateTimesteps(Edit):
    """Run the first ``timesteps`` steps only.

    ``way`` says how a model is made to stop: ``"input"``: a hook cuts the model's input, whose time stands on
    ``axis``; ``"attribute"``: its own loop counts ``attribute`` of ``module`` ("" is the model itself), which is set;
    ``"loop"``: it is called once per timestep, so whoever calls it must stop: all that takes ``timesteps=`` here does,
    and a loop of your own asks ``plan_of(model).timesteps``. Raises PlanError for values that can't be.
    """

    timesteps: int
    way: str = "loop"
    module: str = ""
    attribute: str = ""
    axis: int = 0
    kind: ClassVar[str] = "truncate_timesteps"

    def __post_init__(self) -> None:
        if type(self.timesteps) is not int or self.timesteps < 1:
            raise PlanError(f"A model runs a whole number of timesteps, at least 1, not {self.timesteps!r}.")
        if self.way not in ("loop", "input", "attribute"):
            raise PlanError(f"Timesteps are truncated by 'loop', 'input' or 'attribute', not {self.way!r}.")
        if type(self.axis) is not int or self.axis < 0:
            raise PlanError(f"The time axis of an input is a whole number of at least 0, not {self.axis!r}.")
        if not (isinstance(self.module, str) and isinstance(self.attribute, str)):
            raise PlanError(f"module and attribute must be names, not {self.module!r} and {self.attribute!r}.")

    def check(self, model: nn.Module) -> None:
        """The attribute must be there, and count at least as many steps."""
        if self.way != "attribute":
            return
        module = _find(model, self.module, f"the plan sets its {self.attribute!r}")
        found = vars(module).get(self.attribute)
        if type(found) is not int or found < self.timesteps:
            raise PlanError(
                f"{self.module or type(model).__name__} has no whole number {self.attribute!r} of at least "
                f"{self.timesteps} to count its timesteps ({self.attribute} = {found!r}). Is it another architecture?"
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Cut the input, set the attribute, or leave word for those who call the model."""
        self.check(model)
        if self.way == "input":
            model.register_forward_pre_hook(FirstSteps(self.timesteps, self.axis), with_kwargs=True)
        elif self.way == "attribute":
            setattr(model.get_submodule(self.module), self.attribute, self.timesteps)
        else:
            limit_timesteps(model, self.timesteps)


@dataclass
class FirstSteps:
    """A forward pre-hook that keeps the first ``timesteps`` along ``axis`` of a model's first tensor.

    It expects the number of dimensions that it met first: in another step mode it would cut samples instead.
    """

    timesteps: int
    axis: int
    dims: int | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the model is called instead."""
        values = [*args, *named.values()]
        for position, x in enumerate(values):
            if isinstance(x, Tensor):
                self.dims = x.dim() if self.dims is None else self.dims
                if x.dim() != self.dims:
                    raise ModelError(
                        f"{type(module).__name__} was truncated to {self.timesteps} timesteps for inputs of "
                        f"{self.dims} dimensions, and got {list(x.shape)}. Use it in the step mode of then."
                    )
                if x.dim() > self.axis:
                    values[position] = x.narrow(self.axis, 0, min(self.timesteps, x.shape[self.axis]))
                break
        return tuple(values[: len(args)]), dict(zip(named, values[len(args) :], strict=True))


def edit_from_dict(data: Any) -> Edit:
    """The edit a JSON object describes; raises PlanError for anything else."""
    if not isinstance(data, dict) or "edit" not in data:
        raise PlanError(f"Not an edit: {str(data)[:80]!r}.")
    fields = {k: v for k, v in data.items() if k != "edit"}
    try:
        if data["edit"] == RemoveChannels.kind:
            slices = tuple(slice_from_dict(s) for s in fields["slices"])
            return RemoveChannels(str(fields["layer"]), _integers(fields["indices"]), slices)
        if data["edit"] == QuantizeWeights.kind:
            bits, options = fields["bits"], dict(fields["options"])
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
                raise PlanError(f"{fields['layer']}: bits must be 1 to 16, not {bits!r}.")
            return QuantizeWeights(str(fields["layer"]), str(fields["quantizer"]), bits, options)
        if data["edit"] == MaskWeights.kind:
            return MaskWeights(str(fields["layer"]), _integers(fields["shape"]), str(fields["kept"]))
        if data["edit"] == RemoveBlock.kind:
            repairs = tuple(Repair(str(r["layer"]), *_integers([r["before"], r["after"]])) for r in fields["repairs"])
            return RemoveBlock(str(fields["name"]), repairs, _choice(fields["repair"], REPAIRS))
        others: dict[str, type[Edit]] = {c.kind: c for c in (TruncateTimesteps,)}
        return others[data["edit"]](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"Damaged edit {str(data)[:80]!r}: {type(error).__name__} {error}") from error


def slice_from_dict(data: dict[str, Any]) -> Slice:
    """A slice from its fields; raises KeyError, TypeError or ValueError for anything else."""
    if data["side"] not in ("out", "in", "neuron"):
        raise ValueError(f"side {data['side']!r}")
    width_, axis = _integers([data["width"], data["axis"]])
    if not (-8 <= axis < 0 if data["side"] == "neuron" else axis == 0):
        raise ValueError(f"axis {axis} of a slice on side {data['side']!r}")
    return Slice(str(data["module"]), data["side"], _integers(data["indices"]), width_, axis)


def _choice(value: Any, choices: Collection[str]) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return str(value)


def _integers(values: Any) -> tuple[int, ...]:
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError("whole numbers expected")
    return tuple(values)


def _find(model: nn.Module, name: str, why: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"{type(model).__name__} has no module {name!r}; {why}. Is it another architecture?") from error
