"""Channels that are held silent by hooks while their weights stay, and gradients that pass through such masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .modules import patched
from .one_step import in_all_steps
from .parametrizations import CompressedWeight, passing_gradients


class Silencer:
    """A hook that makes some channels 0 on an axis, counted from the end."""

    passing = False
    """Whether their gradients pass as if they weren't silent."""

    def __init__(self, indices: Tensor, axis: int) -> None:
        self.indices, self.axis = indices, axis

    def silenced(self, x: Tensor) -> Tensor:
        """The tensor with its silent channels at exactly 0."""
        self.indices = self.indices.to(x.device)
        silent = x.index_fill(self.axis, self.indices, 0.0)
        return passing_gradients(x, silent) if self.passing else silent


class _Spikes(Silencer):
    def __init__(self, indices: Tensor, axis: int, time: int | None) -> None:
        super().__init__(indices, axis)
        self.of_one_step, self.time = axis, time

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        spikes = output[0] if isinstance(output, (tuple, list)) else output
        self.axis = in_all_steps(self.of_one_step, self.time, spikes.dim())
        silent = self.silenced(spikes)
        for home in (module._buffers, vars(module)):  # where the neuron keeps them for its own next timestep
            for name in [name for name, value in home.items() if value is spikes]:
                home[name] = silent
        return (silent, *output[1:]) if isinstance(output, (tuple, list)) else silent


class _Ends(Silencer):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        if not (self.passing and output.requires_grad):
            return output
        self.indices = self.indices.to(output.device)
        x = [value.detach() if isinstance(value, Tensor) else value for value in args]
        alone = module.forward(*x, **{k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()})
        return output.index_copy(self.axis, self.indices, alone.index_select(self.axis, self.indices))


class _Inputs(Silencer):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (self.silenced(args[0]), *args[1:]), named
        name = next(iter(named))
        return args, {**named, name: self.silenced(named[name])}


def silence_spikes(neuron: nn.Module, indices: Tensor, axis: int, time: int | None = None) -> None:
    """Let a neuron's spikes be 0 in these channels; it goes on charging and firing behind that.

    They stand on ``axis`` of one timestep; ``time`` is the axis of all, where it isn't in front.
    """
    neuron.register_forward_hook(_Spikes(indices, axis, time))


def silence_inputs(layer: nn.Module, indices: Tensor, axis: int) -> None:
    """Let a layer read 0 in these channels."""
    layer.register_forward_pre_hook(_Inputs(indices, axis), with_kwargs=True)


def end_gradients(layer: nn.Module, indices: Tensor, axis: int) -> None:
    """Let gradients that pass a mask end at the layer's weights for these channels.

    What comes before would else get gradients through channels that it doesn't reach the output by.
    """
    layer.register_forward_hook(_Ends(indices, axis), with_kwargs=True)


def give_voice(model: nn.Module) -> None:
    """Let all channels speak again."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for number in [number for number, hook in hooks.items() if isinstance(hook, Silencer)]:
                del hooks[number]
                flags.pop(number, None)


@contextmanager
def gradients_through_masks(model: nn.Module) -> Iterator[None]:
    """Inside, what is masked still contributes nothing, but gets the gradient that it would get otherwise.

    Nothing else gets another gradient than before.
    """
    with ExitStack() as stack:
        for module in model.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            masks: list[Any] = [hook for hook in hooks if isinstance(hook, Silencer)]
            masks += [module] if isinstance(module, CompressedWeight) else []
            for mask in masks:
                stack.enter_context(patched(mask, "passing", True))
        yield
