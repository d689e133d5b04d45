"""Optimal Brain Surgeon on channels: what the layers that read them can't make up for."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snncompress.extend import Criterion, Granularity, Inputs, Layer, OptionError, Reader, Signal

ROUNDS = 32
"""In each a share of the channels goes at once, one at least."""


@dataclass(frozen=True)
class Reconstruction(Criterion):
    """What the layers behind lose with a channel, if the channels that are left make up for it as well as they can.

    A layer that reads the channels gives W u, with u[t] = (1 - leak) · u[t-1] + x[t] what its neurons integrate of its
    inputs, and H = Σ u uᵀ. Where the inputs c of a channel go, and the others' weights and its bias are fitted again::

        cost(c) = tr(W_c ([H⁻¹]_cc)⁻¹ W_cᵀ) / tr(W H Wᵀ)

    is the share of what its neurons integrate that is lost. The channels of least cost go first, W and H⁻¹ become those
    of what is left, and so on to the last: a channel's score is its cost in its turn. So of two channels that say the
    same one is cheap and the other is dear, and so is one that nothing else can imitate. This is exactly what
    ``repair`` can't give back. The rows of W count as batch norm behind them scales them; costs of several readers are
    added up. No labels are needed.

    Where over 8,192 inputs are read, they are taken to be independent.

    Args:
        damping: share of H's mean diagonal that is added to its diagonal.

    Shapes:
        weight [C, ...] → score [C], float64; all of a layer's together at most 1 for each of its readers.

    Source: Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992) on groups of weights, as Kurtic, Frantar and Alistarh,
    "ZipLM", NeurIPS 2023, Eq. 3 and 4, use it on structures; here on what spiking neurons integrate.

    Example:
        >>> import torch
        >>> from snncompress.extend import Inputs
        >>> u = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        >>> gram = (u.T @ u)[None]  # the first two of three inputs are the same
        >>> inputs = Inputs(gram.diagonal(dim1=1, dim2=2), 0 * u[:1], 3.0, gram)
        >>> fc, behind, all_of = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1), torch.ones(3, dtype=torch.bool)
        >>> weight, columns = torch.tensor([[1.0, 2.0, 1.0]]), torch.arange(3)[:, None]
        >>> reader = Reader("behind", behind, weight, None, columns, all_of, inputs)
        >>> layer = Layer("fc", fc, fc.weight.detach(), None, None, (), torch.Generator(), None, (reader,))
        >>> Reconstruction(1e-9).score(layer, None).round(decimals=3)  # of 2 · (1 + 2)² + 1 = 19: 0, then 18, and 1
        tensor([0.0000, 0.9470, 0.0530], dtype=torch.float64)
    """

    name: ClassVar[str] = "reconstruction"
    granularity: ClassVar[Granularity] = "channel"
    needs: ClassVar[frozenset[Signal]] = frozenset({"readers"})

    damping: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise OptionError(f"reconstruction: damping must be a number above 0, not {self.damping!r}.")

    def score(self, layer: Layer, state: Any) -> Tensor:
        """Costs [C], in the order in which the channels go; shares of the weights' squares where no layer reads any."""
        problems = [_Problem(r, r.inputs, self.damping) for r in layer.readers if r.inputs is not None]
        if not problems:
            squares = layer.weight.double().square().flatten(1).sum(1)
            return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        left, dearest = torch.arange(layer.channels, device=layer.weight.device), 0.0
        scores, several = torch.zeros(len(left), dtype=torch.float64, device=left.device), ceil(len(left) / ROUNDS)
        while len(left):
            costs, order = torch.stack([problem.costs(left) for problem in problems]).sum(0).sort(stable=True)
            going = left[order[:several]]
            scores[going] = costs[:several].clamp_min(dearest)
            dearest = float(scores[going[-1]])
            left = left[order[several:].sort().values]
            for problem in problems:
                problem.remove(going)
        return scores


class _Problem:
    """One reader's weights [O, D] and inverse Gram matrix [D, D], of the inputs that are left of all its groups."""

    def __init__(self, reader: Reader, inputs: Inputs, damping: float) -> None:
        rows = reader.rows.double()
        if (scale := _scale(reader.norm)) is not None and scale.numel() == rows.shape[:2].numel():
            rows = rows * scale.double().view(*rows.shape[:2], 1)
        inverse = inputs.inverse(damping)
        if inverse is None or inputs.gram is None:
            self.variance = 1 / inputs.inverse_diagonal(damping)
            whole, self.inverse = (rows.square() * self.variance.unsqueeze(1)).sum(), None
            self.variance = self.variance.flatten()
        else:
            mean = rows @ inputs.total.unsqueeze(2)
            whole = ((rows @ inputs.gram) * rows).sum() - mean.square().sum() / inputs.count
            self.inverse = torch.block_diag(*inverse).to(_dtype(damping))  # type: ignore[no-untyped-call]
        least = 1e-12 * inputs.count * rows.square().sum()  # of inputs that never change
        self.whole = whole.clamp_min(least).clamp_min(torch.finfo(torch.float64).tiny)
        self.weight: Tensor = torch.block_diag(*rows).to(_dtype(damping))  # type: ignore[no-untyped-call]
        self.columns, self.reads = reader.columns, reader.reads
        self.place = torch.arange(self.weight.shape[1], device=rows.device)
        """Where each input stands among those that are left; -1 of those that went."""

    def costs(self, channels: Tensor) -> Tensor:
        """What is lost with each of these channels, [n], as a share."""
        costs = torch.zeros(len(channels), dtype=torch.float64, device=channels.device)
        reading = self.reads[channels].nonzero().flatten()
        if not len(reading) or not self.weight.shape[1]:
            return costs
        columns = self.place[self.columns[channels[reading]]]  # [n, K]
        went, columns = columns < 0, columns.clamp_min(0)
        weight = self.weight[:, columns].masked_fill(went, 0).movedim(1, 0)  # [n, O, K]
        if self.inverse is None:
            lost = (weight.square() * self.variance[columns].unsqueeze(1)).sum((1, 2))
        else:
            block = self.inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
            block = block.masked_fill(went.unsqueeze(2) | went.unsqueeze(1), 0)
            lost = ((weight @ torch.linalg.pinv(block, hermitian=True)) * weight).sum((1, 2))
        costs[reading] = lost.double().clamp_min(0) / self.whole
        return costs

    def remove(self, channels: Tensor) -> None:
        """Their inputs go; the weights of the others become those that make up for them."""
        places = self.place[self.columns[channels[self.reads[channels]]]]
        stays = torch.ones(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        stays[places[places >= 0]] = False
        gone, kept = (~stays).nonzero().flatten(), stays.nonzero().flatten()
        if self.inverse is not None:
            rows = self.inverse[kept]
            across = torch.linalg.solve(self.inverse[gone][:, gone], rows[:, gone].T)
            self.weight = torch.addmm(self.weight[:, kept], self.weight[:, gone], across, alpha=-1)
            self.inverse = torch.addmm(rows[:, kept], rows[:, gone], across, alpha=-1)
        else:
            self.weight, self.variance = self.weight[:, kept], self.variance[kept]
        moved = torch.where(stays, stays.cumsum(0) - 1, -1)
        self.place[self.place >= 0] = moved[self.place[self.place >= 0]]


def _dtype(damping: float) -> torch.dtype:
    """What H⁻¹ can be worked on in: its entries differ by 1/damping, and more where H is close to singular."""
    return torch.float32 if damping >= 1e-2 else torch.float64


def _scale(norm: nn.Module | None) -> Tensor | None:
    """By what a batch norm multiplies each channel, in evaluation."""
    variance = getattr(norm, "running_var", None)
    if not isinstance(variance, Tensor):
        return None
    deviation = (variance + float(getattr(norm, "eps", 0.0))).sqrt()
    weight = getattr(norm, "weight", None)
    return weight.detach() / deviation if isinstance(weight, Tensor) else 1 / deviation
