"""What torch.fx sees of a forward: its graph, and plain names for what it calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn


def trace_forward(module: nn.Module, *, deep: bool = False, training: bool = False) -> tuple[nn.Module, fx.Graph]:
    """The graph of one module's forward, optional arguments at their defaults, and a shallow clone that it fits.

    The clone holds what tracing adds: tensors that forward makes. With ``deep`` only torch's own modules are opaque,
    else all children are.
    """
    clone = copy.copy(module)
    clone.training = training
    return clone, Tracer(deep).trace(clone)


def operation(node: fx.Node) -> str:
    """What a node calls, by its plain name: "relu" for F.relu, torch.relu_ and x.relu(); "" for modules."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    return getattr(node.target, "__name__", "").strip("_") if node.op == "call_function" else ""


def called(model: nn.Module, name: str) -> str:
    """A module as messages name it: ``features.3 (GELU)``."""
    kind = type(model.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else kind


class Tracer(fx.Tracer):
    """Goes into modules as torch.fx does, or, unless ``deep``, into none."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self._deep = deep

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Is this module not gone into?"""
        return not self._deep or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the arguments without a default alone."""
        args: list[Any] = [self.root]
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
                continue  # a placeholder would be taken for a value that was given
            if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.KEYWORD_ONLY:
                raise TypeError(f"forward takes {parameter}")
            args.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return root_fn, args
