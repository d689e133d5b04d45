"""Optimal Brain Surgeon on the membrane potential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from snncompress.extend import Criterion, Granularity, Layer, OptionError, Scope, Signal, layer_adaptive


@dataclass(frozen=True)
class OBS(Criterion):
    """What the membrane potential loses with a weight at least, if the others of its row make up for it.

    With H = Σ u uᵀ over what the row reads, u[t] = (1 - leak) · u[t-1] + x[t]::

        saliency(w_j) = w_j² / [H⁻¹]_jj

    is by how much Σ (Δw · u)² grows where w_j goes and the row's other weights, and its bias, are fitted again: so
    this criterion asks for ``repair``, which does fit them. A weight whose input the others can imitate is cheap, one
    with an input of its own is dear. Across layers saliencies are compared as LAMP compares squared magnitudes. No
    labels are needed.

    H is that of the network as it is, of a layer's inputs that are all there: where weights went before, their inputs
    still count as ones that could make up for others.

    Args:
        scope: "global" compares weights across all layers of the same ratio; "layer" removes the same share of each.
        damping: share of H's mean diagonal that is added to its diagonal.

    Shapes:
        weight [C, ...] → score [C, ...], float64.

    Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, Eq. 5;
    on what spiking neurons integrate: Shi, Li and Ward-Cherrier, "Spiking Brain Compression", arXiv 2506.03996.

    Example:
        >>> import torch
        >>> from snncompress.extend import Inputs
        >>> u = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # three samples, two inputs
        >>> gram, fc = (u.T @ u)[None], torch.nn.Linear(2, 1)
        >>> inputs = Inputs(gram.diagonal(dim1=1, dim2=2), torch.zeros(1, 2), 3.0, gram)
        >>> weight = torch.tensor([[1.0, -2.0]])
        >>> layer = Layer("fc", fc, weight, None, None, (), torch.Generator(), inputs)
        >>> OBS(scope="layer", damping=0.0).score(layer, None)  # 1² · 5, 2² · 1
        tensor([[5., 4.]], dtype=torch.float64)
    """

    name: ClassVar[str] = "obs"
    granularity: ClassVar[Granularity] = "weight"
    needs: ClassVar[frozenset[Signal]] = frozenset({"inputs"})

    scope: Scope = "global"
    damping: float = 1e-2

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise OptionError(f"obs: scope must be 'layer' or 'global', not {self.scope!r}.")
        if not 0 <= self.damping < float("inf"):
            raise OptionError(f"obs: damping must be a number from 0, not {self.damping!r}.")

    def score(self, layer: Layer, state: Any) -> Tensor:
        """Saliencies, or with a global scope what LAMP makes of their roots, [C, ...]."""
        saliency = layer.weight.double() ** 2
        if layer.inputs is not None:
            cost = 1 / layer.inputs.inverse_diagonal(self.damping)  # [G, D]
            saliency = saliency * cost[:, None, :].expand_as(layer.rows).reshape(saliency.shape)
        return layer_adaptive(saliency.sqrt()) if self.scope == "global" else saliency
