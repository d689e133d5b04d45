"""``save`` and ``load``: a compressed network in one safetensors file, each weight in its own number of bits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.base.files import as_path
from snncompress.base.packing import pack_codes, unpack_codes
from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, OptionError, PlanError, StorageError
from snncompress.interfaces import Adapter
from snncompress.model.cells import cell_weights, layer_at, layer_of
from snncompress.model.chance import undisturbed
from snncompress.model.copying import refuse_broken
from snncompress.model.grids import FixedGrid, Grid
from snncompress.model.parametrizations import (
    CompressedWeight,
    build_quantizer,
    compression_of,
    gridded,
    grids_follow,
    hold,
)
from snncompress.model.plan import Plan, has_plan, plan_of, refuse_frozen
from snncompress.version import __version__

from .compact import MASK, compact, expanded
from .container import Container

M = TypeVar("M", bound=nn.Module)
_SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORED = re.compile(r"\.parametrizations\.(\w+)\.original$")


def save(model: nn.Module, path: str | os.PathLike[str], *, adapter: Adapter | str | None = None) -> None:
    """Keep a compressed network in one file, as small as its bit widths promise.

    A safetensors file (docs/format.md) with the plan as JSON; of quantized layers the codes in their bit width and the
    scale, of masked ones only the weights that exist, all other parameters and buffers as they are. No pickle, no code.
    What a fresh model brings along isn't in it: classes, hooks, constants of constructors. Nor are the floats behind
    quantized weights, unless a quantizer's values come from no uniform grid; nor what neurons remember of the last run,
    where a framework keeps it in buffers.

    The file is written whole or not at all: a process that is killed leaves the old file or the new one.

    Raises:
        StorageError: the file can't be written; what was there before is still there.
        ModelError: a tensor holds NaN, a weight is infinite, or a module keeps other state than tensors.

    Example:
        >>> import tempfile
        >>> import snncompress
        >>> from spikingjelly.activation_based import neuron
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 64), neuron.IFNode(), nn.Linear(64, 64), neuron.IFNode())
        >>> small = snncompress.apply(build(), "magnitude", 0.5, 2, data=torch.rand(8, 4), timesteps=2, skip=[])
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> save(small, path)
        >>> torch.equal(load(path, into=build())[0].weight, small[0].weight)
        True
    """
    file = as_path(path)
    found = find_adapter(model, adapter, plain=True)
    plan = _plan_of(model)
    refuse_broken(model, found, but=_moments(model, found))
    compacted, tensors = compact(plan)
    packed: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    state = _state(model, found)
    for name, *others in _tied(state):
        tensor = state[name]
        aliases.update(dict.fromkeys(others, name))
        compression = _compression(model, name)
        if compression is None or others:  # layers that share floats may make different weights of them
            tensors[name] = tensor
        else:
            packed[name], parts = _packed(compression, tensor)
            tensors.update({f"{name}.{part}": value for part, value in parts.items()})
    for name in [name for name in tensors if _on_a_grid(name, packed)]:
        del tensors[name]
    described = _described(model, found)
    data = {"version": __version__, "model": described, "plan": compacted, "packed": packed, "aliases": aliases}
    Container(data, tensors).write(file)


def load(path: str | os.PathLike[str], into: M | None = None, *, adapter: Adapter | str | None = None) -> M:
    """The network that :func:`save` kept, on the structure of a fresh one.

    ``into`` is a newly built model of the architecture that was compressed; it stays as it is. The file's plan is
    replayed on a copy, on the same device, and the file's tensors are put in: outputs are bitwise those of the model
    that was saved, on the same kind of device. A quantized layer keeps its scale; trained further, it moves from the
    values in the file.

    A file may be a stranger's: whatever it holds is checked before it is used, and can raise an error, not run code.

    Raises:
        StorageError: the file is damaged, of another format, or holds other tensors than the model needs.
        PlanError: its plan doesn't fit the model.
        OptionError: no model given; the message says which one the file needs.
    """
    file = Container.read(path)
    described = part(file, "model")
    if into is None:
        raise OptionError(
            f"{path} holds {_needs(described, file.tensors)}. Build it and pass it: snncompress.load(path, into=model)."
        )
    found = find_adapter(into, adapter, plain=True)
    if _compressed(into):
        raise OptionError(
            f"This {type(into).__name__} is compressed already. Build a fresh one for load(path, into=model)."
        )
    total = sum(p.numel() for p in into.parameters()) + 1_000_000
    with undisturbed(into), torch.inference_mode(False), torch.no_grad():
        plan = expanded(part(file, "plan"), file.tensors, 64 * total)
        with grids_follow():
            model = plan.replayed(into, found, 64 * total, blank=into.state_dict(keep_vars=True).values())
        try:
            _fill(model, file, found)
        except StorageError as error:
            raise StorageError(
                f"{path} doesn't fit this {type(into).__name__}: {error} It holds {_needs(described, file.tensors)}."
            ) from error
        except Exception as error:  # a file may come from anywhere
            raise StorageError(f"{path} can't be loaded: {type(error).__name__}: {error}.") from error
    return model


def _plan_of(model: nn.Module) -> Plan:
    """The plan; raises ModelError for a network that no plan leads to."""
    refuse_frozen(model, "saved")
    try:
        return plan_of(model)
    except PlanError as error:
        inner = next((name for name, module in model.named_modules() if name and has_plan(module)), "")
        if inner:
            why = f"the compressed network is its part {inner!r}. Save that part."
        elif _compressed(model):
            why = "layers of it are compressed, and there is no plan. Save the model that snncompress.apply returned."
        else:
            return Plan()
        raise ModelError(f"This {type(model).__name__} can't be saved: {why}") from error


def _compressed(model: nn.Module) -> bool:
    return any(compression_of(layer) is not None for layer in _layers(model))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Every module, and every weight of a cell."""
    for name, module in model.named_modules():
        yield module
        yield from (layer_at(model, weight) for weight in cell_weights(name, module))


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names, those of one tensor together."""
    groups: dict[Any, list[str]] = {}
    for name, t in state.items():
        same = t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype
        groups.setdefault(same if t.numel() else name, []).append(name)
    return list(groups.values())


def _on_a_grid(name: str, packed: Mapping[str, Any]) -> bool:
    """Is this a quantizer's own parameter, which its layer's grid takes the place of?"""
    layer, found, rest = name.partition(".parametrizations.")
    return bool(found) and "bits" in packed.get(f"{layer}.{rest.partition('.')[0]}", {})


def _state(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Parameters and buffers, but for neurons' states, by the names that they have in an uncompressed network."""
    moments = _moments(model, adapter)
    state = {name: value for name, value in model.state_dict().items() if name not in moments}
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelError(f"{other[0]} of this {type(model).__name__} isn't a tensor, so it can't be kept in a file.")
    return {_STORED.sub(r".\1", name): tensor for name, tensor in state.items()}


def _moments(model: nn.Module, adapter: Adapter) -> set[str]:
    """Names of the buffers that hold no more than what neurons remember of the last run."""
    found: set[str] = set()
    for name, neuron in adapter.stateful(model).items():
        try:
            states = adapter.states(neuron)
        except ModelError:  # nothing is known of it: all of it is kept
            continue
        own = {buffer for buffer, _ in neuron.named_buffers(recurse=False)}
        found.update(f"{name}.{state}" if name else state for state in own & set(states))
    return found


def _compression(model: nn.Module, name: str) -> CompressedWeight | None:
    """What makes the layer's weight, where ``name`` is the weight of a compressed layer."""
    layer = layer_of(model, name)
    return None if layer is None else compression_of(layer)


def _packed(compression: CompressedWeight, stored: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How a layer's weight is kept, and in which tensors."""
    turned, kept = compression.turned(stored), _kept(compression)
    shape = {"shape": list(turned.shape)}
    if (found := gridded(compression, stored)) is None:
        return shape, {"values": _listed(turned, kept)}
    grid, numbers = found
    codes = _listed(numbers, kept).cpu().numpy().astype(np.uint16)
    form, packed = pack_codes(codes, grid.bits)
    how = {**shape, "bits": grid.bits, "zero_point": grid.zero_point}
    if form != "bits":
        how |= {"form": form, "weights": len(codes)}
    tensors = {"codes": torch.tensor(packed)}
    if grid.scale.dim() == 0 and grid.scale.dtype == _wide(stored.dtype):
        return {**how, "scale": float(grid.scale)}, tensors
    return how, {**tensors, "scale": grid.scale}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which a scale is kept as a number: of weights in half precision, float32."""
    return torch.promote_types(dtype, torch.float32)


def _kept(compression: CompressedWeight) -> Tensor | None:
    """Which weights exist, output channels first; None: all."""
    return None if compression.mask is None else compression.turned(compression.mask)


def _listed(weight: Tensor, kept: Tensor | None) -> Tensor:
    """The weights that exist [n], in the order of memory."""
    return weight.reshape(-1) if kept is None else weight.masked_select(kept)


def _placed(listed: Tensor, kept: Tensor | None, shape: torch.Size) -> Tensor:
    """The weights back at their places, 0 elsewhere."""
    if kept is None:
        return listed.view(shape)
    return torch.zeros(shape, dtype=listed.dtype, device=listed.device).masked_scatter_(kept, listed)


def _fill(model: nn.Module, file: Container, adapter: Adapter) -> None:
    """Put the file's tensors in; raises StorageError, the model may then be half filled."""
    packed = {name: how for name, how in part(file, "packed").items() if isinstance(how, dict)}
    aliases = {name: str(other) for name, other in part(file, "aliases").items()}
    moments = _moments(model, adapter)  # an adapter that didn't name them may have written the file
    left = {name: t for name, t in file.tensors.items() if not name.startswith(MASK) and name not in moments}
    _wake(model, left)
    for name, target in _state(model, adapter).items():
        if "bits" not in packed.get(name, {}) and (compression := _compression(model, name)) is not None:
            build_quantizer(compression, target.device)
    state = {name: tensor for name, tensor in _state(model, adapter).items() if not _on_a_grid(name, packed)}
    found: dict[str, Tensor] = {}
    for name, target in state.items():
        compression = _compression(model, name)
        if name in packed and compression is not None:
            found[name] = _unpacked(compression, target, name, packed[name], left)
        elif name in left:
            found[name] = left.pop(name)
        elif name not in aliases:
            raise StorageError(f"The file has no {name}.")
    if left:
        raise StorageError(f"The model has no {min(left)[:80]}.")
    for name, target in state.items():
        value = found.get(name, found.get(aliases.get(name, "")))
        if value is None:
            raise StorageError(f"{name} is said to be {aliases[name][:80]!r}, which isn't there.")
        if (value.shape, value.dtype) != (target.shape, target.dtype):
            raise StorageError(
                f"{name} is {_name(value.dtype)} {list(value.shape)} in the file and {_name(target.dtype)} "
                f"{list(target.shape)} in the model."
            )
        if value.is_floating_point() and bool(value.sum().isnan()) and bool(value.isnan().any()):
            raise StorageError(f"{name} holds NaN.")
        target.copy_(value)
    for layer in _layers(model):
        compression = compression_of(layer)
        if compression is None or isinstance(compression.tensor_quant, FixedGrid):  # which is finite
            continue
        if not bool(torch.isfinite(cast(Tensor, layer.weight)).all()):
            raise StorageError(f"The weight of a {type(layer).__name__} comes out infinite, or as NaN.")
    try:
        refuse_broken(model, adapter, but=moments)
    except ModelError as error:
        raise StorageError(str(error)) from error


def _wake(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let modules name parameters in their state_dict that they leave out until these have a value, as Brevitas' do."""
    named = model.state_dict().keys()
    unnamed = {name: p for name, p in model.named_parameters() if name not in named}
    for name, parameter in unnamed.items():
        if name in tensors and tensors[name].shape == parameter.shape:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).load_state_dict({leaf: tensors[name]}, strict=False)


def _unpacked(
    compression: CompressedWeight, target: Tensor, name: str, how: dict[str, Any], tensors: dict[str, Tensor]
) -> Tensor:
    """A layer's weight; it is taken out of ``tensors``, and the layer quantizes to the grid that the file names."""
    shape, kept = compression.turned(target).shape, _kept(compression)
    count = target.numel() if kept is None else int(kept.count_nonzero())
    if how.get("weights", count) != count:
        raise StorageError(f"{name} has {str(how['weights'])[:40]} weights in the file, {count} in the model.")
    if how.get("shape") != list(shape):
        raise StorageError(
            f"{name} has the shape {str(how.get('shape'))[:80]} in the file, {list(shape)} in the model."
        )
    if "bits" not in how:
        values = _taken(tensors, f"{name}.values", target.dtype, (count,)).to(target.device)
        return compression.turned(_placed(values, kept, shape))
    grid = _grid(compression, shape, name, how, tensors, target)
    packed = tensors.pop(f"{name}.codes", torch.zeros(0))
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise StorageError(f"{name} has no codes in bytes.")
    codes = unpack_codes(how.get("form", "bits"), packed.numpy(), grid.bits, count)
    numbers = torch.from_numpy(codes.astype(np.int32) if grid.bits > 8 else codes).to(grid.scale)
    hold(compression, grid)
    if kept is None:
        return compression.turned(grid.values(numbers.view(shape), target.dtype))
    scale = grid.scale.expand(shape).masked_select(kept) if grid.scale.dim() else grid.scale
    values = Grid(scale, grid.zero_point, grid.bits).values(numbers, target.dtype)
    return compression.turned(_placed(values, kept, shape))


def _grid(
    compression: CompressedWeight, shape: torch.Size, name: str, how: dict[str, Any], tensors: dict[str, Tensor],
    target: Tensor,
) -> Grid:  # fmt: skip
    """The grid that the file names; raises StorageError for one that can't be."""
    bits, zero_point, number = compression.bits, how.get("zero_point"), how.get("scale")
    if bits is None or how["bits"] != bits or not isinstance(zero_point, float) or not abs(zero_point) <= 2**17:
        raise StorageError(f"{name} has no bits and zero point that fit its layer.")
    if isinstance(number, float):
        scale = torch.tensor(number, dtype=_wide(target.dtype))
    else:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        found = tensors.get(f"{name}.scale", torch.zeros(()))
        scale = _taken(tensors, f"{name}.scale", found.dtype, () if found.dim() == 0 else per_channel)
    if scale.dtype not in _SCALES or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise StorageError(f"{name} has a scale that is no positive number.")
    ends = Grid(scale.max(), zero_point, bits).values(torch.tensor([0, 2**bits - 1]), target.dtype)
    if not bool(torch.isfinite(ends).all()):
        raise StorageError(f"{name} has a scale and zero point whose values are infinite.")
    return Grid(scale.to(target.device), zero_point, bits)


def _taken(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    found = tensors.pop(name, None)
    if found is None or found.dtype != dtype or tuple(found.shape) != shape:
        what = "isn't there" if found is None else f"is {_name(found.dtype)} {list(found.shape)}"
        raise StorageError(f"{name} must be {_name(dtype)} {list(shape)}, and {what}.")
    return found


def _described(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    kind = type(model)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "framework": adapter.framework}


def _needs(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    kind, framework = str(described.get("class"))[:80], str(described.get("framework"))[:40]
    names = ", ".join(list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if not name.startswith(MASK)))[:6])
    return f"a compressed {kind} of {framework}, with tensors for {names[:200]} …"


def part(file: Container, key: str) -> dict[str, Any]:
    """An object of the file's JSON; raises StorageError where it is none."""
    found = file.data.get(key)
    if not isinstance(found, dict):
        raise StorageError(f"The file's {key!r} is a {type(found).__name__}, not an object.")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
