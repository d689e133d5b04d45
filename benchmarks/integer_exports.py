"""Networks in whole numbers on MNIST: does ONNX Runtime fire as they do?

    python benchmarks/integer_exports.py [--data FOLDER]

In both frameworks: a network with max pooling, trained for an epoch on 5,000 images, put on grids (weights of 4 bits,
states of 8), frozen with integer="full" and exported as ONNX. Counted is how many spikes differ, of every neuron at
every timestep, on 2,000 test images: in ONNX Runtime from the frozen network, and in that from the one in fixed point.
One thread. Writes benchmarks/results/integer_exports.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from datasets import add_data_option
from mnist import loader, read
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.export.integer_network import heard

RESULT = Path(__file__).resolve().parent / "results" / "integer_exports.md"
T, TRAIN, IMAGES, BATCH = 4, 5_000, 2_000, 250


def network(framework: str) -> nn.Module:
    """Conv(1, 16) - pool - Conv(16, 32) - pool - Linear(128) - Linear(10), neurons behind all but the last."""
    if framework == "snntorch":
        import snntorch
        from snntorch import surrogate

        def fire() -> nn.Module:  # reset by subtraction, in the timestep after
            return snntorch.Leaky(beta=0.75, spike_grad=surrogate.atan(), init_hidden=True)

        parts = nn
    else:
        from spikingjelly.activation_based import layer as parts
        from spikingjelly.activation_based import neuron, surrogate

        def fire() -> nn.Module:
            return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    return nn.Sequential(
        parts.Conv2d(1, 16, 3, padding=1, bias=False), parts.BatchNorm2d(16), fire(), parts.MaxPool2d(2),
        parts.Conv2d(16, 32, 3, padding=1, bias=False), parts.BatchNorm2d(32), fire(), parts.MaxPool2d(2),
        parts.Flatten(), parts.Linear(32 * 7 * 7, 128), fire(), parts.Linear(128, 10),
    )  # fmt: skip


class Engine:
    """The model in ONNX Runtime, on one thread, with the spikes that are inside."""

    def __init__(self, path: Path, neurons: list[str]) -> None:
        model, options = onnx.load(path), onnxruntime.SessionOptions()
        self.start = json.loads(next(p.value for p in model.metadata_props if p.key == "initial_states"))
        model.graph.output.extend(onnx.ValueInfoProto(name=f"{name}.out") for name in neurons)
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def run(self, x: Tensor) -> list[dict[str, Any]]:
        """What comes out in each timestep."""
        inputs, names = self.session.get_inputs()[1:], [value.name for value in self.session.get_outputs()]
        states = {
            i.name: np.broadcast_to(np.array(self.start[i.name], np.int32), [len(x), *i.shape[1:]]) for i in inputs
        }
        made = []
        for _ in range(T):
            made.append(dict(zip(names, self.session.run(None, {"input": x.numpy(), **states}), strict=True)))
            states = {name: made[-1][f"{name}_next"] for name in states}
        return made


def spikes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every neuron, [T, N, ...]."""
    adapter = find_adapter(model)
    found = heard(model, adapter, lambda net: adapter.run(net, x, T))
    return {name: s.reshape(T, len(x), *s.shape[2:]) for name, s in found.items()}


def compared(small: nn.Module, x: Tensor, folder: Path) -> list[str]:
    """Spikes that differ between the three, in words."""
    whole = snncompress.freeze(small, x[:1], timesteps=T, integer="full")
    snncompress.export(whole, folder / "net.onnx", data=x[:2], timesteps=T)
    engine, frozen, exported, total, size = None, 0, 0, 0, 0
    for part in x.split(BATCH):
        fixed, ours = spikes(small, part), spikes(whole, part)
        engine = engine or Engine(folder / "net.onnx", list(ours))
        for t, made in enumerate(engine.run(part)):
            for name, s in ours.items():
                exported += int((made[f"{name}.out"] != s[t].numpy()).sum())
                frozen += int((fixed[name][t] ^ s[t]).sum())
                total, size = total + int(s[t].sum()), size + s[t].numel()
    of = f"of {size:,} ({total:,} spikes)"
    return [f"{frozen} {of}", f"{exported} {of}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    (x, y), (test, labels) = read(data, "train"), read(data, "test")
    rows = []
    for framework in ("spikingjelly", "snntorch"):
        torch.manual_seed(0)
        batches = loader(x[:TRAIN], y[:TRAIN])
        net = snncompress.finetune(network(framework), batches, epochs=1, lr=2e-3, timesteps=T, progress=False).eval()
        small = snncompress.apply(
            net, None, bits=4, state_bits=8, data=(x[:500], y[:500]), timesteps=T, progress=False
        ).eval()
        accuracy = 100 * snncompress.evaluate(small, loader(test, labels, shuffle=False), timesteps=T).accuracy
        with tempfile.TemporaryDirectory() as folder:
            cells = compared(small, test[:IMAGES], Path(folder))
        rows.append(f"| {framework} | {accuracy:.2f} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    text = [
        f"Networks in whole numbers on {IMAGES:,} test images of MNIST over T = {T} steps, all neurons: weights of 4 "
        f"bits, states of 8. onnxruntime {onnxruntime.__version__}, {platform.machine()}, torch {torch.__version__}, "
        f"seed 0, {datetime.date.today()}.",
        "",
        "| framework | test accuracy (%) | spikes that differ: frozen from fixed point in float32 | ONNX from frozen |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ]
    RESULT.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
