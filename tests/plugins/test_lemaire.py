"""Energy with memory: by hand, and against SpikingJelly's own reading of the same paper."""

from __future__ import annotations

import math

import pytest
import torch
from snncompress_horowitz import Lemaire45nm
from torch import Tensor, nn

import snncompress
from snncompress import OptionError
from snncompress.extend import MemoryUse, OperationCounts

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")

from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.op_counter.analytical_energy import LemaireEnergyConfig, estimate_lemaire_energy

T = 3


class Net(nn.Module):
    """[T, 1, 2, 6, 6] → 3 maps → 5 → 4; without modules that SpikingJelly's profiler refuses."""

    def __init__(self, kernel: int, leaky: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        fire = neuron.LIFNode if leaky else neuron.IFNode
        self.conv, self.fire = layer.Conv2d(2, 3, kernel, padding=kernel // 2, bias=bias), fire(v_threshold=0.1)
        self.fc, self.fire2, self.out = layer.Linear(108, 5, bias=bias), fire(v_threshold=0.1), layer.Linear(5, 4)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fire2(self.fc(self.fire(self.conv(x)).flatten(2))))


def spikes(margin: int = 0) -> Tensor:
    x = torch.zeros(T, 1, 2, 6, 6)
    inside = x[..., margin : 6 - margin, margin : 6 - margin]
    inside.copy_(torch.rand(inside.shape, generator=torch.Generator().manual_seed(1)) < 0.4)
    return x


def both(net: nn.Module, x: Tensor, leaky: bool) -> tuple[float, float]:
    """(ours, SpikingJelly's) in pJ, each input multiplied at every step as there."""
    rules = snncompress.Conventions(direct_encoding="every step", padding=True, zero_weights=True)
    found = snncompress.profile(net.eval(), x, energy_model=Lemaire45nm(leaky=leaky), conventions=rules)
    theirs = estimate_lemaire_energy(net, x, config=LemaireEnergyConfig(strict=True)).total_pj
    functional.reset_net(net)
    return found.energy_pj, theirs


@pytest.mark.parametrize("leaky", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "x"),
    [(1, spikes()), (3, spikes(margin=1)), (3, torch.rand(1, 1, 2, 6, 6) + 0.1)],
    ids=["1x1", "spikes inside", "pixels"],
)
def test_what_spikingjelly_computes(kernel: int, x: Tensor, bias: bool, leaky: bool) -> None:
    ours, theirs = both(Net(kernel, leaky, bias), x, leaky)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_buffer_of_pixels_holds_one_timestep_here() -> None:
    """There it holds all T of them where they come in one tensor, and is dearer."""
    ours, theirs = both(Net(3, True, False), torch.rand(T, 1, 2, 6, 6) + 0.1, True)
    products, pixels, at = T * 3 * 2 * 9 * 36, 72 * 4, 10 / 8192
    # They count the taps of the filters, 27, once too: one call.
    assert theirs - ours == pytest.approx(products * (T - 1) * pixels * at, rel=1e-9)


def test_spikes_at_the_border_meet_fewer_weights_here() -> None:
    ours, theirs = both(Net(3, True, False), spikes(), True)
    assert 0.8 * theirs < ours < theirs


def test_a_spike_by_hand() -> None:
    # One spike into 1 → 1 channels, 3×3, in the middle of 3×3: 9 synapses. 36 bytes of weights, 36 of potentials, queue
    # of 4,000. Additions 9 and addresses 9; 2 multiply-accumulates for the place.
    net = nn.Sequential(layer.Conv2d(1, 1, 3, padding=1, bias=False), neuron.IFNode(v_threshold=1e9))
    x = torch.zeros(1, 1, 3, 3)
    x[..., 1, 1] = 1
    at = 10 / 8192
    by_hand = 9 * 36 * at + 2 * 9 * 36 * at + 4000 * at + 18 * 0.1 + 2 * 3.2
    neurons = 2 * 9 * 36 * at
    table = snncompress.profile(net, x, timesteps=1, energy_model=Lemaire45nm(leaky=False))
    assert [row.energy_pj for row in table.layers] == pytest.approx([by_hand, neurons], rel=1e-9)
    assert "lemaire_45nm(add_pj=0.1" in str(table)
    assert "arithmetic, addressing and memory" in str(table)
    assert "horowitz_45nm(ac_pj=0.9, mac_pj=4.6): arithmetic alone" in str(snncompress.profile(net, x, timesteps=1))


def test_narrow_weights_are_read_for_less() -> None:
    use = MemoryUse(n_weights=1024, out_channels=32, input_size=32, output_size=32, n_spikes_in=1, n_outputs=32)
    wide, narrow = (
        Lemaire45nm().energy_pj(OperationCounts(32, 0, memory=u))
        for u in (use, MemoryUse(**{**vars(use), "weight_bits": 4}))
    )
    # 32 reads of 4,096 bytes at 10 pJ per 8,192; of 512 bytes, an eighth of a word each.
    assert wide - narrow == pytest.approx(32 * (5 - 0.625 / 8))


def test_prices_grow_with_the_memory() -> None:
    def of(n_biases: int) -> float:
        use = MemoryUse(n_weights=1, n_biases=n_biases, n_outputs=1)
        return Lemaire45nm(add_pj=0).energy_pj(OperationCounts(0, 0, memory=use))

    sizes = [(2047, 10), (8191, 20), (262143, 100), (10**7, 100), (1023, 5), (5119, 15), (135167, 60)]
    for n_biases, picojoules in sizes:
        assert of(n_biases) == pytest.approx(picojoules)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_analysis_over_time_gives_the_same(steps: int) -> None:
    net, model = Net(3, True, True), Lemaire45nm()
    for x in (torch.rand(T, 2, 2, 6, 6) + 0.1, torch.rand(1, 2, 2, 6, 6).expand(T, 2, 2, 6, 6)):
        found = snncompress.temporal_analysis(net, x, energy_model=model).energy_pj[steps - 1]
        assert found == pytest.approx(snncompress.profile(net, x[:steps], energy_model=model).energy_pj, rel=1e-9)


def test_an_ordinary_network_writes_its_outputs() -> None:
    # 3 → 2, analog: 6 products of 3 inputs, 24 bytes of weights, 12 of inputs, 8 of outputs.
    at, net = 10 / 8192, nn.Linear(3, 2, bias=False)
    found = snncompress.profile(net, torch.rand(1, 3), energy_model=Lemaire45nm()).energy_pj
    assert found == pytest.approx(6 * 3.2 + 6 * 24 * at + 3 * 12 * at + 5 * 0.1 + 2 * 8 * at)


@pytest.mark.parametrize("options", [{"add_pj": -1}, {"mul_pj": math.inf}, {"queue": -1}])
def test_energies_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Lemaire45nm(**options)
