"""Chips: ten networks on all targets beside the vendors' own answers, and one network taken to Speck.

    python benchmarks/targets.py [--data FOLDER] [--part verdicts|speck]

The vendors' packages are sinabs (its DynapcnnNetwork, its memories, its matching of layers and cores) and Rockpool (the
mappers of three Xylos), without samna (`target_vendors.py`). Their weights are floats, which they round themselves:
beside them stands what `fits` says of all but weights' form.

The network for Speck (`target_speck.py`) sees MNIST as events: each pixel fires with its brightness as probability, in
T steps, always the same ones. It is trained on 4,000 images.
Writes benchmarks/results/targets.md, part by part; everything runs in one thread.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
from pathlib import Path

import datasets
import torch
from snncompress_chips import Speck
from target_networks import cases
from target_speck import BOARD, speck
from target_vendors import rockpool_says, sinabs_says, without_samna
from torch import nn

import snncompress
from snncompress.extend import Stage

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "targets.md"
FORM = ("bits of a weight", "scales of its weights")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    datasets.add_data_option(parser)
    parser.add_argument("--part", choices=("verdicts", "speck"), help="one part alone; the other's figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    without_samna()
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
