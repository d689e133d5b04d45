"""What silent channels still add where batch norms and biases stand behind their neurons, and where that goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from snncompress.errors import PlanError
from snncompress.model.network import ChannelGroup, depthwise

from .base import find

Gone = Mapping[tuple[str, str], tuple[int, ...]]
"""(module, side) → the indices that it loses."""


@dataclass(frozen=True)
class Shift:
    """``reader`` gets a constant of every silent channel: what the modules ``through`` make of zero, one by one.

    A batch norm makes (x - μ) · w / √(σ² + ε) + b of x, a depthwise convolution x · Σ w + b. What the channels that go
    would have added, their constants times the reader's weights, is put on the reader's bias, which it gets where it
    has none. That is exact but for the zeros with which a convolution pads its border. ``adjacent`` tells how the
    inputs of one channel stand behind a flatten: side by side, or as far apart as there are channels.
    """

    through: tuple[str, ...]
    reader: str
    adjacent: bool

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Shift:
        """Raises KeyError, TypeError or ValueError for anything but a shift's fields."""
        through, adjacent = data["through"], data["adjacent"]
        if not (isinstance(adjacent, bool) and isinstance(through, (list, tuple)) and through):
            raise ValueError("a shift leads through at least one module")
        return cls(tuple(str(name)[:1000] for name in through), str(data["reader"]), adjacent)

    def check(self, model: nn.Module, gone: Gone) -> None:
        """Raise PlanError unless all modules are there and lose channels that fit."""
        *through, reader = (
            find(model, name, "the plan moves a constant to the bias behind it")
            for name in (*self.through, self.reader)
        )
        channels, columns = gone.get((self.through[0], "out"), ()), gone.get((self.reader, "in"), ())
        if not (
            all(map(_passes, through))
            and all(gone.get((name, "out")) == channels for name in self.through)
            and _reads(reader)
            and channels
            and len(columns) % len(channels) == 0
        ):
            raise PlanError(
                f"The plan moves what {' and '.join(self.through)} make of silent channels to the bias of "
                f"{self.reader}. They aren't batch norms or depthwise convolutions before a layer that loses the same."
            )

    def apply(self, model: nn.Module, gone: Gone) -> None:
        """Put it on the bias, before the channels go."""
        reader = model.get_submodule(self.reader)
        channels, columns = list(gone[self.through[0], "out"]), list(gone[self.reader, "in"])
        with torch.no_grad():
            stored = next(reader.parameters())
            constants = torch.zeros((), dtype=torch.float64, device=stored.device)
            for name in self.through:
                constants = _made_of(constants, model.get_submodule(name))
            constants, copies = constants[channels], len(columns) // len(channels)
            constants = constants.repeat_interleave(copies) if self.adjacent else constants.repeat(copies)
            added = _summed(cast(Tensor, reader.weight))[:, columns] @ constants
            bias = cast("Tensor | None", reader.bias)
            new = added if bias is None else bias.detach() + added
            learns = (stored if bias is None else bias).requires_grad
            reader.bias = nn.Parameter(new.to(stored.dtype), requires_grad=learns)


def shifts(model: nn.Module, group: ChannelGroup) -> tuple[Shift, ...]:
    """What a removal of the group's channels moves, for each of the ``shifted`` ways into a reader."""
    found = []
    for through, reader in group.shifted:
        made = [group.member(name, "out") for name in through]
        read = group.member(reader, "in")
        if read is None or not _reads(model.get_submodule(reader)):
            continue
        indices = [member.index for member in made if member is not None]
        if len(indices) == len(made) and all(torch.equal(index, indices[0]) for index in indices):
            adjacent = _adjacent(indices[0], read.index)
            if adjacent is not None:
                found.append(Shift(through, reader, adjacent))
    return tuple(found)


def _passes(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or depthwise(module)


def _reads(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and module.groups == 1


def _adjacent(made: Tensor, read: Tensor) -> bool | None:
    """How the reader's inputs follow the channels; None where in neither way."""
    if made.shape[1] not in (1, read.shape[1]):
        return None
    channels = made.flatten()
    columns = read.reshape(len(channels), -1)[channels.argsort()]
    for adjacent, order in ((True, columns.flatten()), (False, columns.T.flatten())):
        if torch.equal(order, order.sort().values):
            return adjacent
    return None


def _made_of(x: Tensor, module: nn.Module) -> Tensor:
    """What a module makes of one constant per channel."""
    weight, bias = cast("Tensor | None", module.weight), cast("Tensor | None", module.bias)
    if isinstance(module, _BatchNorm):
        if module.running_mean is not None and module.running_var is not None:
            x = (x - module.running_mean) / (module.running_var.double() + module.eps).sqrt()
        else:
            x = x.expand(module.num_features)  # each is its own mean
            x = x - x
        x = x if weight is None else x * weight
    else:
        x = x * _summed(cast(Tensor, weight)).flatten()
    return x if bias is None else x + bias


def _summed(weight: Tensor) -> Tensor:
    """Over the kernel: [out, in]."""
    weight = weight.double()
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight
