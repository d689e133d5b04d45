"""What is remembered of a matrix is what would be computed anew, whatever was done to it in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snncompress.extend import Remembered

ROWS = torch.tensor([[1.0, -4.0, 0.0, 2.0], [0.5, 3.0, -0.25, 8.0]])
ODD = ROWS[:, :3]


class Counted:
    """Σ|w| of each row, and how often it was computed."""

    def __init__(self) -> None:
        self.memory, self.times = Remembered(), 0

    def __call__(self, rows: Tensor, beside: object = None) -> Tensor:
        def compute() -> Tensor:
            self.times += 1
            return rows.abs().sum(1)

        found = self.memory.of(rows, beside, compute)
        assert torch.equal(found, rows.abs().sum(1))
        return found


@pytest.mark.parametrize("start", [ROWS, ODD, ROWS.double(), ROWS.half()], ids=["even", "odd", "double", "half"])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.neg_().mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.data[0, 0].add_(0.125),
        lambda w: w.data.copy_(w.data.flip(0).clone()),
        lambda w: w.set_(torch.cat([w, w])),
        lambda w: w.set_(w.sum(1, keepdim=True).clone()),
    ],
    ids=["written", "behind the counter", "one weight", "rows exchanged", "more rows", "fewer columns"],
)
def test_another_matrix_is_seen(start: Tensor, write: Callable[[Tensor], object]) -> None:
    sums, rows = Counted(), start.clone()
    sums(rows)
    sums(rows.clone())  # the same numbers elsewhere
    assert sums.times == 1
    write(rows)
    sums(rows)
    assert sums.times == 2


def test_what_stands_beside_counts_and_copies_remember() -> None:
    sums = Counted()
    for bits in (torch.tensor(4.0), torch.tensor(4.0), torch.tensor(2.0)):
        sums(ROWS, ("mse", bits))
    assert sums.times == 2
    twin = copy.deepcopy(sums)
    twin(ROWS, ("mse", torch.tensor(2.0)))
    assert twin.times == 2
    sums(ROWS, ("mse", torch.tensor(2.0))).zero_()  # the caller's own
    sums(ROWS, ("mse", torch.tensor(2.0)))
    sums(ROWS.to(torch.float64), ("mse", torch.tensor(2.0)))
    assert sums.times == 3


def test_what_inference_mode_found_serves_with_gradients() -> None:
    sums = Counted()
    with torch.inference_mode():
        sums(ROWS)
    weight = torch.ones(2, requires_grad=True)
    (weight * sums(ROWS)).sum().backward()  # type: ignore[no-untyped-call]
    assert sums.times == 1
    assert weight.grad is not None
    assert weight.grad.tolist() == [7.0, 11.75]


def test_nothing_is_remembered_where_a_graph_is_recorded() -> None:
    memory = Remembered()
    made = torch.func.vmap(lambda w: memory.of(w, None, lambda: w.abs().sum(1)))(torch.stack([ROWS, 2 * ROWS]))
    assert made.tolist() == [[7.0, 11.75], [14.0, 23.5]]
    assert memory.of(torch.ones(2, 2, device="meta"), None, lambda: torch.ones(2)).tolist() == [1.0, 1.0]
