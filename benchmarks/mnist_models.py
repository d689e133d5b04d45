"""The benchmark's network, once per framework: 2 convolutions with batch normalization, 2 linear layers.

Conv(1, 16) - BN - LIF - pool - Conv(16, 32) - BN - LIF - pool - Linear(1568, 128) - LIF - Linear(128, 10);
3x3 convolutions, 2x2 max pooling. Pixels go in as constant current; the class scores are the last layer's
output, averaged over time.
"""

from torch import nn

WIDTHS = (16, 32, 128)


def spikingjelly_net() -> nn.Module:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    a, b, c = WIDTHS
    net = nn.Sequential(
        layer.Conv2d(1, a, 3, padding=1, bias=False), layer.BatchNorm2d(a), lif(), layer.MaxPool2d(2),
        layer.Conv2d(a, b, 3, padding=1, bias=False), layer.BatchNorm2d(b), lif(), layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(b * 7 * 7, c), lif(),
        layer.Linear(c, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def snntorch_net() -> nn.Module:
    import snntorch as snn
    from snntorch import surrogate

    def lif() -> nn.Module:
        return snn.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True)

    a, b, c = WIDTHS
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), lif(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), lif(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(b * 7 * 7, c), lif(),
        nn.Linear(c, 10),
    )  # fmt: skip


NETS = {"spikingjelly": spikingjelly_net, "snntorch": snntorch_net}
