"""Weights that go onto a grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from snncompress.contract.registry import registry
from snncompress.errors import OptionError, PlanError
from snncompress.interfaces import Adapter, Quantizer
from snncompress.model.cells import layer_at
from snncompress.model.parametrizations import computed_weight, quantize_weight, weight_bits

from .base import Budget, Edit, edit_from_dict, find


@dataclass(frozen=True)
class QuantizeWeights(Edit):
    """Fake-quantize the weight of ``layer`` to ``bits`` bits with the named quantizer and its options."""

    layer: str
    quantizer: str
    bits: int
    options: dict[str, Any]
    kind: ClassVar[str] = "quantize_weights"

    @classmethod
    def of(cls, layer: str, quantizer: Quantizer, bits: int) -> QuantizeWeights:
        """The edit for a quantizer instance."""
        return cls(layer, quantizer.name, bits, quantizer.options())

    def check(self, model: nn.Module) -> None:
        """The layer must be there, have a weight, and not be quantized yet."""
        module = find(model, self.layer, "the plan quantizes it")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"{self.layer} is a {type(module).__name__} without a weight to quantize.")
        if why := computed_weight(module):
            raise PlanError(
                f"{self.layer} can't be quantized: {why}. Make it a plain parameter first, or skip the layer."
            )
        if (bits := weight_bits(module)) is not None:
            raise PlanError(
                f"{self.layer!r} is already quantized to {bits} bits. Start from the float model, or leave bits=None."
            )

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the quantizer before the layer's weight."""
        self.check(model)
        cls = registry().find("quantizer", self.quantizer)
        try:
            quantizer = cls(**self.options)
        except TypeError as error:
            raise OptionError(f"Quantizer {self.quantizer!r} doesn't take {self.options}: {error}") from error
        quantize_weight(layer_at(model, self.layer), quantizer, self.bits)

    def describe(self) -> str:
        """Layer and settings."""
        settings = {"quantizer": self.quantizer, "bits": self.bits, "options": self.options}
        return f"{self.layer}: " + ", ".join(f"{key}={value}" for key, value in settings.items())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantizeWeights:
        """Bits must be 1 to 16."""
        bits, options = data["bits"], dict(data["options"])
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise PlanError(f"{data['layer']}: bits must be 1 to 16, not {bits!r}.")
        return cls(str(data["layer"]), str(data["quantizer"]), bits, options)

    def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """With a list of layers, which those of the same settings join."""
        data = self.to_dict()
        return {**{key: value for key, value in data.items() if key != "layer"}, "layers": [self.layer]}

    @staticmethod
    def merged(before: dict[str, Any], data: dict[str, Any]) -> bool:
        """Layers of the same settings, one after the other, are one entry."""
        if {**before, "layers": None} != {**data, "layers": None}:
            return False
        before["layers"] += data["layers"]
        return True

    @classmethod
    def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: Budget) -> Iterator[Edit]:
        """An edit per layer."""
        return (edit_from_dict({**data, "layer": layer}) for layer in data["layers"])

    @classmethod
    def summary(cls, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Layers and settings."""
        settings = {key: value for key, value in data.items() if key not in ("edit", "layers")}
        return f"{', '.join(data['layers'])}: " + ", ".join(f"{key}={value}" for key, value in settings.items())
