"""Ten networks, each a list of layers, so that the vendors' packages get the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snncompress

Spec = list[tuple[Any, ...]]


@dataclass
class Case:
    """A network, how it is built, and an input for it."""

    name: str
    spec: Spec
    x: Tensor
    timesteps: int | None = None
    framework: str = "spikingjelly"
    compress: Callable[[nn.Module, Tensor], nn.Module] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.framework == "snntorch":
            built: nn.Module = Leaky(self.spec)
        else:
            built = nn.Sequential(*(_layer(*part) for part in self.spec))
            functional.set_step_mode(built, "m")
        built.eval()
        return built if self.compress is None else self.compress(built, self.x)


def _layer(kind: str, *args: Any) -> nn.Module:
    kinds: dict[str, Callable[..., nn.Module]] = {
        "conv": lambda i, o, k, p: layer.Conv2d(i, o, k, padding=p, bias=False),
        "linear": lambda i, o: layer.Linear(i, o, bias=False),
        "norm": layer.BatchNorm2d,
        "avg": layer.AvgPool2d,
        "max": layer.MaxPool2d,
        "flatten": layer.Flatten,
        "if": lambda: neuron.IFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()),
        "lif": lambda: neuron.LIFNode(surrogate_function=surrogate.ATan()),
    }
    return kinds[kind](*args)


class Leaky(nn.Module):
    """The same for snnTorch, with a loop over T steps of its own; neurons leak and are reset by subtraction."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        import snntorch

        kinds: dict[str, Callable[..., nn.Module]] = {
            "conv": lambda i, o, k, p: nn.Conv2d(i, o, k, padding=p, bias=False),
            "linear": lambda i, o: nn.Linear(i, o, bias=False),
            "max": nn.MaxPool2d,
            "flatten": nn.Flatten,
            "lif": lambda: snntorch.Leaky(0.9),
        }
        self.parts = nn.ModuleList(kinds[part[0]](*part[1:]) for part in spec)

    def forward(self, x: Tensor) -> Tensor:  # [T, N, ...]
        states = {part: part.init_leaky() for part in self.parts if hasattr(part, "init_leaky")}
        out = []
        for step in x:
            for part in self.parts:
                if part in states:
                    step, states[part] = part(step, states[part])
                else:
                    step = part(step)
            out.append(step)
        return torch.stack(out)


def _for_speck(model: nn.Module, x: Tensor) -> nn.Module:
    return snncompress.apply(model, "magnitude", data=x, target="speck", repair=None)


def _seven_bits(model: nn.Module, x: Tensor) -> nn.Module:
    return snncompress.apply(model, None, bits=7, data=x, skip=[], repair=None)


def cases() -> Iterator[Case]:
    events, pictures = torch.rand(4, 2, 2, 32, 32).round(), torch.rand(4, 2, 1, 28, 28)
    sound = torch.rand(4, 2, 16).round()

    def maps(first: int, second: int, cell: str = "if", *between: tuple[Any, ...]) -> Spec:
        pool: tuple[Any, ...] = ("avg", 2) if cell == "if" else ("max", 2)
        norms = [("norm", first)], [("norm", second)]
        before, behind = norms if cell == "lif" else ([], [])
        return [
            ("conv", 2, first, 3, 1), *before, (cell,), pool, ("conv", first, second, 3, 1), *behind, (cell,), pool,
            ("flatten",), ("linear", second * 64, 10), (cell,),
        ]  # fmt: skip

    def block(n: int) -> Spec:
        return [("conv", 8 if n else 2, 8, 3, 1), ("if",), *([("avg", 2)] if n < 2 else [])]

    deep: Spec = [part for n in range(10) for part in block(n)]
    tutorial: Spec = [
        ("conv", 1, 12, 5, 0), ("max", 2), ("lif",), ("conv", 12, 64, 5, 0), ("max", 2), ("lif",), ("flatten",),
        ("linear", 1024, 10), ("lif",),
    ]  # fmt: skip

    def hearing(*widths: int) -> Spec:
        sizes = (16, *widths)
        return [part for i, o in itertools.pairwise(sizes) for part in (("linear", i, o), ("lif",))]

    yield Case("events 8-16", maps(8, 16), events)
    yield Case("events 96-256", maps(96, 256), events)
    yield Case("events 96-256, for Speck", maps(96, 256), events, compress=_for_speck)
    yield Case("ten convolutions", [*deep, ("flatten",), ("linear", 8 * 64, 10), ("if",)], events)
    yield Case("leaky, batch norms, max pooling", maps(8, 16, "lif"), events)
    yield Case("pictures 12-64 (snnTorch)", tutorial, pictures, framework="snntorch")
    flat: Spec = [("flatten",), ("linear", 784, 1000), ("lif",), ("linear", 1000, 10), ("lif",)]
    yield Case("pictures 784-1000-10 (snnTorch)", flat, pictures, framework="snntorch")
    for name, widths in (("63-8", (63, 8)), ("1200-8", (1200, 8)), ("100-60-8", (100, 60, 8))):
        small = name != "1200-8"
        title = f"sound 16-{name} (snnTorch){', 7 bits' if small else ''}"
        yield Case(title, hearing(*widths), sound, framework="snntorch", compress=_seven_bits if small else None)
