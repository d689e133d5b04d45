"""Plans of ten fixed networks, bit for bit as they were when they were written down.

``python -m tests.end_to_end.test_golden_plans`` writes them anew, after a change that is meant to change plans.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from tests.equivalence import PAPER

GOLDEN = Path(__file__).parents[1] / "data" / "golden_plans.json"
VERSIONS = {"snncompress", "torch"}
X = (8, 2, 8, 8)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(layer.Conv2d(channels, channels, 3, padding=1), neuron.LIFNode())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class OwnLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(128, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.lif = nn.ModuleList(snn.Leaky(beta=0.9) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [lif.init_leaky() for lif in self.lif]
        spikes = []
        for x_t in x:
            z = x_t.flatten(1)
            for n, linear in enumerate((self.one, self.two, self.three)):
                z, states[n] = self.lif[n](linear(z), states[n])
            spikes.append(z)
        return torch.stack(spikes)


def conv() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(2, 12, 3, padding=1), layer.BatchNorm2d(12), neuron.LIFNode(), layer.MaxPool2d(2),
        layer.Conv2d(12, 10, 3, padding=1), layer.BatchNorm2d(10), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(160, 20), neuron.LIFNode(), layer.Linear(20, 4),
    )  # fmt: skip


def multi_step() -> nn.Module:
    net = conv()
    functional.set_step_mode(net, "m")
    return net


def residual() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.IFNode(), Residual(8), Residual(8), layer.Conv2d(8, 6, 1),
        neuron.IFNode(), layer.Flatten(), layer.Linear(384, 4),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.IFNode(), layer.Conv2d(8, 12, 3, padding=1, groups=4),
        neuron.ParametricLIFNode(), layer.Conv2d(12, 12, 3, padding=1, groups=12), neuron.LIFNode(),
        layer.ConvTranspose2d(12, 6, 2, stride=2), neuron.LIFNode(), layer.Flatten(), layer.Linear(1536, 4),
    )  # fmt: skip


def hidden() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 10, 3), snn.Leaky(beta=0.8, init_hidden=True), nn.Conv2d(10, 9, 3),
        snn.Synaptic(alpha=0.8, beta=0.7, init_hidden=True), nn.Flatten(), nn.Linear(144, 4),
        snn.Leaky(beta=0.9, init_hidden=True),
    )  # fmt: skip


def recurrent() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 16), snn.RLeaky(beta=0.8, linear_features=16, init_hidden=True), nn.Linear(16, 12),
        snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(12, 4),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "svs, as published": (conv, {"criterion": "svs", "ratio": 0.6, "bits": 4}),
    "sca in steps, multi-step": (multi_step, {"criterion": "sca", "ratio": 0.5, "bits": 2, "scheduler": "iterative"}),
    "magnitude, residual, everything": (residual, {"criterion": "magnitude", "ratio": 0.5, "bits": 8, "skip": []}),
    "firing rate, groups": (grouped, {"criterion": "firing_rate", "ratio": 0.4, "bits": None, "skip": []}),
    "taylor, prune first": (hidden, {"criterion": "taylor", "ratio": 0.3, "bits": 3, "order": "pq"}),
    "random, recurrent": (recurrent, {"criterion": "random", "ratio": 0.5, "bits": 4, "seed": 3, "skip": []}),
    "own loop, by layer": (OwnLoop, {"ratio": {"one": 0.5, "t*": 0.25}, "bits": {"two": 5}, "skip": []}),
    "cqp in steps": (conv, {"criterion": "cqp", "ratio": 0.8, "bits": 4, "scheduler": "gradual"}),
    "lamp, truncated": (hidden, {"criterion": "lamp", "ratio": 0.7, "bits": None, "truncate": 2}),
    "ablation of blocks": (residual, {"criterion": "ablation", "ratio": 0.5, "bits": 4}),
}  # fmt: skip


def plan_of(name: str) -> dict[str, Any]:
    build, options = CASES[name]
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.weight.data.mul_(3).add_(0.1)  # so that all neurons fire
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 2, 4)
            nn.init.uniform_(module.bias, 0, 2)
    batch = 2 * torch.rand(X), torch.arange(8) % 4
    looped = isinstance(model, OwnLoop)
    x = batch[0].expand(4, *X) if looped else batch[0]
    compressed = snncompress.apply(
        model, data=(x, batch[1]), timesteps=None if looped else 4, quantizer=PAPER, repair=None, **options
    )
    plan: dict[str, Any] = json.loads(snncompress.plan_of(compressed).to_json())
    plan["origin"] = {key: value for key, value in plan["origin"].items() if key not in VERSIONS}
    return plan


@pytest.mark.parametrize("name", CASES)
def test_plans_are_what_they_were(name: str) -> None:
    assert plan_of(name) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: plan_of(name) for name in CASES}, separators=(",", ":")) + "\n")
