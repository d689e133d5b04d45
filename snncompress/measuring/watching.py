"""Watching what a model asks torch to do beside its layers: which averages it takes, and what it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from snncompress.model.cells import CellWeight, layer_at
from snncompress.model.weights_in_use import PRODUCTS

from .averaged_spikes import AveragedSpikes
from .products import Product, product_of

Seen = Callable[[str, str, "Product | None"], None]
"""Called with the module in which tensors are multiplied, torch's function, and the product where it is of two."""


class Watch(TorchFunctionMode):
    """Inside, functions of torch are seen; what one does inside, where it is made of others, isn't seen again."""

    def __init__(self, product: Callable[..., None], averages: AveragedSpikes | None) -> None:
        super().__init__()
        self._product, self._averages, self._aside = product, averages, False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is called in here isn't the model's doing."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._aside:
            name = getattr(func, "__name__", "")
            if name in PRODUCTS:
                self._product(name, func, args, kwargs)
            elif self._averages is not None:
                self._averages.see(name, func, args, kwargs, output)
        return output


@contextmanager
def watched(
    model: nn.Module,
    layers: Collection[str],
    neurons: Collection[str],
    seen: Seen,
    averages: AveragedSpikes | None = None,
) -> Iterator[Watch]:
    """Inside, ``seen`` is told of every product of tensors that is neither a layer's nor a neuron's own.

    ``layers`` are the names of those whose operations are counted.
    """
    inside: list[str] = []
    cells = {name.rpartition(".")[0] for name in layers if isinstance(layer_at(model, name), CellWeight)}
    counted = {*layers, *cells}

    def product(name: str, func: Any, args: Any, kwargs: Any) -> None:
        where = inside[-1] if inside else ""
        if where in neurons or any(module in counted for module in inside):
            return
        seen(where, name.strip("_"), product_of(name, func, args, kwargs))

    def enter(name: str, *_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield stack.enter_context(Watch(product, averages))
