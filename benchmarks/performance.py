"""What calibration and pruning cost, as ratios measured side by side in one process.

    python benchmarks/performance.py [--batches 2] [--batch-size 16] [--repeats 9] [--threads 2]

The network is QP-SNN's spiking VGG-16 for CIFAR shapes, T = 4, in SpikingJelly's multi-step mode, and where a row says
so SEW-ResNet18, or an MLP of snnTorch that loops over time in its forward. Weights are random, batch norms settled on
the data, so that every population fires (the rates are printed); the pruned one has the widths of the paper's 4.25 M
row. The things compared run in turn, A B A B …, and the median of ratios counts, so that a machine whose speed drifts
does little harm; with one thread processor time counts, so that others at work do less. ``--scoring`` measures nothing
but what scoring costs, and prints it. Writes benchmarks/results/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference
import snntorch
import torch
import torch_pruning as tp
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from vgg16 import vgg16

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import snncompress
from examples.networks.blocks import Residual, add_classifier, add_conv, convs
from examples.networks.sew_resnet18 import sew_resnet18
from snncompress.contract.detection import find_adapter
from snncompress.contract.registry import registry
from snncompress.export.integer_layers import instructions
from snncompress.extend import Layer
from snncompress.pruning.recording import record
from snncompress.pruning.selection import resolve_skip, targets
from snncompress.pruning.steps import ChannelPruning
from snncompress.running.data import Feed
from snncompress.running.scores import loss_of
from snncompress.structure.tracing import trace

ROOT = Path(__file__).resolve().parent.parent
T = 4
RATIOS = {f"conv{i}": 0.45 for i in range(1, 8)} | {f"conv{i}": 0.51 for i in range(8, 13)}


class PlainSVS(snncompress.extend.Criterion):
    """SVS as one would write it first: a batched float64 SVD of the time-averaged maps, for comparison."""

    name = "plain svs"
    needs = frozenset({"spikes"})

    def begin(self, layer: Layer) -> list[Any]:
        return [0.0, torch.zeros(layer.channels, dtype=torch.float64), 0]

    def observe(self, layer: Layer, state: list[Any], spikes: Tensor, membrane: Tensor | None) -> list[Any]:
        return [state[0] + spikes.double().sum(0), state[1], state[2] + len(spikes)]

    def end_batch(self, layer: Layer, state: list[Any]) -> list[Any]:
        sigma = torch.linalg.svdvals(state[0] / state[2])
        return [0.0, state[1] + (sigma > 1e-6).sum(-1).double().sum(0) + 1e-6 * sigma.sum((0, 2)), 0]

    def score(self, layer: Layer, state: list[Any]) -> Tensor:
        return state[1]


def images(count: int) -> Tensor:
    """Smooth random images [N, 3, 32, 32]."""
    return nn.functional.interpolate(torch.rand(count, 3, 8, 8), size=(32, 32), mode="bilinear")


class LoopingMLP(nn.Module):
    """784-256-128-10 of Leaky neurons, which asks for each weight at each of its timesteps."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in ((784, 256), (256, 128), (128, 10)))
        self.lif = nn.ModuleList(snntorch.Leaky(beta=0.9) for _ in self.fc)

    def forward(self, x: Tensor) -> Tensor:
        state = [lif.init_leaky() for lif in self.lif]
        spikes = []
        for _ in range(self.timesteps):
            y = x
            for n, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                y, state[n] = lif(fc(y), state[n])
            spikes.append(y)
        return torch.stack(spikes)


def settled(model: nn.Module, x: Tensor, timesteps: int = T) -> nn.Module:
    """Batch norms at the statistics of ``x``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.constant_(module.weight, 1.5)
    adapter = find_adapter(model)
    with torch.no_grad():
        model.train()(x.unsqueeze(0).expand(timesteps, *x.shape))
    adapter.reset(model)
    return model.eval()


def seconds(action: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    action()
    return clock() - start


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of time(a) / time(b) over alternating runs, with the smallest and the largest."""
    a(), b()
    ratios = [seconds(a) / seconds(b) for _ in range(repeats)]
    return statistics.median(ratios), min(ratios), max(ratios)


class Bench:
    """A dense network, its batches, and what is done with them."""

    def __init__(
        self, batches: int, batch_size: int, *, traced: bool = True, build: Callable[[], nn.Module] = vgg16,
        timesteps: int = T,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.data = [images(batch_size) for _ in range(batches)]
        self.model = settled(build(), self.data[0], timesteps)
        self.adapter = find_adapter(self.model)
        self.feed = Feed(self.adapter, self.data, timesteps)
        labelled = [(x, torch.arange(len(x)) % 10) for x in self.data]
        self.labelled = Feed(self.adapter, labelled, timesteps)
        if not traced:
            return
        self.network = trace(self.model, self.adapter, self.feed.example())
        skips = resolve_skip(None, self.network, self.network.layers, "channel")
        todo, _ = targets(self.network, 0.5, skips)
        criterion = registry().find("criterion", "svs")()
        self.layers = ChannelPruning(self.model, self.adapter, criterion, self.network, todo).scored()

    def forward(self) -> None:
        with torch.no_grad():
            for batch in self.feed:
                self.feed(self.model, batch)

    def forward_and_backward(self) -> None:
        for batch in self.labelled:
            self.model.zero_grad()
            loss_of(self.labelled, self.labelled(self.model, batch), batch).backward()
        self.model.zero_grad()

    def calibrate(self, name: str, model: nn.Module | None = None) -> None:
        criterion = PlainSVS() if name == PlainSVS.name else registry().find("criterion", name)()
        layers: Any = self.layers if criterion.granularity == "channel" else dict.fromkeys(self.network.layers, ())
        feed = self.labelled if "gradients" in criterion.needs else self.feed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record(model or self.model, self.network, feed, criterion, layers, seed=0, progress=False)

    def apply(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            snncompress.apply(
                self.model, "magnitude", 0.5, None, data=self.data[0], timesteps=self.feed.timesteps, repair=None,
                progress=False,
            )  # fmt: skip

    def profile(self) -> None:
        snncompress.profile(self.model, self.data, timesteps=self.feed.timesteps)


Row = Callable[[str, tuple[float, float, float], str], None]


def scoring(batches: int, batch_size: int, repeats: int, add: Row) -> None:
    """What scoring and measuring cost, in the forward (and backward) passes that they can't do without."""
    for network, build in (("", vgg16), ("SEW-ResNet18, ", sew)):
        for timesteps in (1, 4, 16) if build is vgg16 else (4,):
            bench = Bench(batches, batch_size, build=build, timesteps=timesteps)
            what = f"{network}T = {timesteps}"
            for name, aim in (("svs", "≤ 1.2"), ("sca", "≤ 1.1"), ("firing_rate", "≤ 1.1")):
                add(
                    f"calibrating with {name} / plain forward passes, {what}",
                    ratio(lambda b=bench, n=name: b.calibrate(n), bench.forward, repeats),
                    aim,
                )
            if timesteps != T:
                continue
            add(
                f"calibrating with cqp / forward and backward passes, {what}",
                ratio(lambda b=bench: b.calibrate("cqp"), bench.forward_and_backward, repeats),
                "≤ 1.15",
            )
            quantized = snncompress.apply(bench.model, None, bits=4, data=bench.data[0], timesteps=T, progress=False)
            quantized.eval()
            add(
                f"calibrating with firing_rate, 4 bits / float, {what}",
                ratio(
                    lambda b=bench, q=quantized: b.calibrate("firing_rate", q),
                    lambda b=bench: b.calibrate("firing_rate"),
                    repeats,
                ),
                "≤ 1.1",
            )
            add(f"profile / plain forward passes, {what}", ratio(bench.profile, bench.forward, repeats), "≤ 1.3")
    loops(repeats, add)


def loops(repeats: int, add: Row) -> None:
    """Compressed weights in a network that loops over time itself."""
    torch.manual_seed(0)
    x, mlp = torch.rand(128, 784), LoopingMLP(25)
    options: dict[str, Any] = {"data": x, "repair": None, "progress": False, "skip": []}
    masked = snncompress.apply(mlp, "weight_magnitude", 0.9, None, **options)
    quantized = snncompress.apply(mlp, None, bits=4, **options)

    def run(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                model(x)

        return call

    what = "a network that loops over T = 25 in its forward"
    add(f"{what}: masks / dense", ratio(run(masked), run(mlp), 3 * repeats), "≤ 1.1")
    add(f"{what}: 4 bits / dense", ratio(run(quantized), run(mlp), 3 * repeats), "≤ 1.3")


def pruning(repeats: int, add: Row) -> None:
    """apply(magnitude) beside torch-pruning by itself, on the same network with ReLUs in the place of neurons."""
    x = images(1)
    for name, build in (("VGG-16", vgg16), ("SEW-ResNet18", sew), ("SEW-ResNet50", sew_resnet50)):
        model = build().eval()
        twin = relu_twin(model)

        def ours(model: nn.Module = model) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                snncompress.apply(
                    model, "magnitude", 0.5, None, data=x, timesteps=T, repair=None, skip=[], progress=False
                )

        def alone(twin: nn.Module = twin) -> None:
            small = copy.deepcopy(twin)
            heads = [m for m in small.modules() if isinstance(m, nn.Linear)]
            importance = tp.importance.GroupMagnitudeImportance(p=1)
            tp.pruner.BasePruner(small, x, importance, pruning_ratio=0.5, ignored_layers=heads).step()

        add(f"apply(magnitude) / torch-pruning alone on the ReLU twin, {name}", ratio(ours, alone, repeats), "≤ 1.3")


def relu_twin(model: nn.Module) -> nn.Module:
    """The network with a ReLU for each neuron, for inputs without a time axis."""
    twin = copy.deepcopy(model)
    functional.set_step_mode(twin, "s")
    for name, module in list(twin.named_modules()):
        if isinstance(module, neuron.LIFNode):
            owner, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(owner), attribute, nn.ReLU())
    return twin.eval()


def sew() -> nn.Module:
    model = sew_resnet18()
    functional.set_step_mode(model, "m")
    return model


def sew_resnet50() -> nn.Module:
    """Bottlenecks in the place of the blocks of SEW-ResNet18: 3, 4, 6 and 3 of them."""
    net = nn.Sequential()
    add_conv(net, 1, 3, 64, 3)
    before = 64
    for number, blocks in enumerate((3, 4, 6, 3), start=1):
        width, stage = 64 * 2 ** (number - 1), nn.Sequential()
        for block in range(blocks):
            stride = 2 if number > 1 and block == 0 else 1
            branch = convs((before, width, 1), (width, width, 3, stride), (width, 4 * width, 1))
            stage.append(Residual(branch, convs((before, 4 * width, 1, stride)) if block == 0 else None))
            before = 4 * width
        net.add_module(f"layer{number}", stage)
    add_classifier(net, before, 10)
    functional.set_step_mode(net, "m")
    return net


NETWORKS = {"vgg16": vgg16, "sew": sew}


def peak_mb(what: str, batches: int, batch_size: int, threads: int, network: str = "vgg16") -> float:
    """Memory that a fresh process needs at its peak for one pass, tracing included, above what its imports take."""
    command = [sys.executable, __file__, "--peak", what, "--batches", str(batches), "--batch-size", str(batch_size)]
    command += ["--threads", str(threads), "--network", network]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def run_peak(what: str, batches: int, batch_size: int, network: str) -> None:
    before = _peak_kb()
    bench = Bench(batches, batch_size, traced=what not in ("forward", "apply"), build=NETWORKS[network])
    if what == "forward":
        bench.forward()
    elif what == "apply":
        bench.apply()
    else:
        bench.calibrate(what)
    print((_peak_kb() - before) / 1e3)


def _peak_kb() -> float:
    """Linux's own mark; getrusage would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def split(model: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds per forward pass in convolutions, batch norms, neurons and the rest."""
    kinds = {"Conv2d": "convolutions", "BatchNorm2d": "batch norms", "LIFNode": "neurons"}
    spent: dict[str, float] = defaultdict(float)
    started: dict[nn.Module, float] = {}
    handles = []
    for module in model.modules():
        if not list(module.children()) or type(module).__name__ in kinds:
            kind = kinds.get(type(module).__name__, "pooling and linear")
            if kind == "pooling and linear" and "surrogate" in type(module).__module__:
                continue

            def before(m: nn.Module, _: object) -> None:
                started[m] = time.perf_counter()

            def after(m: nn.Module, _: object, __: object, kind: str = kind) -> None:
                spent[kind] += time.perf_counter() - started[m]

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    adapter = find_adapter(model)
    with torch.no_grad():
        for _ in range(repeats):
            adapter.reset(model)
            adapter.run(model, x, T)
    for handle in handles:
        handle.remove()
    return {kind: value / repeats for kind, value in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scoring", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--network", choices=list(NETWORKS), default="vgg16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        run_peak(options.peak, options.batches, options.batch_size, options.network)
        return

    repeats = options.repeats
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, result: tuple[float, float, float], aim: str) -> None:
        rows.append((what, f"{result[0]:.2f}×", f"{result[1]:.2f} – {result[2]:.2f}", aim))
        print(*rows[-1], flush=True)

    scoring(options.batches, options.batch_size, repeats, add)
    if options.scoring:
        return
    bench = Bench(options.batches, options.batch_size)
    rates = snncompress.profile(bench.model, bench.data[0], timesteps=T)
    fire = [row.firing_rate for row in rates.layers if row.kind == "neuron"]
    add(
        f"calibrating with {PlainSVS.name} / plain forward passes",
        ratio(lambda: bench.calibrate(PlainSVS.name), bench.forward, repeats),
        "",
    )

    plain = peak_mb("forward", options.batches, options.batch_size, options.threads)
    for name in ("svs", "sca"):
        few = peak_mb(name, options.batches, options.batch_size, options.threads)
        many = peak_mb(name, 4 * options.batches, options.batch_size, options.threads)
        aim = "≤ 1.25"
        rows.append((f"peak memory with {name} / plain forward passes", f"{few / plain:.2f}×", "one run", aim))
        rows.append(
            (f"peak memory with {name}: 4 times the batches / as above", f"{many / few:.2f}×", "one run", "1.00 (flat)")
        )
        print(*rows[-2:], sep="\n", flush=True)

    for network, build in NETWORKS.items():
        size = sum(t.numel() * t.element_size() for t in build().parameters()) / 1e6
        own, above = (peak_mb(w, 1, 1, options.threads, network) for w in ("forward", "apply"))  # a batch would hide it
        what = f"peak memory of apply(magnitude) above a forward pass, in copies of the model, {network}"
        rows.append((what, f"{(above - own) / size:.2f}", "one run", "≤ 2"))
        print(rows[-1], flush=True)

    pruning(max(3, repeats // 3), add)
    x = bench.data[0]

    def tracing(steps: int) -> Callable[[], object]:
        feed = Feed(bench.adapter, x.unsqueeze(0).repeat(steps, 1, 1, 1, 1)[:, :1], None)
        return lambda: trace(bench.model, bench.adapter, feed.example())

    add("tracing at T = 16 / T = 1", ratio(tracing(16), tracing(1), repeats), "≤ 1.10")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = snncompress.apply(bench.model, "magnitude", RATIOS, None, data=x, timesteps=T, repair=None).eval()
    widths = [pruned.get_submodule(f"conv{i}").out_channels for i in range(1, 14)]
    scratch = settled(vgg16(widths=widths), x)
    scratch.load_state_dict(pruned.state_dict())

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                bench.adapter.reset(model)
                bench.adapter.run(model, x, T)

        return run

    add(
        "forward of the pruned network / built from scratch at its widths",
        ratio(forward(pruned), forward(scratch), 3 * repeats),
        "≤ 1.03",
    )
    add("forward of the dense network / pruned", ratio(forward(bench.model), forward(pruned), 3 * repeats), "")
    before, after = (
        snncompress.profile(m, x, timesteps=T, conventions=snncompress.Conventions()) for m in (bench.model, pruned)
    )
    dense_macs = [macs(m, x) for m in (bench.model, pruned)]
    rows.append(("dense multiply-accumulates, dense / pruned", f"{dense_macs[0] / dense_macs[1]:.2f}×", "exact", ""))
    rows.append(("AC actually caused by spikes, dense / pruned", f"{before.n_ac / after.n_ac:.2f}×", "exact", ""))

    parts = [split(m, x, repeats) for m in (bench.model, pruned)]
    torch.set_num_threads(1)
    for row in inference.rows(images(8), repeats):  # on one thread
        if not isinstance(row, str):
            add(f"{row[0]} (one thread, {instructions()})", row[1], row[2])
    text = [
        "# Performance",
        "",
        f"VGG-16 (13 convolutions) for 3×32×32, T = {T}, SpikingJelly multi-step, {options.batches} batches of "
        f"{options.batch_size}; firing rates {min(fire):.3f} – {max(fire):.3f}; seed 0; {options.threads} of "
        f"{os.cpu_count()} threads ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, {datetime.date.today()}.",
        "",
        "| what | median | range | aim |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Where a forward pass spends its time:",
        "",
        "| part | dense (ms) | pruned (ms) | ratio |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {dense * 1e3:.1f} | {parts[1][kind] * 1e3:.1f} | {dense / parts[1][kind]:.2f}× |"
            for kind, dense in parts[0].items()
        ),
    ]
    target = ROOT / "benchmarks" / "results" / "performance.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(text) + "\n")
    print("\n".join(text))


def macs(model: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates of one sample if every input were dense."""
    total = 0.0
    handles = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel() / len(x)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(count))
    adapter = find_adapter(model)
    with torch.no_grad():
        adapter.reset(model)
        adapter.run(model, x, T)
    for handle in handles:
        handle.remove()
    return total


if __name__ == "__main__":
    main()
