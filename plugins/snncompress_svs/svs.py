"""SVS: score a channel by the rank of its time-averaged spike maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from snncompress.extend import Criterion, DataError, Layer, OptionError, PluginError, Signal

_EPS = torch.finfo(torch.float64).eps
_CHUNK = 1 << 20  # elements of spike maps decomposed at a time: 8 MB of float64


@dataclass
class _State:
    """One layer's sums. Only ``time_sum``, [N, C, h, w], is larger than one number per channel."""

    rank_sum: Tensor  # [C], over samples
    nuclear_sum: Tensor  # [C], over samples
    samples: int = 0
    time_sum: Tensor | None = None  # Σ_t S[t] of the batch that is running
    timesteps: int = 0  # how many timesteps are in it


@dataclass(frozen=True)
class SVS(Criterion):
    """Singular values of spike activity: how many independent rows a channel's firing map has.

    For every sample the spikes of channel f are averaged over time to an h × w matrix, and its singular
    values above a threshold are counted; the score is the mean count over the samples::

        S_avg[f] = 1/T Σ_t S[t, f]                         (Eq. 11)
        score(f) = mean over samples of #{σ_i(S_avg[f]) > epsilon}      (Eq. 12, 13)

    Counts tie often. Ties are broken by the mean nuclear norm Σ_i σ_i (rounded to 6 decimals, so that
    rounding errors never decide), squashed below half the smallest difference that two mean counts can have:
    a tie-break never reorders channels whose counts differ. What still ties has exactly the same score.

    Counts equal those of a float64 singular value decomposition of S_avg.

    Args:
        epsilon: singular values above this count. Unit: that of a spike, 1 for binary spikes.

    Shapes:
        spikes [T, N, C, H, W] → score [C]. [T, N, C, L] is taken as an L × 1 matrix, [T, N, C] as 1 × 1, so
        that the score of a linear layer's neuron is the share of samples in which it fires at all;
        [T, N, C, D, H, W] as (D·H) × W. Spikes may be graded (values other than 0 and 1).

    Raises:
        OptionError: ``epsilon`` isn't a positive number.
        DataError: the spikes hold NaN or infinity.
        PluginError: nothing was recorded for the layer.

    Source: QP-SNN (ICLR 2025), Eq. 11-13, epsilon = 1e-6.

    Example:
        Three channels of one 2 × 2 map, T = 2: rank 2, rank 1, silent.

        >>> import torch
        >>> from snncompress.extend import Layer
        >>> layer = Layer("conv", torch.nn.Identity(), torch.ones(3, 1), None, None, (), torch.Generator())
        >>> spikes = torch.zeros(2, 1, 3, 2, 2)
        >>> spikes[0, 0, 0] = torch.eye(2)
        >>> spikes[:, 0, 1] = 1.0
        >>> svs = SVS()
        >>> state = svs.end_batch(layer, svs.observe(layer, svs.begin(layer), spikes, None))
        >>> svs.score(layer, state).floor()
        tensor([2., 1., 0.], dtype=torch.float64)
    """

    name: ClassVar[str] = "svs"
    needs: ClassVar[frozenset[Signal]] = frozenset({"spikes"})

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise OptionError(f"svs: epsilon must be a positive number, not {self.epsilon!r}; the paper uses 1e-6.")

    def begin(self, layer: Layer) -> _State:
        """No samples yet."""
        zeros = torch.zeros(layer.channels, dtype=torch.float64, device=layer.weight.device)
        return _State(rank_sum=zeros, nuclear_sum=zeros.clone())

    def observe(self, layer: Layer, state: _State, spikes: Tensor, membrane: Tensor | None) -> _State:
        """Add timesteps to the time sum of the running batch: the history itself is never kept."""
        # float64 for graded spikes: the rounding of float32 sums can lift a zero singular value near 1e-6.
        # Step by step, since sum(0, dtype=float64) first copies all timesteps and takes ten times as long.
        for step in spikes.detach():
            if state.time_sum is None:
                state.time_sum = step.to(torch.float64, copy=True)
            else:
                state.time_sum += step
        state.timesteps += spikes.shape[0]
        return state

    def end_batch(self, layer: Layer, state: _State) -> _State:
        """Decompose the maps of the batch, add their ranks and nuclear norms to the sums, forget the maps."""
        if state.time_sum is None:
            return state
        if not bool(torch.isfinite(state.time_sum.sum())):
            raise DataError(
                f"svs: the spikes that layer {layer.name!r} drives hold NaN or infinity. The likely cause "
                "is NaN in the calibration data or in the model's weights."
            )
        maps = _as_matrices(state.time_sum)
        rank, nuclear = _rank_and_nuclear_norm(maps.flatten(0, 1), state.timesteps, self.epsilon)
        state.rank_sum += rank.view(maps.shape[:2]).sum(0)
        state.nuclear_sum += nuclear.view(maps.shape[:2]).sum(0)
        state.samples += maps.shape[0]
        state.time_sum, state.timesteps = None, 0
        return state

    def score(self, layer: Layer, state: _State) -> Tensor:
        """Mean rank per channel, [C], plus a tie-break below 1 / (2 · samples)."""
        if state.samples == 0:
            raise PluginError(
                f"svs: no spikes were recorded for layer {layer.name!r}. Either no batch was closed with "
                "end_batch, or the neurons that it drives didn't run; leave the layer out or choose another "
                "criterion for it."
            )
        nuclear = torch.round(state.nuclear_sum / state.samples, decimals=6)
        # rank sums are integers, so what is added must stay below 1/2 for them to decide
        return (state.rank_sum + 0.5 * nuclear / (1 + nuclear)) / state.samples


def _as_matrices(total: Tensor) -> Tensor:
    """[N, C, *map] → [N, C, h, w]."""
    if total.dim() <= 4:
        return total.reshape(*total.shape, *[1] * (4 - total.dim()))
    return total.flatten(2, -2)


def _rank_and_nuclear_norm(sums: Tensor, timesteps: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """#{σ_i > epsilon} and Σ σ_i of every matrix of ``sums / timesteps``, [M, h, w] → two of [M]."""
    rows = max(1, _CHUNK // max(1, sums.shape[1] * sums.shape[2]))
    results = [_decompose(chunk, timesteps, epsilon) for chunk in torch.split(sums, rows)]
    ranks, norms = zip(*results, strict=True)
    return torch.cat(ranks), torch.cat(norms)


def _decompose(sums: Tensor, timesteps: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """The same, for all matrices at once.

    Most of the time of scoring goes here, hence the care. The σ_i² are the eigenvalues of the Gram matrix on
    the smaller side, which cost less than singular values; the Gram matrix of spike counts is exact.
    Squaring makes small σ uncertain, so a matrix with an eigenvalue too near the threshold is decided by a
    float64 SVD.
    """
    firing = sums.flatten(1).abs().amax(1).nonzero().squeeze(1)
    if len(firing) < len(sums):  # channels are often silent on a sample
        rank = sums.new_zeros(len(sums))
        nuclear = sums.new_zeros(len(sums))
        if len(firing):
            rank[firing], nuclear[firing] = _decompose(sums[firing], timesteps, epsilon)
        return rank, nuclear

    h, w = sums.shape[-2:]
    gram = sums @ sums.mT if h <= w else sums.mT @ sums
    # eigenvalues of S_avg S_avgᵀ, [M, n], ascending; dividing last keeps the Gram matrix a matrix of integers
    eigenvalues = _eigenvalues(gram) / timesteps**2
    # a bound on their error, twice and more what was ever seen; the theory: a small multiple of n ·
    # ε_machine · λ_max
    error = (min(h, w) + 20) * _EPS * eigenvalues[:, -1:]
    threshold = epsilon**2
    rank = (eigenvalues > threshold).sum(1).double()
    # an eigenvalue within its error is rounding noise, whose root must not reach the tie-break
    nuclear = torch.where(eigenvalues > error, eigenvalues, 0.0).sqrt().sum(1)

    # relative slack, because epsilon² is rounded too
    unsure = ((eigenvalues - threshold).abs() <= error + 1e-12 * threshold).any(1).nonzero().squeeze(1)
    if len(unsure):
        sigma = torch.linalg.svdvals(sums[unsure] / timesteps)
        rank[unsure] = (sigma > epsilon).sum(1).double()
        nuclear[unsure] = sigma.sum(1)
    return rank, nuclear


def _eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues of symmetric positive semidefinite matrices, [M, n, n] → [M, n], ascending."""
    n = gram.shape[-1]
    if n == 1:
        return gram[:, 0]
    if n == 2:
        a, b, c = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
        high = (a + c + torch.hypot(a - c, 2 * b)) / 2
        # the determinant of an integer matrix is exact; a + c - hypot would cancel
        low = (a * c - b * b).clamp_min(0) / high
        return torch.stack((low, high), 1)
    try:
        eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    except RuntimeError:  # torch.linalg.LinAlgError: CUDA's batched solver gives up on some that LAPACK decomposes
        eigenvalues = torch.linalg.eigvalsh(gram.cpu()).to(gram.device)
    return eigenvalues
