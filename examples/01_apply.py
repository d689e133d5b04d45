"""Compress a spiking network in one call: prune its channels, quantize its weights, fine-tune, measure.

    python examples/01_apply.py [--framework spikingjelly|snntorch] [--output demo]

It ends with a table, a picture of energy and size layer by layer, and a report to open in a browser. The data are real
scans of handwritten digits, 8x8 pixels, that come with scikit-learn.
"""

import argparse
import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress

T = 4  # timesteps: every image is fed as constant current for this long


def spikingjelly_network() -> nn.Module:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    net = nn.Sequential(
        layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), lif(), layer.MaxPool2d(2),
        layer.Conv2d(32, 64, 3, padding=1, bias=False), layer.BatchNorm2d(64), lif(), layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(64 * 2 * 2, 128), lif(),
        layer.Linear(128, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def snntorch_network() -> nn.Module:
    import snntorch as snn
    from snntorch import surrogate

    def lif() -> nn.Module:
        return snn.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True)

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), lif(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), lif(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 128), lif(),
        nn.Linear(128, 10),
    )  # fmt: skip


def spikingjelly_accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    from spikingjelly.activation_based import functional

    net.eval()
    functional.reset_net(net)
    with torch.no_grad():
        scores = net(x.repeat(T, 1, 1, 1, 1)).mean(0)
    functional.reset_net(net)
    return (scores.argmax(1) == y).float().mean().item()


def snntorch_accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    from snntorch import utils

    net.eval()
    utils.reset(net)
    with torch.no_grad():
        scores = torch.stack([net(x) for _ in range(T)]).mean(0)
    utils.reset(net)
    return (scores.argmax(1) == y).float().mean().item()


FRAMEWORKS = {
    "spikingjelly": (spikingjelly_network, spikingjelly_accuracy),
    "snntorch": (snntorch_network, snntorch_accuracy),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="spikingjelly")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the picture and the report")
    options = parser.parse_args()
    network, accuracy = FRAMEWORKS[options.framework]
    torch.set_num_threads(1)  # networks this small train fastest in one thread
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8] in [0, 1]
    y = torch.tensor(digits.target)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    train = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

    # A trained network to begin with. finetune() is a plain Adam loop; one of your own does as well. On a
    # terminal it shows a progress bar, and so does apply().
    dense = network()
    snncompress.finetune(dense, train, epochs=10, timesteps=T, lr=2e-3)

    # Of each convolution's channels the 60 % with the simplest spike maps go. The weights that are left get 4
    # bits, but for the first layer's and the classifier's, and are fitted to the data, without labels: the network
    # works straight away. `dense` stays as it is; `small` is a network of the same framework, to be used and trained
    # as before.
    small = snncompress.apply(dense, criterion="svs", ratio=0.6, bits=4, data=train, timesteps=T)
    nets = [dense, small, copy.deepcopy(small)]
    snncompress.finetune(nets[2], train, epochs=10, timesteps=T, lr=2e-3)

    scores = [accuracy(net, x_test, y_test) for net in nets]
    before, *after = (snncompress.profile(net, x_test, timesteps=T) for net in nets)
    rows = {
        "parameters": ("{:,.0f}", "n_params", 1),
        "size (MB)": ("{:.4f}", "size_mb", 1),
        "SynOps: AC / sample": ("{:,.0f}", "n_ac", 1),
        "SynOps: MAC / sample": ("{:,.0f}", "n_mac", 1),
        "energy (nJ / sample)": ("{:,.1f}", "energy_pj", 1e3),
        "spikes / neuron / step": ("{:.3f}", "firing_rate", 1),
    }
    table = Table("", title=f"svs, ratio 0.6, 4 bits, on {len(x_test)} test digits")
    for column in ("before", "straight after", "fine-tuned"):
        table.add_column(column, justify="right")
    table.add_row("accuracy", f"{scores[0]:.1%}", *(f"{s:.1%} ({100 * (s - scores[0]):+.1f})" for s in scores[1:]))
    for label, (form, field, unit) in rows.items():
        first = getattr(before, field)
        values = [(value := getattr(profile, field), value / first) for profile in after]
        cells = [f"{form.format(value / unit)} (× {share:.2f})" for value, share in values]
        table.add_row(label, form.format(first / unit), *cells)
    Console().print(table)

    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "layers.png"
    after[1].plot(before=before).savefig(picture, dpi=120)
    named = dict(zip(("before", "straight after", "fine-tuned"), nets, strict=True))
    page = snncompress.report(named, (x_test, y_test), path=options.output / "report.html", timesteps=T)
    print(f"picture: {picture.resolve()}\nreport:  {page.resolve()}")


if __name__ == "__main__":
    main()
