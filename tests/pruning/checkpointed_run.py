"""A long run in a process of its own, to be killed: python checkpointed_run.py FRAMEWORK FOLDER KILL_AT

Dies by SIGKILL at progress event number KILL_AT, or, where that is "write", when a checkpoint is written but not yet in
its place. A run that comes to its end prints the plan and a digest of the weights.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress


def network(framework: str) -> nn.Module:
    torch.manual_seed(0)
    if framework == "snntorch":
        import snntorch as snn

        def fire() -> nn.Module:
            return snn.Leaky(beta=0.9, init_hidden=True)
    else:
        from spikingjelly.activation_based import neuron

        def fire() -> nn.Module:
            return neuron.LIFNode()

    return nn.Sequential(nn.Linear(16, 12), fire(), nn.Dropout(0.2), nn.Linear(12, 8), fire(), nn.Linear(8, 4))


def run(
    framework: str, folder: str | None, criterion: str, progress: object = False, scheduler: str = "iterative"
) -> nn.Module:
    x, y = torch.rand(48, 16, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 4
    order = torch.Generator().manual_seed(2)  # the loader's own: resuming must find its place, too
    data = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=order)
    return snncompress.apply(
        network(framework), criterion, 0.6, 4, data=data, timesteps=3, scheduler=scheduler, finetune=1, skip=[],
        seed=5, progress=progress, checkpoint=folder,
    )  # fmt: skip


def digest(model: nn.Module) -> str:
    weights = b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def result(model: nn.Module) -> str:
    return f"{snncompress.plan_of(model).to_json()}\n{digest(model)}"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    framework, folder, criterion, kill_at = sys.argv[1:]
    events = 0

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal events
        events += 1
        if str(events) == kill_at:
            die()

    if kill_at == "write":
        os.replace = die
    print(result(run(framework, folder, criterion, progress)))


if __name__ == "__main__":
    main()
