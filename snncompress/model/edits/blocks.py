"""Whole blocks that become a wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.network import WEIGHT_LAYERS, width
from snncompress.model.parametrizations import stored_weight, weight_mask
from snncompress.model.resizing import resize_inputs

from .base import Edit, find, integers

_EARLIER = ("project", "slice", "reinit")
"""What plans written by earlier versions call the weights of the layers behind a block; the last are new ones."""


@dataclass(frozen=True)
class Resized:
    """A weight layer whose inputs change from ``before`` to ``after`` channels (features of a linear layer)."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class RemoveBlock(Edit):
    """Put a wire in the place of module ``name``, and mend the widths of the layers that read it.

    ``resized`` layers keep the weights of their first input channels (zeros where there are more than before), or are
    ``fresh``: drawn anew, the same at every replay. What repair or training made of them the state_dict holds.
    """

    name: str
    resized: tuple[Resized, ...]
    fresh: bool = False
    kind: ClassVar[str] = "remove_block"

    def check(self, model: nn.Module) -> None:
        """The block must be there, and the layers behind it have the widths that the edit expects."""
        if not self.name or isinstance(find(model, self.name, "the plan removes it"), nn.Identity):
            raise PlanError(f"There is no block {self.name!r} to remove, or it is gone already.")
        for piece in self.resized:
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
        for piece in self.resized:
            size = stored_weight(find(model, piece.layer, "the plan changes its inputs")).numel()
            if size * piece.after > largest * max(1, piece.before):
                raise PlanError(f"{piece.layer} would grow from {piece.before} to {piece.after} inputs.")

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Replace the block, resize what reads it."""
        self.check(model)
        model.set_submodule(self.name, nn.Identity())
        for piece in self.resized:
            resize_inputs(model.get_submodule(piece.layer), piece.after, fresh=self.fresh)

    def describe(self) -> str:
        """The block, and the layers that got other inputs."""
        how = ", drawn anew" if self.fresh else ""
        resized = "".join(f", {r.layer} from {r.before} to {r.after} inputs{how}" for r in self.resized)
        return f"{self.name}: the block removed{resized}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RemoveBlock:
        """Also from what earlier versions wrote: ``repairs``, and ``repair`` in words."""
        if "repair" in data:
            if data["repair"] not in _EARLIER:
                raise ValueError(f"{data['repair']!r} is none of {', '.join(_EARLIER)}")
            data = {**data, "resized": data["repairs"], "fresh": data["repair"] == "reinit"}
        if not isinstance(data["fresh"], bool):
            raise TypeError(f"fresh is {data['fresh']!r}, not true or false")
        resized = tuple(Resized(str(r["layer"]), *integers([r["before"], r["after"]])) for r in data["resized"])
        return cls(str(data["name"]), resized, data["fresh"])
