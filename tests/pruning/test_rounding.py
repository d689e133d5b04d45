"""Rounding with the error passed on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snncompress.model.grids import Grid
from snncompress.pruning.rounding import passed_on


def problem(
    seed: int, groups: int, rows: int, reads: int, bits: int, *, intercept: bool, per_row: bool
) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """θ [G, R, D], Σ u uᵀ of correlated inputs, the scale of each row, and a grid that reaches their largest weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.rand(reads, reads, generator=generator, dtype=torch.float64)
    u = torch.rand(groups, 200, reads, generator=generator, dtype=torch.float64) @ mixing
    if intercept:
        u = torch.cat([u, torch.ones_like(u[..., :1])], 2)
    theta = torch.randn(groups, rows, u.shape[2], generator=generator, dtype=torch.float64)
    size = theta[..., :reads].abs()
    largest = size.amax(2, keepdim=True) if per_row else size.amax().expand(groups, rows, 1)
    scale = 2 * largest / (2**bits - 1)
    held = scale.flatten() if per_row else scale.flatten()[0]
    return theta, u.transpose(1, 2) @ u, scale, Grid(held, (2**bits - 1) / 2, bits)


def nearest(theta: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return torch.round(theta / scale + grid.zero_point).clamp(0, 2**grid.bits - 1)


def test_golden() -> None:
    # Two inputs that say nearly the same, weights 0.45 and 0.4, values 0 and 1. To the nearest both are 0. The larger
    # weight keeps its number; what it loses, 0.45, the other makes up for by 0.45 · H_12 / H_22 = 0.45 · 0.9 / 1.01
    # (a hundredth of the mean diagonal is added to the diagonal) = 0.401. 0.801 rounds to 1.
    theta = torch.tensor([[[0.45, 0.4]]], dtype=torch.float64)
    gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    grid = Grid(torch.tensor([1.0]), 0.0, 1)
    numbers = passed_on(theta, gram, 2, torch.ones(1, 1, 1, dtype=torch.float64), grid, None)
    assert numbers is not None
    assert nearest(theta, torch.ones(1, 1, 1), grid).tolist() == [[[0.0, 0.0]]]
    assert numbers.tolist() == [[[0.0, 1.0]]]


def test_those_that_read_most_go_first() -> None:
    # As above, but the second input is three times as strong: it is rounded first, 0.4 to 0, and the first makes up
    # for it: 0.45 is the largest and keeps its number nevertheless.
    theta = torch.tensor([[[0.45, 0.4]]], dtype=torch.float64)
    gram = torch.tensor([[[1.0, 2.7], [2.7, 9.0]]], dtype=torch.float64)
    grid = Grid(torch.tensor([1.0]), 0.0, 1)
    numbers = passed_on(theta, gram, 2, torch.ones(1, 1, 1, dtype=torch.float64), grid, None)
    assert numbers is not None
    assert numbers.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("intercept", [True, False])
def test_less_is_lost_than_to_the_nearest(bits: int, intercept: bool) -> None:
    theta, gram, scale, grid = problem(0, 2, 8, 150, bits, intercept=intercept, per_row=True)  # more than one block
    found = passed_on(theta, gram, 150, scale, grid, None)
    assert found is not None

    def lost(numbers: Tensor) -> float:
        change = theta.clone()
        change[..., :150] -= (numbers - grid.zero_point) * scale
        if intercept:
            change[..., 150] = 0
            change[..., 150] = -(change @ gram[:, :, -1:]).squeeze(2) / gram[:, -1:, -1]  # fitted again
        return float(((change @ gram) * change).sum())

    assert lost(found) < 0.5 * lost(nearest(theta[..., :150], scale, grid))


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_numbers_are_on_the_grid_and_ranges_stay(
    seed: int, groups: int, rows: int, reads: int, bits: int, per_row: bool
) -> None:
    theta, gram, scale, grid = problem(seed, groups, rows, reads, bits, intercept=True, per_row=per_row)
    kept = torch.rand(groups, rows, reads, generator=torch.Generator().manual_seed(seed)) < 0.7
    theta[..., :reads] = theta[..., :reads].where(kept, 0.0)
    numbers = passed_on(theta, gram, reads, scale, grid, kept)
    assert numbers is not None
    assert torch.equal(numbers, numbers.round())
    assert 0 <= float(numbers.min()) <= float(numbers.max()) <= 2**bits - 1
    size = theta[..., :reads].abs().where(kept, 0.0)
    largest = size == (size.amax(2, keepdim=True) if per_row else size.amax())
    assert torch.equal(numbers[largest], nearest(theta[..., :reads], scale, grid)[largest])


def test_no_answer_without_moments() -> None:
    theta, gram, scale, grid = problem(0, 1, 2, 3, 4, intercept=False, per_row=True)
    assert passed_on(theta, torch.full_like(gram, torch.nan), 3, scale, grid, None) is None
