"""Recurrent cells and layers while a network is traced: each a single node of autograd's graph.

torch unrolls most of them, gate by gate and timestep by timestep, and what reads that graph takes a time that grows
with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch_pruning.pruner.function import BasePruningFunc

from snncompress.model.cells import input_weights
from snncompress.model.modules import patched
from snncompress.model.one_step import through


@contextmanager
def in_one_node(model: nn.Module) -> Iterator[None]:
    """Inside, what a recurrent cell or layer puts out comes of what it takes in, not of its states, in one step."""
    with ExitStack() as stack:
        for module in model.modules():
            if input_weights(module):
                stack.enter_context(patched(module, "forward", through(module.forward)))
        yield


class CellPruner(BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning that the outputs of such a module aren't its inputs, and that it cuts neither."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Nothing."""
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        """Nothing, and another function."""
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Of all directions."""
        size = getattr(layer, "proj_size", 0) or layer.hidden_size
        return int(size * (1 + getattr(layer, "bidirectional", False)))

    def get_in_channels(self, layer: Any) -> int:
        """What it takes in."""
        return int(layer.input_size)
