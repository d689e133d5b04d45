"""One timestep of a network as torch.fx sees it, with what every node computes on an example."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from snncompress.errors import ModelError
from snncompress.interfaces import Adapter
from snncompress.structure.fx_graphs import Tracer


def step_graph(model: nn.Module, adapter: Adapter, x: Tensor) -> tuple[fx.Graph, StepRun]:
    """The graph of a model that is called once per timestep, run on ``x``; raises ModelError where it can't be traced.

    Neurons, torch's layers and their subclasses are nodes; other modules are gone into.
    """
    try:
        tracer = _LeafTracer(adapter)
        graph = tracer.trace(model)
        run = StepRun(fx.GraphModule(tracer.root, graph))
        run.run(x)
    except Exception as error:  # the code is the user's: anything can come out of it
        raise ModelError(
            f"torch.fx can't trace {type(model).__name__}: {type(error).__name__}: {error}. Keep loops over time "
            f"and decisions that depend on the input out of its forward."
        ) from error
    return graph, run


class _LeafTracer(Tracer):
    """Goes into modules that are written in terms of others; not into neurons, torch's layers and their subclasses."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(deep=True)
        self._adapter = adapter

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A neuron, or a layer of torch's."""
        homes = (cls.__module__ for cls in type(m).__mro__)
        layer = any(
            h.startswith("torch.nn.modules.") and h.split(".")[-1] not in ("module", "container") for h in homes
        )
        return layer or self._adapter.is_neuron(m)


class StepRun(fx.Interpreter):
    """Keeps what every node computed, also where it is changed in place later."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As ever, and kept."""
        result = super().run_node(n)
        self.values[n] = result.clone() if isinstance(result, Tensor) else result
        return result
