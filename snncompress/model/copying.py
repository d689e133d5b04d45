"""Copies of a model that leave the original bitwise as it was."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from snncompress.base.distributed import gathered, spread
from snncompress.errors import ModelError
from snncompress.interfaces import Adapter

from .brevitas_layers import without_quantization
from .cells import cell_weights, home, layer_at
from .parametrizations import computed_weight, separate_classes
from .weight_norms import without_norms

M = TypeVar("M", bound=nn.Module)


def private_copy(model: M, adapter: Adapter, *, share: bool = False, blank: Iterable[object] = ()) -> M:
    """A deep copy with neurons reset; also of a model whose neurons still hold a live autograd graph.

    ``copy.deepcopy`` refuses tensors inside a graph, and resetting the user's model first would change it; so those
    tensors are replaced by detached clones on the way. With ``share`` the copy has the same parameters, which must not
    be written into, but may be replaced. Values of parameters in ``blank`` aren't copied: the caller writes over them.
    """
    with torch.inference_mode(False):  # else the copy's parameters could never be changed
        memo: dict[int, Any] = {id(t): t.detach().clone() for t in _graph_tensors(model)}
        memo |= {id(empty): type(empty)() for empty in _empty(model)}
        if share:
            memo |= {id(parameter): parameter for parameter in model.parameters()}
        memo |= {id(p): nn.Parameter(torch.empty_like(p), p.requires_grad) for p in blank if type(p) is nn.Parameter}
        result = copy.deepcopy(model, memo)
        separate_classes(result)
        adapter.reset(result)
    return result


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ModelError for a model in DDP, which holds on to its processes: what is in there is meant."""
    if isinstance(model, DistributedDataParallel):
        raise ModelError(
            "This model is wrapped in DistributedDataParallel. Pass model.module, which is brought together over all "
            "processes as well, and wrap what comes of it."
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise ModelError for a model of torch.compile, or with a part of it: that runs a graph of the modules before.

    So does one of torch.jit.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "This model was compiled by torch.jit, so nothing in it can be exchanged. Take the model that it was made "
            "from."
        )
    found = next(
        (name for name, m in model.named_modules() if isinstance(getattr(m, "_orig_mod", None), nn.Module)), None
    )
    if found is not None:
        what = f"The part {found!r} of this {type(model).__name__}" if found else "This model"
        place = f"Put {found}._orig_mod in its place" if found else "Take model._orig_mod"
        raise ModelError(f"{what} was compiled by torch.compile. {place}, and compile what comes of it.")


def refuse_broken(model: nn.Module, adapter: Adapter | None = None, *, but: Collection[str] = ()) -> None:
    """Raise ModelError for a parameter or a norm's statistic that isn't finite, or a buffer that is NaN.

    Other buffers may be infinite: masks of an attention, thresholds of neurons that never fire. With an adapter, a
    number that a neuron holds, such as its threshold, mustn't be NaN either. What is named in ``but`` may be anything.
    """
    neurons = {} if adapter is None else adapter.neurons(model)
    for owner, module in model.named_modules():
        where = f"{owner}." if owner else ""
        for name, value in vars(module).items() if owner in neurons else ():
            if isinstance(value, float) and math.isnan(value):
                raise ModelError(
                    f"{where}{name} of this {type(model).__name__} is NaN. Likely cause: it was computed from numbers "
                    f"that are."
                )
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta or not tensor.is_floating_point() or f"{where}{name}" in but:
                continue
            if bool(torch.isfinite(tensor.sum())):  # so all are; ten times as fast as looking at each
                continue
            finite = isinstance(tensor, nn.Parameter) or name in ("running_mean", "running_var")
            bad = ~torch.isfinite(tensor) if finite else torch.isnan(tensor)
            if bool(bad.any()):
                raise ModelError(
                    f"{where}{name} of this {type(model).__name__} holds {int(bad.sum())} NaN or infinite values of "
                    f"{tensor.numel()}. Likely cause: its training diverged. Go back to a checkpoint from before."
                )


def same_everywhere(model: nn.Module) -> None:
    """Give the model, of which every process has one, the values that it has in rank 0, as DDP does.

    Raises ModelError where they aren't of one architecture. Buffers that have a shape of their own in some process are
    what neurons remember of its last batch, and stay.
    """
    own = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if not tensor.is_meta}
    parameters = {name for name, _ in model.named_parameters()}
    shapes = gathered({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()})
    unlike = [name for name in {**shapes[0], **own} if any(said.get(name) != shapes[0].get(name) for said in shapes)]
    if other := [name for name in unlike if name in parameters or name not in own]:
        said = ", ".join(str(list(said[other[0]][0]) if other[0] in said else "missing") for said in shapes)
        raise ModelError(
            f"{other[0]} of this {type(model).__name__} differs from process to process: {said}. All must build, or "
            f"load, the same network."
        )
    spread([tensor for name, tensor in own.items() if name not in unlike])


def _graph_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _non_leaves(vars(module))


def _empty(model: nn.Module) -> Iterator[Any]:
    """Empty dicts and sets of modules, a dozen in each, which ``copy.deepcopy`` would rebuild slowly one by one."""
    for module in model.modules():
        yield from (held for held in vars(module).values() if type(held) in (OrderedDict, dict, set) and not held)


def _non_leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _non_leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _non_leaves(item)


def discard(copy: nn.Module) -> None:
    """Free the memory of a copy that isn't needed any more, though something may still hold on to it in a circle."""
    for parameter in copy.parameters():
        parameter.data, parameter.grad = parameter.data.new_empty(0), None


def plain_copy(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A private copy in eval mode with plain weights that all require a gradient, ready to be traced."""
    copy = private_copy(model, adapter).eval()
    without_quantization(copy)
    without_norms(copy)
    for module in list(copy.modules()):
        layers = [layer_at(module, weight) for weight in cell_weights("", module)] or [module]
        for owner, tensor in (home(layer) for layer in layers if not computed_weight(layer)):
            if parametrize.is_parametrized(owner, tensor):
                parametrize.remove_parametrizations(owner, tensor, leave_parametrized=False)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return copy
