"""Networks whose rounding errors were passed on: on the quantizer's own grid, whatever it is, and stored exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from snncompress_rescaw import ReScaW, Uniform
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import OptionError, load, plan_of, save
from snncompress.extend import Quantizer

X = torch.rand(64, 2, 8, 8, generator=torch.Generator().manual_seed(3))
QUANTIZERS: list[Quantizer] = [
    *(ReScaW(gamma, per_channel) for gamma in ("mse", "max", "percentile", "l1_mean") for per_channel in (True, False)),
    Uniform(),
]


def net(*, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 12, 3, bias=False), layer.BatchNorm2d(12) if norm else nn.Identity(), neuron.LIFNode(),
        layer.Conv2d(12, 16, 3, groups=2), neuron.LIFNode(), layer.Flatten(),
        layer.Linear(256, 20), neuron.LIFNode(), layer.Linear(20, 5),
    )  # fmt: skip
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight.mul_(4)
    return model.eval()


def quantized(bits: Any, **options: Any) -> nn.Module:
    asked: dict[str, Any] = {"data": X, "timesteps": 4, "skip": [], **options}
    return snncompress.apply(net(), asked.pop("criterion", None), asked.pop("ratio", 0.0), bits, **asked)


def integrated(model: nn.Module, index: int) -> Tensor:
    """What the neurons behind a layer integrate (leak 1/2), [T, N, ...]."""
    seen: list[Tensor] = []
    handle = model[index].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    snncompress.evaluate(model, (X, torch.zeros(len(X), dtype=torch.long)), timesteps=4)
    handle.remove()
    potential, found = torch.zeros_like(seen[0]), []
    for current in seen[-4:]:
        potential = potential / 2 + current
        found.append(potential)
    return torch.stack(found)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("bits", [2, 8])
def test_every_quantizer_keeps_its_grid(quantizer: Quantizer, bits: int, tmp_path: Path) -> None:
    small = quantized(bits, quantizer=quantizer, criterion="weight_magnitude", ratio=0.3)
    grid = quantizer.tensor_quant(bits)
    for name in ("0", "3", "6", "8"):
        layer_, mask = small.get_submodule(name), small.get_submodule(name).parametrizations.weight[0].mask
        stored = layer_.parametrizations.weight.original.detach()
        assert torch.equal(layer_.weight, torch.where(mask, grid(torch.where(mask, stored, 0.0))[0], 0.0))
        rows = layer_.weight.detach().flatten(1)
        kept = mask.flatten(1)
        scaled_by_row = getattr(quantizer, "per_channel", False)
        for row, there in zip(rows, kept, strict=True) if scaled_by_row else [(rows.flatten(), kept.flatten())]:
            assert len(row[there].unique()) <= 2**bits
    again = plan_of(small).apply(net())
    again.load_state_dict(small.state_dict())
    save(small, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", net())
    for name in ("0", "3", "6", "8"):
        weight = small.get_submodule(name).weight
        assert torch.equal(weight, again.get_submodule(name).weight)
        assert torch.equal(weight, loaded.get_submodule(name).weight)


@pytest.mark.parametrize("quantizer", [ReScaW("max", True), ReScaW("mse", True), ReScaW("max", False)], ids=repr)
def test_less_is_lost_than_to_the_nearest(quantizer: Quantizer) -> None:
    wanted = integrated(net(), 6)
    lost = {}
    for rounding in ("nearest", "gptq"):
        small = quantized({"6": 2}, quantizer=quantizer, rounding=rounding)
        lost[rounding] = float((integrated(small, 6) - wanted).square().mean())
    assert lost["gptq"] < 0.7 * lost["nearest"]


def test_what_is_stored_still_knows_what_was_rounded_off() -> None:
    """Training starts from it: weights on the grid itself would all be half a step from moving."""
    for module in quantized(4, quantizer=Uniform()).modules():
        if hasattr(module, "parametrizations"):
            stored, value = module.parametrizations.weight.original, module.weight
            assert (stored != value).float().mean() > 0.9
            assert (stored - value)[value.abs() < 1].abs().max() < 1 / 15  # half a step of 2/15


def test_what_is_pruned_later_is_scored_by_weights_of_its_own() -> None:
    # At one bit every rounded weight is ±γ: of equal magnitudes the first would go, row by row.
    small = quantized(1, criterion="weight_magnitude", ratio=0.5)
    lost = (small[6].weight == 0).sum(1)
    assert int(lost.min()) > 0
    assert int(lost.max()) < small[6].weight.shape[1]


class PowersOfTwo(Quantizer):
    """No uniform grid: ±2^n."""

    name: ClassVar[str] = "powers_of_two"

    def tensor_quant(self, bits: int) -> nn.Module:
        class Quant(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                value = x.sign() * 2.0 ** x.abs().clamp_min(1e-9).log2().round().clamp(-(2 ** (bits - 1)), 0)
                return x + (value - x).detach(), torch.ones(()), torch.zeros(()), torch.tensor(float(bits))

        return Quant()


def test_what_has_no_grid_is_rounded_by_itself() -> None:
    near, passed = (quantized(3, quantizer=PowersOfTwo(), rounding=rounding) for rounding in ("nearest", "gptq"))
    for a, b in zip(near.parameters(), passed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_precisions(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    small = snncompress.apply(model, "magnitude", 0.25, 3, data=X.to(dtype), timesteps=4)
    assert small[3].weight.dtype == dtype
    assert len(small[3].weight.detach()[0].unique()) <= 8
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())


def test_the_plan_says_how() -> None:
    assert plan_of(quantized(4)).origin["rounding"] == "gptq"
    assert plan_of(quantized(4, rounding="nearest")).origin["rounding"] == "nearest"
    assert "rounding" not in plan_of(quantized(4, repair=None)).origin
    with pytest.raises(OptionError, match="rounding must be 'gptq' or 'nearest'"):
        quantized(4, rounding="stochastic")
