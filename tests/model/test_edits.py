"""An edit owns itself: a new kind needs nothing but its own class to be replayed, kept, described and saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snncompress import Edit, MaskWeights, Plan, PlanError, QuantizeWeights, load, plan_of, save
from snncompress.contract.detection import find_adapter
from snncompress.extend import Adapter
from snncompress.model.edits import base
from snncompress.saving.describing import describe


@pytest.fixture
def scale_weights() -> Iterator[type[Edit]]:
    """A sixth kind of edit, defined here and nowhere else."""

    @dataclass(frozen=True)
    class ScaleWeights(Edit):
        layer: str
        factors: tuple[float, ...]
        kind: ClassVar[str] = "scale_weights"

        def check(self, model: nn.Module) -> None:
            if len(model.get_submodule(self.layer).weight) != len(self.factors):
                raise PlanError("other channels")

        def apply(self, model: nn.Module, adapter: Adapter) -> None:
            self.check(model)
            with torch.no_grad():
                model.get_submodule(self.layer).weight *= torch.tensor(self.factors)[:, None]

        def describe(self) -> str:
            return f"{self.layer}: scaled"

        @classmethod
        def from_dict(cls, data: dict[str, Any]) -> Edit:
            return cls(str(data["layer"]), tuple(map(float, data["factors"])))

        def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
            tensors[name] = torch.tensor(self.factors)
            return {"edit": self.kind, "layer": self.layer, "tensor": name}

        @classmethod
        def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: base.Budget) -> list[Edit]:
            return [cls(data["layer"], tuple(tensors[data["tensor"]].tolist()))]

    yield ScaleWeights
    del base.KINDS["scale_weights"]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), neuron.IFNode(), nn.Linear(3, 2))


def test_a_new_edit_is_one_class(scale_weights: type[Edit], tmp_path: Path) -> None:
    edit = scale_weights("0", (1.0, 0.5, 2.0))
    plan = Plan((edit, QuantizeWeights("2", "uniform", 4, {"ste": "clip"})))
    assert Plan.from_json(plan.to_json()) == plan
    assert "0: scaled" in str(plan)
    model = plan.apply(build())
    assert torch.equal(model[0].weight, build()[0].weight * torch.tensor([[1.0], [0.5], [2.0]]))
    save(model, tmp_path / "net")
    assert "scale_weights: layer=0" in describe(tmp_path / "net")
    loaded = load(tmp_path / "net", into=build())
    assert plan_of(loaded) == plan
    assert torch.equal(loaded[0].weight, model[0].weight)
    with pytest.raises(PlanError, match="other channels"):
        Plan((scale_weights("0", (1.0,)),)).apply(build())


def test_an_edit_that_nobody_knows_is_refused() -> None:
    with pytest.raises(PlanError, match="KeyError 'scale_weights'"):
        base.edit_from_dict({"edit": "scale_weights", "layer": "0"})
    with pytest.raises(PlanError, match="can't replay 'mystery' edits"):
        type("Mystery", (Edit,), {"kind": "mystery"})().apply(build(), find_adapter(build()))
    del base.KINDS["mystery"]


def test_a_mask_takes_the_place_of_the_one_before() -> None:
    first, other = (MaskWeights.of(name, torch.tensor([[True, False]])) for name in ("0", "2"))
    second = MaskWeights.of("0", torch.tensor([[False, False]]))
    assert second.supersedes(first)
    assert not second.supersedes(other)
    assert not QuantizeWeights("0", "uniform", 4, {}).supersedes(first)
