"""A NIR graph, run in Euler steps: what an approximation does to the spikes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from snncompress.base.tables import Column, Shown, Table, percent

from .nir_neurons import DT


@dataclass(frozen=True)
class Approximation(Shown):
    """How a NIR file differs from the network that it was written from. ``print`` shows a table.

    Fields:
        replaced: module or operation → what stands in the file in its place.
        differing: neuron → share of (sample, timestep, neuron) where one of the two spikes and the other doesn't.
        rates: neuron → firing rates of the model and of the file's network.
        samples, timesteps: how many were run, from the data that the file was written with.

    Example:
        >>> print(Approximation({"pool": "averages"}, {"lif": 0.25}, {"lif": (0.5, 0.25)}, 1, 4))
        approximate: pool: averages
         neuron   spikes differ (%)   firing rate   in the file
         ──────────────────────────────────────────────────────
         lif                   25.0           0.5          0.25
        1 sample, 4 timesteps
    """

    replaced: Mapping[str, str]
    differing: Mapping[str, float]
    rates: Mapping[str, tuple[float, float]]
    samples: int
    timesteps: int

    def _parts(self) -> Iterator[str | Table]:
        yield from (f"approximate: {name}: {by}" for name, by in self.replaced.items())
        columns = (
            Column("neuron"), Column("differing", "spikes differ (%)", percent),
            Column("rate", "firing rate"), Column("rate_in_file", "in the file"),
        )  # fmt: skip
        yield Table(columns, [(name, share, *self.rates[name]) for name, share in self.differing.items()])
        yield f"{'1 sample' if self.samples == 1 else f'{self.samples:,} samples'}, {self.timesteps} timesteps"


def difference(
    graph: Any, x: Tensor, spikes: Mapping[str, Tensor], timesteps: int, replaced: Mapping[str, str]
) -> Approximation:
    """Run the graph on x [N, ...] as constant current, and compare with a model's ``spikes``, each [T, N, ...]."""
    run = Running(graph)
    made: dict[str, list[Tensor]] = {name: [] for name in spikes}
    for _ in range(timesteps):
        values = run.step(x)
        for name, steps in made.items():
            steps.append(values[name])
    found = {name: torch.stack(steps) for name, steps in made.items()}
    differing = {name: float((found[name] != s).double().mean()) for name, s in spikes.items()}
    rates = {name: (float(s.double().mean()), float(found[name].mean())) for name, s in spikes.items()}
    return Approximation(replaced, differing, rates, len(x), timesteps)


@dataclass
class Running:
    """The graph's nodes in order; an edge from a later one hands on what that put out in the timestep before."""

    graph: Any
    values: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)

    def step(self, x: Tensor) -> dict[str, Tensor]:
        """What every node puts out, float64."""
        for name, node in self.graph.nodes.items():
            before = [self.values[a] for a, b in self.graph.edges if b == name and a in self.values]
            if type(node).__name__ == "Input":
                self.values[name] = x.double()
            else:
                total = sum(before[1:], before[0]) if before else torch.zeros(())
                self.values[name] = self._made(name, node, total)
        return self.values

    def _made(self, name: str, node: Any, x: Tensor) -> Tensor:
        kind = type(node).__name__
        if kind in _PLAIN:
            return _PLAIN[kind](node, x)
        if kind == "CubaLIF":
            current = self.states.get(f"{name}.i", torch.zeros_like(x))
            x = self.states[f"{name}.i"] = current + DT / _of(node.tau_syn) * (_of(node.w_in) * x - current)
        v = self.states.get(name, torch.zeros_like(x) + (_of(node.v_reset) if hasattr(node, "v_reset") else 0.0))
        if kind in ("I", "IF"):
            v = v + DT * _of(node.r) * x
        else:
            tau = node.tau_mem if kind == "CubaLIF" else node.tau
            v = v + DT / _of(tau) * (_of(node.v_leak) - v + _of(node.r) * x)
        if kind in ("I", "LI"):
            self.states[name] = v
            return v
        fired = v > _of(node.v_threshold)
        self.states[name] = torch.where(fired, _of(node.v_reset), v)
        return fired.double()


def _of(value: Any) -> Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.float64)


def _conv(node: Any, x: Tensor) -> Tensor:
    call: Callable[..., Tensor] = F.conv1d if type(node).__name__ == "Conv1d" else F.conv2d
    stride, padding, dilation = (
        value if isinstance(value, str) else np.asarray(value).tolist()
        for value in (node.stride, node.padding, node.dilation)
    )
    return call(x, _of(node.weight), _of(node.bias), stride, padding, dilation)


def _mean(node: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, *(np.asarray(value).tolist() for value in (node.kernel_size, node.stride, node.padding)))


_PLAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Output": lambda node, x: x,
    "Linear": lambda node, x: x @ _of(node.weight).T,
    "Affine": lambda node, x: x @ _of(node.weight).T + _of(node.bias),
    "Conv1d": _conv,
    "Conv2d": _conv,
    "AvgPool2d": _mean,
    "SumPool2d": lambda node, x: _mean(node, x) * float(np.prod(node.kernel_size)),
    "Flatten": lambda node, x: x.flatten(1),
    "Threshold": lambda node, x: (x > _of(node.threshold)).double(),
    "Scale": lambda node, x: x * _of(node.scale),
}
