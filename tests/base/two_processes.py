"""What one of two processes makes of its half of the data: python two_processes.py FOLDER RANK WORLD."""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import snncompress
from snncompress.extend import Criterion
from snncompress.reports.reporting import Measured

T = 3
Batch = tuple[Tensor, Tensor]


class Peak(Criterion):
    """Can't be put together: it doesn't say that it is a maximum."""

    name = "peak"
    needs = frozenset({"spikes"})

    def begin(self, layer: Any) -> Any:
        return torch.zeros(layer.channels)

    def observe(self, layer: Any, state: Any, spikes: Tensor, membrane: Tensor | None) -> Any:
        return state.maximum(spikes.transpose(0, 2).flatten(1).amax(1))

    def score(self, layer: Any, state: Any) -> Tensor:
        return state


def network(channels: int = 6) -> nn.Module:
    """Multi-step: [T, N, C, H, W]."""
    torch.manual_seed(0)
    norm = layer.BatchNorm2d(channels)
    norm.weight.data.fill_(3.0)
    norm.bias.data.uniform_(0.2, 1.0)
    net = nn.Sequential(
        layer.Conv2d(1, channels, 3), norm, neuron.LIFNode(),
        layer.Conv2d(channels, 6, 3), neuron.LIFNode(v_threshold=0.2), layer.Flatten(), layer.Linear(24, 3),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def stepwise() -> nn.Module:
    """One call per timestep, without a norm over the batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 12), neuron.LIFNode(v_threshold=0.5), nn.Dropout(0.0), nn.Linear(12, 3)
    )


def batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    return [(2 * torch.rand(6, 1, 6, 6, generator=draw), torch.arange(6) % 3) for _ in range(4)]


def over_time(data: list[Batch]) -> list[Batch]:
    return [(x.expand(T, *x.shape), y) for x, y in data]


def kept(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return snncompress.plan_of(model).to_json(), {k: v.clone() for k, v in model.state_dict().items()}


def failure(function: Any, *args: Any, **options: Any) -> tuple[str, str]:
    try:
        function(*args, **options)
    except snncompress.SNNCompressError as error:
        return type(error).__name__, str(error)
    return "", ""


def trained_step(data: Batch, world: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A step of one's own loop, in DDP, on a network of removed weights and 4 bits: state, a mask, a weight in use."""
    with snncompress.no_sync():
        x = torch.ones(1, 1, 6, 6)
        small = snncompress.apply(
            stepwise(), "weight_magnitude", 0.5, {"1": 4}, data=x, timesteps=T, skip=[], repair=None
        )
    gone = small[1].weight == 0
    called = DistributedDataParallel(small) if world > 1 else small
    optimizer = torch.optim.SGD(small.parameters(), 0.5, momentum=0.9)
    for _ in range(2):
        functional.reset_net(small)
        optimizer.zero_grad()
        F.cross_entropy(called(data[0]), data[1]).backward()
        optimizer.step()
    functional.reset_net(small)
    return {k: v.clone() for k, v in small.state_dict().items()}, gone, small[1].weight.detach().clone()


def results(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The same calls in all processes, on batches rank, rank + world, … of the four."""
    static = batches()[rank::world]
    data, small = over_time(static), snncompress.apply
    found: dict[str, Any] = {
        "svs": kept(small(network(), "svs", 0.5, 4, data=data, skip=[])),
        "obs": kept(small(network(), "obs", 0.5, None, data=data, skip=[])),
        "cqp": kept(small(network(), "cqp", 0.5, None, data=data, repair=None)),
        "energy": kept(small(network(), "taylor", None, None, data=data, skip=[], budget={"energy": 0.6})),
        "profile": snncompress.profile(network(), data),
        "accuracy": Measured.of({"net": network()}, data).networks["net"].accuracy,
        "temporal": snncompress.temporal_analysis(network(), data),
        "refresh": snncompress.refresh(network(), data).state_dict(),
        "flow": snncompress.gradient_flow(network(), data).norms,
        "scores": snncompress.scores(network(), "firing_rate", data).values["0"],
    }
    for name in ("first run", "resumed"):  # each its own folder, of which only that of rank 0 gets a file
        run = small(
            network(),
            "svs",
            0.5,
            4,
            data=data,
            finetune=1,
            scheduler="iterative",
            skip=[],
            checkpoint=folder / str(rank),
        )
        found[name] = kept(run)
    # training: a process's batch is its part of one process's batch
    pairs = [(torch.cat(x), torch.cat(y)) for x, y in (zip(*batches()[i : i + 2], strict=True) for i in (0, 2))]
    part = 12 // world
    own = [(x[rank * part :][:part], y[rank * part :][:part]) for x, y in pairs]
    history: list[Any] = []
    found["tuned"] = snncompress.finetune(
        stepwise(), own, epochs=2, timesteps=T, validation=own, clip=1.0, on_epoch=history.extend
    ).state_dict()
    found["epochs"] = [(e.loss, e.accuracy, e.validation_accuracy) for e in history]
    found["step"] = trained_step(own[0], world)
    if world > 1:
        uneven = static if rank else static[:1]
        found["uneven"] = snncompress.finetune(stepwise(), uneven, timesteps=T, rate_penalty=0.1).state_dict()
        broken = [(x / (1 - rank * (number == 1)), y) for number, (x, y) in enumerate(data)]
        found["failures"] = [
            failure(small, network(), "svs", 0.5, 4, data=broken, skip=[]),
            failure(small, network(6 + rank), "svs", 0.5, 4, data=data, skip=[]),
            failure(small, network(), "svs", 0.5, 4, data=data if rank else [], skip=[]),
            failure(small, network(), Peak(), 0.5, 4, data=data, skip=[]),
            failure(small, DistributedDataParallel(network()), data=data),
            failure(snncompress.finetune, DistributedDataParallel(network()), data),
        ]
        with snncompress.no_sync():
            found["alone"] = snncompress.profile(network(), data).n_samples if rank else 0
            small(network(), Peak(), 0.5, 4, data=data, skip=[])
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = distributed.FileStore(str(folder / "store"), world)
    patience = datetime.timedelta(seconds=300)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    torch.save(results(folder, rank, world), folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
