"""What snncompress must know of SpikingJelly ≥ 2.0: neurons, step modes, memories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snncompress.extend import (
    Adapter,
    Dynamics,
    Emission,
    ModelError,
    Observer,
    StandIn,
    StateGrid,
    all_steps,
    first_step,
    patched,
    remove_along,
    stacked,
    through,
)

from . import equations
from .ancestry import below, derives, family, is_multi_step

_CONTAINERS = (
    "MultiStepContainer", "SeqToANNContainer", "TLastMultiStepContainer", "TLastSeqToANNContainer", "StepModeContainer",
)  # fmt: skip
_RECURRENT = ("ElementWiseRecurrentContainer", "LinearRecurrentContainer")
_PARALLEL = ("PSN", "MaskedPSN", "SlidingPSN")
_RATE_CODED = ("DSRIFNode", "DSRLIFNode")


class SpikingJellyAdapter(Adapter):
    """Models whose neurons derive from SpikingJelly's BaseNode, in single- or multi-step mode.

    A model is multi-step where one of its modules is: its input is then [T, N, ...], and ``timesteps`` = T repeats
    static samples along a new first dimension. A single-step model is called once per timestep.
    """

    framework = "spikingjelly"

    def is_neuron(self, module: nn.Module) -> bool:
        """A class of SpikingJelly's neurons in the ancestry, but for those that never fire; or a cell of its RNNs."""
        kinds = [name for name, place in family(module) if below(place, "neuron")]
        return (bool(kinds) and not any("NonSpiking" in name for name in kinds)) or _is_cell(module)

    def refusal(self, model: nn.Module) -> str:
        """``clock_driven`` is SpikingJelly before 0.0.0.0.14, which had other modules for multi-step mode."""
        old = [name for name, m in model.named_modules() if any(_is_old(cls) for cls in type(m).__mro__)]
        if not old:
            return ""
        return (
            f"{old[0]!r} is of spikingjelly.clock_driven, which SpikingJelly gave up in 2022. Port the model: import "
            f"from spikingjelly.activation_based; write MultiStepLIFNode(...) as neuron.LIFNode(..., step_mode='m'); "
            f"wrap layers for [T, N, ...] as layer.SeqToANNContainer(...), or take layer.Conv2d and its kin with "
            f"step_mode='m'. A state_dict loads as it is."
        )

    def reset(self, model: nn.Module) -> None:
        """Every memory back to its reset value."""
        module: Any  # nn.Module's own type knows nothing of reset()
        for module in model.modules():
            if _is_memory(module) and callable(getattr(module, "reset", None)):
                module.reset()
        self.reset_memories(model)

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        """[T, N, ...] at once in multi-step mode, else step by step, the outputs stacked to [T, N, ...]."""
        if timesteps is None:
            return model(x)
        if any(is_multi_step(module) for module in model.modules()):
            return model(x.unsqueeze(0).repeat(timesteps, *[1] * x.dim()))
        return stacked([model(x.clone()) for _ in range(timesteps)])

    @contextmanager
    def identities(self, model: nn.Module, stand_in: StandIn) -> Iterator[None]:
        """Multi-step modules run the first timestep alone and repeat its result over all T.

        A cell of an RNN computes as it does, with its surrogate functions as wires. What can't run a single step (BN
        over time, PSN) runs all of them.
        """
        with ExitStack() as stack:
            module: Any  # nor of step modes
            for module in list(model.modules()):
                if _is_cell(module):
                    for name in _surrogates(module):
                        stack.enter_context(patched(module, name, _wire))
                    stack.enter_context(patched(module, "forward", through(module.forward)))
                    continue
                if self.is_neuron(module):
                    single: Callable[..., Any] | None = _firing(module, stand_in)
                elif derives(module, "layer", _RECURRENT):
                    single = _twice(_in_single_step(module))
                elif _is_container(module):
                    single = partial(nn.Sequential.forward, module)
                elif is_multi_step(module) and not _is_memory(module) and "s" in module.supported_step_mode():
                    single = _in_single_step(module)
                else:
                    single = None
                if single is not None:
                    forward = _collapsed(module, single) if is_multi_step(module) else single
                    if derives(module, "neuron", ("BaseNode", "SimpleBaseNode")):
                        forward = _potential(module, forward)
                    stack.enter_context(patched(module, "forward", forward))
            yield
        self.reset(model)

    def observe(self, neuron: nn.Module, observer: Observer, *, membrane: bool) -> Callable[[], None]:
        """Spikes from a forward hook; Ũ by standing in for the surrogate function, which is called with Ũ − θ."""
        if not membrane:
            rate_coded = derives(neuron, "neuron", _RATE_CODED)  # their spikes are as high as the threshold

            def hook(module: nn.Module, args: Any, spikes: Any) -> None:
                spikes = spikes[0] if isinstance(spikes, tuple) else spikes  # an LSTM's hidden state, and its cell's
                spikes = _ones(spikes) if rate_coded else spikes
                observer(spikes if is_multi_step(module) else spikes.unsqueeze(0), None)

            return neuron.register_forward_hook(hook).remove
        threshold = _threshold(neuron)
        original = neuron.surrogate_function
        neuron.surrogate_function = tap = _Tap(original, threshold, observer)
        hook_handle = neuron.register_forward_hook(tap.hand_over, prepend=True)  # before others change the spikes

        def stop() -> None:
            hook_handle.remove()
            neuron.surrogate_function = original

        return stop

    @contextmanager
    def differentiable(self, model: nn.Module) -> Iterator[None]:
        """Some have a surrogate gradient in train mode only, as all of 0.0.0.0.14, and are otherwise alike in it."""
        with ExitStack() as stack:
            for neuron in self.neurons(model).values():
                kind: Any = type(neuron)
                if _fires_by_mode(kind) or derives(neuron, "neuron", ("ComplementaryLIFNode",)):
                    stack.enter_context(patched(neuron, "training", True))
            yield

    def remove_channels(self, neuron: nn.Module, indices: list[int], *, width: int, axis: int) -> None:
        """Parameters and memories along the channel axis; those that hold layers can't be shrunk."""
        layers = [name for name, child in neuron.named_children() if any(p.dim() > 1 for p in child.parameters())]
        if layers:
            raise ModelError(
                f"{type(neuron).__name__} holds layers of its own ({', '.join(layers)}), so its channels stay."
            )
        if derives(neuron, "neuron", _PARALLEL):  # their weights are of timesteps
            return
        if derives(neuron, "neuron", ("GatedLIFNode",)):  # [C] or [T, C]; or one for all, and then [T]
            if cast(Tensor, neuron.alpha).numel() > 1:
                remove_along(neuron, indices, width=width, axis=-1)
            return
        if not derives(neuron, "neuron", ("BaseNode", "SimpleBaseNode")):
            held: dict[str, Any] = vars(neuron).get("_memories_rv", {})
            own = [*neuron.parameters(), *neuron.buffers(), *(m for m in held.values() if isinstance(m, Tensor))]
            if any(width in tensor.shape for tensor in own):
                raise ModelError(f"which tensors of a {type(neuron).__name__} belong to its channels isn't known")
        remove_along(neuron, indices, width=width, axis=axis, anywhere=True)
        if _is_memory(neuron):
            cast(Any, neuron).reset()

    def make_neuron(self, kind: Literal["lif", "if"]) -> nn.Module:
        """LIFNode, whose input leaks too (``decay_input``), or IFNode; single-step."""
        try:
            from spikingjelly.activation_based import neuron, surrogate
        except ImportError as error:
            raise ModelError(f"SpikingJelly can't be imported ({error}): pip install 'spikingjelly>=2.0'.") from error
        options: dict[str, Any] = {"v_threshold": 1.0, "surrogate_function": surrogate.ATan()}
        made: nn.Module = (
            neuron.LIFNode(tau=2.0, v_reset=0.0, **options) if kind == "lif" else neuron.IFNode(v_reset=None, **options)
        )
        return made

    def make_traceable(self, model: nn.Module) -> None:
        """Ũ - θ ≥ 0, as the surrogate functions have it."""
        neuron: Any
        for neuron in self.neurons(model).values():
            if not hasattr(neuron, "state_grid"):
                vars(neuron).pop("forward", None)  # a fast one
            neuron.surrogate_function = _AtLeastZero()
            neuron.store_v_seq = False

    def single_step(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Tensor:
        """Step mode "s" everywhere; containers that loop over time become plain nn.Sequential."""
        modules: list[Any] = list(model.modules())
        first = x[0] if timesteps is None and any(is_multi_step(module) for module in modules) else x
        for module in modules:
            if _is_container(module):
                vars(module)["forward"] = partial(nn.Sequential.forward, module)
            elif hasattr(module, "supported_step_mode"):
                if "s" not in module.supported_step_mode():
                    raise ModelError(
                        f"{type(module).__name__} needs all timesteps at once, so it can't be exported as one step. "
                        f"Use a neuron or layer with step mode 's'."
                    )
                module.step_mode = "s"
        return first

    def states(self, neuron: nn.Module) -> dict[str, Tensor]:
        """The neuron's memories."""
        memories: dict[str, Any] = vars(neuron).get("_memories", {})
        for name, value in memories.items():
            if not isinstance(value, (Tensor, float, int)):
                raise ModelError(f"its memory {name!r} is a {type(value).__name__}, not a tensor")
        return {name: torch.as_tensor(value) for name, value in memories.items()}

    def set_states(self, neuron: nn.Module, states: dict[str, Tensor]) -> None:
        """Number or tensor, as the neuron takes it."""
        vars(neuron).get("_memories", {}).update(states)

    def dynamics(self, neuron: nn.Module) -> Dynamics:
        """Of IFNode, LIFNode and ParametricLIFNode (:mod:`snncompress_spikingjelly.equations`)."""
        return equations.dynamics(neuron)

    def make_fast(self, neuron: nn.Module, emitted: Callable[[Tensor], Emission]) -> None:
        """IFNode, LIFNode and ParametricLIFNode with their step in as few passes over memory as torch allows."""
        equations.make_fast(neuron, emitted)

    def step_on(self, neuron: nn.Module, grid: StateGrid) -> None:
        """IFNode, LIFNode and ParametricLIFNode."""
        equations.step_on(neuron, grid)


class _AtLeastZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


class _Tap(nn.Module):
    """Passes Ũ − θ on to the surrogate function, and shows (spikes, Ũ) of a call of the neuron to the observer.

    Neurons that are parallel in time call it for all timesteps at once, and flattened. A neuron whose spikes aren't
    what the surrogate function returned, one by one, means something else by it.
    """

    def __init__(self, surrogate: Any, threshold: Callable[[], Any], observer: Observer) -> None:
        super().__init__()
        self.surrogate, self.threshold, self.observer = surrogate, threshold, observer
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        spikes: Tensor = self.surrogate(x, *args, **named)
        self.seen.append((spikes.detach(), x.detach() + self.threshold()))
        return spikes

    def hand_over(self, module: nn.Module, args: Any, output: Tensor) -> None:
        output = output.detach() if is_multi_step(module) else output.detach().unsqueeze(0)
        seen, self.seen = self.seen, []
        if not seen or len(output) % len(seen):
            raise _unreadable(module)
        pieces = torch.split(
            output, len(output) // len(seen)
        )  # as they were made: fresh from the caches, and not copied
        for piece, (spikes, potential) in zip(pieces, seen, strict=True):
            if spikes.numel() != piece.numel() or not _same(spikes.view(piece.shape), piece):
                raise _unreadable(module)
            self.observer(piece, potential.view(piece.shape))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("surrogate"), name)


def _ones(spikes: Tensor) -> Tensor:
    """1 where spikes of some height are, with their gradient."""
    height = spikes.detach().amax()
    return spikes / torch.where(height > 0, height, 1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal: ``torch.equal``, three times as fast."""
    return a.data_ptr() == b.data_ptr() or not bool(torch.linalg.vector_norm(a - b))


def _threshold(neuron: Any) -> Callable[[], Any]:
    """θ as it stands when the surrogate function is called; raises ModelError where Ũ can't be read there."""
    if derives(neuron, "neuron", ("ILIFNode",)):  # whole numbers of spikes, of a surrogate function of its own
        raise _unreadable(neuron)
    if derives(neuron, "neuron", ("BaseNode", "SimpleBaseNode")):
        return lambda: neuron.v_threshold
    if derives(neuron, "neuron", ("GatedLIFNode",)):
        return lambda: neuron.v_threshold.detach().view(1, -1, 1, 1).sigmoid()
    if derives(neuron, "neuron", ("MaskedPSN",)) and not is_multi_step(neuron):
        return lambda: -neuron.bias.detach()[int(neuron.time_step)]
    if derives(neuron, "neuron", _PARALLEL):
        return lambda: -neuron.bias.detach()
    raise _unreadable(neuron)


def _unreadable(neuron: nn.Module) -> ModelError:
    return ModelError(
        f"The membrane potential of a {type(neuron).__name__} can't be read. Take a criterion that needs spikes or "
        f"gradients, such as 'svs', 'firing_rate' or 'taylor'."
    )


@lru_cache(maxsize=1024)
def _fires_by_mode(cls: type) -> bool:
    """Does it have a surrogate gradient in train mode only?"""
    return any(name.startswith("jit_eval_") for name in dir(cls))


def _is_old(cls: type) -> bool:
    return f"{cls.__module__}.".startswith("spikingjelly.clock_driven.")


def _is_cell(module: nn.Module) -> bool:
    return derives(module, "rnn", ("SpikingRNNCellBase",))


def _surrogates(cell: nn.Module) -> list[str]:
    return [name for name, child in cell.named_children() if name.startswith("surrogate_function")]


def _wire(x: Tensor) -> Tensor:
    return x * 1.0


def _is_memory(module: nn.Module) -> bool:
    return any(name == "MemoryModule" or "NonSpiking" in name for name, _ in family(module))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and derives(module, "layer", _CONTAINERS)


def _firing(neuron: nn.Module, stand_in: StandIn) -> Callable[..., Tensor]:
    return lambda *args, **named: stand_in(neuron, next(iter((*args, *named.values()))))


def _potential(neuron: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same; the membrane potential, which the model may read, doesn't fall silent with the spikes."""

    def call(*args: Any, **named: Any) -> Tensor:
        y = forward(*args, **named)
        neuron.v = (y[-1] if is_multi_step(neuron) else y) + 1
        if is_multi_step(neuron) and getattr(neuron, "store_v_seq", False):
            neuron.v_seq = y + 1
        return y

    return call


def _in_single_step(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **named: Any) -> Any:
        if not is_multi_step(module):
            return forward(*args, **named)
        with patched(module, "_step_mode", "s"):
            return forward(*args, **named)

    return run


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent container shows its feedback connection at its second step only."""

    def run(*args: Any) -> Any:
        forward(*args)
        return forward(*args)

    return run


def _collapsed(module: nn.Module, single: Callable[..., Any]) -> Callable[..., Tensor]:
    axis = -1 if type(module).__name__.startswith("TLast") else 0

    def forward(*args: Any, **named: Any) -> Tensor:
        x_seq: Tensor = next(iter((*args, *named.values())))
        return all_steps(single(first_step(x_seq, axis)), x_seq.shape[axis], axis)

    return forward
