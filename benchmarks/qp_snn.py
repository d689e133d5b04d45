"""QP-SNN's ablation, its two orders and its γ (ICLR 2025: Tables 2 and 3, Figure 5a), each with and without repair.

    python benchmarks/qp_snn.py --budget small [--data FOLDER] [--only ablation order gamma last] [--workers 2]
    python benchmarks/qp_snn.py --budget small --estimate
    torchrun --nproc_per_node 8 benchmarks/qp_snn.py --budget full --data FOLDER

Small, for CPUs: CIFAR-10, 10,000 training images, the paper's ResNet20 at an eighth of its widths (8, 16, 32, 64),
T = 2; 10 epochs dense, 5 after each step, SGD and cosine. It shows directions, not the paper's accuracies. Wide, for
one GPU: the same with the paper's widths, and automatic mixed precision. Full, for GPUs: CIFAR-100, the paper's widths,
300 epochs dense and after quantization, 150 after pruning, automatic mixed precision. Not known from the paper are
learning rates, weight decay, batch and what is done to images: SGD with momentum 0.9, 5e-4, 128, flips and shifts by up
to 4 pixels, and the learning rates that stand below.

A job is a dense network, or one step behind another job's network: quantize (first layer and classifier stay at 32
bits), or prune by Table 10's ratios 0.3 and 0.6. Jobs run in --workers processes, each in one thread; under torchrun
all processes share each job. Figures and networks are kept in benchmarks/.cache as they come, so a run that was stopped
goes on with the job that it was at. --estimate measures training steps and says how long all that is still missing
takes. Writes benchmarks/results/qp_snn.md (qp_snn_cuda.md, qp_snn_wide.md, qp_snn_full.md), unless --images or --epochs
make it a try, which has a folder of its own and prints its tables.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import jobs
import torch
from qp_snn_study import PARTS, Case, Prune, Quantize, Step, Tables, cases
from snncompress_rescaw import ReScaW, Uniform
from spikingjelly.activation_based import functional
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import snncompress

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from examples.networks.blocks import undivided_lif  # noqa: E402
from examples.networks.resnet20 import resnet20  # noqa: E402

T, BATCH, CALIBRATION = 2, 128, 512
RATIO = {"conv1": 0.1, "layer?.?.conv2": 0.3, "layer?.?.conv1": 0.6, "layer1.0.conv1": 0.3, "layer3.?.conv2": 0}
QUANTIZERS = {
    "vanilla": Uniform(),
    **{gamma: ReScaW(gamma, per_channel=False) for gamma in ("max", "percentile", "l1_mean", "mse")},
}


@dataclass(frozen=True)
class Training:
    epochs: int
    lr: float


@dataclass(frozen=True)
class Budget:
    dataset: str
    classes: int
    widths: tuple[int, int, int, int]
    images: int
    test: int
    dense: Training
    quantize: Training
    prune: Training
    amp: bool

    def after(self, step: Step | None) -> Training:
        """The training of the dense network, or behind a step."""
        return self.dense if step is None else self.quantize if isinstance(step, Quantize) else self.prune


BUDGETS = {
    "small": Budget(
        "cifar10", 10, (8, 16, 32, 64), 10_000, 10_000, Training(10, 0.1), Training(5, 0.02), Training(5, 0.02), False
    ),
    "wide": Budget(
        "cifar10", 10, (64, 128, 256, 512), 10_000, 10_000, Training(10, 0.1), Training(5, 0.02), Training(5, 0.02),
        True,
    ),
    "full": Budget(
        "cifar100", 100, (64, 128, 256, 512), 50_000, 10_000, Training(300, 0.1), Training(300, 0.1),
        Training(150, 0.1), True,
    ),
}  # fmt: skip


class Ranks:
    """The processes that share a job: torchrun's, or this one alone."""

    def __init__(self, device: str) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if "RANK" in os.environ:
            backend = "gloo" if device == "cpu" else "nccl"
            distributed.init_process_group(backend, timeout=datetime.timedelta(hours=6))
            device = "cpu" if device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = torch.device("cuda:0" if device == "cuda" else device)
        if device != "cpu":
            torch.cuda.set_device(self.device)

    def share(self, value: Any) -> Any:
        """The first one's value."""
        if self.world == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]


# -- data and networks --


@cache
def images(folder: Path, budget: Budget, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalized images [N, 3, 32, 32] and labels, always the same ones: a file may be sorted by class."""
    x, y = getattr(datasets, budget.dataset)(folder, split)
    count = budget.images if split == "train" else budget.test
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count].numpy()
    x = torch.tensor(x[chosen]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.491, 0.482, 0.447]).view(3, 1, 1)) / torch.tensor([0.247, 0.243, 0.262]).view(3, 1, 1)
    return x.contiguous().to(device), torch.tensor(y[chosen]).long().to(device)


def augmented(x: Tensor) -> Tensor:
    """Each image flipped or not, and shifted by up to four pixels."""
    size, pixels = len(x), torch.arange(32, device=x.device)
    flip = torch.rand(size, 1, 1, 1, device=x.device) < 0.5
    down, right = torch.randint(0, 9, (2, size, 1), device=x.device)
    padded = F.pad(torch.where(flip, x.flip(3), x), (4, 4, 4, 4)).permute(0, 2, 3, 1)
    rows, columns = (down + pixels).unsqueeze(2), (right + pixels).unsqueeze(1)
    return padded[torch.arange(size, device=x.device).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2).contiguous()


def network(budget: Budget, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = resnet20(budget.classes, widths=budget.widths, neuron=partial(undivided_lif, triangle=True))
    functional.set_step_mode(net, "m")
    return net


def packed(net: nn.Module) -> dict[str, Any]:
    """Plan and state: a compressed network, to be trained further, in a file or in another process."""
    try:
        plan = snncompress.plan_of(net).to_json()
    except snncompress.PlanError:
        plan = snncompress.Plan().to_json()
    return {"plan": plan, "state": {name: value.cpu() for name, value in net.state_dict().items()}}


def unpacked(pack: dict[str, Any], budget: Budget, device: torch.device) -> nn.Module:
    net = snncompress.Plan.from_json(pack["plan"]).apply(network(budget, 0))
    net.load_state_dict(pack["state"])
    return net.to(device)


# -- one job --


def train(net: nn.Module, x: Tensor, y: Tensor, training: Training, amp: bool, seed: int, ranks: Ranks) -> None:
    """SGD with momentum under half a cosine; each process takes its part of every batch."""
    torch.manual_seed(seed + 1_000 * ranks.rank)
    order = torch.Generator().manual_seed(seed)
    half = torch.bfloat16 if ranks.device.type == "cpu" else torch.float16
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=amp and half == torch.float16)
    steps = max(1, len(x) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), training.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=training.epochs * steps)
    called = DistributedDataParallel(net) if ranks.world > 1 else net
    net.train()
    for _ in range(training.epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH)[:steps]:
            part = batch[ranks.rank :: ranks.world].to(x.device)
            current = augmented(x[part])
            functional.reset_net(net)
            with torch.autocast(ranks.device.type, half, enabled=amp):
                loss = F.cross_entropy(called(current.expand(T, *current.shape)).mean(0), y[part])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    functional.reset_net(net)
    net.eval()


def taken(net: nn.Module, step: Step, repair: str | None, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The network after a step, not trained yet."""
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].to(x.device)
    options: dict[str, Any] = {
        "data": list(zip(x[chosen].split(64), y[chosen].split(64), strict=True)),
        "timesteps": T, "repair": repair, "seed": seed, "progress": False,
    }  # fmt: skip
    if isinstance(step, Prune):
        return snncompress.apply(net, step.criterion, RATIO, None, **options)
    return snncompress.apply(net, None, bits=step.bits, quantizer=QUANTIZERS[step.quantizer], **options)


def job(case: Case, budget: Budget, cache: Path, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Accuracy in % straight after the last step, and after the training behind it; parameters, MB, seconds."""
    began = time.perf_counter()
    x, y = images(folder, budget, "train", ranks.device)
    figures: dict[str, float] = {}
    step = case.steps[-1] if case.steps else None
    net, pack = network(budget, case.seed).to(ranks.device), None
    if step is not None:
        if ranks.rank == 0:
            pack = torch.load(cache / f"{case.before().stem()}.pt", weights_only=True)
            net = taken(unpacked(pack, budget, ranks.device).eval(), step, case.repair, x, y, case.seed)
            figures["straight"] = accuracy(net, folder, budget, ranks.device)
        if ranks.world > 1:
            net = unpacked(ranks.share(packed(net) if ranks.rank == 0 else None), budget, ranks.device)
    train(net, x, y, budget.after(step), budget.amp, case.seed, ranks)
    if ranks.rank == 0:
        cost = snncompress.profile(net, x[:8], timesteps=T)
        figures |= {"parameters": cost.n_params, "megabytes": cost.size_mb}
        figures["accuracy"] = accuracy(net, folder, budget, ranks.device)
        if len(case.steps) < 2:  # others start from it
            torch.save(packed(net), cache / f"{case.stem()}.pt")
    return figures | {"seconds": time.perf_counter() - began}


def accuracy(net: nn.Module, folder: Path, budget: Budget, device: torch.device) -> float:
    x, y = images(folder, budget, "test", device)
    batches = list(zip(x.split(200), y.split(200), strict=True))
    return 100 * snncompress.evaluate(net, batches, timesteps=T).accuracy


# -- all of them --


def job_alone(case: Case, budget: Budget, cache: Path, folder: Path, device: str) -> dict[str, float]:
    return job(case, budget, cache, folder, Ranks(device))


def missing(wanted: Sequence[Case], cache: Path) -> list[list[Case]]:
    """What must be computed yet: dense networks, then those of one step, then those of two."""
    done = jobs.known(cache / "figures.jsonl")
    found: dict[Case, None] = {}

    def need(case: Case) -> None:
        found[case] = None
        if case.steps and not (cache / f"{case.before().stem()}.pt").exists():
            need(case.before())

    for case in wanted:
        if case.key() not in done:
            need(case)
    return [[case for case in found if len(case.steps) == depth] for depth in range(3)]


def compute(todo: list[list[Case]], budget: Budget, cache: Path, options: argparse.Namespace) -> None:
    """One process, of one thread, for each job; or every process of torchrun for each."""
    figures = cache / "figures.jsonl"
    if "RANK" not in os.environ:
        for some in todo:
            work = partial(job_alone, budget=budget, cache=cache, folder=options.data, device=options.device)
            jobs.compute(some, work, figures, options.workers, options.device)
        return
    ranks = Ranks(options.device)
    for case in (case for some in ranks.share(todo) for case in some):
        found = job(case, budget, cache, options.data, ranks)
        if ranks.rank == 0:
            jobs.note(figures, case.key(), found, str(ranks.device))
            print(case, found, flush=True)
    distributed.destroy_process_group()


def estimate(todo: list[list[Case]], budget: Budget, options: argparse.Namespace) -> str:
    """Seconds of a training step, by what was done to the network, and what they come to."""
    torch.set_num_threads(1)
    ranks = Ranks(options.device)
    device = ranks.device
    x, y = images(options.data, replace(budget, images=BATCH, test=BATCH), "train", device)
    steps = {"dense": [], "quantized": [Quantize("l1_mean", 4)], "both": [Quantize("l1_mean", 4), Prune("svs")]}
    seconds = {}
    for name, chain in steps.items():
        net = network(budget, 0).to(device)
        for step in chain:
            net = taken(net, step, None, x, y, 0)
        train(net, x, y, Training(1, 0.1), budget.amp, 0, ranks)
        began = clock(device)
        train(net, x, y, Training(3, 0.1), budget.amp, 0, ranks)
        seconds[name] = (clock(device) - began) / 3
    epochs = dict.fromkeys(steps, 0)
    for name, some in zip(steps, todo, strict=True):
        epochs[name] = sum(budget.after(case.steps[-1] if case.steps else None).epochs for case in some)
    total = sum(epochs[name] * (budget.images // BATCH) * seconds[name] for name in steps)
    measured = ", ".join(f"{name} {seconds[name]:.2f} s" for name in steps)
    return (
        f"{sum(map(len, todo))} jobs, {sum(epochs.values())} epochs of {budget.images:,} images; a training step of "
        f"{BATCH}: {measured} ({jobs.here(options.device)}). In all {total / 3600:.1f} hours of one "
        f"{'core' if device.type == 'cpu' else 'GPU'}, evaluations and repairs not counted."
    )


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()  # of one thread, so others on the machine don't matter
    torch.cuda.synchronize(device)
    return time.perf_counter()


def report(budget: Budget, tables: Tables, parts: Sequence[str], where: Sequence[str]) -> Iterator[str]:
    titles = {
        "ablation": "Ablation (Table 2)",
        "order": "Order (Table 3)",
        "gamma": "γ (Figure 5a), quantized alone",
        "last": "Repair of the last step alone: ReScaW, trained, then pruned",
    }
    count = len(tables.seeds)
    spread_over = "of one seed" if count == 1 else f"mean ± half the range over {count} seeds"
    yield "# QP-SNN's ablation, orders and γ"
    yield ""
    yield (
        f"ResNet20 of widths {budget.widths} on {budget.images:,} images of {budget.dataset.upper()}, T = {T}, "
        f"{budget.dense.epochs} epochs dense, {budget.quantize.epochs} after quantization, {budget.prune.epochs} after "
        f"pruning (SGD, learning rates {budget.dense.lr:g}, {budget.quantize.lr:g}, {budget.prune.lr:g}, cosine). "
        f"Accuracy in % on {budget.test:,} test images straight after the last step → **after the training behind "
        f"it**, {spread_over}. "
        + ("" if budget == BUDGETS["full"] else "It shows directions, not the paper's accuracies. ")
        + "The paper's figures are those of ResNet20 on CIFAR-100. Written by benchmarks/qp_snn.py."
    )
    yield ""
    yield f"Dense: {tables.dense()}."
    if {"ablation", "order"} & set(parts):
        yield f"Sizes: {tables.sizes()}."
    for part in parts:
        yield from ["", f"## {titles[part]}", "", *tables.text(part)]
    yield from ["", f"({'; '.join(where)}.)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    datasets.add_data_option(parser)
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure for these tables alone")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time; under torchrun it is one")
    parser.add_argument("--device", help="default: cpu for small, cuda for full")
    parser.add_argument("--images", type=int, help="a try on so many training and test images; no results are written")
    parser.add_argument("--epochs", type=int, help="a try with so many epochs of each training; none are written")
    parser.add_argument("--estimate", action="store_true", help="say how long what is missing takes, and stop")
    options = parser.parse_args()
    default = "cpu" if options.budget == "small" else "cuda"
    options.device = options.device or default
    elsewhere = "" if options.device == default else f"-{options.device}"
    budget, seeds = BUDGETS[options.budget], range(options.seeds)
    cache = HERE / ".cache" / f"qp_snn-{options.budget}{elsewhere}"
    if a_try := options.images is not None or options.epochs is not None:
        cache = cache.with_name(f"{cache.name}-try-{options.images}-{options.epochs}")
        budget = replace(
            budget, images=options.images or budget.images, test=options.images or budget.test,
            **{name: replace(getattr(budget, name), epochs=options.epochs or getattr(budget, name).epochs)
               for name in ("dense", "quantize", "prune")},
        )  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [*(Case(seed=seed) for seed in seeds), *cases(options.only, options.bits, seeds)]
    todo = missing(wanted, cache)
    if options.estimate:
        print(estimate(todo, budget, options))
        return
    compute(todo, budget, cache, options)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    rows = jobs.known(cache / "figures.jsonl")
    tables = Tables(lambda case: rows[case.key()]["figures"], options.bits, seeds)
    found = {part: cases([part], options.bits, seeds) for part in PARTS}
    parts = [part for part, some in found.items() if all(case.key() in rows for case in some)]  # earlier runs' too
    where = sorted({rows[case.key()]["where"] for part in parts for case in found[part]})
    text = "\n".join(report(budget, tables, parts, where))
    if not a_try:
        name = "_".join(["qp_snn", *[options.budget] * (options.budget != "small"), *elsewhere.split("-")[1:]]) + ".md"
        (HERE / "results" / name).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
