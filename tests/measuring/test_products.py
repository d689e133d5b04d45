"""Products of tensors outside layers, such as q·kᵀ and attn·v: pairs counted one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")

from spikingjelly.activation_based import neuron

from snncompress.measuring.conventions import PRESETS, Conventions
from snncompress.measuring.products import Product, product_of
from snncompress.measuring.profiling import profile
from snncompress.measuring.temporal import temporal_analysis
from snncompress.measuring.watching import Watch

A = torch.tensor([[1.0, 0, 1], [0, 0, 1]])  # spikes of two tokens
B = torch.tensor([[1.0, 1], [0, 1], [1, 0]])
COUNTS = torch.tensor([[3.0, 0], [2, 5], [0, 1]])
ANALOG = torch.tensor([[0.5, 0], [0.3, 0.1], [0, 0.2]])


@pytest.mark.parametrize(
    ("a", "b", "rules", "expected"),
    [
        # a_mk and b_kn both 1: token 0 meets rows 0 and 2 of b, that is 2 + 1 spikes; token 1 meets row 2.
        (A, B, "snncompress", (3 + 1, 0)),
        (A, B, "spikingjelly", (3 + 1, 0)),
        # Rows 0 and 2 of the counts hold one number other than 0 each, at which 1 and 2 tokens' spikes arrive.
        (A, COUNTS, "snncompress", (1 + 2, 0)),
        # SpikingJelly lets every spike meet both columns, of numbers that aren't all 0 or 1.
        (A, COUNTS, "spikingjelly", (3 * 2, 0)),
        # The two of a sum of two spikes is two additions.
        (2 * A, COUNTS, "snncompress", (2 * (1 + 2), 0)),
        # Spikes meet analog numbers: additions still. Of -1 and 1 alike.
        (-A, ANALOG, "snncompress", (1 + 2, 0)),
        # No spikes: 2 · 3 · 2 products; of two numbers other than 0 as many as there are pairs of spikes above.
        (A / 2, ANALOG, "snncompress", (0, 12)),
        (A / 2, ANALOG, Conventions(zero_inputs=False), (0, 1 + 2)),
        # Half of a are spikes, on average, and each may meet 4 spikes in b's 6 places, twice.
        (A, B, Conventions(counting="rate"), (2 * 4 / 2, 0)),
    ],
)
def test_pairs_of_two_by_three_and_three_by_two(a, b, rules, expected) -> None:
    rules = PRESETS[rules] if isinstance(rules, str) else rules
    assert Product(torch.matmul, a, b).operations(rules) == expected
    turned = Product(torch.matmul, b.t(), a.t()).operations(rules)
    assert turned == expected or rules.counting == "rate"


def called(name_and_product: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> list[Product | None]:
    """The products that torch is seen to compute."""
    found: list[Product | None] = []
    with Watch(lambda *call: found.append(product_of(*call)), None):
        name_and_product(a, b)
    return found


PRODUCTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "@": lambda a, b: a @ b.transpose(-1, -2),
    "matmul": lambda a, b: torch.matmul(a, other=b.transpose(-1, -2)),
    "r@": lambda a, b: Tensor.__rmatmul__(b.transpose(-1, -2), a),
    "bmm": lambda a, b: torch.bmm(a.flatten(0, 1), b.flatten(0, 1).transpose(-1, -2)),
    "baddbmm": lambda a, b: torch.baddbmm(torch.ones(4, 3, 5), a.flatten(0, 1), b.flatten(0, 1).transpose(-1, -2)),
    "einsum": lambda a, b: torch.einsum("...ik,...jk->...ij", a, b),
    "einsum of a list": lambda a, b: torch.einsum("nhik,nhjk->nhij", [a, b]),
}


@pytest.mark.parametrize("call", PRODUCTS.values(), ids=PRODUCTS)
def test_every_way_to_write_it(call: Callable[[Tensor, Tensor], object]) -> None:
    torch.manual_seed(0)
    a, b = (torch.rand(2, 2, 3, 4) < 0.5).float(), (torch.rand(2, 2, 5, 4) < 0.5).float()
    pairs = sum(
        float(a[n, h, i, k] * b[n, h, j, k])
        for n, h, i, j, k in itertools.product(range(2), range(2), range(3), range(5), range(4))
    )
    (product,) = called(call, a, b)
    assert product is not None
    assert product.operations(Conventions()) == (pairs, 0)
    (product,) = called(call, a, b * 0.5)
    assert product is not None
    assert product.operations(Conventions()) == (pairs, 0)
    assert product.operations(Conventions(), analog=True) == (0, 2 * 2 * 3 * 5 * 4)


def test_what_is_no_product_of_two() -> None:
    a = torch.ones(2, 2)
    for call in (
        lambda a, b: torch.einsum("ij,jk,kl->il", a, b, a),
        lambda a, b: F.conv1d(a[None], b[None]),
        lambda a, b: F.scaled_dot_product_attention(a, b, a),
        lambda a, b: a.to(torch.complex64) @ b.to(torch.complex64),
    ):
        assert called(call, a, a) == [None]


class Attention(nn.Module):
    """Two tokens of three numbers each, [T, N, 2, 3] or [N, 2, 3], which are queries, keys and values."""

    def __init__(self, mode: str = "m", steps: int = 3) -> None:
        super().__init__()
        self.fire, self.steps = neuron.IFNode(step_mode=mode), steps
        self.mode, self.torchs = mode, False

    def attend(self, x: Tensor) -> Tensor:
        x = self.fire(x)
        if self.torchs:
            return F.scaled_dot_product_attention(x, x, x).flatten(-2)
        return (x @ x.transpose(-1, -2) @ x).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "m":
            return self.attend(x.expand(self.steps, *x.shape))
        return torch.stack([self.attend(x) for _ in range(self.steps)])


@pytest.mark.parametrize("mode", ["s", "m"])
def test_a_row_of_its_own(mode: str) -> None:
    # Spikes at every step: (1, 0, 1) and (0, 0, 1). q·kᵀ: 2 + 1 + 1 + 1 pairs, and the counts are 2, 1; 1, 1. attn·v:
    # three spikes meet two counts each.
    net = nn.Sequential(Attention(mode))
    table = profile(net, A[None])
    (row,) = [row for row in table.layers if row.kind == "product"]
    assert (row.name, row.n_ac, row.n_mac, row.n_params) == ("0.matmul", 3 * (5 + 6), 0, 0)
    assert (table.n_ac, table.energy_pj, table.uncounted) == (row.n_ac, pytest.approx(33 * 0.9), ())
    assert "matmul" in str(table)
    assert profile(net, [A[None]] * 2).n_ac == row.n_ac  # every batch is watched
    table = profile(net, A[None], conventions=Conventions(attention="not counted"))
    assert (table.n_ac, table.uncounted) == (0, ("matmul in 0",))
    net[0].torchs = True
    table = profile(net, A[None])
    assert (table.n_ac, table.uncounted) == (0, ("scaled_dot_product_attention in 0",))


@pytest.mark.parametrize("mode", ["s", "m"])
def test_an_analysis_over_time_counts_alike(mode: str) -> None:
    net, x, wanted = Attention(mode), torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)), []
    found = temporal_analysis(net, [x, x[:1]]).energy_pj
    for net.steps in (1, 2, 3):
        wanted.append(profile(net, [x, x[:1]]).energy_pj)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert 0 < found[1] < found[2]


def test_an_ordinary_network_multiplies() -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-1, -2)).flatten(1)

    assert profile(nn.Sequential(Mixer(), nn.Linear(4, 2)), A[None]).n_mac == 2 * 3 * 2 + 4 * 2
