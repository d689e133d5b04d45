"""Chips: ten networks on all targets beside the vendors' own answers, and one network taken to Speck.

    python benchmarks/targets.py [--data FOLDER] [--part verdicts|speck]

The vendors' packages are sinabs (its DynapcnnNetwork, its memories, its matching of layers and cores) and Rockpool (the
mappers of three Xylos). Both import samna, which downloads a binary where it is imported; here an empty module stands
in its place, so that all of theirs runs that is written in Python, and samna's own validate_configuration doesn't.
Their weights are floats, which they round themselves: beside them stands what `fits` says of all but weights' form.

The network for Speck sees MNIST as events: each pixel fires with its brightness as probability, in T steps, always the
same ones. It is trained on 4,000 images, taken to Speck by one call, written as NIR, read by sinabs and run there.
Writes benchmarks/results/targets.md, part by part; everything runs in one thread.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.machinery
import itertools
import platform
import random
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from snncompress_chips import FPGA, Speck
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snncompress
from snncompress.extend import Stage

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "targets.md"
FORM = ("bits of a weight", "scales of its weights")
BOARD = FPGA(weight_bits=8, bytes=600 * 1024)
T, TRAIN, TEST, EPOCHS, BATCH = 4, 4_000, 2_000, 3, 50
EXPLAINED = {
    "input": "sinabs doesn't look at data",
    "neurons that inputs reach": "Rockpool's rule le_128_input_expansion_neurons is empty",
    "neurons that reach outputs": "Rockpool's rule le_128_output_expansion_neurons is empty",
    "neurons that a neuron reaches": "fan-out is left to samna's validate_configuration",
}
"""Limits that the vendors' Python doesn't look at, and why."""
THEIR_BUG = (
    "the mapper for IMU numbers a single hidden layer twice, as what inputs reach and as what reaches outputs "
    "(the one for Audio 3 doesn't)"
)


class _Absent(types.ModuleType):
    """A module in which every name is another such module."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ("samna", "samnagui"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> _Absent:
        return _Absent(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


# --- ten networks, each a list of layers, so that the vendors' packages get the same ---

Spec = list[tuple[Any, ...]]


@dataclass
class Case:
    """A network, how it is built, and an input for it."""

    name: str
    spec: Spec
    x: Tensor
    timesteps: int | None = None
    framework: str = "spikingjelly"
    compress: Callable[[nn.Module, Tensor], nn.Module] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.framework == "snntorch":
            built: nn.Module = Leaky(self.spec)
        else:
            built = nn.Sequential(*(_layer(*part) for part in self.spec))
            functional.set_step_mode(built, "m")
        built.eval()
        return built if self.compress is None else self.compress(built, self.x)


def _layer(kind: str, *args: Any) -> nn.Module:
    kinds: dict[str, Callable[..., nn.Module]] = {
        "conv": lambda i, o, k, p: layer.Conv2d(i, o, k, padding=p, bias=False),
        "linear": lambda i, o: layer.Linear(i, o, bias=False),
        "norm": layer.BatchNorm2d,
        "avg": layer.AvgPool2d,
        "max": layer.MaxPool2d,
        "flatten": layer.Flatten,
        "if": lambda: neuron.IFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()),
        "lif": lambda: neuron.LIFNode(surrogate_function=surrogate.ATan()),
    }
    return kinds[kind](*args)


class Leaky(nn.Module):
    """The same for snnTorch, with a loop over T steps of its own; neurons leak and are reset by subtraction."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        import snntorch

        kinds: dict[str, Callable[..., nn.Module]] = {
            "conv": lambda i, o, k, p: nn.Conv2d(i, o, k, padding=p, bias=False),
            "linear": lambda i, o: nn.Linear(i, o, bias=False),
            "max": nn.MaxPool2d,
            "flatten": nn.Flatten,
            "lif": lambda: snntorch.Leaky(0.9),
        }
        self.parts = nn.ModuleList(kinds[part[0]](*part[1:]) for part in spec)

    def forward(self, x: Tensor) -> Tensor:  # [T, N, ...]
        states = {part: part.init_leaky() for part in self.parts if hasattr(part, "init_leaky")}
        out = []
        for step in x:
            for part in self.parts:
                if part in states:
                    step, states[part] = part(step, states[part])
                else:
                    step = part(step)
            out.append(step)
        return torch.stack(out)


def _for_speck(model: nn.Module, x: Tensor) -> nn.Module:
    return snncompress.apply(model, "magnitude", data=x, target="speck", repair=None)


def _seven_bits(model: nn.Module, x: Tensor) -> nn.Module:
    return snncompress.apply(model, None, bits=7, data=x, skip=[], repair=None)


def cases() -> Iterator[Case]:
    events, pictures = torch.rand(4, 2, 2, 32, 32).round(), torch.rand(4, 2, 1, 28, 28)
    sound = torch.rand(4, 2, 16).round()

    def maps(first: int, second: int, cell: str = "if", *between: tuple[Any, ...]) -> Spec:
        pool: tuple[Any, ...] = ("avg", 2) if cell == "if" else ("max", 2)
        norms = [("norm", first)], [("norm", second)]
        before, behind = norms if cell == "lif" else ([], [])
        return [
            ("conv", 2, first, 3, 1), *before, (cell,), pool, ("conv", first, second, 3, 1), *behind, (cell,), pool,
            ("flatten",), ("linear", second * 64, 10), (cell,),
        ]  # fmt: skip

    def block(n: int) -> Spec:
        return [("conv", 8 if n else 2, 8, 3, 1), ("if",), *([("avg", 2)] if n < 2 else [])]

    deep: Spec = [part for n in range(10) for part in block(n)]
    tutorial: Spec = [
        ("conv", 1, 12, 5, 0), ("max", 2), ("lif",), ("conv", 12, 64, 5, 0), ("max", 2), ("lif",), ("flatten",),
        ("linear", 1024, 10), ("lif",),
    ]  # fmt: skip

    def hearing(*widths: int) -> Spec:
        sizes = (16, *widths)
        return [part for i, o in itertools.pairwise(sizes) for part in (("linear", i, o), ("lif",))]

    yield Case("events 8-16", maps(8, 16), events)
    yield Case("events 96-256", maps(96, 256), events)
    yield Case("events 96-256, for Speck", maps(96, 256), events, compress=_for_speck)
    yield Case("ten convolutions", [*deep, ("flatten",), ("linear", 8 * 64, 10), ("if",)], events)
    yield Case("leaky, batch norms, max pooling", maps(8, 16, "lif"), events)
    yield Case("pictures 12-64 (snnTorch)", tutorial, pictures, framework="snntorch")
    flat: Spec = [("flatten",), ("linear", 784, 1000), ("lif",), ("linear", 1000, 10), ("lif",)]
    yield Case("pictures 784-1000-10 (snnTorch)", flat, pictures, framework="snntorch")
    for name, widths in (("63-8", (63, 8)), ("1200-8", (1200, 8)), ("100-60-8", (100, 60, 8))):
        small = name != "1200-8"
        title = f"sound 16-{name} (snnTorch){', 7 bits' if small else ''}"
        yield Case(title, hearing(*widths), sound, framework="snntorch", compress=_seven_bits if small else None)


# --- what the vendors say ---


def sinabs_says(case: Case) -> tuple[bool | None, str]:
    """Whether sinabs makes a DynapcnnNetwork of it, and finds cores for all layers."""
    import sinabs.layers as sl
    from sinabs.backend.dynapcnn import DynapcnnNetwork
    from sinabs.backend.dynapcnn.chips.speck2f import Speck2FConfigBuilder

    widths = _widths(case)
    parts: list[nn.Module] = []
    for (kind, *args), (i, o) in zip(case.spec, widths, strict=True):
        if kind == "conv":
            parts.append(nn.Conv2d(i, o, args[2], padding=args[3], bias=False))
        elif kind == "linear":
            parts.append(nn.Linear(i, o, bias=False))
        elif kind == "norm":
            parts[-1].bias = nn.Parameter(torch.zeros(parts[-1].out_channels))  # it folds into that
            parts.append(nn.BatchNorm2d(o))
        elif kind == "if":
            parts.append(sl.IAFSqueeze(batch_size=1))
        elif kind == "lif":
            parts.append(sl.LIFSqueeze(tau_mem=20.0, batch_size=1))
        else:
            parts.append({"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "flatten": nn.Flatten}[kind](*args))
    shape = tuple(case.x.shape[2:]) if case.x.dim() == 5 else (case.x.shape[-1], 1, 1)
    try:
        network = DynapcnnNetwork(nn.Sequential(*parts), input_shape=shape, discretize=True)
        Speck2FConfigBuilder.get_valid_mapping(network)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return True, ""


def _widths(case: Case) -> list[tuple[int, int]]:
    """(in, out) of each part, as compressed."""
    if case.framework == "snntorch":
        model: Any = case.model().parts
    else:
        model = case.model()
    found = []
    for part in model:
        one = getattr(part, "in_channels", getattr(part, "in_features", 0))
        other = getattr(part, "out_channels", getattr(part, "out_features", getattr(part, "num_features", 0)))
        found.append((int(one), int(other)))
    return found


def rockpool_says(case: Case, chip: str) -> tuple[bool | None, str]:
    """Whether Rockpool's mapper for that Xylo takes it; None where it can't be written in Rockpool for it."""
    import importlib

    from rockpool.nn.combinators import Sequential
    from rockpool.nn.modules import LIFTorch, LinearTorch

    if any(part[0] not in ("linear", "lif", "flatten") for part in case.spec):
        return None, "no such layers in its graphs for Xylo"
    home = {"xylo_audio2": "syns61201", "xylo_audio3": "syns65302", "xylo_imu": "syns63300"}[chip]
    mapper = importlib.import_module(f"rockpool.devices.xylo.{home}.xylo_mapper").mapper
    parts: list[Any] = []
    for part in case.spec:
        if part[0] == "linear":
            parts += [LinearTorch(part[1:], has_bias=False), LIFTorch((part[2],), dt=1e-3, tau_mem=0.02, tau_syn=0.01)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            mapper(Sequential(*parts).as_graph())
        except Exception as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return False, f"{type(error).__name__}: {' '.join(str(error).split())[:90]}{cause[:60]}"
    rules = [str(warning.message) for warning in said if "DRC" in warning.category.__name__]
    return not rules, rules[0][:90] if rules else ""


def verdicts() -> list[str]:
    names = [entry.name for entry in snncompress.targets()]
    rows, beside, contradictions = [], [], 0
    for case in cases():
        model = case.model()
        cells = []
        for name in names:
            found = snncompress.fits(model, BOARD if name == "fpga" else name, data=case.x, timesteps=case.timesteps)
            cells.append("fits" if found else f"{len(found.missed)} exceeded")
            if name == "speck":
                said, why = sinabs_says(case)
            elif name.startswith("xylo"):
                said, why = rockpool_says(case, name)
            else:
                continue
            rest = [row.limit.what for row in found.missed if row.limit.what not in FORM]
            ours, unlike = not rest, said is not None and said != (not rest)
            note = why
            if unlike:
                known = [EXPLAINED[what] for what in dict.fromkeys(rest) if what in EXPLAINED]
                solved = ours is False and said is True and all(what in EXPLAINED for what in rest)
                if name == "xylo_imu" and "is not in list" in why:
                    known, solved = [f"{why}: {THEIR_BUG}"], True
                contradictions += not solved
                note = "; ".join(known) if solved else f"**unexplained** {why}"
            words = {True: "yes", False: "no", None: "–"}
            first = ", ".join(list(dict.fromkeys(rest))[:3]) or "–"
            beside.append(f"| {case.name} | {name} | {words[ours]} | {first} | {words[said]} | {note or '–'} |")
        rows.append(f"| {case.name} | {' | '.join(cells)} |")
    head = [f"| network | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    side = [
        "| network | target | fits, weights aside | what is exceeded | vendor | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return [
        "## Ten networks on all targets", "",
        "How many limits are exceeded. `fpga` has 600 KB for weights of 8 bits and potentials. Floats have 32 bits, so",
        "no network that isn't compressed fits a chip of integers.", "", *head, *rows, "",
        "## Beside the vendors' own packages", "",
        "sinabs 2.0.3 for Speck, Rockpool 3.1.0 for Xylo, without samna. `–`: it can't be written for them.",
        f"Contradictions that aren't explained: {contradictions}.", "", *drawn(200), *side, *beside,
    ]  # fmt: skip


# --- networks drawn at random, placed by both ---


def drawn(count: int) -> list[str]:
    """Convolutions within what sinabs' documentation allows, of which memories and cores decide."""
    import sinabs.layers as sl
    from sinabs.backend.dynapcnn import DynapcnnNetwork
    from sinabs.backend.dynapcnn.chips.speck2f import Speck2FConfigBuilder

    chance, chip, agreed, fitting = random.Random(0), Speck(), 0, 0
    for _ in range(count):
        channels, side, parts, stages = 2, chance.choice((16, 32, 64)), [], []
        first = side
        for number in range(chance.randint(1, 9)):
            out, kernel = chance.choice((4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 200)), chance.choice((1, 3, 5))
            pool = chance.choice([size for size in (1, 2, 4) if side // size >= 4] or [1])
            window = ((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1))
            stages.append(
                Stage(
                    str(number),
                    "convolution",
                    channels,
                    out,
                    (side,) * 2,
                    (side,) * 2,
                    *window,
                    neuron="if",
                    weight_bits=8,
                )
            )
            parts += [nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), sl.IAFSqueeze(batch_size=1)]
            parts += [nn.AvgPool2d(pool)] if pool > 1 else []
            channels, side = out, side // pool
        try:
            network = DynapcnnNetwork(nn.Sequential(*parts), input_shape=(2, first, first), discretize=True)
            Speck2FConfigBuilder.get_valid_mapping(network)
            theirs_ = True
        except ValueError:
            theirs_ = False
        met = all(limit.met for stage in stages for limit in chip.limits(stage))
        ours_ = met and len(chip.place(stages).cores) == len(stages)
        agreed, fitting = agreed + (ours_ == theirs_), fitting + ours_
    return [
        f"{count} networks of 1 to 9 convolutions, drawn at random: `place` and sinabs' matching agree on {agreed};",
        f"{fitting} of them fit.", "",
    ]  # fmt: skip


# --- one network, taken to Speck ---


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    datasets.add_data_option(parser)
    parser.add_argument("--part", choices=("verdicts", "speck"), help="one part alone; the other's figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    torch.manual_seed(0)
    kept = RESULT.read_text().split("<!-- speck -->") if RESULT.exists() else ["", ""]
    day = f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}"
    head = f"# Chips\n\n`python benchmarks/targets.py`, {day}.\n\n"
    one = kept[0] if options.part == "speck" and kept[0] else head + "\n".join(verdicts()) + "\n\n"
    two = kept[-1] if options.part == "verdicts" else "\n\n" + "\n".join(speck(options.data)) + "\n"
    RESULT.write_text(f"{one}<!-- speck -->{two}")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
