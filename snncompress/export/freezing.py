"""The inference form of a network: plain weights, batch norms folded into what stands before them."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import fusion

from snncompress.errors import DataError, OptionError
from snncompress.interfaces import Adapter, Forward
from snncompress.model.cells import layer_at
from snncompress.model.copying import private_copy
from snncompress.model.network import WEIGHT_LAYERS, weight_layers
from snncompress.model.parametrizations import bake, compression_of, computed_weight, gridded, stored_weight
from snncompress.model.plan import detach
from snncompress.running.bench import bench
from snncompress.running.data import Run
from snncompress.running.sameness import all_same, wire, wired_outputs

from .integer_layers import Codes, make_float
from .integer_layers import codes as codes_of
from .quickening import quicken

M = TypeVar("M", bound=nn.Module)


def freeze(
    model: M,
    data: Any = None,
    *,
    timesteps: int | None = None,
    integer: bool | Literal["auto"] = False,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
) -> M:
    """A copy for inference: quantized and masked weights baked into plain layers, batch norms folded where they can be.

        BN(W x + b) = W' x + b',  W' = γ/√(σ² + ε) · W,  b' = γ/√(σ² + ε) · (b − μ) + β

    A batch norm is folded where all that it ever gets comes from one convolution or linear layer; an ``nn.Identity``
    takes its place. Whether that is so is seen by running an example, and each fold is checked on a copy with random
    batch norms and neurons as wires: the outputs must stay. Elsewhere the batch norm stays.

    The copy is in eval mode, without gradients, and holds no plan: it can't be compressed further or saved with
    :func:`snncompress.save`, but as a whole with ``torch.save``. Its outputs are those of ``model.eval()`` up to the
    rounding of floats, which can move a membrane potential that lies at its threshold to the other side.

    It is made to be fast on a CPU: neurons whose equation the adapter knows compute in place, convolutions have their
    channels last in memory, and a layer whose input is the same in every timestep (direct encoding) is computed once.

    With ``integer``, layers whose weight was quantized to at most 8 bits and whose input is spikes compute

        y_c = scale_c · Σ k_ci · s_i + bias_c

    with spikes s and codes k of a byte each and exact sums in 32 bits, batch norm in the scale and the bias. Their
    weights take a quarter of the memory. What is spikes is seen on the example: what neurons put out, through pooling
    by maxima, reshaping and sums, or other whole numbers from 0 to 127. An input that turns out to be anything else is
    computed in float, from the same weights. :func:`snncompress.frozen_layers` tells which layers compute in float, and
    why. The operators are oneDNN's inside torch, and not part of its public interface: they are tried once, and without
    them all layers compute in float.

    Args:
        model: a network, compressed or not; it stays as it is.
        data: an example of what it takes: a batch, a DataLoader, or an iterable of batches, of which one sample is
            used. None: noise of a shape that fits.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds a batch as it is.
        integer: whether layers compute with integers where they can. "auto" leaves those in float that are known to be
            faster so. With True a network in which no layer can is an error.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        adapter: a framework's name or an Adapter, where the model doesn't tell.

    Raises:
        DataError: the data don't fit the model, or none are given and no shape of noise fits.
        ModelError: neurons of two frameworks, an uninitialised layer, or ``integer=True`` and no layer that can.
        OptionError: another value of ``integer``.

    Example:
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Conv2d(1, 2, 3), layer.BatchNorm2d(2), neuron.IFNode())
        >>> frozen = freeze(net, torch.rand(1, 1, 5, 5), timesteps=2)
        >>> frozen[1]
        Identity()
    """
    if not (isinstance(integer, bool) or integer == "auto"):
        raise OptionError(f"integer must be True, False or 'auto', not {integer!r}.")
    with bench(model, data, timesteps, forward, adapter=adapter, plain=True, noise="structure") as table:
        frozen, found = table.model.eval(), table.adapter
        if not integer:
            for module in frozen.modules():
                make_float(module)  # of a network that was frozen for integers
        codes = {name: _codes(layer_at(frozen, name)) for name in weight_layers(frozen)} if integer else {}
        folded(frozen, found, table.feed.example())
        frozen = quicken(frozen, found, table.feed.example(), codes, integer=integer)
    found.reset(frozen)
    found.adopt(frozen)
    return frozen


def folded(model: M, adapter: Adapter, run: Run) -> M:
    """Bake the weights of a copy in eval mode, fold its batch norms and take its plan away, in place."""
    for name in weight_layers(model):
        bake(layer_at(model, name))
    _fold(model, adapter, run)
    adapter.reset(model)
    detach(model)
    model.requires_grad_(False)
    return model


def _codes(layer: nn.Module) -> Codes | str:
    """A layer's weight as whole numbers, or why it isn't."""
    compression = compression_of(layer)
    if compression is None or compression.bits is None:
        return "its weight isn't quantized"
    on_grid = gridded(compression, stored_weight(layer))
    if on_grid is None:
        return "its weights don't lie on one grid"
    mask = None if compression.mask is None else compression.turned(compression.mask)
    return codes_of(*on_grid, mask)


def _fold(model: nn.Module, adapter: Adapter, run: Run) -> None:
    """Fold what can be: all at once if the outputs stay, else one by one."""
    probe = private_copy(model, adapter)
    pairs = _pairs(probe, adapter, run)
    _randomize([probe.get_submodule(norm) for _, norm in pairs])
    expected = wired_outputs(probe, adapter, run)

    def stays(folds: list[tuple[str, str]]) -> bool:
        trial = private_copy(probe, adapter)
        try:
            for fold in folds:
                _fold_pair(trial, *fold)
            found = wired_outputs(trial, adapter, run)
        except (RuntimeError, DataError):  # of a norm over another axis than the layer's channels
            return False
        return all_same(expected, found)

    for fold in pairs if stays(pairs) else [fold for fold in pairs if stays([fold])]:
        _fold_pair(model, *fold)


def _pairs(model: nn.Module, adapter: Adapter, run: Run) -> list[tuple[str, str]]:
    """(layer, batch norm): the norm gets the layer's output, and nothing else, each time it is called."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no identity is used twice
    calls: Counter[str] = Counter()
    sources: dict[str, list[str]] = defaultdict(list)

    def made_by(name: str, module: nn.Module, args: Any, output: Any) -> None:
        made[id(output)] = name, output
        calls[name] += 1

    def taken_by(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        sources[name].append(made.get(id(args[0]), ("", args[0]))[0] if args else "")

    with ExitStack() as stack:
        stack.enter_context(adapter.identities(model, wire))
        for name, module in model.named_modules():
            if isinstance(module, WEIGHT_LAYERS) and not computed_weight(module):
                stack.callback(module.register_forward_hook(partial(made_by, name)).remove)
            elif isinstance(module, _BatchNorm) and module.running_var is not None:
                stack.callback(module.register_forward_pre_hook(partial(taken_by, name)).remove)
        run(model)
    norms = Counter(source for found in sources.values() for source in set(found))
    return [
        (found[0], norm)
        for norm, found in sources.items()
        if set(found) == {found[0]} and found[0] and len(found) == calls[found[0]] and norms[found[0]] == 1
    ]


def _fold_pair(model: nn.Module, layer: str, norm: str) -> None:
    before: Any = model.get_submodule(layer)
    bn: Any = model.get_submodule(norm)
    gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
    beta = torch.zeros_like(bn.running_var) if bn.bias is None else bn.bias
    args = before.weight, before.bias, bn.running_mean, bn.running_var, bn.eps, gamma, beta
    if isinstance(before, nn.Linear):
        before.weight, before.bias = fusion.fuse_linear_bn_weights(*args)
    else:
        before.weight, before.bias = fusion.fuse_conv_bn_weights(*args, transpose=isinstance(before, _ConvTransposeNd))
    model.set_submodule(norm, nn.Identity())


def _randomize(norms: list[Any]) -> None:
    """A norm that has learned nothing yet would hide a wrong fold."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        tensors = ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5))
        for tensor, low in tensors:
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
