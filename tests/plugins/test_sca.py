from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snncompress_sca import SCA

from snncompress import PluginError
from snncompress.extend import Layer


def make_layer(channels: int) -> Layer:
    return Layer("conv", torch.nn.Identity(), torch.ones(channels, 1), None, None, (), torch.Generator())


def score(membrane: torch.Tensor, steps: int, batches: int = 1) -> torch.Tensor:
    """Feed [T, N, C, ...] in pieces of ``steps`` timesteps and ``batches`` parts of the samples."""
    layer, criterion = make_layer(membrane.shape[2]), SCA()
    state = criterion.begin(layer)
    for batch in membrane.chunk(batches, dim=1):
        for piece in batch.split(steps):
            state = criterion.observe(layer, state, torch.zeros_like(piece), piece)
        state = criterion.end_batch(layer, state)
    return criterion.score(layer, state)


def test_golden() -> None:
    # T = 2, N = 1, C = 2, 2 × 2 maps. Channel 0: |1|+|-2|+|0|+|3| = 6 at t = 0, and 2 at t = 1: mean 4.
    # Channel 1: 0.5 · 4 = 2 at both: mean 2.
    membrane = torch.zeros(2, 1, 2, 2, 2)
    membrane[0, 0, 0] = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    membrane[1, 0, 0, 0, 0] = -2.0
    membrane[:, 0, 1] = 0.5
    assert score(membrane, 2).tolist() == [4.0, 2.0]


def test_the_trap_a_silent_channel_far_below_zero_scores_high() -> None:
    membrane = torch.tensor([0.9, -50.0]).expand(3, 2, 2)  # the second never comes near a threshold
    low, high = score(membrane, 1)
    assert high > low


def test_needs_membrane_only() -> None:
    assert SCA.needs == {"membrane"}
    assert SCA().options() == {}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]),
    st.integers(0, 2**31),
)
def test_any_split_gives_the_mean_of_the_equation(t: int, n: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    membrane = torch.randn(t, n, 3, *shape, generator=generator)
    direct = membrane.double().reshape(t, n, 3, -1).abs().sum(3).mean((0, 1))
    for steps, batches in [(t, 1), (1, 1), (1, n), (t, n)]:
        torch.testing.assert_close(score(membrane, steps, batches), direct, rtol=1e-6, atol=1e-9)


def test_errors_name_the_layer() -> None:
    criterion, layer = SCA(), make_layer(2)
    with pytest.raises(PluginError, match="'conv'"):
        criterion.observe(layer, criterion.begin(layer), torch.zeros(1, 1, 2), None)
    with pytest.raises(PluginError, match=r"'conv'.*didn't run"):
        criterion.score(layer, criterion.begin(layer))
