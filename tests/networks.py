"""Networks for the tests: generated ones of both frameworks, and models that are sure to fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import snntorch as snn
import torch
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.contract.detection import find_adapter
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.running.data import Feed


@dataclass
class Case:
    """A model, a batch [N, C, H, W] for it, and how it is fed."""

    model: nn.Module
    x: Tensor
    timesteps: int | None

    @property
    def feed(self) -> Feed:
        return Feed(find_adapter(self.model), self.x, self.timesteps)


def firing_rates(case: Case) -> dict[str, float]:
    """Spikes per neuron and timestep of every population, on the case's batch."""
    adapter = find_adapter(case.model)
    spikes: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[[Tensor, Tensor | None], None]:
        return lambda s, _: spikes.setdefault(name, []).append((s != 0).double().mean())

    stops = [adapter.observe(n, listen(name), membrane=False) for name, n in adapter.neurons(case.model).items()]
    with torch.no_grad():
        case.feed(case.model, case.feed.first())
    for stop in stops:
        stop()
    adapter.reset(case.model)
    return {name: float(torch.stack(steps).mean()) for name, steps in spikes.items()}


def liven(case: Case) -> Case:
    """Settle batch normalization on the batch, then scale weights up until every population fires well."""
    adapter = find_adapter(case.model)
    norms = [m for m in case.model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 1.0, 3.0)
        nn.init.uniform_(norm.bias, -0.5, 1.0)
    case.model.train()
    with torch.no_grad():
        for _ in range(3):
            case.feed(case.model, case.feed.first())
    adapter.reset(case.model)
    case.model.eval()
    for norm in norms:
        norm.momentum = 0.1
    for _ in range(12):
        if min(firing_rates(case).values()) > 0.1:
            return case
        with torch.no_grad():
            for module in case.model.modules():
                if isinstance(module, WEIGHT_LAYERS):
                    module.weight *= 1.4
                    if module.bias is not None:
                        module.bias.abs_().add_(0.2)
    return case


class Residual(nn.Module):
    """Adds a block's output to its input: spikes to spikes (SEW) or currents before the neuron (Spiking ResNet)."""

    def __init__(self, body: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x) + x)


@st.composite
def spikingjelly_cases(draw: st.DrawFn) -> Case:
    """Convolutional networks in float64: depth, widths, kernel, pooling, BN, residual, neuron, reset, mode, T."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from([neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode]))
    v_reset = draw(st.sampled_from([0.0, None]))

    def fire() -> nn.Module:
        return kind(v_reset=v_reset)

    channels, size = draw(st.integers(1, 3)), 8
    parts: list[nn.Module] = []
    before = channels
    for _ in range(draw(st.integers(1, 3))):
        after, kernel = draw(st.integers(2, 9)), draw(st.sampled_from([1, 3]))
        bn = draw(st.booleans())
        groups = draw(st.sampled_from([1, before])) if after % before == 0 and after // before == 1 else 1
        parts.append(layer.Conv2d(before, after, kernel, padding=kernel // 2, bias=not bn, groups=groups))
        parts += [layer.BatchNorm2d(after)] if bn else []
        parts.append(fire())
        residual = draw(st.sampled_from(["none", "spikes", "currents"]))
        if residual != "none":
            body = [layer.Conv2d(after, after, 3, padding=1, bias=False), layer.BatchNorm2d(after)]
            sew = residual == "spikes"
            parts.append(Residual(nn.Sequential(*body, *([fire()] if sew else [])), nn.Identity() if sew else fire()))
        pool = draw(st.sampled_from(["none", "max", "avg"]))
        if pool != "none" and size > 2:
            parts.append(layer.MaxPool2d(2) if pool == "max" else layer.AvgPool2d(2))
            size //= 2
        before = after
    hidden = draw(st.integers(2, 12))
    parts += [layer.Flatten(), layer.Linear(before * size * size, hidden), fire(), layer.Linear(hidden, 5)]
    model = nn.Sequential(*parts, *([fire()] if draw(st.booleans()) else [])).double()
    functional.set_step_mode(model, draw(st.sampled_from("sm")))
    return liven(Case(model, torch.rand(3, channels, 8, 8, dtype=torch.float64), draw(st.integers(1, 4))))


class ClassStyle(nn.Module):
    """A snnTorch class with its own time loop and explicit membranes, returning stacked records."""

    def __init__(self, make: Callable[[int, bool], nn.Module], widths: tuple[int, int], steps: int) -> None:
        super().__init__()
        a, b = widths
        self.steps = steps
        self.conv = nn.Conv2d(1, a, 3, padding=1)
        self.lif1 = make(a, True)
        self.fc1 = nn.Linear(a * 16, b)
        self.lif2 = make(b, False)
        self.fc2 = nn.Linear(b, 5)
        self.lif3 = snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state1: list[Tensor] = []
        state2: list[Tensor] = []
        state3: list[Tensor] = []
        spikes, membranes = [], []
        for _ in range(self.steps):
            s1, *state1 = self.lif1(self.conv(x), *state1)
            pooled = nn.functional.max_pool2d(s1, 2)
            s2, *state2 = self.lif2(self.fc1(pooled.flatten(1)), *state2)
            s3, *state3 = self.lif3(self.fc2(s2), *state3)
            spikes.append(s3)
            membranes.append(state3[-1])
        return torch.stack(spikes), torch.stack(membranes)


@st.composite
def snntorch_cases(draw: st.DrawFn) -> Case:
    """Sequential networks with hidden states and class-style ones: every neuron, reset, delay, β per channel."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["Leaky", "Synaptic", "Alpha", "Lapicque", "RLeaky", "RSynaptic"]))
    reset = draw(st.sampled_from(["subtract", "zero", "none"]))
    delay = draw(st.booleans())
    per_channel, learn = draw(st.booleans()), draw(st.booleans())
    all_to_all = draw(st.booleans())

    def make(width: int, maps: bool, *, hidden: bool = True, output: bool = False) -> nn.Module:
        shape = (width, 1, 1) if maps else (width,)

        def value(low: float) -> float | Tensor:
            return low + 0.2 * torch.rand(shape) if per_channel else low

        options = {
            "beta": 0.6 if kind == "Lapicque" else value(0.6), "threshold": value(0.4),
            "learn_beta": learn, "learn_threshold": learn,
            "init_hidden": hidden, "output": output, "reset_mechanism": reset,
        }  # fmt: skip
        if kind in ("Synaptic", "Alpha", "RSynaptic"):
            options["alpha"] = value(0.85)
        if kind in ("Leaky", "Synaptic", "RLeaky"):
            options["reset_delay"] = delay
        if kind.startswith("R"):
            options["all_to_all"] = all_to_all
            if not all_to_all:
                options["V"] = value(0.2)
            elif maps:
                options |= {"conv2d_channels": width, "kernel_size": 3}
            else:
                options["linear_features"] = width
        return getattr(snn, kind)(**options)

    a, b, steps = draw(st.integers(2, 8)), draw(st.integers(2, 12)), draw(st.integers(1, 4))
    if kind == "Alpha":
        steps += 5  # it answers a step after its input, so a spike takes a step for every layer
    x = torch.rand(3, 1, 8, 8)
    if draw(st.booleans()) and not kind.startswith("R"):
        model: nn.Module = ClassStyle(lambda w, maps: make(w, maps, hidden=False), (a, b), steps)
        return liven(Case(model, x, None))
    bn = draw(st.booleans())
    model = nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1, bias=not bn), nn.BatchNorm2d(a) if bn else nn.Identity(), make(a, True),
        nn.MaxPool2d(2) if draw(st.booleans()) else nn.AvgPool2d(2),
        nn.Conv2d(a, a, 3, padding=1, groups=draw(st.sampled_from([1, a]))), make(a, True),
        nn.Flatten(), nn.Linear(a * 16, b), make(b, False),
        nn.Linear(b, 5), make(5, False, output=draw(st.booleans())),
    )  # fmt: skip
    return liven(Case(model, x, steps))
