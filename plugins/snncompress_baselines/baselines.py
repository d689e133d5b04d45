"""The criteria every comparison needs. What torch-pruning computes is left to torch-pruning.

torch-pruning scores a *group* of coupled layers. Here each layer is scored alone, and by its float weight
[C, ...] whatever its type, so its importances are handed a genuine group of one stand-in layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snncompress.extend import Criterion, Layer, OptionError, PluginError, Signal


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The size of a channel's filter: score(f) = Σ |w|^p over the weights of output channel f.

    The p-th root isn't taken (torch-pruning's convention): it wouldn't change the order within a layer.

    Args:
        p: 1 or 2, for the L1 or the squared L2 norm.

    Shapes:
        weight [C, ...] → score [C].

    Raises:
        OptionError: ``p`` is neither 1 nor 2.

    Source: Li et al., "Pruning filters for efficient ConvNets", ICLR 2017; computed by torch-pruning's
    ``GroupMagnitudeImportance``.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
        >>> layer = Layer("fc", torch.nn.Identity(), weight, None, None, (), torch.Generator())
        >>> Magnitude(p=1).score(layer, None), Magnitude().score(layer, None)
        (tensor([7., 1.], dtype=torch.float64), tensor([25.,  1.], dtype=torch.float64))
    """

    name: ClassVar[str] = "magnitude"

    p: int = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise OptionError(f"magnitude: p must be 1 (L1 norm) or 2 (L2 norm), not {self.p!r}.")

    def score(self, layer: Layer, state: Any) -> Tensor:
        """Σ |w|^p per output channel, [C]."""
        from torch_pruning import prune_linear_out_channels
        from torch_pruning.pruner.importance import GroupMagnitudeImportance

        importance = GroupMagnitudeImportance(p=self.p, normalizer=None)
        return _scores(importance, _linear(layer.weight), prune_linear_out_channels)


class Random(Criterion):
    """Uniform random scores in [0, 1): the floor that every criterion has to beat.

    The numbers come from ``layer.generator``, so they follow the seed of ``apply`` and leave torch's global
    random state alone.

    Shapes:
        → score [C].

    Source: Mittal et al., "Recovering from random pruning", WACV 2018.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> def layer():
        ...     generator = torch.Generator().manual_seed(0)
        ...     return Layer("fc", torch.nn.Identity(), torch.ones(3, 1), None, None, (), generator)
        >>> torch.equal(Random().score(layer(), None), Random().score(layer(), None))
        True
    """

    name: ClassVar[str] = "random"

    def score(self, layer: Layer, state: Any) -> Tensor:
        """[C] numbers from the layer's generator."""
        # torch-pruning's RandomImportance draws from the global generator, which apply must not touch
        generator = layer.generator
        return torch.rand(layer.channels, generator=generator, dtype=torch.float64, device=generator.device)


class BNScale(Criterion):
    """Network slimming: score(f) = |γ_f|, the scale of the batch normalization behind the layer.

    Shapes:
        norm.weight [C] → score [C].

    Raises:
        PluginError: the layer has no batch normalization before its neurons, or one without a scale.

    Source: Liu et al., "Learning efficient convolutional networks through network slimming", ICCV 2017;
    computed by torch-pruning's ``BNScaleImportance``.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> norm = torch.nn.BatchNorm2d(2)
        >>> with torch.no_grad():
        ...     _ = norm.weight.copy_(torch.tensor([0.5, -2.0]))
        >>> layer = Layer("conv", torch.nn.Identity(), torch.ones(2, 1), None, norm, (), torch.Generator())
        >>> BNScale().score(layer, None)
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "bn_scale"

    def score(self, layer: Layer, state: Any) -> Tensor:
        """|γ| per channel, [C]."""
        from torch_pruning import prune_batchnorm_out_channels
        from torch_pruning.pruner.importance import BNScaleImportance

        remedy = "Choose another criterion, or leave this layer out with skip."
        if layer.norm is None:
            raise PluginError(
                f"bn_scale: layer {layer.name!r} can't be scored, since no batch normalization stands "
                f"between it and its neurons. {remedy}"
            )
        scale = getattr(layer.norm, "weight", None)
        if not isinstance(scale, Tensor) or scale.numel() != layer.channels:
            raise PluginError(
                f"bn_scale: layer {layer.name!r} can't be scored, since its {type(layer.norm).__name__} has "
                f"no scale per channel (affine=False, or not a batch normalization). {remedy}"
            )
        stand_in = nn.BatchNorm1d(layer.channels)
        stand_in.weight = nn.Parameter(scale.detach().flatten().float(), requires_grad=False)
        return _scores(BNScaleImportance(normalizer=None), stand_in, prune_batchnorm_out_channels)


@dataclass
class _Sum:
    total: Tensor  # [C]
    count: int = 0

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(self.total + other.total, self.count + other.count)


class FiringRate(Criterion):
    """How often a channel fires: the share of (sample, timestep, neuron) with a spike.

    Silent channels are the first to go.

    A graded or negative spike counts as one spike.

    Shapes:
        spikes [T, N, C, *map] → score [C], in spikes per neuron and timestep.

    Raises:
        PluginError: nothing was recorded for the layer.

    Example:
        Two neurons, one sample, T = 4:

        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("fc", torch.nn.Identity(), torch.ones(2, 1), None, None, (), torch.Generator())
        >>> spikes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]).unsqueeze(1)
        >>> rate = FiringRate()
        >>> rate.score(layer, rate.observe(layer, rate.begin(layer), spikes, None))
        tensor([0.7500, 0.0000], dtype=torch.float64)
    """

    name: ClassVar[str] = "firing_rate"
    needs: ClassVar[frozenset[Signal]] = frozenset({"spikes"})

    def begin(self, layer: Layer) -> _Sum:
        """No spikes yet."""
        return _Sum(torch.zeros(layer.channels, dtype=torch.float64, device=layer.weight.device))

    def observe(self, layer: Layer, state: _Sum, spikes: Tensor, membrane: Tensor | None) -> _Sum:
        """Count spikes."""
        # written as numbers at once: count_nonzero takes ten times as long, turning booleans into numbers four times
        fired = torch.ne(spikes.detach(), 0, out=torch.empty_like(spikes, dtype=torch.float32, requires_grad=False))
        per_map = fired.flatten(3).sum(3) if fired.dim() > 3 else fired
        state.total += per_map.double().sum((0, 1))
        state.count += spikes.numel() // max(1, spikes.shape[2])
        return state

    def merge(self, layer: Layer, state: _Sum, other: _Sum) -> _Sum:
        """Add up."""
        return state.plus(other)

    def score(self, layer: Layer, state: _Sum) -> Tensor:
        """Spikes per neuron and timestep, [C]."""
        if state.count == 0:
            raise PluginError(
                f"firing_rate: no spikes were recorded for layer {layer.name!r}: the neurons that it drives "
                "didn't run. Leave the layer out or choose a criterion that looks at weights, such as "
                "'magnitude'."
            )
        return torch.div(state.total, state.count)


class Taylor(Criterion):
    """First-order estimate of the loss without a channel: score(f) = mean over batches of Σ |w · ∂L/∂w|.

    The sum runs over the weights of output channel f; the gradient is one batch's, through the surrogate
    gradient of the spikes.

    Shapes:
        weight, weight_grad [C, ...] → score [C], in units of the loss.

    Raises:
        PluginError: a batch was closed without a gradient, or no batch was.

    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019; computed by
    torch-pruning's ``GroupTaylorImportance``.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight, gradient = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, -1.0], [0.5, 9.0]])
        >>> layer = Layer("fc", torch.nn.Identity(), weight, gradient, None, (), torch.Generator())
        >>> taylor = Taylor()
        >>> taylor.score(layer, taylor.end_batch(layer, taylor.begin(layer)))
        tensor([3.0000, 1.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[frozenset[Signal]] = frozenset({"gradients"})

    def begin(self, layer: Layer) -> _Sum:
        """No batches yet."""
        return _Sum(torch.zeros(layer.channels, dtype=torch.float64, device=layer.weight.device))

    def end_batch(self, layer: Layer, state: _Sum) -> _Sum:
        """Add this batch's Σ |w · ∂L/∂w|."""
        from torch_pruning import prune_linear_out_channels
        from torch_pruning.pruner.importance import GroupTaylorImportance

        if layer.weight_grad is None:
            raise PluginError(
                f"taylor: layer {layer.name!r} has no gradient. The likely cause is a weight with "
                "requires_grad=False or one that the loss doesn't depend on; leave the layer out with skip "
                "or choose another criterion."
            )
        stand_in = _linear(layer.weight)
        stand_in.weight.grad = layer.weight_grad.detach().flatten(1).float()
        state.total += _scores(GroupTaylorImportance(normalizer=None), stand_in, prune_linear_out_channels)
        state.count += 1
        return state

    def merge(self, layer: Layer, state: _Sum, other: _Sum) -> _Sum:
        """Add up."""
        return state.plus(other)

    def score(self, layer: Layer, state: _Sum) -> Tensor:
        """Mean over batches, [C]."""
        if state.count == 0:
            raise PluginError(
                f"taylor: no gradient was recorded for layer {layer.name!r}. taylor needs at least one "
                "batch of labelled calibration data."
            )
        return torch.div(state.total, state.count)


class BNScaleGradient(Criterion):
    """How much the loss wants a channel's scale to change: score(f) = |mean over batches of ∂L/∂γ_f|.

    γ is the scale of the batch norm behind the layer; the gradient goes through the surrogate gradient of the spikes.
    It is what ``prune_regrow`` brings channels back by: a channel that is masked gets the gradient that it would get if
    it spoke, with the weights that it has.

    Where no batch norm with a scale stands behind the layer, a scale of 1 on what its weights make stands in, and its
    gradient is known without it::

        y = s · (W x) + b, s = 1        ∂L/∂s_f = Σ over outputs (W x)_f · ∂L/∂y_f = Σ over weights w_f · ∂L/∂w_f

    that is the ∂L/∂γ of a batch norm with mean 0, variance 1 and γ = 1. Channels are compared within a layer, and
    layers that are coupled are put on one scale, so the two needn't share theirs.

    Shapes:
        norm.weight.grad [C], else weight, weight_grad [C, ...] → score [C], in units of the loss.

    Raises:
        PluginError: a batch was closed without a gradient, or no batch was.

    Source: Li et al., "Towards efficient deep spiking neural networks construction with spiking activity based
    pruning", ICML 2024, which regrows channels by it.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight, gradient = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, -1.0], [0.5, 9.0]])
        >>> norm, by = torch.nn.BatchNorm1d(2), BNScaleGradient()
        >>> norm.weight.grad = torch.tensor([-0.5, 0.25])
        >>> for layer in (Layer("fc", torch.nn.Identity(), weight, gradient, n, (), None) for n in (norm, None)):
        ...     by.score(layer, by.end_batch(layer, by.begin(layer))).tolist()
        [0.5, 0.25]
        [1.0, 1.5]
    """

    name: ClassVar[str] = "bn_scale_gradient"
    needs: ClassVar[frozenset[Signal]] = frozenset({"gradients"})

    def begin(self, layer: Layer) -> _Sum:
        """No batches yet."""
        return _Sum(torch.zeros(layer.channels, dtype=torch.float64, device=layer.weight.device))

    def end_batch(self, layer: Layer, state: _Sum) -> _Sum:
        """Add this batch's ∂L/∂γ, or ∂L/∂s."""
        scale = getattr(layer.norm, "weight", None)
        if isinstance(scale, Tensor) and scale.grad is not None and scale.numel() == layer.channels:
            state.total += scale.grad.detach().flatten()
        elif layer.weight_grad is not None:
            state.total += (layer.weight * layer.weight_grad.detach()).flatten(1).sum(1)
        else:
            raise PluginError(
                f"{self.name}: layer {layer.name!r} has no gradient: the loss doesn't depend on its weight. Leave the "
                f"layer out with skip, or give it a ratio of 0."
            )
        state.count += 1
        return state

    def merge(self, layer: Layer, state: _Sum, other: _Sum) -> _Sum:
        """Add up."""
        return state.plus(other)

    def score(self, layer: Layer, state: _Sum) -> Tensor:
        """The size of the mean over batches, [C]."""
        if state.count == 0:
            raise PluginError(f"{self.name}: no gradient was recorded for layer {layer.name!r}.")
        return torch.div(state.total, state.count).abs()


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight, [C, ...] → [C, K], in float32 as torch-pruning computes."""
    flat = weight.detach().flatten(1).float()
    # on the meta device, since initialization would draw from the global random state
    linear = nn.Linear(flat.shape[1], flat.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(flat)
    return linear


def _scores(importance: Any, layer: nn.Linear | nn.BatchNorm1d, prune: Any) -> Tensor:
    """What a torch-pruning importance says of all output channels of one layer, [C]."""
    from torch_pruning.dependency import Dependency, Group, Node

    node = Node(layer, None, "stand-in")
    channels = list(range(int(layer.weight.shape[0])))
    group = Group()
    group.add_dep(Dependency(prune, prune, node, node), channels)
    group[0].root_idxs = channels
    scores: Tensor = importance(group)
    return scores.double()
