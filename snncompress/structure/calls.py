"""Which layers, norms and neurons a run calls, and what of autograd's graph goes in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from snncompress.model.modules import patched, tensors_in

from .axes import Axes


class Calls:
    """The autograd nodes that go in and out of watched modules; ``layers`` maps weight layers to their channel axis.

    From the third time on that a module is called with an input that went through the same modules, it returns what
    it returned the second time: a model with its own loop over T steps then costs little more graph than two steps,
    which is where a recurrent connection shows itself.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.axes = Axes()
        self._layers = layers
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[Any, str] = {}
        self._ancestors: dict[Any, frozenset[str]] = {}  # of an output: all watched modules it went through
        self._results: dict[Any, list[Any]] = {}

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Inside, the calls of these modules are noted."""
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(patched(module, "forward", self._watched(name, module.forward)))
            yield

    def _watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            x = next(tensors_in([args, named]))
            through = frozenset({name}).union(*(self._ancestors[n] for n in _stops([x.grad_fn], self.outputs)))
            results = self._results.setdefault((name, x.shape, through), [])
            if len(results) == 2:
                return results[-1]
            result = forward(*args, **named)
            results.append(result)
            self.inputs.setdefault(name, []).append(x.grad_fn)
            node = next(tensors_in(result)).grad_fn
            self.outputs[node], self._ancestors[node] = name, through
            if name in self._layers:
                self.axes.known[node] = self._layers[name]
            return result

        return call

    def named(self, modules: Iterable[str]) -> dict[Any, str]:
        """The nodes that these modules put out, and which module each is of."""
        wanted = set(modules)
        return {node: name for node, name in self.outputs.items() if name in wanted}


def upstream(nodes: Iterable[Any], stops: dict[Any, str]) -> set[str]:
    """Names of the first stops met when walking the graph backwards."""
    return {stops[node] for node in _stops(nodes, stops)}


def leaves(nodes: Iterable[Any]) -> set[int]:
    """The ids of the tensors that the graph begins at: of parameters, for the most part."""
    return {id(node.variable) for node in _behind(nodes, {}) if hasattr(node, "variable")}


def _stops(nodes: Iterable[Any], stops: dict[Any, str]) -> set[Any]:
    return {node for node in _behind(nodes, stops) if node in stops}


def _behind(nodes: Iterable[Any], stops: dict[Any, str]) -> set[Any]:
    """All nodes on the way back to the first stops, and those."""
    seen, stack = set(), [n for n in nodes if n is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in stops:
            stack.extend(n for n, _ in node.next_functions if n is not None)
    return seen
