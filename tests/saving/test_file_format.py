"""The file format: what this version wrote is read by every later one, and by other programs."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snncompress_baselines import WeightMagnitude
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import load, plan_of, save
from snncompress.commands.main import main
from snncompress.saving.container import Container
from snncompress.saving.describing import describe

DATA = Path(__file__).parent.parent / "data"
FIXTURES = [DATA / "format1.safetensors", DATA / "format2.safetensors"]
"""Written by ``save(small(), …)`` in format 1, and by ``save(load(…, into=build()), …)`` of that in format 2."""
WEIGHTS = "045734966fcb4a0cb9e7f4209c2b45185bf2488981b064e5011dad4fa6d56d6c"


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = layer.Conv2d(channels, channels, 3, padding=1), layer.BatchNorm2d(channels)
        self.fire = neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fire(self.norm(self.conv(x)))


def build() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(2, 8, 3), layer.BatchNorm2d(8), neuron.LIFNode(), Residual(8), Residual(8),
        layer.ConvTranspose2d(8, 6, 2, stride=2), neuron.IFNode(), layer.Flatten(), layer.Linear(6 * 8 * 8, 20),
        neuron.LIFNode(), layer.Linear(20, 5),
    )  # fmt: skip


def small() -> nn.Module:
    """Every kind of edit, both forms of masks, floats and codes, a scale per channel."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"data": (torch.rand(4, 2, 6, 6), torch.arange(4)), "timesteps": 4}
    net = snncompress.apply(build(), "ablation", 0.5, None, **options)
    net = snncompress.apply(net, "magnitude", 0.25, None, **options)
    sparse = WeightMagnitude(scope="layer")
    net = snncompress.apply(net, sparse, {"8": 0.97, "5": 0.5, "10": 0.4}, None, **options)
    net = snncompress.apply(net, None, bits={"5": 3}, skip=[], quantizer=ReScaW(per_channel=True), **options)
    return snncompress.apply(net, None, bits={"8": 4, "0": 8}, skip=[], truncate=3, **options)


def digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(tensor := getattr(module, name, None), Tensor):
                total.update(tensor.detach().contiguous().numpy().data)
    return total.hexdigest()


@pytest.mark.parametrize("fixture", FIXTURES, ids=["format 1", "format 2"])
def test_what_was_written_is_read(fixture: Path) -> None:
    model = load(fixture, into=build())
    assert digest(model) == WEIGHTS
    assert {edit.kind for edit in plan_of(model).edits} == {
        "remove_block", "remove_channels", "mask_weights", "quantize_weights", "truncate_timesteps",
    }  # fmt: skip
    assert plan_of(model).timesteps == 3
    x = torch.rand(2, 2, 6, 6)
    assert snncompress.profile(model, x, timesteps=4).n_mac == 4 * 4 * 6 * 18
    every_step = snncompress.Conventions(direct_encoding="every step")
    assert snncompress.profile(model, x, timesteps=4, conventions=every_step).n_mac == 3 * 4 * 4 * 6 * 18


def test_it_is_still_written_like_that(tmp_path: Path) -> None:
    """Whatever zlib makes of it: the same bytes, deflated or not."""
    path = tmp_path / "again"
    save(load(FIXTURES[0], into=build()), path)
    ours, theirs = (Container.read(p) for p in (path, FIXTURES[1]))
    assert {**ours.data, "version": ""} == {**theirs.data, "version": ""}
    assert {name: plain(t) for name, t in ours.tensors.items()} == {n: plain(t) for n, t in theirs.tensors.items()}
    assert path.stat().st_size < FIXTURES[0].stat().st_size
    before = path.read_bytes()
    save(load(path, into=build()), path)
    assert path.read_bytes() == before


def plain(tensor: Tensor) -> bytes:
    content = tensor.numpy().tobytes()
    try:
        return zlib.decompress(content)
    except zlib.error:
        return content


def test_another_program_reads_it(tmp_path: Path) -> None:
    """The reader that stands in docs/format.md, word for word."""
    text = (Path(__file__).parent.parent.parent / "docs" / "format.md").read_text()
    space: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.S)[0], space)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 7, 3), neuron.IFNode(), nn.Flatten(), nn.Linear(7 * 16, 50), neuron.IFNode(), nn.Linear(50, 40)
    )
    for weights in (net[3].weight, net[5].weight):
        nn.init.normal_(weights, std=0.1)  # bells can be deflated, the first layer's 126 even ones can't
    options: dict[str, Any] = {"data": torch.rand(2, 2, 6, 6), "timesteps": 2, "skip": []}
    first = snncompress.apply(net, None, bits={"0": 3}, quantizer=ReScaW(per_channel=True), **options)
    second = snncompress.apply(first, None, bits={"3": 5}, quantizer=ReScaW(gamma="max", per_channel=False), **options)
    small = snncompress.apply(second, None, bits={"5": 11}, quantizer="uniform", **options)
    save(small, tmp_path / "net")
    forms = {name: how.get("form") for name, how in Container.read(tmp_path / "net").data["packed"].items()}
    assert forms == {"0.weight": None, "3.weight": "deflated", "5.weight": "deflated"}
    found = space["quantized_weights"](tmp_path / "net")
    assert set(found) == set(forms)
    for name, weight in found.items():
        assert np.array_equal(weight, small.get_submodule(name[0]).weight.detach().numpy()), name


def test_sizes_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    """Eq. 16 within 2 % is the file with each code at its bit width; on the disk are exactly the bytes of the table.

    Normal weights at γ = mean|W| = 0.798 σ: beyond 14/15 of that, 0.745 σ, are 45.6 %, half at each end; the 14 values
    between have 3.9 % each. H = 2 · 0.228 · log2(1/0.228) + 14 · 0.0389 · log2(1/0.0389) = 3.53 of 4 bits, 0.88.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(700, 900), neuron.IFNode())
    nn.init.normal_(net[0].weight)
    paper = ReScaW(gamma="l1_mean", per_channel=False)
    options: dict[str, Any] = {"data": torch.rand(2, 700), "timesteps": 1, "skip": [], "quantizer": paper}
    small = snncompress.apply(net, None, bits=4, **options)
    save(small, tmp_path / "small")
    plain, size = re.findall(r"total +([\d,]+) +([\d,]+)", describe(tmp_path / "small"))[0]
    formula = 1e6 * snncompress.profile(small, torch.rand(2, 700), timesteps=1).size_mb
    assert int(plain.replace(",", "")) == pytest.approx(formula, rel=0.02)
    assert int(size.replace(",", "")) == (tmp_path / "small").stat().st_size
    assert 0.88 < (tmp_path / "small").stat().st_size / formula < 0.9


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, path in enumerate(FIXTURES, 1):
        assert main(["info", str(path)]) == 0
        text = capsys.readouterr().out
        size = path.stat().st_size
        assert f"format{number}.safetensors: {size:,} bytes, format {number}, written by snncompress 0.1.0" in text
        assert re.search(r"8.weight +4-bit codes +\d+ +\d+", text)
        assert re.search(r"mask \d+ +bits or gaps +\d+ +\d+", text)
        assert re.search(rf"total +[\d,]+ +{size:,}\n", text)
        assert "timesteps=3" in text
        assert re.search(r"8: 4966 of 5120 weights removed", text)
        assert re.search(r"0: 2 of 8 channels removed", text)
        assert "5: quantizer=rescaw, bits=3" in text
    assert main(["info", str(tmp_path / "nothing")]) == 1
    assert "snncompress: " in (error := capsys.readouterr().err)
    assert "Traceback" not in error
