from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import snntorch as snn
import torch
from snncompress_obs import Reconstruction
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import OptionError
from snncompress.extend import Criterion, Inputs, Layer, Reader, Signal
from snncompress.testing import check_criterion

EVERY = torch.ones(4, dtype=torch.bool)


def moments(u: Tensor) -> Inputs:
    """Of samples [n, D] without leak."""
    u = u.double()
    gram = (u.T @ u)[None]
    return Inputs(gram.diagonal(dim1=1, dim2=2), u.sum(0)[None], float(len(u)), gram)


def reader(weight: Tensor, u: Tensor, k: int = 1, reads: Tensor = EVERY, norm: nn.Module | None = None) -> Reader:
    """A linear layer of which each channel has k places."""
    columns = torch.arange(weight.shape[1]).view(-1, k)
    return Reader("fc", nn.Linear(*weight.shape[::-1]), weight, norm, columns, reads, moments(u))


def score(*readers: Reader, channels: int = 4, damping: float = 1e-10) -> Tensor:
    module = nn.Linear(3, channels)
    made = Layer("conv", module, module.weight.detach(), None, None, (), torch.Generator(), None, readers)
    return Reconstruction(damping).score(made, None)


def left_over(u: Tensor, wanted: Tensor, kept: list[int]) -> float:
    """By brute force: the squared error of least squares on these inputs, with an intercept."""
    rest = torch.cat([u[:, kept], torch.ones(len(u), 1).double()], 1)
    return float((wanted - rest @ torch.linalg.lstsq(rest, wanted).solution).square().sum())


@pytest.mark.parametrize("k", [1, 2])
def test_costs_are_what_least_squares_leaves_as_channels_go_one_by_one(k: int) -> None:
    torch.manual_seed(0)
    u, weight = torch.rand(60, 4 * k).double() @ torch.rand(4 * k, 4 * k).double(), torch.randn(3, 4 * k).double()
    wanted, columns, kept, lost = u @ weight.T, torch.arange(4 * k).view(4, k).tolist(), {0, 1, 2, 3}, 0.0
    whole, found = left_over(u, wanted, []), score(reader(weight, u, k))
    for _ in range(4):
        without = {c: left_over(u, wanted, [i for other in kept - {c} for i in columns[other]]) for c in kept}
        cheapest = min(without, key=lambda c: without[c])
        assert float(found[cheapest]) == pytest.approx((without[cheapest] - lost) / whole, rel=1e-4, abs=1e-9)
        lost = without[cheapest]
        kept -= {cheapest}
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-4)


def test_costs_of_readers_add_up_and_one_that_reads_nothing_of_a_channel_adds_nothing() -> None:
    one, other = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    some = torch.tensor([True, True, True, False])
    apart = torch.cat([torch.eye(4), -torch.eye(4)])  # independent inputs: costs are squares of weights
    found = score(reader(one, apart), reader(other, apart, reads=some))
    expected = torch.tensor([1 / 30 + 9 / 12, 4 / 30 + 1 / 12, 9 / 30 + 1 / 12, 16 / 30]).double()
    assert torch.allclose(found, expected, rtol=1e-6)


def test_channels_that_share_an_input_and_such_as_are_left_when_all_inputs_went() -> None:
    apart, weight = torch.cat([torch.eye(2), -torch.eye(2)]), torch.tensor([[1.0, 2.0]])
    columns = torch.tensor([[0], [0], [1], [1]])
    some = torch.tensor([True, True, True, False])
    found = score(Reader("fc", nn.Linear(2, 1), weight, None, columns, some, moments(apart)))
    # the last isn't read; with the first goes all that the second has, 1 of 5; the third has the other 4
    assert torch.allclose(found, torch.tensor([0.2, 0.2, 0.8, 0.0]).double(), rtol=1e-6)


def test_rows_count_as_batch_norm_scales_them() -> None:
    apart, weight = torch.cat([torch.eye(4), -torch.eye(4)]), torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    norm = nn.BatchNorm1d(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 3.0])
    norm.running_var = torch.tensor([4.0, 1.0])  # ½ and 3: squares ¼, ¼ and 9 of 9.5
    assert torch.allclose(
        score(reader(weight, apart, norm=norm)), torch.tensor([0.25, 9, 0.25, 0]).double() / 9.5, rtol=1e-6
    )


def test_without_a_gram_matrix_inputs_count_as_independent() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    inputs = Inputs(torch.tensor([[5.0, 2, 1, 4]]).double(), torch.tensor([[2.0, 0, 0, 0]]).double(), 4.0, None)
    found = score(Reader("fc", nn.Linear(4, 1), weight, None, torch.arange(4)[:, None], EVERY, inputs))
    assert torch.allclose(found, torch.tensor([4.0, 8, 0, 4]).double() / 16, rtol=1e-6)  # 1² · (5 − 2² / 4), 2² · 2


@pytest.mark.parametrize(
    "u", [torch.zeros(9, 8), torch.ones(9, 8), torch.rand(1, 8)], ids=["silent", "constant", "one"]
)
def test_what_never_changes_costs_next_to_nothing(u: Tensor) -> None:
    found = score(reader(torch.ones(2, 8), u, 2), damping=1e-2)
    assert bool(torch.isfinite(found).all())
    assert float(found.sum()) < 0.1


def test_what_nobody_reads_is_scored_by_its_weights() -> None:
    assert float(score().sum()) == pytest.approx(1.0)


def test_bad_options_and_signals_are_refused() -> None:
    with pytest.raises(OptionError, match="above 0"):
        Reconstruction(damping=0.0)

    class Single(Reconstruction):
        granularity = "weight"

    with pytest.raises(OptionError, match="needs 'readers', those of a channel"):
        snncompress.apply(net("snntorch"), Single(), 0.5, None, data=torch.rand(4, 2, 8, 8), timesteps=2)


def test_it_keeps_the_contract() -> None:
    check_criterion(Reconstruction())


@dataclass(frozen=True)
class Peek(Criterion):
    """Keeps what it is shown."""

    name: ClassVar[str] = "peek"
    needs: ClassVar[frozenset[Signal]] = frozenset({"readers"})
    seen: ClassVar[dict[str, tuple[Reader, ...]]] = {}

    def score(self, layer: Layer, state: Any) -> Tensor:
        self.seen[layer.name] = layer.readers
        return torch.zeros(layer.channels)


def net(framework: str) -> nn.Module:
    torch.manual_seed(0)
    if framework == "snntorch":
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), snn.Leaky(0.8, init_hidden=True), nn.ConvTranspose2d(8, 4, 3),
            snn.Leaky(0.8, init_hidden=True), nn.Flatten(), nn.Linear(256, 5),
        )  # fmt: skip
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(),
        layer.Conv2d(8, 8, 3, groups=8), neuron.LIFNode(), layer.Flatten(), layer.Linear(128, 16), neuron.LIFNode(),
        layer.Linear(16, 5),
    )  # fmt: skip


def test_readers_have_the_weights_of_each_channel() -> None:
    data = 3 * torch.rand(6, 2, 8, 8)
    for framework in ("snntorch", "spikingjelly"):
        model = net(framework)
        snncompress.scores(model, Peek(), data, timesteps=3, progress=False)
        for name, behind in {"snntorch": {"0": "2", "2": "5"}, "spikingjelly": {"0": "6", "6": "8"}}[framework].items():
            (one,) = Peek.seen[name]  # the depthwise convolution only passes on
            assert one.name == behind
            assert bool(one.reads.all())
            assert one.inputs is not None
            module: Any = model.get_submodule(behind)
            flat = torch.block_diag(*one.rows)
            for channel, columns in enumerate(one.columns):
                if isinstance(module, nn.ConvTranspose2d):
                    weight = module.weight[channel]
                else:
                    k = len(columns)
                    weight = module.weight[:, k * channel : k * (channel + 1)]
                mine = flat[:, columns]
                assert torch.equal(mine[mine != 0].sort().values, weight.flatten().sort().values)


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_where_there_are_twins_a_channel_goes_that_repair_gives_back(framework: str) -> None:
    model, data, names = net(framework), 3 * torch.rand(16, 2, 8, 8), {"spikingjelly": ["0", "3"], "snntorch": ["0"]}
    with torch.no_grad():
        for name in names[framework]:
            twins: Any = model.get_submodule(name)
            twins.weight[1] = twins.weight[0]
            if twins.bias is not None:
                twins.bias[1] = twins.bias[0]
    small = snncompress.apply(
        model, Reconstruction(1e-6), dict.fromkeys(names[framework], 0.125), None, data=data, timesteps=4, skip=[],
        progress=False,
    )  # fmt: skip
    assert len(small[0].weight) == 7
    assert torch.allclose(run(framework, small, data), run(framework, model, data), atol=1e-3)


def run(framework: str, model: nn.Module, data: Tensor) -> Tensor:
    """Over four timesteps, [T, N, 5]."""
    (functional.reset_net if framework == "spikingjelly" else utils.reset)(model)
    with torch.no_grad():
        return torch.stack([model(data) for _ in range(4)])
