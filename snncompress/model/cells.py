"""The weights of recurrent cells and layers, each as a linear layer: "cell.weight_ih", "lstm.weight_hh_l0".

torch's LSTMCell, GRUCell, RNNCell, LSTM, GRU and RNN hold them as parameters, not as layers. A view is made anew
whenever it is asked for; nothing is added to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from .modules import tensors_in

_WEIGHT = re.compile(r"weight_(ih|hh|hr)_l(\d+)(_reverse)?")


class CellWeight(nn.Linear):
    """A view: y = W x, W one weight of a recurrent cell or layer.

    ``weight_ih`` meets the input, ``weight_hh`` the hidden state, ``weight_hr`` (with ``proj_size``) what is projected
    to it. A layer has them for every level and direction: ``weight_ih_l0``, ``weight_hh_l1_reverse``.
    """

    def __init__(self, cell: nn.Module, tensor: str) -> None:
        nn.Module.__init__(self)
        vars(self).update(cell=cell, tensor=tensor, training=cell.training, bias=None)
        self.out_features, self.in_features = self.weight.shape

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            setattr(cast(nn.Module, self.cell), str(self.tensor), value)
        else:
            super().__setattr__(name, value)

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
    if leaf.startswith("weight_") and leaf in _weights(cell := model.get_submodule(owner)):
        return CellWeight(cell, leaf)
    return model.get_submodule(name)


def layer_of(model: nn.Module, tensor: str) -> nn.Module | None:
    """The layer whose weight goes by that name in an uncompressed network's state_dict, or None.

    >>> cell = nn.Sequential(nn.LSTMCell(3, 2), nn.Linear(2, 1))
    >>> layer_of(cell, "0.weight_ih"), layer_of(cell, "1.weight"), layer_of(cell, "1.bias")
    (CellWeight(in_features=3, out_features=8, bias=False), Linear(in_features=2, out_features=1, bias=True), None)
    """
    owner, _, leaf = tensor.rpartition(".")
    if leaf == "weight":
        return model.get_submodule(owner)
    return layer_at(model, tensor) if leaf in _weights(model.get_submodule(owner)) else None


def cell_weights(name: str, module: nn.Module) -> Iterator[str]:
    """Names of the weights of a module of that name, if it is a recurrent cell or layer."""
    yield from (f"{name}.{weight}".lstrip(".") for weight in _weights(module))


def decays(model: nn.Module) -> dict[str, str]:
    """The recurrent weights that are 0 off their diagonal, and why they are left alone; of snnTorch's LeakyParallel.

    A grid without a zero would connect every unit with every other.
    """
    found = {}
    for name, module in model.named_modules():
        for weight in cell_weights(name, module):
            if _is_decay(layer_at(model, weight)):
                found[weight] = "it is 0 off its diagonal: a decay of each unit, not connections"
    return found


def _is_decay(layer: nn.Module) -> bool:
    cell, tensor = home(layer)
    w = cast(Tensor, layer.weight).detach()
    return (
        w.shape[0] == w.shape[1] > 1
        and torch.equal(w, w.diag().diag())
        and not parametrize.is_parametrized(cell, tensor)
    )


def drivers(neurons: Mapping[str, nn.Module]) -> dict[str, str]:
    """Recurrent layers inside neurons, of units that know nothing of one another, by name; each with its neurons.

    The weight of their input is a layer that drives these: snnTorch's LeakyParallel holds one.
    """
    found = {}
    for neuron, module in neurons.items():
        for name, part in module.named_modules(prefix=neuron):
            single = isinstance(part, nn.RNN) and _weights(part) == ("weight_ih_l0", "weight_hh_l0")
            if single and _is_decay(CellWeight(part, "weight_hh_l0")):
                found[name] = neuron
    return found


def input_weights(module: nn.Module) -> list[CellWeight]:
    """The weights that meet what a recurrent cell or layer takes in; none of another module."""
    return [CellWeight(module, w) for w in _weights(module) if re.fullmatch(r"weight_ih(_l0(_reverse)?)?", w)]


def _weights(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, RNNCellBase):
        return "weight_ih", "weight_hh"
    # what a subclass of one's own computes with them isn't known
    if isinstance(module, RNNBase) and type(module).forward in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    return ()


def met_by(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer's weight meets in a call of the module that holds it: its first tensor.

    The hidden state of a cell begins at 0. That of a recurrent layer, which torch computes all at once, is computed
    again. What ``weight_hr`` meets, and hidden states of packed sequences, are stood in for by 0.5 everywhere: they are
    analog.
    """
    if not isinstance(layer, CellWeight):
        return next(tensors_in([args, named]))
    x = args[0] if args else named["input"]
    hidden = list(tensors_in(args[1] if len(args) > 1 else named.get("hx")))
    cell, tensor = home(layer)
    if isinstance(cell, RNNBase):
        return _met_at(cell, tensor, x, hidden, layer.in_features)
    if tensor == "weight_ih":
        return cast(Tensor, x)
    return hidden[0] if hidden else x.new_zeros(*x.shape[:-1], layer.in_features)


def made_by(layer: nn.Module, x: Tensor, output: Any) -> tuple[int, ...]:
    """The shape of what comes of the product of a layer's weight with ``x``."""
    if isinstance(layer, CellWeight):
        return (*x.shape[:-1], layer.out_features)
    return tuple(output.shape)


@torch.no_grad()
def _met_at(rnn: RNNBase, tensor: str, x: Any, start: list[Tensor], width: int) -> Tensor:
    """What one weight of a recurrent layer meets, at every timestep: shaped as its input, ``width`` wide."""
    kind, level, reverse = cast(re.Match[str], _WEIGHT.fullmatch(tensor)).groups()
    if tensor.startswith("weight_ih_l0"):
        return cast(Tensor, x.data if isinstance(x, PackedSequence) else x)
    if isinstance(x, PackedSequence) or kind == "hr":
        lead = x.data.shape[:-1] if isinstance(x, PackedSequence) else x.shape[:-1]
        return torch.full((*lead, width), 0.5, device=x.data.device)
    lone, turned, ways = x.dim() == 2, rnn.batch_first and x.dim() == 3, 1 + rnn.bidirectional
    x = x.unsqueeze(1) if lone else x.transpose(0, 1) if turned else x
    wide = (rnn.proj_size or rnn.hidden_size, rnn.hidden_size)[: 2 if rnn.mode == "LSTM" else 1]
    shapes = [(rnn.num_layers * ways, x.shape[1], size) for size in wide]
    states = [start[n].view(shape) if start else x.new_zeros(shape) for n, shape in enumerate(shapes)]
    for at in range(int(level) + (kind == "hh")):
        x = _level(rnn, at, x, [h[at * ways : (at + 1) * ways] for h in states])
    if kind == "hh":
        first = states[0][int(level) * ways + bool(reverse)].unsqueeze(0)
        x = torch.cat([x[1:, :, -width:], first] if reverse else [first, x[:-1, :, :width]])
    return cast(Tensor, x.squeeze(1) if lone else x.transpose(0, 1) if turned else x)


def _level(rnn: RNNBase, level: int, x: Tensor, states: list[Tensor]) -> Tensor:
    """[T, N, C] → [T, N, ways · H], what one level of a recurrent layer puts out."""
    ways = 1 + rnn.bidirectional
    weights = [w for names in rnn._all_weights[level * ways : (level + 1) * ways] for w in names]
    run = getattr(torch, rnn.mode.lower())  # torch.lstm, gru, rnn_tanh, rnn_relu
    start = states if rnn.mode == "LSTM" else states[0]
    cudnn = torch.backends.cudnn
    before, cudnn.enabled = cudnn.enabled, False  # it warns of weights that aren't in one piece
    try:
        made = run(
            x, start, [getattr(rnn, w) for w in weights], rnn.bias, 1, 0.0, False, bool(rnn.bidirectional), False
        )
    finally:
        cudnn.enabled = before
    return cast(Tensor, made[0])


def use_computed_weights(rnn: nn.Module) -> None:
    """Let a recurrent layer, some of whose weights are parametrized, multiply with what its weights are at each call.

    torch reads them from a list that it keeps besides. It is made anew instead, on the class that torch made for the
    parametrization, so that it goes with it, and no part of a graph keeps the layer from being copied.
    """
    if isinstance(rnn, RNNBase):
        kind: Any = type(rnn)
        kind._flat_weights = property(_flat_weights, lambda self, value: None)
        kind._update_flat_weights = lambda self: None


def _flat_weights(rnn: RNNBase) -> list[Tensor]:
    made = [getattr(rnn, name) for name in rnn._flat_weights_names]
    # on a GPU cuDNN wants them in one piece of memory
    RNNBase.flatten_parameters(cast(Any, SimpleNamespace(**(vars(rnn) | {"_flat_weights": made}))))
    return made
