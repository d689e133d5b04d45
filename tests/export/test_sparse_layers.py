"""Linear layers that hold what is left of their weights alone: the same sums, less memory, and only where it pays."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import freeze, frozen_layers
from snncompress.export import sparse_layers
from snncompress.export.sparse_layers import Columns, Rows, SparseLayer, best_form, make_dense, make_sparse
from snncompress.model.spikes import Spikes
from tests.export.test_freezing import agree, scores
from tests.export.test_integer_inference import flips

pytestmark = pytest.mark.skipif(bool(sparse_layers.unavailable()), reason=sparse_layers.unavailable())


def linear(inputs: int, outputs: int, zeros: float, *, kind: Any = nn.Linear, bias: bool = True) -> nn.Module:
    made: nn.Module = kind(inputs, outputs, bias=bias).requires_grad_(False)
    made.weight.data[torch.rand(outputs, inputs) < zeros] = 0
    return made


FORMS = pytest.mark.parametrize("form", [Rows, Columns])


@FORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 40, 5), (0, 5)])
def test_the_same_sums(shape: tuple[int, ...], bias: bool, form: Any) -> None:
    torch.manual_seed(0)
    dense = linear(5, 4, 0.6, bias=bias)
    dense.weight[1], dense.weight[:, 2] = 0, 0  # a whole row, a whole column
    sparse = copy.deepcopy(dense)
    make_sparse(sparse, form)
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), dense(x))
    assert sparse(x).is_contiguous()
    assert torch.equal(sparse.weight, dense.weight)


@FORMS
def test_any_other_input_is_taken_in_the_dense_way(form: Any) -> None:
    torch.manual_seed(0)
    dense = linear(5, 4, 0.6)
    sparse = copy.deepcopy(dense)
    make_sparse(sparse, form)
    x = torch.rand(3, 5, requires_grad=True)
    sparse(x).sum().backward()
    assert torch.equal(x.grad, dense.weight.sum(0).expand(3, 5))
    counts = torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.uint8)
    torch.testing.assert_close(sparse(Spikes(counts)), dense(counts.float()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sparse(torch.rand(3, 6))
    wide = copy.deepcopy(sparse).double()
    torch.testing.assert_close(wide(x.double()), dense.double()(x.double()))


@FORMS
def test_it_goes_through_files_and_back(form: Any) -> None:
    torch.manual_seed(0)
    dense = linear(64, 32, 0.9, kind=layer.Linear)
    dense.weight[:, :40] = 0
    sparse = copy.deepcopy(dense)
    make_sparse(sparse, form)
    x, left = torch.rand(3, 64), int(dense.weight.count_nonzero())
    columns = int(dense.weight.any(0).sum())
    # A value and a column of 4 bytes each, and where 32 rows begin and end; or 32 values a column, and its number.
    assert sparse.n_bytes == (8 * left + 4 * 33 if form is Rows else 4 * (32 + 1) * columns)
    whole, file = io.BytesIO(), io.BytesIO()
    torch.save(dense, whole)
    torch.save(sparse, file)
    assert file.tell() < whole.tell()
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), sparse(x))
    other = linear(64, 32, 0.5, kind=layer.Linear)  # which holds more
    make_sparse(other, form)
    assert other.load_state_dict(dense.state_dict()) == ([], [])
    assert torch.equal(other(x), sparse(x))
    assert dense.load_state_dict(sparse.state_dict()) == ([], [])
    make_dense(sparse)
    assert type(sparse) is layer.Linear
    assert torch.equal(sparse.weight, dense.weight)


def test_where_it_pays() -> None:
    """2^17 weights, 2^20 products, 85 % zeros: 512 × 256 of 8 rows is the least, and less by one is too little."""
    weight = torch.zeros(256, 512)
    weight.view(-1)[: int(0.15 * 512 * 256)] = 1  # in the first rows: no column is empty

    def of(weight: Tensor) -> nn.Module:
        made = nn.Linear(512, len(weight))
        made.weight.data = weight
        return made

    full = weight.clone()
    full.view(-1)[int(0.15 * 512 * 256)] = 1
    assert best_form(of(weight), 8) is Rows
    assert best_form(of(weight), 7) is None
    assert best_form(of(full), 8) is None
    full[:, : int(0.3 * 512)] = 0  # 153 empty columns of 512 are less than 30 %
    full[:, 153:] = 1
    assert best_form(of(full), 8) is None
    full[:, 153] = 0
    assert best_form(of(full), 8) is Columns
    assert best_form(of(full), 7) is None
    assert best_form(of(torch.zeros(255, 512)), 800) is None
    assert best_form(of(weight).double(), 8) is None
    assert best_form(nn.Conv2d(512, 256, 1), 8) is None


def network(framework: str) -> nn.Module:
    torch.manual_seed(0)
    kind = nn.Linear if framework == "snntorch" else layer.Linear

    def fire() -> nn.Module:
        return snn.Leaky(beta=0.5, init_hidden=True) if framework == "snntorch" else neuron.LIFNode(v_reset=None)

    net = nn.Sequential(
        linear(256, 512, 0.9, kind=kind), fire(), linear(512, 256, 0.9, kind=kind), fire(), linear(256, 9, 0.9)
    )
    net[0].weight *= 6
    net[2].weight *= 6
    if framework == "multi-step":
        functional.set_step_mode(net, "m")
    return net.eval()


@pytest.mark.parametrize("framework", ["multi-step", "spikingjelly", "snntorch"])
def test_a_frozen_network_fires_alike(framework: str) -> None:
    net, x = network(framework), torch.rand(12, 256)
    frozen, dense = freeze(net, x, timesteps=4), freeze(net, x[:1], timesteps=4)
    rows = frozen_layers(frozen).layers
    assert [row.sparse for row in rows] == ["CSR", "CSR", ""]  # the last one is small
    assert rows[1].computes_in == "float, CSR"
    assert rows[1].n_bytes == frozen[2].n_bytes + 4 * 256
    assert "float, CSR" in str(frozen_layers(frozen))
    assert not any(row.sparse for row in frozen_layers(dense).layers)  # of one sample a pass has too few products
    gone, spikes = flips(frozen, dense, x)
    assert spikes == 12 * 4 * (512 + 256)
    assert gone <= 1e-3 * spikes
    assert agree(scores(frozen, x), scores(net, x))
    assert torch.equal(scores(frozen, x), scores(freeze(net, x, timesteps=4), x))  # to the last bit
    assert snncompress.profile(frozen, x, timesteps=4).n_params == snncompress.profile(net, x, timesteps=4).n_params
    again = freeze(frozen, x[:1], timesteps=4)
    assert not any(isinstance(module, SparseLayer) for module in again)
    assert torch.equal(scores(again, x), scores(dense, x))


def test_whole_numbers_come_first() -> None:
    net, x = network("multi-step"), torch.rand(12, 256)
    options: dict[str, Any] = {"data": x, "timesteps": 4, "skip": [], "repair": None, "progress": False}
    small = snncompress.apply(net, "weight_magnitude", 0.9, 4, **options)
    found = frozen_layers(freeze(small, x, timesteps=4, integer="auto")).layers
    assert [row.computes_in for row in found] == ["float, CSR", "integer", "integer"]
    assert not any(row.sparse for row in frozen_layers(freeze(small, timesteps=4)).layers)  # nothing tells the batch
