"""Unstructured baselines: the same comparisons for single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from snncompress.extend import Criterion, Granularity, Layer, OptionError, PluginError, Scope, Signal, layer_adaptive


@dataclass(frozen=True)
class _WeightCriterion(Criterion):
    """A criterion for single weights, compared within layers or across all of them."""

    granularity: ClassVar[Granularity] = "weight"

    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise OptionError(f"{self.name}: scope must be 'layer' or 'global', not {self.scope!r}.")


class WeightMagnitude(_WeightCriterion):
    """score(w) = |w|.

    Args:
        scope: "global" compares weights across all layers of the same ratio; "layer" removes the same share of each.

    Shapes:
        weight [C, ...] → score [C, ...].

    Source: Han et al., "Learning both weights and connections for efficient neural networks", NeurIPS 2015.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("fc", torch.nn.Identity(), torch.tensor([[3.0, -4.0]]), None, None, (), torch.Generator())
        >>> WeightMagnitude().score(layer, None)
        tensor([[3., 4.]])
    """

    name: ClassVar[str] = "weight_magnitude"

    def score(self, layer: Layer, state: Any) -> Tensor:
        """|w|, [C, ...]."""
        return layer.weight.abs()


class LAMP(_WeightCriterion):
    """Layer-adaptive magnitude: score(w) = w² / Σ of the squares of all weights of the layer that are no smaller.

    Within a layer the order is that of magnitude; across layers the share of a layer that a weight makes up counts.

    Args:
        scope: "global" compares weights across all layers of the same ratio; with "layer" it is ``weight_magnitude``.

    Shapes:
        weight [C, ...] → score [C, ...], float64, in [0, 1].

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("fc", torch.nn.Identity(), torch.tensor([[3.0, -4.0]]), None, None, (), torch.Generator())
        >>> LAMP().score(layer, None)  # 9 / (9 + 16), 16 / 16
        tensor([[0.3600, 1.0000]], dtype=torch.float64)
    """

    name: ClassVar[str] = "lamp"

    def score(self, layer: Layer, state: Any) -> Tensor:
        """LAMP's score of |w|, [C, ...]."""
        return layer_adaptive(layer.weight.abs())


class WeightRandom(_WeightCriterion):
    """Uniform random scores in [0, 1), from ``layer.generator``: the floor that every criterion has to beat.

    Args:
        scope: "global" compares weights across all layers of the same ratio; "layer" removes the same share of each.

    Shapes:
        → score [C, ...].

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("fc", torch.nn.Identity(), torch.ones(2, 3), None, None, (), torch.Generator())
        >>> WeightRandom().score(layer, None).shape
        torch.Size([2, 3])
    """

    name: ClassVar[str] = "weight_random"

    def score(self, layer: Layer, state: Any) -> Tensor:
        """Numbers from the layer's generator, [C, ...]."""
        generator = layer.generator
        return torch.rand(layer.weight.shape, generator=generator, device=generator.device).to(layer.weight.device)


@dataclass
class _Slopes:
    total: Tensor  # shaped like the weight
    batches: int = 0


class _GradientCriterion(_WeightCriterion):
    needs: ClassVar[frozenset[Signal]] = frozenset({"gradients"})

    def begin(self, layer: Layer) -> _Slopes:
        """No batches yet."""
        return _Slopes(torch.zeros_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32)))

    def end_batch(self, layer: Layer, state: _Slopes) -> _Slopes:
        """Add this batch's gradient."""
        if layer.weight_grad is None:
            raise PluginError(
                f"{self.name}: layer {layer.name!r} has no gradient: the loss doesn't depend on its weight. Leave the "
                f"layer out with skip, or give it a ratio of 0."
            )
        state.total += self._part(layer.weight_grad)
        state.batches += 1
        return state

    def merge(self, layer: Layer, state: _Slopes, other: _Slopes) -> _Slopes:
        """Add up."""
        return _Slopes(state.total + other.total, state.batches + other.batches)

    def _part(self, gradient: Tensor) -> Tensor:
        return gradient

    def _mean(self, layer: Layer, state: _Slopes) -> Tensor:
        if state.batches == 0:
            raise PluginError(f"{self.name}: no gradient was recorded for layer {layer.name!r}.")
        return state.total / state.batches


class WeightGradient(_GradientCriterion):
    """score(w) = mean over batches of |∂L/∂w|, through the surrogate gradient: criticality alone, without magnitude.

    Args:
        scope: "global" compares weights across all layers of the same ratio; "layer" removes the same share of each.

    Shapes:
        weight_grad [C, ...] → score [C, ...], in units of the loss per unit of weight.

    Raises:
        PluginError: a layer has no gradient, or no batch was seen.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight, slope = torch.ones(1, 2), torch.tensor([[-0.5, 0.25]])
        >>> layer = Layer("fc", torch.nn.Identity(), weight, slope, None, (), torch.Generator())
        >>> gradient = WeightGradient()
        >>> gradient.score(layer, gradient.end_batch(layer, gradient.begin(layer)))
        tensor([[0.5000, 0.2500]])
    """

    name: ClassVar[str] = "weight_gradient"

    def _part(self, gradient: Tensor) -> Tensor:
        return gradient.abs()

    def score(self, layer: Layer, state: _Slopes) -> Tensor:
        """Mean |∂L/∂w|, [C, ...]."""
        return self._mean(layer, state)


class SNIP(_GradientCriterion):
    """Connection sensitivity: score(w) = |w · ∂L/∂w|, the gradient being the mean over batches.

    What the loss would change, to first order, if the weight were zero. The published method scores an untrained
    network; here the one that is handed in is scored.

    Args:
        scope: "global", as published, compares weights across all layers of the same ratio; "layer" removes the same
            share of each.

    Shapes:
        weight, weight_grad [C, ...] → score [C, ...], in units of the loss.

    Raises:
        PluginError: a layer has no gradient, or no batch was seen.

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.

    Example:
        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight, slope = torch.tensor([[2.0, -1.0]]), torch.tensor([[-0.5, 0.25]])
        >>> layer = Layer("fc", torch.nn.Identity(), weight, slope, None, (), torch.Generator())
        >>> snip = SNIP()
        >>> snip.score(layer, snip.end_batch(layer, snip.begin(layer)))
        tensor([[1.0000, 0.2500]])
    """

    name: ClassVar[str] = "snip"

    def score(self, layer: Layer, state: _Slopes) -> Tensor:
        """|w · mean ∂L/∂w|, [C, ...]."""
        return (layer.weight * self._mean(layer, state)).abs()
