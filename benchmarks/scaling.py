"""How costs grow with timesteps, depth, width and batches, in plain forward passes over the same data.

    python benchmarks/scaling.py [--only timesteps depth width batches]

SEW-ResNets (Fang et al., NeurIPS 2021) for 3×32×32 of 16 channels in the first stage, in SpikingJelly's multi-step
mode: 18 layers, T = 4 and one batch of 8, but for what a row varies. Weights are random, batch norms settled on the
data. Measured are apply() with half of the channels removed by magnitude and by svs, nothing repaired; a profile; the
frozen network in floats, and one of 4 bits frozen in integers, each beside plain forward passes of the network, in
turn: processor time on one thread, and of several the median. Writes benchmarks/results/scaling.md and scaling.png.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from inference import machine_load
from performance import images, settled
from spikingjelly.activation_based import functional
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import snncompress
from examples.networks.blocks import Residual, add_classifier, add_conv, convs
from snncompress.contract.detection import find_adapter
from snncompress.export.integer_layers import instructions
from snncompress.running.data import Feed

HERE = Path(__file__).resolve().parent
RESULT, PICTURE = HERE / "results" / "scaling.md", HERE / "results" / "scaling.png"
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
COSTS = {"magnitude": "apply, magnitude", "svs": "apply, svs", "profile": "profile"}
SPEEDS = {"float": "frozen, floats", "integer": "frozen, 4 bits, integers"}


@dataclass(frozen=True)
class Case:
    """A network and its data."""

    timesteps: int = 4
    depth: int = 18
    width: int = 16
    batches: int = 1
    found: dict[str, float] = field(default_factory=dict, compare=False)


VARIED: dict[str, Sequence[int]] = {
    "timesteps": (1, 4, 16, 64), "depth": tuple(STAGES), "width": (8, 16, 32, 64), "batches": (1, 4, 8)
}  # fmt: skip
TITLES = {"timesteps": "timesteps T", "depth": "layers", "width": "channels in the first stage", "batches": "batches"}


def sew_resnet(depth: int, width: int) -> nn.Module:
    """Basic blocks up to 34 layers, bottlenecks beyond; see examples/networks/sew_resnet18.py."""
    net = nn.Sequential()
    add_conv(net, 1, 3, width, 3)
    before = width
    for stage, count in enumerate(STAGES[depth]):
        inner = width * 2**stage
        after = inner if depth < 50 else 4 * inner
        blocks = nn.Sequential()
        for number in range(count):
            stride = 2 if stage and not number else 1
            shortcut = None if before == after and stride == 1 else convs((before, after, 1, stride))
            shapes = [(before, inner, 3, stride), (inner, after, 3)]
            if depth >= 50:
                shapes = [(before, inner, 1), (inner, inner, 3, stride), (inner, after, 1)]
            blocks.append(Residual(convs(*shapes), shortcut))
            before = after
        net.add_module(f"layer{stage + 1}", blocks)
    add_classifier(net, before, 10)
    functional.set_step_mode(net, "m")
    return net


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measured(case: Case) -> Case:
    """With the seconds of a plain pass over the data, and how many passes all else takes."""
    torch.manual_seed(0)
    data = [images(8) for _ in range(case.batches)]
    model = settled(sew_resnet(case.depth, case.width), data[0], case.timesteps)
    options: dict[str, Any] = {"data": data, "timesteps": case.timesteps, "repair": None, "progress": False}
    small = snncompress.apply(model, None, bits=4, **options)
    frozen = snncompress.freeze(model, data, timesteps=case.timesteps)
    whole = snncompress.freeze(small, data, timesteps=case.timesteps, integer=True)

    def passes(net: nn.Module) -> Callable[[], None]:
        feed = Feed(find_adapter(net), data, case.timesteps)

        def run() -> None:
            with torch.no_grad():
                for batch in feed:
                    feed(net, batch)

        return run

    plain = passes(model)
    actions: dict[str, tuple[Callable[[], object], int]] = {
        "magnitude": (lambda: snncompress.apply(model, "magnitude", 0.5, None, **options), 2),
        "svs": (lambda: snncompress.apply(model, "svs", 0.5, None, **options), 2),
        "profile": (lambda: snncompress.profile(model, data, timesteps=case.timesteps), 3),
        "float": (passes(frozen), 5),
        "integer": (passes(whole), 5),
    }
    found, plains = {}, []
    for name, (action, repeats) in actions.items():
        if repeats > 2:
            action()
        plain()
        ratios = []
        for _ in range(repeats):
            plains.append(seconds(plain))
            ratios.append(seconds(action) / plains[-1])
        found[name] = statistics.median(ratios)
    return replace(case, found={"plain": statistics.median(plains), **found})


def draw(found: Mapping[str, Mapping[int, Case]]) -> None:
    """Above what compressing costs, below how long a frozen network takes, both in plain forward passes."""
    from matplotlib import pyplot

    colours = dict(zip((*COSTS, *SPEEDS), ("#1f77b4", "#b0428a", "#2a9a50", "#e07b16", "#7a5cc0"), strict=True))
    figure, grid = pyplot.subplots(
        2, len(found), figsize=(3.3 * len(found), 6.4), sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for column, (name, cases) in enumerate(found.items()):
        for row, lines in enumerate((COSTS, SPEEDS)):
            axes = grid[row][column]
            for kind, label in lines.items():
                axes.plot(
                    list(cases), [c.found[kind] for c in cases.values()], "o-", c=colours[kind], label=label, ms=4
                )
            axes.axhline(1, color="black", lw=1, ls=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(cases), [str(at) for at in cases], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        grid[0][column].set_yscale("log")
        grid[1][column].set_xlabel(TITLES[name])
        grid[0][column].yaxis.set_tick_params(which="minor", left=False)
    ticks = [1, 2, 5, 10, 20, 50]
    grid[0][0].set_yticks(ticks, [f"{tick}×" for tick in ticks])
    grid[0][0].set_ylabel("compressing and measuring,\nin plain forward passes (log)")
    grid[1][0].set_ylim(0, 1.15)
    grid[1][0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1×"])
    grid[1][0].set_ylabel("a frozen forward pass,\nin plain ones (less is faster)")
    grid[0][0].legend(frameon=False, fontsize=9, loc="upper right")
    grid[1][0].legend(frameon=False, fontsize=9, loc="center", bbox_to_anchor=(0.5, 0.72))
    figure.suptitle(
        "What snncompress costs, and what freezing saves, beside plain forward passes (1×, dotted)\n"
        "SEW-ResNet18 of 16 channels, T = 4, one batch of 8, but for what varies"
    )
    figure.savefig(PICTURE, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIED, default=list(VARIED))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done: dict[Case, Case] = {}
    found: dict[str, dict[int, Case]] = {}
    lines = []
    for name in options.only:
        for value in VARIED[name]:
            case = replace(Case(), **{name: value})
            done[case] = case = done.get(case) or measured(case)
            found.setdefault(name, {})[value] = case
            shares = [f"{case.found[kind]:.2f}" for kind in (*COSTS, *SPEEDS)]
            lines.append(f"| {TITLES[name]}: {value} | {1e3 * case.found['plain']:.0f} | {' | '.join(shares)} |")
            print(lines[-1], flush=True)
    draw(found)
    text = [
        "# How costs grow",
        "",
        "SEW-ResNets for 3×32×32 with 16 channels in the first stage, 18 layers, T = 4, one batch of 8, SpikingJelly "
        "multi-step, but for what a row names. In plain forward passes over the same data, processor time side by "
        "side, median; `apply` removes half of the channels and repairs nothing; seed 0; one thread, instructions "
        f"{instructions()} ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}, "
        f"{datetime.date.today()}; {machine_load()}.",
        "",
        f"| what | plain passes (ms) | {' | '.join((COSTS | SPEEDS).values())} |",
        f"| --- | ---: | {' | '.join(['---:'] * len(COSTS | SPEEDS))} |",
        *lines,
        "",
        f"![what compressing costs and freezing saves, by {', '.join(found)}]({PICTURE.name})",
    ]
    RESULT.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
