"""Single weights that are held at zero."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.base.packing import pack_mask, unpack_mask
from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import computed_weight, mask_weight, stored_weight

from .base import Budget, Edit, find, integers


@dataclass(frozen=True)
class MaskWeights(Edit):
    """Hold single weights of ``layer`` at zero.

    ``kept`` is the mask as text: a bit per weight, 1 = it exists, in the order of the weight's memory (first bit
    highest), in base64. A mask that the layer has already stays in force beside it.
    """

    layer: str
    shape: tuple[int, ...]
    kept: str
    kind: ClassVar[str] = "mask_weights"

    @classmethod
    def of(cls, layer: str, kept: Tensor) -> MaskWeights:
        """The edit for a boolean mask of the weight's shape."""
        bits = np.packbits(kept.cpu().numpy())
        return cls(layer, tuple(kept.shape), base64.b64encode(bits.tobytes()).decode())

    def mask(self) -> Tensor:
        """The mask as a boolean tensor; raises PlanError where ``kept`` isn't one of this shape."""
        bits = np.unpackbits(np.frombuffer(self._bits(), dtype=np.uint8), count=math.prod(self.shape))
        return torch.from_numpy(bits.view(bool)).view(self.shape)

    def _bits(self) -> bytes:
        size = math.prod(self.shape)
        try:
            packed = base64.b64decode(self.kept, validate=True)
        except ValueError as error:
            raise PlanError(f"{self.layer}: its mask isn't base64: {error}.") from error
        if min(self.shape, default=0) < 0 or len(packed) != (size + 7) // 8:
            raise PlanError(f"{self.layer}: a mask of {len(packed)} bytes for a weight of shape {list(self.shape)}.")
        return packed

    def check(self, model: nn.Module) -> None:
        """The layer must be there, with a weight of this shape that is its own parameter."""
        module = find(model, self.layer, "the plan removes weights of it")
        if not isinstance(module, WEIGHT_LAYERS):
            raise PlanError(f"{self.layer} is a {type(module).__name__}, of which no single weights can be removed.")
        if why := computed_weight(module):
            raise PlanError(f"Weights of {self.layer} can't be removed: {why}. Make it a plain parameter first.")
        if (found := tuple(stored_weight(module).shape)) != self.shape:
            raise PlanError(
                f"{self.layer} has a weight of shape {list(found)}, the plan's mask is {list(self.shape)}. The model "
                f"isn't of the architecture that the plan was made for, or was compressed already."
            )
        self._bits()

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the mask before the layer's weight."""
        self.check(model)
        mask_weight(layer_at(model, self.layer), self.mask())

    def supersedes(self, earlier: Edit) -> bool:
        """A mask leaves out all that the same layer's mask before it did."""
        return isinstance(earlier, MaskWeights) and earlier.layer == self.layer

    def describe(self) -> str:
        """Layer and numbers."""
        kept = self.mask()
        return f"{self.layer}: {kept.numel() - int(kept.sum())} of {kept.numel()} weights removed"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MaskWeights:
        """The shape must be whole numbers."""
        shape = integers(data["shape"])
        if len(shape) > 8 or min(shape, default=0) < 0:
            raise ValueError(f"a weight of shape {str(shape)[:80]}")
        return cls(str(data["layer"]), shape, str(data["kept"]))

    def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The mask as a tensor of bytes: bits, or the gaps between weights that exist where that is less."""
        kept = self.mask().numpy().reshape(-1)
        form, packed = pack_mask(kept)
        tensors[name] = torch.tensor(packed)
        count = {"weights": int(kept.sum())} if form.startswith("deflated") else {}
        return {**self.to_dict(), "kept": {"form": form, "tensor": name, **count}}

    @classmethod
    def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: Budget) -> list[Edit]:
        """As many entries are spent as the weight has."""
        size = _size(data)
        budget.spend(size)
        packed = tensors.pop(data["kept"]["tensor"])
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            raise PlanError(f"A mask is stored as bytes, not as {packed.dtype} {list(packed.shape)}.")
        kept = unpack_mask(data["kept"]["form"], np.asarray(packed), size)
        if data["kept"].get("weights", count := int(np.count_nonzero(kept))) != count:
            raise PlanError(f"A mask of {count} weights is said to be one of {str(data['kept']['weights'])[:40]}.")
        return [cls.of(str(data["layer"]), torch.from_numpy(kept).view(data["shape"]))]

    @classmethod
    def summary(cls, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Layer and numbers."""
        size, kept = _size(data), data["kept"].get("weights")
        if kept is None:  # not deflated
            packed = tensors[data["kept"]["tensor"]].numpy()
            kept = int((packed != 255).sum() if data["kept"]["form"] == "gaps" else np.unpackbits(packed).sum())
        return f"{data['layer']}: {size - kept} of {size} weights removed"


def _size(data: dict[str, Any]) -> int:
    """How many weights a packed mask is about; raises PlanError for what is no shape."""
    shape = data["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise PlanError(f"A mask has the shape {str(shape)[:80]}.")
    return math.prod(shape)
