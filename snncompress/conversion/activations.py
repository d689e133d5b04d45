"""Finds the activations of a CNN, modules and functions alike, and gives every use a module of its own.

Each module is traced alone by torch.fx, its children being opaque, so that one that can't be traced hides nothing but
itself, and only modules that need another ``forward`` get one.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from snncompress.errors import ModelError
from snncompress.structure.fx_graphs import called, operation, trace_forward

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish,
}  # fmt: skip
_MAX_POOLS: dict[str, type[nn.Module]] = {
    "max_pool1d": nn.MaxPool1d, "max_pool2d": nn.MaxPool2d, "max_pool3d": nn.MaxPool3d,
    "adaptive_max_pool1d": nn.AdaptiveMaxPool1d, "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
    "adaptive_max_pool3d": nn.AdaptiveMaxPool3d,
}  # fmt: skip
_KINDS = tuple(_ACTIVATIONS.values())
_POOLS = tuple(_MAX_POOLS.values())
_OTHERS = {
    "celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid",
    "mish", "multi_head_attention_forward", "prelu", "rrelu", "scaled_dot_product_attention", "selu", "sigmoid",
    "softmax", "softmin", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
}  # fmt: skip
_OTHER_HOMES = tuple(f"torch.nn.modules.{home}" for home in ("activation", "rnn", "transformer"))
_REMEDY = "Only ReLU, ReLU6, SiLU and Hardswish become neurons: replace it by one of them and train the CNN anew."


def separate(model: nn.Module, *, pools: bool = False) -> tuple[list[str], list[str]]:
    """Give every use of a convertible activation a module of its own, in place; with ``pools`` also of a max-pooling.

    The model computes what it did before. Returns the names of the activations and of the max-poolings. Raises
    ModelError for what can't be converted, naming the module.
    """
    kinds = (*_KINDS, *_POOLS) if pools else _KINDS
    _unshare(model, kinds)
    names = {id(module): name for name, module in model.named_modules()}
    graphs: dict[str, fx.Graph] = {}
    clones: dict[str, nn.Module] = {}
    opaque: dict[str, str] = {}
    for name, module in model.named_modules():
        if _has_forward_of_its_own(module):
            try:
                clones[name], graphs[name] = trace_forward(module)
            except Exception as error:  # the code is the user's: anything can come out of it
                _check_opaque(model, name, error)
                opaque[name] = f"{type(error).__name__}: {error}"

    calls: Counter[str] = Counter()
    outputs = {""}  # modules whose output is the model's
    for name, graph in graphs.items():
        for node in graph.nodes:
            is_output = name in outputs and all(user.op == "output" for user in node.users)
            if node.op == "call_module":
                child = names[id(model.get_submodule(name).get_submodule(node.target))]
                calls[child] += 1
                if is_output:
                    outputs.add(child)
                if _is_other(model.get_submodule(child), at_output=is_output):
                    raise ModelError(f"{called(model, child)} can't be converted. {_REMEDY}")
            elif operation(node) in _OTHERS and not is_output:
                raise ModelError(f"{called(model, name)} calls {operation(node)}, which can't be converted. {_REMEDY}")
    _check_reached(model, calls, opaque)

    seen: set[int] = set()
    for name in graphs:
        _rewrite(model, name, clones[name], graphs[name], kinds, seen)
    known = set(names.values())
    used = {n: m for n, m in model.named_modules() if _is(m, kinds) and (calls[n] or n not in known)}
    activations = [n for n, m in used.items() if isinstance(m, _KINDS)]
    if not activations:
        raise ModelError(
            f"{type(model).__name__} uses no activation that could become a neuron: no ReLU, ReLU6, SiLU or Hardswish "
            f"was found. Put one behind every hidden layer and train the CNN anew."
        )
    for name, count in calls.items():
        module = model.get_submodule(name)
        if count > 1 and not _is(module, kinds) and any(_is(m, kinds) for m in module.modules()):
            raise ModelError(
                f"{called(model, name)} runs {count} times in one pass, and has an activation or a max-pooling inside: "
                f"as a neuron that would mix what it gets each time. Give each use a module of its own."
            )
    for name in activations:
        vars(used[name])["inplace"] = False  # as the neuron will be
    return activations, [n for n, m in used.items() if isinstance(m, _POOLS) and not m.return_indices]


def _unshare(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """A module of these kinds registered under several names becomes several."""
    seen: set[int] = set()
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if _is(child, kinds):
                if id(child) in seen:
                    parent._modules[key] = child = copy.deepcopy(child)
                seen.add(id(child))


def _is(module: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Is it of one of these kinds, and computes what they do? A subclass may have a forward of its own."""
    return isinstance(module, kinds) and not _has_forward_of_its_own(module)


def _has_forward_of_its_own(module: nn.Module) -> bool:
    forward = type(module).forward
    home = getattr(forward, "__module__", None) or ""
    return forward is nn.Sequential.forward or not home.startswith("torch.nn.modules")


def _is_other(module: nn.Module, *, at_output: bool = False) -> bool:
    """An activation, attention or recurrent layer that can't be converted; one on the output needn't be."""
    if isinstance(module, _KINDS) or (at_output and next(module.parameters(), None) is None):
        return False
    return any(c.__module__.startswith(_OTHER_HOMES) for c in type(module).__mro__)


def _check_opaque(model: nn.Module, name: str, error: Exception) -> None:
    module = model.get_submodule(name)
    if isinstance(module, (*_KINDS, *_POOLS)):
        raise ModelError(
            f"{called(model, name)} has a forward of its own, and torch.fx can't trace it: {type(error).__name__}: "
            f"{error}. Keep Python decisions that depend on the input out of this forward."
        ) from error
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    for used in code.co_names if code is not None else ():
        if used.strip("_") in {*_ACTIVATIONS, *_OTHERS} and not hasattr(module, used):
            raise ModelError(
                f"{called(model, name)} calls {used}, and torch.fx can't trace it: {type(error).__name__}: {error}. "
                f"Make the activation a module (nn.ReLU) in an nn.Sequential, or keep Python decisions that depend on "
                f"the input out of this forward."
            ) from error


def _check_reached(model: nn.Module, calls: Counter[str], opaque: dict[str, str]) -> None:
    """Where something can't be traced, an activation that is never seen in use may be used there, once or often."""
    for name, module in model.named_modules():
        if not (isinstance(module, _KINDS) or _is_other(module)) or calls[name] or not opaque:
            continue
        if _is_other(module):
            raise ModelError(f"{called(model, name)} can't be converted. {_REMEDY}")
        holders = [n for n in opaque if not n or name.startswith(f"{n}.")] or list(opaque)
        holder = max(holders, key=len)
        raise ModelError(
            f"How {called(model, name)} is used can't be seen: torch.fx can't trace {called(model, holder)}: "
            f"{opaque[holder]}. Put the activation into an nn.Sequential, or keep Python decisions that depend on the "
            f"input out of that forward."
        )


def _rewrite(
    model: nn.Module, name: str, clone: nn.Module, graph: fx.Graph, kinds: tuple[type[nn.Module], ...], seen: set[int]
) -> None:
    """Replace functions, and uses of modules that were used before, by submodules of their own."""
    module = model.get_submodule(name)
    uses = _uses(module, graph, kinds)
    fresh: list[tuple[int, str, nn.Module]] = []
    for number, (node, what) in enumerate(uses):
        if what is None:
            fresh.append((number, operation(node), _module_for(node)))
        elif id(what) in seen:
            fresh.append((number, str(node.target).rpartition(".")[2], copy.deepcopy(what)))
        else:
            seen.add(id(what))
    if not fresh:
        return
    other_clone, other_graph = trace_forward(clone, training=True)
    other_uses = _uses(module, other_graph, kinds)
    if [(operation(n), what) for n, what in uses] != [(operation(n), what) for n, what in other_uses]:
        raise ModelError(
            f"{called(model, name)} uses other activations in training than in eval mode, which can't be converted. "
            f"Take what is only there for training out of its forward."
        )
    for number, base, new in fresh:
        target = _free_name(module, base)
        module.add_module(target, new.train(module.training))
        for node in (uses[number][0], other_uses[number][0]):
            with node.graph.inserting_before(node):
                call = node.graph.call_module(target, (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(call)
            node.graph.erase_node(node)
    for holder in (clone, other_clone):  # tensors that forward makes
        vars(module).update({k: v for k, v in vars(holder).items() if k not in vars(module)})
    forwards = [type(fx.GraphModule(c, g)).forward for c, g in ((clone, graph), (other_clone, other_graph))]
    _set_forward(module, *forwards)


def _uses(
    module: nn.Module, graph: fx.Graph, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[fx.Node, nn.Module | None]]:
    """Nodes that call a module of these kinds, with that module, or the same as a function, with None."""
    found: list[tuple[fx.Node, nn.Module | None]] = []
    for node in graph.nodes:
        if node.op == "call_module":
            if _is(child := module.get_submodule(node.target), kinds):
                found.append((node, child))
        elif {**_ACTIVATIONS, **_MAX_POOLS}.get(operation(node)) in kinds and len(node.all_input_nodes) == 1:
            found.append((node, None))
    return found


def _module_for(node: fx.Node) -> nn.Module:
    name = operation(node)
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]()
    order: tuple[str, ...] = ("output_size", "return_indices")
    if not name.startswith("adaptive"):
        order = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options = {**dict(zip(order, node.args[1:], strict=False)), **node.kwargs}
    options.pop("input", None)
    return _MAX_POOLS[name](**options)


def _free_name(module: nn.Module, base: str) -> str:
    name, number = base, 0
    while hasattr(module, name):
        number += 1
        name = f"{base}_{number}"
    return name


def _set_forward(module: nn.Module, evaluate: Callable[..., Any], train: Callable[..., Any]) -> None:
    """A subclass, so that isinstance and everything else of the user's class hold."""

    @functools.wraps(evaluate)
    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        return (train if self.training else evaluate)(self, *args, **named)

    own = type(module)
    module.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
