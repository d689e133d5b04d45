"""CQP: single weights by magnitude and by how much the loss depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from snncompress.extend import (
    CriticalityCriterion,
    Granularity,
    Layer,
    OptionError,
    PluginError,
    Scope,
    Signal,
    layer_adaptive,
)

Unit = Literal["weight", "input"]


@dataclass
class Slopes:
    """Running sum over batches of |∂L/∂w|, shaped like the weight."""

    total: Tensor
    batches: int = 0


@dataclass(frozen=True)
class CQP(CriticalityCriterion):
    """Criticality-constrained pruning of single weights, solved exactly.

    The criticality of a weight is the mean over batches of |∂L/∂w|, through the model's own surrogate gradient,
    divided by the largest in its layer; its importance is::

        v = |w| · criticality^α

    and the mask m solves the quadratic program  min Σ (v (1 - m))²,  m ∈ {0, 1},  Σ (1 - m) = k,  m = 1 where
    criticality > τ.  Since each weight adds a term of its own, removing the k lowest v among the weights that aren't
    critical is that minimum: sorting is exact (a convex relaxation isn't: ``cqp_relaxed``). Where fewer than k
    weights are uncritical, the sparsity that was asked for counts, and critical weights go too, the lowest v first.

    The defaults are measured (benchmarks/cqp_mnist.py): α = 1, the paper's, lets criticality drown magnitude; a τ that
    protects many weights takes the choice away from v, one that protects few changes nothing.

    Args:
        alpha: α ≥ 0, how much criticality counts; 0 is magnitude pruning.
        tau: τ in [0, 1], above which a weight is critical; 1 protects none.
        unit: "weight" scores each weight by itself; "input" a whole input (column of a linear layer, input channel of
            a convolution) by mean|w| · C^α, C being its mean |∂L/∂w| over the column divided by the largest.
        scope: "global" compares weights across all layers of the same ratio, made comparable as in LAMP
            (:func:`snncompress.extend.layer_adaptive`); "layer" removes the same share of every layer.

    Shapes:
        weight, weight_grad [C, ...] → score [C, ...], float64: that of LAMP, in [0, 1], which keeps the order of v, and
        2 more for a critical weight.

    Raises:
        OptionError: an option has a value that can't work.
        PluginError: a layer has no gradient, or no batch was seen.

    Source: Criticality-constrained quadratic pruning of SNNs ("CQP"), abstract and the author's published code (which
    has unit="input").

    Example:
        Criticality is [[1, 0.5], [0, 0.25]], so at τ = 0.9 the first weight is critical though v is only 0.1:

        >>> import torch
        >>> from snncompress.extend import Layer
        >>> weight, gradient = torch.tensor([[0.1, -3.0], [2.0, 1.0]]), torch.tensor([[4.0, 2.0], [0.0, -1.0]])
        >>> layer = Layer("fc", torch.nn.Identity(), weight, gradient, None, (), torch.Generator())
        >>> cqp = CQP(alpha=1.0, tau=0.9, scope="layer")
        >>> scores = cqp.score(layer, cqp.end_batch(layer, cqp.begin(layer)))
        >>> scores  # v = [[0.1, 1.5], [0, 0.25]]
        tensor([[2.0043, 1.0000],
                [0.0000, 0.0270]], dtype=torch.float64)
        >>> cqp.select(scores.flatten(), 2)
        tensor([False, False,  True,  True])
    """

    name: ClassVar[str] = "cqp"
    granularity: ClassVar[Granularity] = "weight"
    needs: ClassVar[frozenset[Signal]] = frozenset({"gradients"})

    alpha: float = 0.25
    tau: float = 1.0
    unit: Unit = "weight"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        for option, value, most in (("alpha", self.alpha, 100.0), ("tau", self.tau, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise OptionError(f"{self.name}: {option} must be a number from 0 to {most:g}, not {value!r}.")
        for option, chosen, choices in (("unit", self.unit, get_args(Unit)), ("scope", self.scope, get_args(Scope))):
            if chosen not in choices:
                raise OptionError(f"{self.name}: {option} must be one of {', '.join(choices)}, not {chosen!r}.")

    def begin(self, layer: Layer) -> Slopes:
        """No batches yet."""
        return Slopes(torch.zeros_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32)))

    def end_batch(self, layer: Layer, state: Slopes) -> Slopes:
        """Add this batch's |∂L/∂w|."""
        if layer.weight_grad is None:
            raise PluginError(
                f"{self.name}: layer {layer.name!r} has no gradient: the loss doesn't depend on its weight. Leave the "
                f"layer out with skip, or give it a ratio of 0."
            )
        state.total += layer.weight_grad.abs()
        state.batches += 1
        return state

    def merge(self, layer: Layer, state: Slopes, other: Slopes) -> Slopes:
        """Add up."""
        return Slopes(state.total + other.total, state.batches + other.batches)

    def score(self, layer: Layer, state: Slopes) -> Tensor:
        """LAMP's score of v, and 2 more where critical, [C, ...]."""
        criticality = self.criticality(layer, state)
        scores = layer_adaptive(self._importance(layer, criticality))
        return scores if self.tau >= 1 else scores.add_(criticality > self.tau, alpha=2)  # none is above 1

    def importance(self, layer: Layer, state: Slopes) -> Tensor:
        """The v of every weight, [C, ...]."""
        return self._importance(layer, self.criticality(layer, state))

    def _importance(self, layer: Layer, criticality: Tensor) -> Tensor:
        size = layer.weight.abs()
        return (_per_input(size) if self.unit == "input" else size) * criticality**self.alpha

    def criticality(self, layer: Layer, state: Slopes) -> Tensor:
        """Mean |∂L/∂w| over the largest in the layer, whatever τ is: [C, ...] in [0, 1]."""
        if state.batches == 0:
            raise PluginError(f"{self.name}: no gradient was recorded for layer {layer.name!r}.")
        slope = _per_input(state.total) if self.unit == "input" else state.total
        return slope / slope.max().clamp_min(torch.finfo(slope.dtype).tiny)


def _per_input(values: Tensor) -> Tensor:
    """Each input's mean over the outputs (and the kernel), in the shape of ``values`` [C, I, ...]."""
    others = [dim for dim in range(values.dim()) if dim != 1]
    return values.mean(others, keepdim=True).expand_as(values)
