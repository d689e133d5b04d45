"""The two weights of a recurrent cell, each as a linear layer: "cell.weight_ih" and "cell.weight_hh".

torch's LSTMCell, GRUCell and RNNCell hold them as parameters, not as layers. A view is made anew whenever it is asked
for; nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from .modules import tensors_in

WEIGHTS = ("weight_ih", "weight_hh")


class CellWeight(nn.Linear):
    """A view: y = W x with W = ``cell.weight_ih``, which meets the input, or ``cell.weight_hh``, the hidden state."""

    def __init__(self, cell: nn.Module, tensor: str) -> None:
        nn.Module.__init__(self)
        vars(self).update(cell=cell, tensor=tensor, training=cell.training, bias=None)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the cell multiplies with."""
        return cast(Tensor, getattr(self.cell, str(self.tensor)))


def home(layer: nn.Module) -> tuple[nn.Module, str]:
    """Where a layer's weight is: the module that holds it, and its name there."""
    if isinstance(layer, CellWeight):
        return cast(nn.Module, layer.cell), str(layer.tensor)
    return layer, "weight"


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, or the view of a cell's weight; raises AttributeError where there is none.

    >>> cell = nn.Sequential(nn.LSTMCell(3, 2))
    >>> layer_at(cell, "0.weight_ih")
    CellWeight(in_features=3, out_features=8, bias=False)
    """
    owner, _, leaf = name.rpartition(".")
    if leaf in WEIGHTS and isinstance(cell := model.get_submodule(owner), RNNCellBase):
        return CellWeight(cell, leaf)
    return model.get_submodule(name)


def met_by(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer's weight meets in a call of the module that holds it: its first tensor.

    A cell's ``weight_hh`` meets the hidden state, which begins at 0.
    """
    x, *states = tensors_in([args, named])
    if home(layer)[1] != "weight_hh":
        return x
    return states[0] if states else x.new_zeros(*x.shape[:-1], cast(nn.Linear, layer).in_features)


def made_by(layer: nn.Module, x: Tensor, output: Any) -> tuple[int, ...]:
    """The shape of what comes of the product of a layer's weight with ``x``."""
    if isinstance(layer, CellWeight):
        return (*x.shape[:-1], layer.out_features)
    return tuple(output.shape)


def cell_weights(name: str, module: nn.Module) -> Iterator[str]:
    """Names of the weights of a module of that name, if it is a cell."""
    if isinstance(module, RNNCellBase):
        yield from (f"{name}.{weight}".lstrip(".") for weight in WEIGHTS)
