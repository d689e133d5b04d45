"""One network for MNIST as events, taken to Speck by one call, written as NIR, read by sinabs and run there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
from snncompress_chips import FPGA
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snncompress

BOARD = FPGA(weight_bits=8, bytes=600 * 1024)
T, TRAIN, TEST, EPOCHS, BATCH = 4, 4_000, 2_000, 3, 50


def network() -> nn.Module:
    """Conv(1, 72) - Conv(72, 96) - Linear(10), integrate-and-fire, average pooling, no biases."""
    net = nn.Sequential(
        layer.Conv2d(1, 72, 3, padding=1, bias=False), _fire(), layer.AvgPool2d(4),
        layer.Conv2d(72, 96, 3, padding=1, bias=False), _fire(), layer.AvgPool2d(2), layer.Flatten(),
        layer.Linear(96 * 9, 10, bias=False), _fire(),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def _fire() -> nn.Module:
    return neuron.IFNode(v_threshold=0.25, surrogate_function=surrogate.ATan(), detach_reset=True)


class Events:
    """Batches of pictures as events: ([T, N, 1, 28, 28], [N])."""

    def __init__(self, folder: Path, split: str, count: int, *, shuffle: bool) -> None:
        x, y = datasets.mnist(folder, split)
        self.x, self.y = torch.tensor(x[:count]).float() / 255, torch.tensor(y[:count]).long()
        self.shuffle, self.rounds = shuffle, 0

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.rounds += self.shuffle
        chance = torch.Generator().manual_seed(self.rounds)
        order = torch.randperm(len(self.y), generator=chance) if self.shuffle else torch.arange(len(self.y))
        for part in order.split(BATCH):
            x = self.x[part][:, None].expand(T, -1, 1, -1, -1)
            yield (torch.rand(x.shape, generator=chance) < x).float(), self.y[part]


def accuracy(run: Callable[[Tensor], Tensor], test: Events) -> float:
    """Share of the test set whose digit fires most; ties count as the first of them."""
    right = 0
    with torch.no_grad():
        for x, y in test:
            right += int((run(x).sum(0).argmax(1) == y).sum())
    return right / len(test.y)


def ours(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        functional.reset_net(model)
        return model(x)

    return run


def theirs(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A sinabs network, one batch at a time: [T, N, ...] goes in as [N · T, ...]."""

    def run(x: Tensor) -> Tensor:
        for part in model.modules():
            if hasattr(part, "v_mem"):
                part.v_mem = torch.zeros_like(part.v_mem)
        flat = model(x.transpose(0, 1).flatten(0, 1))
        return flat.view(x.shape[1], T, -1).transpose(0, 1)

    return run


def read_by_sinabs(file: Path, *, as_written: bool) -> nn.Sequential:
    """sinabs' network of a NIR file, layer after layer.

    Its reader gives every neuron the lower bound -θ, and lets it fire more than once a step and be reset by
    subtraction, none of which is in the file. With ``as_written`` they are as the file has them.
    """
    import nir
    import sinabs.activation as sa
    import sinabs.nir

    graph = nir.read(file)
    read = sinabs.nir.from_nir(graph, num_timesteps=T)
    parts = dict(read.named_modules())
    order, name = [], "input"
    while (name := next(b for a, b in graph.edges if a == name)) != "output":
        order.append(parts[name])
    for part in order:
        if hasattr(part, "spike_threshold"):
            threshold = part.spike_threshold.detach().flatten()[0]  # all are the same
            part.spike_threshold = nn.Parameter(threshold, requires_grad=False)
            part.min_v_mem = None if as_written else nn.Parameter(-threshold, requires_grad=False)
            if as_written:
                part.reset_fn, part.spike_fn = sa.MembraneReset(), sa.SingleSpike
    return nn.Sequential(*order)


def speck(folder: Path) -> list[str]:
    from sinabs.backend.dynapcnn import DynapcnnNetwork
    from sinabs.backend.dynapcnn.chips.speck2f import Speck2FConfigBuilder

    train, test = Events(folder, "train", TRAIN, shuffle=True), Events(folder, "test", TEST, shuffle=False)
    torch.manual_seed(0)
    dense = network()
    began = time.perf_counter()
    snncompress.finetune(dense, train, epochs=EPOCHS, lr=2e-3, progress=False)
    dense.eval()
    x = next(iter(test))[0]
    fitting = [
        e.name for e in snncompress.targets() if snncompress.fits(dense, BOARD if e.name == "fpga" else e.name, data=x)
    ]
    first = snncompress.fits(dense, "speck", data=x)
    rows = [("dense", accuracy(ours(dense), test))]
    calibration = [batch for batch, _ in zip(train, range(6), strict=False)]
    straight = snncompress.apply(dense, "svs", data=calibration, target="speck", progress=False)
    rows.append(("for Speck, straight after the call", accuracy(ours(straight.eval()), test)))

    def tune(model: nn.Module) -> None:
        snncompress.finetune(model, train, epochs=1, lr=1e-3, progress=False)

    small = snncompress.apply(dense, "svs", data=calibration, target="speck", finetune=tune, progress=False).eval()
    rows.append(("for Speck, with an epoch of fine-tuning in the call", accuracy(ours(small), test)))
    verdict = snncompress.fits(small, "speck", data=x)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "small.nir"
        snncompress.export(small, file, data=x, target="speck")
        loose, exact, fresh = (read_by_sinabs(file, as_written=written) for written in (False, True, True))
    rows.append(("the same, read by sinabs, with its reader's own neurons", accuracy(theirs(loose), test)))
    rows.append(("the same, read by sinabs, neurons as written", accuracy(theirs(exact), test)))
    chip = DynapcnnNetwork(fresh, input_shape=(1, 28, 28), discretize=True)
    cores = Speck2FConfigBuilder.get_valid_mapping(chip)
    rows.append(("the same, in sinabs' simulation of the chip (DynapcnnNetwork)", accuracy(theirs(chip), test)))
    spikes = [torch.equal(theirs(net)(x), ours(small)(x)) for net in (exact, chip)]
    widths = [m.out_channels for m in small if isinstance(m, nn.Conv2d)]
    words = {True: "yes", False: "no"}
    text = f"""
        MNIST as events, {TRAIN:,} images, {EPOCHS} epochs, T = {T}, tested on {TEST:,}; Conv 72 - Conv 96 - Linear 10,
        integrate-and-fire. Dense it fits {", ".join(fitting) or "nothing"}; on Speck it exceeds {len(first.missed)}
        limits. `apply(dense, "svs", data=…, target="speck")` leaves {widths[0]} and {widths[1]} channels; then `fits`
        says {words[bool(verdict)]}. Its layers go on cores {[core for (core,) in verdict.cores.values()]}, with sinabs'
        own matching on {cores}. Do all spikes that come out for a batch equal ours? As written {words[spikes[0]]}, in
        the simulation of the chip {words[spikes[1]]}. {time.perf_counter() - began:.0f} s in all."""
    return [
        "## One network, taken to Speck", "", *map(str.strip, text.strip().splitlines()), "",
        "| network | test accuracy (%) |", "| --- | ---: |",
        *(f"| {name} | {100 * value:.2f} |" for name, value in rows),
    ]  # fmt: skip
