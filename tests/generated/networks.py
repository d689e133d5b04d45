"""Whole networks: drawn by (seed, index), fed in one of many ways, and sure to fire."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from . import attention, oddities  # noqa: F401 - they add stages
from .formats import Format
from .oddities import Noise
from .stages import STAGES
from .styles import SAMPLES, STYLES, Multi, Own, Style


@dataclass
class Case:
    """A network, the data that it is calibrated with, and how it is run."""

    seed: int
    index: int
    model: nn.Module
    data: Tensor
    style: Style
    stages: list[str]
    timesteps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments for whoever is told of the network."""

    def run(self, model: nn.Module) -> list[Tensor]:
        """What a copy of it returns, from a clean state and without noise."""
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, Noise):
                module.strength = 0.0
        torch.manual_seed(0)
        with torch.no_grad():
            return list(tensors(run_steps(model, self.data.clone(), self.timesteps, self.style)))


def run_steps(model: nn.Module, x: Tensor, timesteps: int | None, style: Style) -> Any:
    """As it stands, or with one sample for all timesteps."""
    if timesteps is None:
        return model(x)
    if style.whole:
        return model(torch.stack([x] * timesteps, style.first))
    return [model(x.clone()) for _ in range(timesteps)]


def tensors(value: Any) -> Any:
    """All in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


class Network(nn.Module):
    """Stages in a row, and what is around them: how time comes in, and what goes out."""

    def __init__(self, stages: list[nn.Module], head: nn.Module, style: Style, **how: Any) -> None:
        super().__init__()
        self.stages, self.head = nn.ModuleList(stages), head
        self.lead, self.steps, self.how = style.lead, style.steps, how
        self.first, self.whole, self.loops = style.first, style.whole, style.loops
        self._restart = [style.reset] if style.loops else []  # a list, so that no copy takes it for a method

    def _through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == self.how["kept"]:
                kept = x
        y = self.head(x)
        return y, kept if self.how["kept"] is not None else y

    def forward(self, x: Tensor) -> Any:
        if self.how["writes"]:
            x.sub_(0.05)
        if self.how["unbatched"]:
            x = x.unsqueeze(1 - self.how["axis"])
        if self.loops:
            for restart in self._restart:
                restart(self)
            inputs = x.unbind(self.how["axis"]) if self.how["sequence"] else [x] * self.steps
            results = [self._through(step) for step in inputs]
            y, kept = (torch.stack(list(part)) for part in zip(*results, strict=True))
        elif self.whole:
            if not self.how["sequence"]:
                x = torch.stack([x] * self.steps, self.first)
            elif self.how["axis"] != self.first:
                x = x.transpose(0, 1)
            n = x.shape[1 - self.first]
            y, kept = self._through(x if self.lead == 2 else x.flatten(0, 1))
            if self.lead == 1:
                before = (self.steps, n) if self.first == 0 else (n, self.steps)
                y, kept = y.unflatten(0, before), kept.unflatten(0, before)
        else:
            y, kept = self._through(x)
        if self.how["output"] == "mean" and (self.loops or self.whole):
            y = y.mean(self.first)
        if self.how["output"] == "tuple":
            return y, kept
        return {"logits": y, "kept": kept} if self.how["output"] == "dict" else y


def generate(seed: int, index: int) -> Case:
    """Network number ``index``: always the same for the same numbers. Torch's generator is left as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1_000_003 * seed + index)
        return _Draw(random.Random(f"{seed}/{index}")).case(seed, index)


class _Draw:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        kind = rng.choices(list(STYLES), list(STYLES.values()))[0]
        self.style = kind(rng, rng.choice([2, 3, 3]))

    def case(self, seed: int, index: int) -> Case:
        style, rng = self.style, self.rng
        start = self._start()
        names, stages, fmt = self._stages(start)
        head = self._head(fmt)
        timed = style.whole or style.loops  # the model knows of time
        outside = not style.loops and (not timed or style.odds(0.3))
        sequence = timed and (outside or style.odds(0.5))
        axis = style.first if outside else rng.choice([0, 1]) if not style.loops or fmt.kind else 0
        if not outside and style.whole and not sequence:
            axis = style.first
        needs_batch = any(isinstance(m, _NormBase) and m.running_mean is None for s in stages for m in s.modules())
        how = {
            "sequence": sequence, "axis": axis, "writes": style.odds(0.1),
            "unbatched": sequence and not outside and not needs_batch and style.odds(0.08),
            "kept": rng.randrange(len(stages)) if style.odds(0.05) else None,
            "output": rng.choices(["all", "mean", "tuple", "dict"], [5, 3, 1, 1])[0],
        }  # fmt: skip
        model = Network(stages, head, style, **how)
        style.finish(model)
        model = model.double().eval()
        shape = [SAMPLES, *start.shape]
        if sequence and not outside:
            shape.insert(axis, style.steps)
        if how["unbatched"]:
            del shape[1 - axis]
        data = torch.rand(shape, dtype=torch.float64)
        options: dict[str, Any] = {}
        if isinstance(style, Own):
            options = {"neurons": style.neurons, "time_dim": style.time_dim}
        names = [type(style).__name__, *names]
        case = Case(seed, index, model, data, style, names, style.steps if outside else None, options)
        _liven(case)
        return case

    def _start(self) -> Format:
        kind = self.rng.choices(["2", "1", "3", "tokens", "vector"], [10, 3, 2, 10, 4])[0]
        if type(self.style).__name__ == "Parallel":
            kind = "vector"
        channels = self.rng.choice([2, 3])
        sizes = {"2": (6, 6), "1": (8,), "3": (4, 4, 4), "tokens": (5,), "vector": ()}[kind]
        if kind == "2" and self.style.odds(0.3):
            sizes = (8, 8)
        return Format("vector" if not sizes else "tokens" if kind == "tokens" else "maps", 3 * channels, sizes) \
            if kind in ("tokens", "vector") else Format("maps", channels, sizes)  # fmt: skip

    def _stages(self, fmt: Format) -> tuple[list[str], list[nn.Module], Format]:
        names: list[str] = []
        stages: list[nn.Module] = []
        first = "convolution" if fmt.kind == "maps" else "linear"
        many = self.rng.choice([2, 3, 3, 4])
        while len(stages) < many:
            name = first if not stages and self.style.odds(0.85) else self._name(fmt)
            try:
                module, made = STAGES[name][0](self.style, fmt)
            except ValueError:
                continue
            if made.channels > 32 or made.flat > 1600:
                continue
            names.append(name)
            stages.append(module)
            fmt = made
            if len(stages) < many and fmt.kind == "maps" and self.style.odds(0.12):
                module, fmt = self._onwards(fmt)
                names.append("onwards")
                stages.append(module)
                many += 1
        while fmt.kind != "vector":
            module, fmt = self._onwards(fmt)
            stages.append(module)
        if self.style.odds(0.7):
            after = self.rng.choice([8, 12])
            made = Format("vector", after)
            stages.append(nn.Sequential(self.style.linear(fmt.channels, after), self.style.fire(made)))
            fmt = made
        return names, stages, fmt

    def _name(self, fmt: Format) -> str:
        fitting = {name: weight for name, (_, weight, kinds) in STAGES.items() if fmt.kind in kinds}
        return self.rng.choices(list(fitting), list(fitting.values()))[0]

    def _onwards(self, fmt: Format) -> tuple[nn.Module, Format]:
        """To tokens or to a vector."""
        if fmt.kind == "tokens":
            if self.style.odds(0.5):
                return Averaged((-2,)), Format("vector", fmt.channels)
            return (Token(), Format("vector", fmt.channels)) if self.style.odds(0.4) else (
                Flat(2), Format("vector", fmt.flat)
            )  # fmt: skip
        if self.style.odds(0.35):
            return ToTokens(fmt.dims), Format("tokens", fmt.channels, (fmt.flat // fmt.channels,))
        if self.style.odds(0.4):
            return Averaged(tuple(range(-fmt.dims, 0))), Format("vector", fmt.channels)
        if self.style.odds(0.5):
            return Flat(fmt.dims + 1), Format("vector", fmt.flat)
        flat = self.style.layer("Flatten") if self.style.lead == 1 else nn.Flatten(2)
        return flat, Format("vector", fmt.flat)

    def _head(self, fmt: Format) -> nn.Module:
        made = Format("vector", 5)
        parts = [self.style.linear(fmt.channels, 5)]
        if self.style.odds(0.25):
            parts.append(self.style.fire(made))
        elif isinstance(self.style, Multi) and self.style.odds(0.15):
            parts.append(Readout())
        return nn.Sequential(*parts)


class Readout(nn.Module):
    """Membranes of neurons that never fire, of which SpikingJelly gives back a list."""

    def __init__(self) -> None:
        super().__init__()
        self.neurons = neuron.NonSpikingLIFNode()

    def forward(self, x: Tensor) -> Tensor:
        v = self.neurons(x)
        return torch.stack(v) if isinstance(v, list) else v


class Averaged(nn.Module):
    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class Token(nn.Module):
    """The first of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0, :]


class Flat(nn.Module):
    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(-self.axes)


class ToTokens(nn.Module):
    """Places become tokens."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(-self.dims).transpose(-1, -2)


def _liven(case: Case) -> None:
    """Scale each layer, at its first call that isn't silent: what it puts out is about as large as thresholds then."""
    model = copy.deepcopy(case.model)
    twins = dict(case.model.named_modules())
    done: set[nn.Module] = set()

    def scale(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
            spread = float(y.std()) if y.numel() > 1 else 0.0
            if module in done or not 1e-6 < spread < 1e12:
                return None
            done.add(module)
            factor = 2.0 / spread
            for m in (module, twins[name]):
                m.weight.data *= factor
                if m.bias is not None:
                    m.bias.data.mul_(factor).abs_().add_(0.1)
            return None if module.bias is None and factor == 1 else module.forward(*args)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and not hasattr(module, "parametrizations"):
            module.register_forward_hook(scale(name))
    with torch.no_grad():
        run_steps(model, case.data.clone(), case.timesteps, case.style)
