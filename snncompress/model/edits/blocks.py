"""Whole blocks that become a wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.network import WEIGHT_LAYERS, resize_inputs, width
from snncompress.model.parametrizations import stored_weight, weight_mask

from .base import Edit, find, integers

REPAIRS = ("project", "slice", "reinit")


@dataclass(frozen=True)
class Repair:
    """A weight layer whose inputs change from ``before`` to ``after`` channels (features of a linear layer)."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class RemoveBlock(Edit):
    """Put a wire in the place of module ``name``, and mend the widths of the layers that read it.

    ``repair`` says how their weights came about: "slice" keeps the first input channels (zeros where there are more
    than before), "reinit" draws new ones, "project" fits them to calibration data. A replay can't know the data, so
    it slices; loading the state_dict brings the weights.
    """

    name: str
    repairs: tuple[Repair, ...]
    repair: str
    kind: ClassVar[str] = "remove_block"

    def check(self, model: nn.Module) -> None:
        """The block must be there, and the layers behind it have the widths that the edit expects."""
        if not self.name or isinstance(find(model, self.name, "the plan removes it"), nn.Identity):
            raise PlanError(f"There is no block {self.name!r} to remove, or it is gone already.")
        for piece in self.repairs:
            module = find(model, piece.layer, "the plan changes its inputs")
            if not isinstance(module, WEIGHT_LAYERS):
                raise PlanError(f"{piece.layer} is a {type(module).__name__}, whose inputs can't be changed.")
            if (found := width(module, "in")) != piece.before:
                raise PlanError(f"{piece.layer} has {found} inputs, the plan expects {piece.before}.")
            if piece.after < 1 or getattr(module, "groups", 1) != 1 or weight_mask(module) is not None:
                raise PlanError(
                    f"{piece.layer} can't be given {piece.after} inputs: it is a grouped convolution, or weights of it "
                    f"are masked. Remove blocks first, then single weights."
                )

    def check_growth(self, model: nn.Module, largest: int) -> None:
        """Raise PlanError where a layer would get more than ``largest`` weights."""
        for piece in self.repairs:
            size = stored_weight(find(model, piece.layer, "the plan changes its inputs")).numel()
            if size * piece.after > largest * max(1, piece.before):
                raise PlanError(f"{piece.layer} would grow from {piece.before} to {piece.after} inputs.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Replace the block, resize what reads it."""
        self.check(model)
        model.set_submodule(self.name, nn.Identity())
        for piece in self.repairs:
            resize_inputs(model.get_submodule(piece.layer), piece.after, fresh=self.repair == "reinit")

    def describe(self) -> str:
        """The block, and the layers that were fitted."""
        fitted = "".join(f", {r.layer} fitted from {r.before} to {r.after} inputs" for r in self.repairs)
        return f"{self.name}: the block removed{fitted} (repair={self.repair})"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RemoveBlock:
        """The repair must be a known one."""
        repairs = tuple(Repair(str(r["layer"]), *integers([r["before"], r["after"]])) for r in data["repairs"])
        if data["repair"] not in REPAIRS:
            raise ValueError(f"{data['repair']!r} is none of {', '.join(REPAIRS)}")
        return cls(str(data["name"]), repairs, str(data["repair"]))
