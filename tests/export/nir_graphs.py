"""NIR graphs, run by a few lines of numpy, against the networks that they were written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snncompress.contract.detection import find_adapter
from snncompress.export.exporting import export
from tests.equivalence import same, snapshot
from tests.networks import Case, firing_rates, liven

T = 10
Values = dict[str, np.ndarray[Any, Any]]


def simulate(graph: Any, xs: Tensor, name: str) -> np.ndarray[Any, Any]:
    """What a node puts out at each step, [T, N, ...]: NIR's equations in Euler steps, in float64."""
    dt = float(graph.metadata["dt"])
    membranes: Values = {}
    last: Values = {}
    result = []
    back = {n for n in graph.nodes if n.endswith(("_reset", "_recurrent"))}
    for x in xs.double().numpy():
        values: Values = {"input": x}
        waiting = [n for n in graph.nodes if n != "input"]
        while waiting:
            ready = next(n for n in waiting if all(a in values or a in back for a, b in graph.edges if b == n))
            waiting.remove(ready)
            total = sum(values[a] if a not in back else last.get(a, 0.0) for a, b in graph.edges if b == ready)
            values[ready] = node_step(graph.nodes[ready], ready, total, membranes, dt)
        last = {n: values[n] for n in back}
        result.append(values[name])
    return np.stack(result)


def node_step(node: Any, name: str, x: Any, membranes: Values, dt: float) -> Any:
    tensor = torch.from_numpy(x)
    match node:
        case nir.Output():
            return x
        case nir.Affine():
            return x @ node.weight.T.astype(float) + node.bias
        case nir.Linear():
            return x @ node.weight.T.astype(float)
        case nir.Conv1d() | nir.Conv2d():
            weight, bias = torch.from_numpy(node.weight).double(), torch.from_numpy(node.bias).double()
            stride, padding, dilation = (np.array(v).tolist() for v in (node.stride, node.padding, node.dilation))
            conv = F.conv1d if isinstance(node, nir.Conv1d) else F.conv2d
            return conv(tensor, weight, bias, stride, padding, dilation, int(node.groups)).numpy()
        case nir.AvgPool2d() | nir.SumPool2d():
            kernel, stride, padding = (tuple(v.tolist()) for v in (node.kernel_size, node.stride, node.padding))
            mean = F.avg_pool2d(tensor, kernel, stride, padding).numpy()
            return mean if isinstance(node, nir.AvgPool2d) else mean * np.prod(kernel)
        case nir.Threshold():
            return (x > node.threshold).astype(float)
        case nir.Scale():
            return x * node.scale
        case nir.LI() | nir.I():
            v = membranes.get(name, np.zeros_like(x))
            v = v + dt * (node.r * x if isinstance(node, nir.I) else (node.v_leak - v + node.r * x) / node.tau)
            membranes[name] = v
            return v
        case nir.CubaLIF():
            i, v = membranes.get(f"{name}.i", np.zeros_like(x)), membranes.get(name, np.zeros_like(x))
            i = i + dt * (node.w_in * x - i) / node.tau_syn
            v = v + dt * (node.v_leak - v + node.r * i) / node.tau_mem
            spikes = v > node.v_threshold
            membranes[f"{name}.i"], membranes[name] = i, np.where(spikes, node.v_reset, v)
            return spikes.astype(float)
        case nir.Flatten():
            return tensor.flatten(node.start_dim + 1).numpy()
        case nir.IF() | nir.LIF():
            v = membranes.get(name, np.broadcast_to(node.v_reset, x.shape))
            v = v + dt * (node.r * x if isinstance(node, nir.IF) else (node.v_leak - v + node.r * x) / node.tau)
            spikes = v > node.v_threshold
            membranes[name] = np.where(spikes, node.v_reset, v)
            return spikes.astype(float)
    raise AssertionError(node)


def spikes(case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """Every neuron's spikes in the model itself, [T, N, ...]."""
    found: dict[str, list[Tensor]] = {}
    adapter = find_adapter(case.model)

    def listen(name: str) -> Callable[[Tensor, Tensor | None], None]:
        return lambda s, _: found.setdefault(name, []).append(s.clone())

    stops = [adapter.observe(n, listen(name), membrane=False) for name, n in adapter.neurons(case.model).items()]
    with torch.no_grad():
        case.feed(case.model, case.feed.first())
    for stop in stops:
        stop()
    adapter.reset(case.model)
    return {name: torch.cat(steps).numpy() for name, steps in found.items()}


def agree(case: Case, path: Path) -> Any:
    """Export, read back, run: every neuron's spikes must be the model's."""
    rates = firing_rates(case)
    assert all(0.01 < rate < 1 for rate in rates.values()), rates
    before = snapshot(case.model)
    export(case.model, path, data=case.x, timesteps=T)
    assert same(before, snapshot(case.model))
    graph = nir.read(path)
    xs = case.x.expand(T, *case.x.shape)
    for name, expected in spikes(case).items():
        np.testing.assert_array_equal(simulate(graph, xs, name), expected, err_msg=name)
    return graph


def alive(net: nn.Module, channels: int = 2) -> Case:
    return liven(Case(net, 2 * torch.rand(4, channels, 8, 8), T))
