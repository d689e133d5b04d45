"""A model under test, and what is found out about its adapter on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.errors import ModelError, PluginError
from snncompress.interfaces import Adapter
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in

from .common import broken, calling


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`check_adapter` could check, and what the adapter doesn't offer, or not for every neuron, with why.

    >>> print(AdapterReport(("run", "reset"), ("equations of 1 (Synaptic): only Leaky is known by equation",)))
    checked: run, reset
    missing: equations of 1 (Synaptic): only Leaky is known by equation
    """

    checked: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"checked: {', '.join(self.checked)}", *(f"missing: {what}" for what in self.missing)])


@dataclass
class Call:
    """What a neuron was first called with, each tensor as it was then."""

    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Trial:
    """A model under test, and how it is fed."""

    adapter: Adapter
    model: nn.Module
    x: Tensor
    timesteps: int | None
    currents: dict[str, torch.Size] = field(default_factory=dict)
    """The shape [N, C, ...] of one timestep that each neuron gets."""
    checked: dict[str, None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def report(self) -> AdapterReport:
        """All of it so far."""
        return AdapterReport(tuple(self.checked), tuple(self.missing))

    def run(self, *, resets: int = 1, grad: bool = False, model: nn.Module | None = None) -> list[Tensor]:
        """Reset, run, and give all tensors of the output."""
        model = self.model if model is None else model
        torch.manual_seed(0)
        with calling(self.adapter, "reset() or run()"), torch.set_grad_enabled(grad):
            for _ in range(resets):
                self.adapter.reset(model)
            output = list(tensors_in(self.adapter.run(model, self.x, self.timesteps)))
        if not output:
            raise broken(self.adapter, "run() must return a tensor, or tensors in a tuple, list or dict.")
        return output

    def copy(self) -> nn.Module:
        """A copy to change, its neurons reset."""
        with calling(self.adapter, "reset()"):
            return private_copy(self.model, self.adapter).eval()

    def neurons(self, model: nn.Module | None = None) -> dict[str, nn.Module]:
        """By name."""
        return self.adapter.neurons(self.model if model is None else model)

    def listen(self, stack: ExitStack, model: nn.Module | None = None) -> dict[str, list[Tensor]]:
        """What each neuron puts out until the stack is left, by name."""
        heard: dict[str, list[Tensor]] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def call(module: nn.Module, args: Any, output: Any) -> None:
                heard.setdefault(name, []).append(next(tensors_in(output)).detach().clone())

            return call

        for name, neuron in self.neurons(model).items():
            stack.callback(neuron.register_forward_hook(hook(name)).remove)
        return heard

    def calls(self) -> dict[str, Call]:
        """What each neuron, or else stateful module, is first called with in a run, by name."""
        found: dict[str, Call] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def call(module: nn.Module, args: Any, named: Any) -> None:
                if name not in found:
                    found[name] = Call(mapped(torch.clone, args), mapped(torch.clone, named))

            return call

        with ExitStack() as stack:
            for name, neuron in {**self.neurons(), **self.adapter.stateful(self.model)}.items():
                stack.callback(neuron.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            self.run()
        self.adapter.reset(self.model)
        return found

    def call(self, neuron: nn.Module, call: Call, when: str) -> list[Tensor]:
        """All tensors that the neuron alone puts out; ``when`` says what was done with it before."""
        torch.manual_seed(0)
        with calling(self.adapter, f"a {type(neuron).__name__} {when}"), torch.no_grad():
            output = neuron(*mapped(torch.clone, call.args), **mapped(torch.clone, call.named))
        return [tensor.clone() for tensor in tensors_in(output)]

    @contextmanager
    def optional(self, what: str, neuron: tuple[str, nn.Module] | None = None) -> Iterator[None]:
        """Notes whether ``what`` was checked: a ModelError inside says that it isn't offered, for this neuron."""
        where = f" of {neuron[0] or 'the model'} ({type(neuron[1]).__name__})" if neuron else ""
        try:
            yield
        except ModelError as error:
            self.missing.append(f"{what}{where}: {error}")
        except PluginError:
            raise
        except Exception as error:
            raise broken(self.adapter, f"{what}{where} failed: {type(error).__name__}: {error}") from error
        else:
            self.checked[what] = None


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting of tuples, lists and dicts, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(change, item) for item in value)
    return value


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise the same."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def nearly(a: list[Tensor], b: list[Tensor]) -> bool:
    """The same shapes, and but for one in a hundred, which rounding may decide, the same values."""
    return [t.shape for t in a] == [t.shape for t in b] and all(
        float(torch.isclose(s, t, rtol=1e-4, atol=1e-5).double().mean()) >= 0.99
        for s, t in zip(a, b, strict=True)
        if s.numel()
    )


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All values in a row."""
    return torch.cat([t.flatten() for t in tensors])


def in_order(steps: Tensor, outputs: list[Tensor]) -> bool | None:
    """Whether the outputs of a neuron's calls are those steps [T, N, C, ...] with time first, or samples first: False.

    None where they are neither. The first two axes may be one, as in [N·T, C, ...].
    """
    sizes = [output.numel() // max(1, steps[:1].numel()) for output in outputs]
    if sum(sizes) != len(steps) or sum(output.numel() for output in outputs) != steps.numel():
        return None
    pieces = torch.split(steps, sizes)
    if torch.equal(flat(pieces), flat(outputs)):
        return True
    return False if torch.equal(flat(piece.transpose(0, 1) for piece in pieces), flat(outputs)) else None


def check_passes_on(adapter: Adapter, context: Callable[[], AbstractContextManager[None]], what: str) -> None:
    """An exception raised inside ``context()`` comes out of it."""
    for error in (RuntimeError("raised inside"), KeyboardInterrupt()):
        try:
            with context():
                raise error
        except BaseException as raised:
            if raised is not error:
                raise broken(adapter, f"{what} turns an exception into a {type(raised).__name__}.") from raised
        else:
            raise broken(adapter, f"{what} swallows exceptions.")
