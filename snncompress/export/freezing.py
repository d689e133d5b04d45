"""The inference form of a network: plain weights, batch norms folded into what stands before them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import nn

from snncompress.base.distributed import no_sync
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, Forward
from snncompress.model.cells import layer_at
from snncompress.model.edits.norms import fold_norm
from snncompress.model.network import weight_layers
from snncompress.model.parametrizations import bake, compression_of, gridded, stored_weight
from snncompress.model.plan import detach
from snncompress.running.bench import bench
from snncompress.running.data import Feed, Run
from snncompress.structure.folding import foldable

from .integer_layers import Codes, make_float
from .integer_layers import codes as codes_of
from .integer_network import integer_network, refuse_integers
from .quickening import quicken, slowed

M = TypeVar("M", bound=nn.Module)


def freeze(
    model: M,
    data: Any = None,
    *,
    timesteps: int | None = None,
    integer: bool | Literal["auto", "full"] = False,
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

    A linear layer in float of 2^17 weights or more, which make 2^20 products or more in a batch like the first of
    ``data``, holds less of them where that is faster, as measured on one thread: of 85 % zeros or more nothing but the
    others, row by row (CSR); with 30 % of its columns all zeros nothing but the other columns. It is a rule, so that
    networks frozen alike compute alike.

    With ``integer``, layers whose weight was quantized to at most 8 bits and whose input is spikes compute

        y_c = scale_c · Σ k_ci · s_i + bias_c

    with spikes s and codes k of a byte each and exact sums in 32 bits, batch norm in the scale and the bias. Their
    weights take a quarter of the memory. What is spikes is seen on the example: what neurons put out, through pooling
    by maxima, reshaping and sums, or other whole numbers from 0 to 127. An input that turns out to be anything else is
    computed in float, from the same weights. :func:`snncompress.frozen_layers` tells which layers compute in float, and
    why. The operators are oneDNN's inside torch, and not part of its public interface: they are tried once, and without
    them all layers compute in float.

    With ``integer="full"`` neurons count in whole numbers too. That takes states in fixed point (``state_bits`` of
    :func:`snncompress.apply`) and layers that each drive neurons of their own, with nothing but a batch norm between:

        y = M · Σ k s + B + A · q - reset        q ← saturate(y >> 24, rounded)        it fires where q ≥ θ, or q > θ

    with numbers q of the grid's step, sums of codes and spikes in 32 bits, and M, B, A and θ whole; scales are folded
    into M and B, which are per channel where they are. Layers before the first spikes compute in float64, and their
    output is rounded to 2^-24 of a step; a layer behind the last spikes puts out floats. Every spike is that of the
    network in float64, but where a sum comes nearer to a tie than floats can tell; on the example it is tried.

    Args:
        model: a network, compressed or not; it stays as it is.
        data: an example of what it takes: a batch, a DataLoader, or an iterable of batches, of which one sample is
            used. None: noise of a shape that fits.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds a batch as it is.
        integer: whether layers compute with integers where they can. "auto" leaves those in float that are known to be
            faster so. With True a network in which no layer can is an error. With "full" there is no float between the
            first layer's output and the readout; a layer or neuron that would need one is an error.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        adapter: a framework's name or an Adapter, where the model doesn't tell.

    Raises:
        DataError: the data don't fit the model, or none are given and no shape of noise fits.
        ModelError: neurons of two frameworks, an uninitialised layer, or ``integer=True`` and no layer that can.
        OptionError: another value of ``integer``.

    Example:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Conv2d(1, 2, 3), layer.BatchNorm2d(2), neuron.IFNode())
        >>> frozen = freeze(net, torch.rand(1, 1, 5, 5), timesteps=2)
        >>> frozen[1]
        Identity()
    """
    if not (isinstance(integer, bool) or integer in ("auto", "full")):
        raise OptionError(f"integer must be True, False, 'auto' or 'full', not {integer!r}.")
    refuse_integers(model, "frozen")
    with no_sync(), bench(model, data, timesteps, forward, adapter=adapter, plain=True, noise="structure") as table:
        frozen, found = table.model.eval(), table.adapter
        for module in frozen.modules():  # of a network that was frozen before
            slowed(module)
            if not integer:
                make_float(module)
        codes = {name: _codes(layer_at(frozen, name)) for name in weight_layers(frozen)} if integer else {}
        folded(frozen, found, table.feed.example())
        if integer == "full":
            frozen = integer_network(frozen, found, table.feed.example(), codes)
        else:
            share = 1 if data is None else _share(table.feed)
            frozen = quicken(frozen, found, table.feed.example(), codes, integer=integer, share=share)
    found.reset(frozen)
    found.adopt(frozen)
    return frozen


def folded(model: M, adapter: Adapter, run: Run) -> M:
    """Bake the weights of a copy in eval mode, fold its batch norms and take its plan away, in place."""
    for name in weight_layers(model):
        bake(layer_at(model, name))
    for layer, norm in foldable(model, adapter, run):
        fold_norm(model, layer, norm)
    adapter.reset(model)
    detach(model)
    model.requires_grad_(False)
    return model


def _share(feed: Feed) -> int:
    """How many times as many samples a batch has as an example; 1 where nothing tells."""
    axis = feed.samples_axis(feed.first())
    return 1 if axis is None else feed.first().x.shape[axis] // max(1, feed.example_batch().x.shape[axis])


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
