"""Neurons whose states go onto a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from snncompress.errors import ModelError, PlanError
from snncompress.interfaces import Adapter
from snncompress.model.fixed_point import FixedPoint, Leak, Overflow, state_grid

from .base import Budget, Edit, find

FEWEST, MOST_BITS = 3, 32


@dataclass(frozen=True)
class QuantizeStates(Edit):
    """Let the ``neuron`` hold its membrane potential, threshold and leak in fixed point, ``bits`` for a potential.

    ``step`` is what one means: one number for all, or one per channel, which stands on ``axis`` < 0 of its input.
    """

    neuron: str
    bits: int
    step: tuple[float, ...]
    axis: int = -1
    overflow: Overflow = "saturate"
    leak: Leak = "exact"
    kind: ClassVar[str] = "quantize_states"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not FEWEST <= self.bits <= MOST_BITS:
            raise PlanError(f"{self.neuron}: states have {FEWEST} to {MOST_BITS} bits, not {self.bits!r}.")
        if self.overflow not in get_args(Overflow) or self.leak not in get_args(Leak):
            raise PlanError(
                f"{self.neuron}: states 'saturate' or 'wrap', and leak 'exact' or by a 'shift', not "
                f"{self.overflow!r} and {self.leak!r}."
            )
        if not self.step or not all(isinstance(s, float) and math.isfinite(s) and s > 0 for s in self.step):
            raise PlanError(f"{self.neuron}: the step of a state is a positive number, or one per channel.")
        if type(self.axis) is not int or not -64 <= self.axis < 0:
            raise PlanError(f"{self.neuron}: channels stand on an axis from -64 to -1, not {self.axis!r}.")

    def grid(self) -> FixedPoint:
        """A new one."""
        step = torch.tensor(self.step if len(self.step) > 1 else self.step[0])
        shape = (-1, *[1] * (-1 - self.axis)) if len(self.step) > 1 else ()
        return FixedPoint(step.view(shape), self.bits, self.overflow, self.leak)

    def check(self, model: nn.Module) -> None:
        """The neuron must be there, and not be on a grid yet."""
        neuron = find(model, self.neuron, "the plan puts its state on a grid")
        if (grid := state_grid(neuron)) is not None:
            raise PlanError(
                f"The state of {self.neuron!r} has {grid.bits} bits already. Start from the network of before, or "
                f"leave state_bits=None."
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Hand the neuron its grid."""
        self.check(model)
        neuron = model.get_submodule(self.neuron)
        tensor = next((t for t in (*neuron.parameters(), *model.parameters()) if t.is_floating_point()), None)
        grid = self.grid() if tensor is None else self.grid().to(tensor.device, tensor.dtype)
        try:
            adapter.step_on(neuron, grid)
        except ModelError as error:
            raise PlanError(f"The state of {self.neuron!r} can't be put on a grid: {error}.") from error

    def describe(self) -> str:
        """Neuron and settings."""
        return self.summary(self.to_dict(), {})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return super().to_dict() | {"step": list(self.step)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantizeStates:
        """Steps as they are."""
        return cls(**data | {"neuron": str(data["neuron"]), "step": tuple(data["step"])})

    def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The steps as floats of 32 bits, which they are."""
        tensors[f"{name}.step"] = torch.tensor(self.step)
        return super().to_dict() | {"step": f"{name}.step"}

    @classmethod
    def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: Budget) -> list[Edit]:
        """With the steps from their tensor."""
        step = tensors.pop(data["step"])
        budget.spend(step.numel())
        return [cls.from_dict({key: v for key, v in data.items() if key != "edit"} | {"step": step.flatten().tolist()})]

    @classmethod
    def summary(cls, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Neuron and settings."""
        return f"{data['neuron']}: states of {data['bits']} bits, overflow={data['overflow']}, leak={data['leak']}"
