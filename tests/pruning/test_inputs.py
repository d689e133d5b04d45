"""The signal "inputs": second moments of what a layer reads, integrated as its neurons integrate."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.extend import Criterion, Granularity, Inputs, Layer, Signal
from snncompress.model.network import outputs_first
from snncompress.model.patches import outputs, patches, positions
from snncompress.pruning import integration

SEEN: dict[str, Inputs | None] = {}


class Watch(Criterion):
    """Notes what it gets; an outsider's criterion, which registers nothing."""

    name: ClassVar[str] = "watch"
    granularity: ClassVar[Granularity] = "weight"
    needs: ClassVar[frozenset[Signal]] = frozenset({"inputs"})

    def score(self, layer: Layer, state: Any) -> Tensor:
        SEEN[layer.name] = layer.inputs
        return layer.weight.abs()


def watched(net: nn.Module, data: Any, timesteps: int | None) -> dict[str, Inputs]:
    SEEN.clear()
    snncompress.apply(net, Watch(), 0.5, None, data=data, timesteps=timesteps, repair=None)
    return {name: inputs for name, inputs in SEEN.items() if inputs is not None}


@pytest.mark.parametrize("mode", ["s", "m"])
def test_golden(mode: str) -> None:
    # A leak of a half: constant inputs 2 and 1 integrate to 2, 3 and 1, 1.5 in two timesteps, the constant 1 to 1, 1.5.
    # Σ u uᵀ = [[4 + 9, 2 + 4.5], [., 1 + 2.25]]; Σ u · 1 = (2 + 4.5, 1 + 2.25); Σ 1 · 1 = 1 + 2.25.
    net = nn.Sequential(layer.Linear(2, 3), neuron.LIFNode(tau=2.0), layer.Linear(3, 2))
    functional.set_step_mode(net, mode)
    found = watched(net, torch.tensor([[2.0, 1.0]]), 2)["0"]
    assert found.gram is not None
    assert found.gram.tolist() == [[[13.0, 6.5], [6.5, 3.25]]]
    assert found.square.tolist() == [[13.0, 3.25]]
    assert found.total.tolist() == [[6.5, 3.25]]
    assert found.count == 3.25


def test_sums_run_over_batches_and_a_batch_starts_afresh() -> None:
    net = nn.Sequential(nn.Linear(2, 3), snn.Leaky(0.5, init_hidden=True), nn.Linear(3, 2))
    one = watched(net, torch.tensor([[2.0, 1.0]]), 2)["0"]
    two = watched(net, [torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 1.0]])], 2)["0"]
    assert two.gram is not None
    assert one.gram is not None
    assert torch.equal(two.gram, 2 * one.gram)
    assert two.count == 2 * one.count


def test_a_convolution_reads_patches() -> None:
    # No neurons behind it, so nothing is integrated: every output of the 2 × 2 kernel reads four ones, or fewer at the
    # edges of the padded 2 × 2 image: 1 + 2 + 1 + 2 + 4 + 2 + 1 + 2 + 1 = 16 ones, 4 for each place of the kernel.
    net = nn.Sequential(nn.Linear(2, 2), snn.Leaky(0.5, init_hidden=True), nn.Conv2d(1, 3, 2, padding=1))
    net[0].weight.data.zero_()
    net[0].bias.data.fill_(5.0)  # always fires
    found = watched(net, torch.ones(1, 1, 2, 2), 1)["2"]
    assert found.square.tolist() == [[4.0] * 4]
    assert found.total.tolist() == [[4.0] * 4]
    assert found.count == 9


def test_too_wide_a_layer_has_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(layer.Linear(2, 3), neuron.LIFNode(tau=2.0), layer.Linear(3, 2))
    whole = watched(net, torch.tensor([[2.0, 1.0]]), 2)["0"]
    monkeypatch.setattr(integration, "MOST_READS", 1)
    found = watched(net, torch.tensor([[2.0, 1.0]]), 2)["0"]
    assert found.gram is None
    assert torch.equal(found.square, whole.square)
    assert bool((found.inverse_diagonal() > 0).all())


def test_silent_inputs_have_a_finite_inverse() -> None:
    zeros = torch.zeros(1, 2, 2, dtype=torch.float64)
    silent = Inputs(zeros[:, 0], zeros[:, 0], 5.0, zeros)
    assert bool(torch.isfinite(silent.inverse_diagonal()).all())


@pytest.mark.parametrize("make", [
    lambda: nn.Linear(6, 4), lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
])  # fmt: skip
def test_rows_are_in_the_order_of_what_they_read(make: Any) -> None:
    module = make()
    weight = outputs_first(module.weight.detach(), module)
    x = torch.rand(
        3, *([6] if isinstance(module, nn.Linear) else [4, 5] if isinstance(module, nn.Conv1d) else [4, 5, 5])
    )
    out = module(x).detach()
    where = positions(module, out, 7, torch.Generator())
    rows = Layer("it", module, weight, None, None, (), torch.Generator()).rows
    bias = module.bias.detach().view(len(rows), -1)
    made = torch.einsum("ngd,grd->ngr", patches(module, x, where), rows) + bias
    assert torch.allclose(made, outputs(module, out, where), atol=1e-5)
