"""SVS: score a channel by the rank of its time-averaged spike maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from snncompress.extend import Criterion, DataError, Layer, OptionError, PluginError, Signal

from .rank import rank_and_square


@dataclass
class _State:
    """One layer's sums. Only ``time_sum``, [N, C, h, w], is larger than one number per channel."""

    rank_sum: Tensor  # [C], over samples
    square_sum: Tensor  # [C], Σ σ² over samples
    whole: bool = True  # all spikes were whole numbers, and so the sums are exact
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

    Counts tie often. Ties are broken by the mean squared Frobenius norm Σ_i σ_i², which is the sum of the squared
    entries and exact where spikes are whole numbers (else rounded to 6 decimals, so that rounding errors never
    decide), squashed below half the smallest difference that two mean counts can have: a tie-break never reorders
    channels whose counts differ. What still ties has exactly the same score, and the lower index goes first.

    Counts equal those of a float64 singular value decomposition of S_avg, but few maps are decomposed
    (:mod:`snncompress_svs.rank`).

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
        return _State(rank_sum=zeros, square_sum=zeros.clone())

    def observe(self, layer: Layer, state: _State, spikes: Tensor, membrane: Tensor | None) -> _State:
        """Add timesteps to the time sum of the running batch: the history itself is never kept."""
        # float64 for graded spikes: the rounding of float32 sums can lift a zero singular value near 1e-6.
        # Step by step, since sum(0, dtype=float64) first copies all timesteps and takes ten times as long.
        for step in spikes.detach():
            if state.time_sum is None:  # the model may write to its spikes
                state.time_sum = step.to(torch.promote_types(step.dtype, torch.float32), copy=True)
            else:
                state.time_sum = state.time_sum.double().add_(step)
        state.timesteps += spikes.shape[0]
        return state

    def end_batch(self, layer: Layer, state: _State) -> _State:
        """Add the ranks and the squared norms of the batch's maps to the sums, and forget the maps."""
        if state.time_sum is None:
            return state
        maps = _as_matrices(state.time_sum)
        fraction = float(torch.linalg.vector_norm(maps.frac()))  # 0 for whole numbers, NaN where one isn't finite
        if math.isnan(fraction):
            raise DataError(
                f"svs: the spikes that layer {layer.name!r} drives hold NaN or infinity. The likely cause "
                "is NaN in the calibration data or in the model's weights."
            )
        least = self.epsilon * state.timesteps  # for the sum over time what epsilon is for the average
        rank, square = rank_and_square(maps.flatten(0, 1), least, whole=fraction == 0)
        state.rank_sum += rank.view(maps.shape[:2]).sum(0)
        state.square_sum += square.view(maps.shape[:2]).sum(0) / state.timesteps**2
        state.whole = state.whole and fraction == 0
        state.samples += maps.shape[0]
        state.time_sum, state.timesteps = None, 0
        return state

    def merge(self, layer: Layer, state: _State, other: _State) -> _State:
        """Add up: no batch is running."""
        state.rank_sum += other.rank_sum
        state.square_sum += other.square_sum
        state.whole = state.whole and other.whole
        state.samples += other.samples
        return state

    def score(self, layer: Layer, state: _State) -> Tensor:
        """Mean rank per channel, [C], plus a tie-break below 1 / (2 · samples)."""
        if state.samples == 0:
            raise PluginError(
                f"svs: no spikes were recorded for layer {layer.name!r}. Either no batch was closed with "
                "end_batch, or the neurons that it drives didn't run; leave the layer out or choose another "
                "criterion for it."
            )
        square = state.square_sum / state.samples
        if not state.whole:
            square = torch.round(square, decimals=6)
        # rank sums are integers, so what is added must stay below 1/2 for them to decide
        return (state.rank_sum + 0.5 * square / (1 + square)) / state.samples


def _as_matrices(total: Tensor) -> Tensor:
    """[N, C, *map] → [N, C, h, w]."""
    if total.dim() <= 4:
        return total.reshape(*total.shape, *[1] * (4 - total.dim()))
    return total.flatten(2, -2)
