"""Timesteps that no longer run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from snncompress.errors import ModelError, PlanError
from snncompress.interfaces import Adapter
from snncompress.model.modules import limit_timesteps

from .base import MOST, Edit, find


@dataclass(frozen=True)
class TruncateTimesteps(Edit):
    """Run the first ``timesteps`` steps only.

    ``way`` says how a model is made to stop: ``"input"``: a hook cuts the model's input, whose time stands on
    ``axis``; ``"attribute"``: its own loop counts ``attribute`` of ``module`` ("" is the model itself), which is set;
    ``"loop"``: it is called once per timestep, so whoever calls it must stop: all that takes ``timesteps=`` here does,
    and a loop of your own asks ``plan_of(model).timesteps``. Raises PlanError for values that can't be.
    """

    timesteps: int
    way: str = "loop"
    module: str = ""
    attribute: str = ""
    axis: int = 0
    kind: ClassVar[str] = "truncate_timesteps"

    def __post_init__(self) -> None:
        if type(self.timesteps) is not int or not 1 <= self.timesteps <= MOST:
            raise PlanError(f"A model runs a whole number of timesteps, 1 to {MOST}, not {str(self.timesteps)[:80]}.")
        if self.way not in ("loop", "input", "attribute"):
            raise PlanError(f"Timesteps are truncated by 'loop', 'input' or 'attribute', not {self.way!r}.")
        if type(self.axis) is not int or not 0 <= self.axis < 64:  # torch's most dimensions
            raise PlanError(f"The time axis of an input is a whole number from 0 to 63, not {str(self.axis)[:80]}.")
        if not (isinstance(self.module, str) and isinstance(self.attribute, str)):
            raise PlanError(f"module and attribute must be names, not {self.module!r} and {self.attribute!r}.")

    def check(self, model: nn.Module) -> None:
        """The attribute must be there, and count at least as many steps."""
        if self.way != "attribute":
            return
        module = find(model, self.module, f"the plan sets its {self.attribute!r}")
        found = vars(module).get(self.attribute)
        if type(found) is not int or found < self.timesteps:
            raise PlanError(
                f"{self.module or type(model).__name__} has no whole number {self.attribute!r} of at least "
                f"{self.timesteps} to count its timesteps ({self.attribute} = {found!r}). Is it another architecture?"
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Cut the input, set the attribute, or leave word for those who call the model."""
        self.check(model)
        if self.way == "input":
            model.register_forward_pre_hook(FirstSteps(self.timesteps, self.axis), with_kwargs=True)
        elif self.way == "attribute":
            setattr(model.get_submodule(self.module), self.attribute, self.timesteps)
        else:
            limit_timesteps(model, self.timesteps)

    def describe(self) -> str:
        """How many timesteps, and how the model is made to stop."""
        where = f" ({self.attribute} of {self.module or 'the model'})" if self.way == "attribute" else f" ({self.way})"
        return f"truncated to timesteps={self.timesteps}{where}"


@dataclass
class FirstSteps:
    """A forward pre-hook that keeps the first ``timesteps`` along ``axis`` of a model's first tensor.

    It expects the number of dimensions that it met first: in another step mode it would cut samples instead.
    """

    timesteps: int
    axis: int
    dims: int | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the model is called instead."""
        values = [*args, *named.values()]
        for position, x in enumerate(values):
            if isinstance(x, Tensor):
                self.dims = x.dim() if self.dims is None else self.dims
                if x.dim() != self.dims:
                    raise ModelError(
                        f"{type(module).__name__} was truncated to {self.timesteps} timesteps for inputs of "
                        f"{self.dims} dimensions, and got {list(x.shape)}. Use it in the step mode of then."
                    )
                if x.dim() > self.axis:
                    values[position] = x.narrow(self.axis, 0, min(self.timesteps, x.shape[self.axis]))
                break
        return tuple(values[: len(args)]), dict(zip(named, values[len(args) :], strict=True))
