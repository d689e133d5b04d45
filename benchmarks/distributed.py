"""Two processes against one: the same plan, the same weights, the same figures? In what time, and with how many bytes?

    python benchmarks/distributed.py [--data FOLDER] [--processes 2]

The network is that of mnist_models.py, SpikingJelly's, trained on a part of MNIST. Every batch of 64 images is divided
among the processes, as a DistributedSampler does; one thread each, gloo, on this machine. Bytes are those that a
process hands to torch.distributed. The report is in benchmarks/results. Takes some eight minutes of two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import add_data_option
from jobs import here
from mnist import BATCH, CACHE, T, read, some, table, tune
from mnist_models import spikingjelly_net
from torch import Tensor, distributed, nn

import snncompress

RESULT = Path(__file__).resolve().parent / "results" / "distributed.md"
IMAGES, ORDERS = 512, 3
NOISE = ("svs, 4 bits", "svs")
CASES: dict[str, dict[str, Any]] = {
    "svs, 4 bits": {"criterion": "svs", "ratio": 0.5, "bits": 4},
    "svs": {"criterion": "svs", "ratio": 0.5, "bits": None},
    "sca": {"criterion": "sca", "ratio": 0.5, "bits": None},
    "obs": {"criterion": "obs", "ratio": 0.9, "bits": None},
    "taylor": {"criterion": "taylor", "ratio": 0.5, "bits": None},
    "cqp": {"criterion": "cqp", "ratio": 0.9, "bits": None},
    "svs, energy 0.5": {"criterion": "svs", "bits": None, "budget": {"energy": 0.5}},
}
BY_BATCH = ("taylor", "cqp")
"""What the absolute gradients of single batches decide on."""
Found = dict[str, Any]


@contextmanager
def handed_over() -> Iterator[list[int]]:
    """Inside, notes the size of each message, in bytes."""
    sizes: list[int] = []
    collectives = ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list")
    before = {name: getattr(distributed, name) for name in collectives}

    def size(value: Any) -> int:
        return value.numel() * value.element_size() if isinstance(value, Tensor) else len(pickle.dumps(value))

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            sizes.append(size(args[1] if name == "all_gather_object" else args[0]))
            return before[name](*args, **options)

        return call

    for name in collectives:
        setattr(distributed, name, noting(name))
    try:
        yield sizes
    finally:
        for name, function in before.items():
            setattr(distributed, name, function)


def timed(call: Callable[[], Any]) -> Found:
    began, worked = time.perf_counter(), time.process_time()
    with handed_over() as sizes:
        result = call()
    seconds, busy = time.perf_counter() - began, time.process_time() - worked
    return {"result": result, "seconds": seconds, "busy": busy, "bytes": sum(sizes), "messages": len(sizes)}


def results(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], cases: dict[str, dict[str, Any]], *, measured: bool = True
) -> Found:
    snncompress.apply(model, "svs", 0.5, 4, data=data[:1], timesteps=T, skip=[], progress=False)  # imports
    snncompress.evaluate(model, data[:1], timesteps=T)
    found: Found = {}
    for name, options in cases.items():
        found[name] = timed(
            lambda o=options: snncompress.apply(model, data=data, timesteps=T, skip=[], progress=False, **o)
        )
        small = found[name]["result"]
        found[name]["result"] = json.loads(snncompress.plan_of(small).to_json()), small.state_dict()
    if not measured:
        return found
    found["profile"] = timed(lambda: snncompress.profile(model, data, timesteps=T).to_dict())
    found["evaluate"] = timed(lambda: snncompress.evaluate(model, data, timesteps=T))

    def trained() -> dict[str, Tensor]:
        net = snncompress.apply(model, "weight_magnitude", 0.5, 4, data=data, timesteps=T, repair=None, progress=False)
        return snncompress.finetune(net.eval(), data, timesteps=T, progress=False).state_dict()

    found["finetune"] = timed(trained)
    return found


def batches(split: tuple[Tensor, Tensor], rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(split[0].split(BATCH), split[1].split(BATCH), strict=True)
    return [(x[rank::world], y[rank::world]) for x, y in pairs]


def dense(split: tuple[Tensor, Tensor]) -> nn.Module:
    path = CACHE / "distributed.pt"
    torch.manual_seed(0)
    model = spikingjelly_net()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        tune(model, some(split, 3_000, 1), 2, 0, lr=2e-3)
        CACHE.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def work(folder: Path, rank: int, world: int, split: tuple[Tensor, Tensor]) -> None:
    """One of the processes."""
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = results(dense(split), batches(some(split, IMAGES, 0), rank, world), CASES)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """The largest difference of two states, relative to the largest value of the same tensor."""
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
        return "inf"  # of other shapes
    differences = [
        float((a.double() - other[n].double()).abs().max() / a.double().abs().max().clamp_min(1e-12))
        for n, a in one.items()
        if a.numel()
    ]
    return f"{max(differences):.1e}" if max(differences) else "0"


def shuffled(model: nn.Module, data: list[tuple[Tensor, Tensor]], case: str, plain: Found) -> str:
    """What float noise alone does: one process, the samples of each batch in other orders."""
    same, differences = 0, []
    for seed in range(ORDERS):
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
        other = results(model, [(x[order], y[order]) for x, y in data], {case: CASES[case]}, measured=False)[case]
        (plan, state), (plan_0, state_0) = other["result"], plain["result"]
        same += plan["edits"] == plan_0["edits"]
        differences.append(float(apart(state_0, state)))
    return f"{case}: the same edits in {same} of {ORDERS}, weights up to {max(differences):.1e} apart"


def alike(one: Any, other: Any) -> str:
    return "same" if one == other else "others"


def report(one: Found, parts: list[Found], halves: Found, noise: list[str], world: int) -> str:
    rows = []
    for name in CASES:
        (plan, state), (plan_0, state_0) = one[name]["result"], parts[0][name]["result"]
        others = [part[name]["result"] for part in parts[1:]]
        if name in BY_BATCH:
            plan, _ = halves[name]["result"]
        rows.append([
            name,
            alike(plan["edits"], plan_0["edits"]) + (" (batches as they are)" if name in BY_BATCH else ""),
            apart(state, state_0) if name not in BY_BATCH else "—",
            ", ".join(alike(plan_0, other) for other, _ in others),
            ", ".join(apart(state_0, state_r) for _, state_r in others),
            f"{one[name]['seconds']:.1f}", f"{parts[0][name]['seconds']:.1f}",
            f"{one[name]['busy']:.1f}", f"{parts[0][name]['busy']:.1f}",
            f"{parts[0][name]['bytes'] / 1e6:.2f}", parts[0][name]["messages"],
        ])  # fmt: skip
    own = {k: v for k, v in one["profile"]["result"].items() if k != "n_batches"}
    measured = {k: v for k, v in parts[0]["profile"]["result"].items() if k != "n_batches"}
    for name in ("profile", "evaluate", "finetune"):
        values = [found[name]["result"] for found in (one, *parts)]
        same = alike(own, measured) if name == "profile" else alike(values[0], values[1]) if name == "evaluate" else "—"
        tuned = name == "finetune"
        rows.append([
            name, same, apart(values[0], values[1]) if tuned else "",
            "" if tuned else alike(values[1], values[2]), apart(values[1], values[2]) if tuned else "",
            f"{one[name]['seconds']:.1f}", f"{parts[0][name]['seconds']:.1f}",
            f"{one[name]['busy']:.1f}", f"{parts[0][name]['busy']:.1f}",
            f"{parts[0][name]['bytes'] / 1e6:.2f}", parts[0][name]["messages"],
        ])  # fmt: skip
    header = [
        "call", "edits, or figures, against one process", "weights against one process", "ranks: plan",
        "ranks: weights", "s, 1", f"s, {world}", "core s, 1", f"core s, each of {world}", "MB handed over", "messages",
    ]  # fmt: skip
    return f"""# {world} processes against one

Written by benchmarks/distributed.py. {IMAGES} MNIST images in batches of {BATCH}, each divided among the processes;
T = {T}; `apply` with repair, all else at the defaults; gloo on one machine, one thread per process. Weights: the
largest difference, relative to the largest value of the same tensor. Handed over: by each process, without the
gradients of DDP.

{table(header, rows)}

`taylor` and `cqp` take absolute gradients of single batches, so their edits are compared with those of one process that
goes through the parts of all batches. `finetune` has batch norms, which see a part of a batch in each process.

What one process makes of the same samples in another order within each batch: repair then chooses its ridge by other
halves of the data, and a weight at the border of two steps of a 4-bit grid takes the other one.
{"; ".join(noise)}.

({here("cpu")}.)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    split, world = read(args.data, "train"), args.processes
    if args.rank is not None:
        work(args.folder, args.rank, world, split)
        return
    model, images = dense(split), some(split, IMAGES, 0)
    one = results(model, batches(images, 0, 1), CASES)
    cut = [part for pair in zip(*(batches(images, r, world) for r in range(world)), strict=True) for part in pair]
    halves = results(model, cut, {name: CASES[name] for name in BY_BATCH}, measured=False)
    noise = [shuffled(model, batches(images, 0, 1), case, one[case]) for case in NOISE]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--data", str(args.data), "--folder", folder, "--processes", str(world)]
        children = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
        if any(child.wait(timeout=datetime.timedelta(hours=1).total_seconds()) for child in children):
            raise SystemExit("a process failed")
        parts = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
    RESULT.write_text(report(one, parts, halves, noise, world))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
