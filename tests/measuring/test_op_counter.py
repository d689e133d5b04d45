"""The preset "spikingjelly" gives the counts of SpikingJelly's op_counter; the default differs as stated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")

from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.op_counter import (
    DispatchCounterMode,
    MACCounter,
    SynOpCounter,
)

from snncompress.measuring.profiling import profile

STEPS = 4


def build(step_mode: str, pool: type[nn.Module] = layer.MaxPool2d) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1, bias=False),
        layer.BatchNorm2d(6),
        neuron.IFNode(v_threshold=0.5),
        layer.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        neuron.LIFNode(v_threshold=0.1),
        pool(2),
        layer.ConvTranspose2d(8, 4, 3, stride=2, padding=1),
        neuron.IFNode(v_threshold=0.1),
        layer.Flatten(),
        layer.Linear(4 * 7 * 7, 10),
    )
    functional.set_step_mode(net, step_mode)
    return net.eval()


def by_op_counter(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """(ACs, MACs) per sample over STEPS steps of constant input ``x`` [N, ...]."""
    synops, macs = SynOpCounter(), MACCounter()
    with torch.no_grad(), DispatchCounterMode([synops, macs]):
        if net[0].step_mode == "m":
            net(x.expand(STEPS, *x.shape).contiguous())
        else:
            for _ in range(STEPS):
                net(x)
    functional.reset_net(net)
    return synops.get_total() / len(x), macs.get_total() / len(x)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("pool", [layer.MaxPool2d, layer.AvgPool2d])
def test_same_counts(step_mode, pool):
    net, x = build(step_mode, pool), torch.rand(4, 2, 16, 16)
    n_ac, n_mac = by_op_counter(net, x)
    found = profile(net, x, timesteps=STEPS, conventions="spikingjelly")
    assert (found.n_ac, found.n_mac) == (n_ac, n_mac)
    assert n_ac > 0
    # Averaged spikes are fractions, so SpikingJelly and we both charge MACs for the transposed convolution.
    transposed = next(row for row in found.layers if row.name == "6")
    assert (transposed.n_mac > 0) == (pool is layer.AvgPool2d)


def test_where_the_defaults_differ():
    # First layer: SpikingJelly counts 16·16·3·3 products per pair of channels, padding included; of these
    # (16·3 - 2)² meet a real input, once for all steps. BN is folded, and a pruned weight is no synapse.
    net, x = build("m"), torch.rand(4, 2, 16, 16)
    theirs = profile(net, x, timesteps=STEPS, conventions="spikingjelly")
    ours = profile(net, x, timesteps=STEPS)
    assert theirs.layers[0].n_mac == STEPS * 2 * 6 * 16 * 16 * 9
    assert ours.layers[0].n_mac == 2 * 6 * (16 * 3 - 2) ** 2
    assert (theirs.layers[1].n_mac, ours.layers[1].n_mac) == (STEPS * 6 * 16 * 16, 0)
    assert ours.n_ac == theirs.n_ac
    net[3].weight.data[0] = 0
    theirs = profile(net, x, timesteps=STEPS, conventions="spikingjelly")
    ours = profile(net, x, timesteps=STEPS)
    assert ours.layers[3].n_ac < theirs.layers[3].n_ac
    assert (theirs.n_ac, theirs.n_mac) == by_op_counter(net, x)


def test_same_counts_in_a_spikformer():
    from spikingjelly.activation_based.model.spikformer import Spikformer

    torch.manual_seed(0)
    sizes = {"img_size_h": 16, "img_size_w": 16, "patch_size": 4, "embed_dims": 16, "num_heads": 2, "depths": 1}
    net = Spikformer(T=2, in_channels=1, num_classes=5, mlp_ratio=2.0, **sizes).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.bias, 1.0)  # which lets neurons of all layers fire
    x = torch.rand(2, 1, 16, 16)
    counters = SynOpCounter(), MACCounter()
    with torch.no_grad(), DispatchCounterMode(list(counters)):
        net(x)
    functional.reset_net(net)
    table = profile(net, x, conventions="spikingjelly")
    assert (table.n_ac, table.n_mac) == tuple(counter.get_total() / 2 for counter in counters)
    (attention,) = [row for row in table.layers if row.kind == "product"]
    (ours,) = [row for row in profile(net, x).layers if row.kind == "product"]
    assert attention.n_ac > ours.n_ac > 0  # counts of 0 are met there, by spikes of the other operand


def test_a_sum_of_two_spikes_is_two_accumulates_here_and_products_there():
    net = nn.Sequential(layer.Linear(3, 4, bias=False), neuron.IFNode()).eval()
    x = torch.tensor([[2.0, 1.0, 0.0]])
    assert by_op_counter(net, x) == (0, STEPS * 12)
    assert profile(net, x, timesteps=STEPS, conventions="spikingjelly").n_mac == STEPS * 12
    assert profile(net, x, timesteps=STEPS).n_ac == STEPS * (2 + 1) * 4
