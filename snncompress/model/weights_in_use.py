"""What a layer multiplies its input with, found by watching it do so; and which products happen outside layers.

A subclass of ``nn.Conv2d`` or ``nn.Linear`` may compute with something else than its ``weight``: a standardized, a
normalized, a fake-quantized one. No type tells. So the layer's forward is run once on a small input of noise, and the
tensor that reaches torch's convolution or matrix product is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .chance import undisturbed

PRODUCTS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
        "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "addmm",
        "addmm_", "addbmm", "baddbmm", "addmv", "einsum", "tensordot", "chain_matmul", "scaled_dot_product_attention",
        "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
        "rnn_relu_cell", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    }
)  # fmt: skip
"""torch's functions that multiply tensors and add up, by name."""
_TORCHS = {None} | {
    getattr(cls, method, None)
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    )
    for method in ("forward", "_conv_forward")
}  # fmt: skip
_PLAIN: dict[Any, bool] = {}
"""Whether such a layer multiplies with its weight, by class and settings."""


class Products(TorchFunctionMode):
    """Inside, ``seen(name, tensors)`` is called at every product of tensors, with what torch's function is handed.

    What a function does inside, where it is made of others, isn't seen again.
    """

    def __init__(self, seen: Callable[[str, list[Any]], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            self._seen(name, [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))


def weight_in_use(layer: nn.Module) -> Tensor | None:
    """The weight that a convolution or linear layer multiplies with, without gradient; None where it can't be told.

    >>> layer = nn.Linear(2, 1)
    >>> torch.equal(weight_in_use(layer), layer.weight)
    True
    """
    if _plain_class(layer) or not computes_its_weight(layer):
        return cast("Tensor | None", getattr(layer, "weight", None))
    return _watched(layer)[0]


def computes_its_weight(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer multiplies with another tensor than its ``weight``, or that isn't known."""
    if _plain_class(layer):
        return False
    if next(layer.children(), None) is not None:  # which may be switched on and off
        return not _watched(layer)[1]
    key = type(layer).forward, tuple((k, v) for k, v in vars(layer).items() if isinstance(v, (bool, int, float, str)))
    if key not in _PLAIN:
        _PLAIN[key] = _watched(layer)[1]
    return not _PLAIN[key]


class Within(TorchFunctionMode):
    """Sees a layer's own product while its forward is run: torch may be handed something else than the layer.

    A subclass may turn its input first, to multiply channels that don't stand last, or normalize and fire behind.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._shape = cast(Tensor, layer.weight).shape
        self._dims = 1 if isinstance(layer, nn.Linear) else len(self._shape) - 1
        self._calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if (name == "linear" or name.startswith("conv")) and len(args) > 1 and args[1].shape == self._shape:
            self._calls.append((args[0], made))
        return made

    def begin(self, *_: Any) -> None:
        """Look from here, as before a forward."""
        cast(Any, self).__enter__()

    def end(self, *_: Any) -> None:
        """No longer, as behind it."""
        cast(Any, self).__exit__(None, None, None)

    def products(self, x: Tensor, output: Any) -> list[tuple[Tensor, tuple[int, ...]]]:
        """What was multiplied since the last time, and the shape of what came of it.

        The layer's own input, if all of it was, as it is, and its output where that has the shape of the product's.
        """
        calls, self._calls = self._calls, []
        if not calls or (
            len(calls) == 1 and _one(x, calls[0][0], self._dims) and _one(output, calls[0][1], self._dims)
        ):
            return [(x, tuple(output.shape))]
        return [(met, tuple(made.shape)) for met, made in calls]


def has_its_own_forward(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer's forward isn't torch's."""
    return isinstance(layer, (_ConvNd, nn.Linear)) and not _plain_class(layer)


def _one(given: Any, there: Tensor, dims: int) -> bool:
    """Are these the same numbers, in the same order, folded otherwise at most, as time into samples?"""
    if not isinstance(given, Tensor) or given.numel() != there.numel() or given.shape[-dims:] != there.shape[-dims:]:
        return False
    return given.data_ptr() != there.data_ptr() or given.stride()[-dims - 1 :] == there.stride()[-dims - 1 :]


def _plain_class(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.forward in _TORCHS and getattr(kind, "_conv_forward", None) in _TORCHS


def _watched(layer: nn.Module) -> tuple[Tensor | None, bool]:
    """What the layer's forward multiplied noise with, and whether that is its weight."""
    # Parameters aren't copied; what an observer of ranges counts, is.
    twin = copy.deepcopy(layer, {id(p): p for p in layer.parameters()}).eval()
    seen: list[Tensor] = []

    def note(name: str, operands: list[Any]) -> None:
        for operand in map(_dense, operands):
            if operand is None or operand.data_ptr() == x.data_ptr():
                continue
            turned = [operand.t()] if isinstance(twin, nn.Linear) and name != "linear" and operand.dim() == 2 else []
            seen.extend(used for used in (*turned, operand) if used.shape == weight.shape)

    with undisturbed(layer), torch.no_grad(), parametrize.cached():
        weight = cast(Tensor, twin.weight)
        for x in _inputs(twin):
            with suppress(Exception), Products(note):  # it is the user's: anything can come out of it
                type(twin).forward(twin, x)  # without hooks
            if seen:
                break
    for used in seen:
        if used.data_ptr() == weight.data_ptr():
            return weight.detach(), True
    return (seen[0].detach() if seen else None), False


def _dense(operand: Any) -> Tensor | None:
    value = getattr(operand, "value", operand)  # of Brevitas' quantized tensors
    return value if isinstance(value, Tensor) else None


def _inputs(layer: nn.Module) -> list[Tensor]:
    """Noise of the shapes that such a layer may take: with and without time, small and less so."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Linear):
        return [torch.rand(*lead, layer.in_features).to(weight) for lead in ((2,), (2, 2), (2, 2, 2))]
    conv = cast(_ConvNd, layer)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    shapes = [(conv.in_channels, *sizes) for sizes in (spans, [max(8, span) for span in spans])]
    return [torch.rand(*lead, *shape).to(weight) for shape in shapes for lead in ((1,), (1, 1), ())]
