"""Detection study: what pruning and quantization cost a spiking YOLO on scenes made from MNIST's digits.

    python benchmarks/detection.py [--data FOLDER] [--scenes 4000] [--epochs 12]

ResNet10 of a quarter of the widths with a YOLOv3 head, on canvases of 64×64 with one to four digits; test scenes are
made from test digits. mAP at an overlap of 0.5, by pycocotools, of the dense network, straight after compression
without and with repair, and after fine-tuning; the labels are lists of boxes, handed to ``loss=``. The dense network
and the rows that are done are kept in benchmarks/.cache, so that it goes on where it was stopped. One thread, ten
minutes. Writes benchmarks/results/detection.md. Needs MNIST and ``pip install
"snncompress[spikingjelly,detection]"``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch
from datasets import add_data_option
from detection_data import Batches, Sample, mean_average_precision, scenes
from spikingjelly.activation_based import functional
from torch import nn

import snncompress

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from examples.networks.yolo import Anchors, yolo  # noqa: E402

SIZE, T, TEST, CALIBRATION, WIDTH = 64, 2, 500, 256, 16
TUNE_EPOCHS, LR = 2, 2e-3
ANCHORS = Anchors(SIZE, (((20, 20), (14, 20)), ((14, 14), (9, 16), (5, 13))))

# What is done to the dense network: the ratio of channels by layer, and the bits.
HOWS: dict[str, tuple[dict[str, float] | None, int | None]] = {
    "4 bits": (None, 4),
    "2 bits": (None, 2),
    "4 bits, 30 % of the backbone's channels": ({"layer*": 0.3}, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--scenes", type=int, default=4_000, help="for training")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train = scenes(options.data, "train", options.scenes, SIZE, seed=options.seed)
    test = scenes(options.data, "test", TEST, SIZE, seed=options.seed)
    calibration = Batches(train[:CALIBRATION])

    def tuned(net: nn.Module, epochs: int, lr: float = LR) -> nn.Module:
        torch.manual_seed(options.seed)
        batches = Batches(train, 32, shuffle=True)
        return snncompress.finetune(net, batches, epochs=epochs, lr=lr, timesteps=T, loss=ANCHORS.loss, progress=False)

    torch.manual_seed(options.seed)
    dense = yolo(in_channels=1, width=WIDTH, anchors=(2, 3))
    functional.set_step_mode(dense, "m")
    kept = HERE / ".cache" / f"detection-{options.scenes}-{options.epochs}-{options.seed}.pt"
    kept.parent.mkdir(exist_ok=True)
    if not kept.exists():
        tuned(dense, options.epochs)
        torch.save(dense.state_dict(), kept)
    dense.load_state_dict(torch.load(kept, weights_only=True))
    functional.reset_net(dense)
    before = snncompress.profile(dense, calibration, timesteps=T)

    def row(name: str) -> str:
        if name == "dense":
            again = tuned(snncompress.apply(dense, None, bits=None, data=calibration, timesteps=T), TUNE_EPOCHS, LR / 2)
            cells = [f"{before.n_params:,}", f"{before.size_mb:.3f}", share(dense, test), "", share(again, test)]
            return f"| dense | {' | '.join(cells)} |"
        ratio, bits = HOWS[name]
        bare, repaired = (
            snncompress.apply(
                dense, None if ratio is None else "svs", ratio or 0.0, bits, data=calibration, timesteps=T,
                repair=repair, skip={"prune": []}, progress=False,  # ratio says what goes
            )
            for repair in (None, "membrane")
        )  # fmt: skip
        after = snncompress.profile(repaired, calibration, timesteps=T)
        cells = [share(bare, test), share(repaired, test), share(tuned(repaired, TUNE_EPOCHS, LR / 2), test)]
        size = f"{after.n_params:,} | {after.size_mb:.3f} (× {after.size_mb / before.size_mb:.3f})"
        return f"| {name} | {size} | {' | '.join(cells)} |"

    rows_kept = kept.with_suffix(".json")
    rows = json.loads(rows_kept.read_text()) if rows_kept.exists() else {}
    for name in ("dense", *HOWS):
        if name not in rows:
            rows[name] = row(name)
            rows_kept.write_text(json.dumps(rows))
        print(rows[name], flush=True)
        write(options, [rows[name] for name in ("dense", *HOWS) if name in rows])


def write(options: argparse.Namespace, rows: list[str]) -> None:
    text = [
        f"mAP at an overlap of 0.5, in %, on {TEST} scenes of {SIZE}×{SIZE} with one to four digits made from MNIST's "
        f"test images; trained on {options.scenes:,} scenes of its training images, {options.epochs} epochs, Adam "
        f"{LR:g} with a cosine schedule. Spiking ResNet10 ({WIDTH} to {8 * WIDTH} channels) with a YOLOv3 head, "
        f"T = {T}. Channels by svs; {CALIBRATION} scenes calibrate, without their boxes; {TUNE_EPOCHS} epochs of "
        f"fine-tuning at {LR / 2:g}, which the dense network got too. The first layer and the two output layers stay "
        f"at 32 bits. Seed {options.seed}, one thread ({platform.machine()}), torch {torch.__version__}, "
        f"{datetime.date.today()}.",
        "",
        "| network | parameters | MB | straight after, bare | straight after, repaired | fine-tuned |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    (HERE / "results" / "detection.md").write_text("\n".join(text) + "\n")


def share(net: nn.Module, test: list[Sample]) -> str:
    """mAP in %."""
    net.eval()
    found, wanted = [], []
    with torch.no_grad():
        for images, boxes in Batches(test, 100):
            functional.reset_net(net)
            found += ANCHORS.detect(net(images.expand(T, *images.shape)), least=0.01)
            wanted += boxes
    functional.reset_net(net)
    return f"{100 * mean_average_precision(found, wanted):.1f}"


if __name__ == "__main__":
    main()
