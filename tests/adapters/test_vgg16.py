"""The four VGG-16 rows of QP-SNN (ICLR 2025): parameters and sizes come out as printed."""

from __future__ import annotations

import warnings

import pytest
import torch

import snncompress
from benchmarks.vgg16 import vgg16

# classes, ratio of conv 1-7, of conv 8-12, millions of parameters, MB at 8, 4 and 2 bits
ROWS = [
    (10, 0.45, 0.51, "4.25", {8: "4.28", 4: "2.16", 2: "1.10"}),
    (10, 0.49, 0.80, "1.42", {8: "1.45", 4: "0.74", 2: "0.39"}),
    (100, 0.45, 0.70, "2.31", {8: "2.48", 4: "1.35", 2: "0.79"}),
    (100, 0.45, 0.78, "1.68", {8: "1.85", 4: "1.04", 2: "0.63"}),
]


@pytest.mark.parametrize(
    ("classes", "early", "late", "params", "sizes"),
    [pytest.param(*row, marks=pytest.mark.slow if number else ()) for number, row in enumerate(ROWS)],
)
def test_parameters_and_sizes(classes: int, early: float, late: float, params: str, sizes: dict[int, str]) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32)
    ratios = {f"conv{i}": early for i in range(1, 8)} | {f"conv{i}": late for i in range(8, 13)}
    pruned = None
    for bits, size in sizes.items():
        # magnitude: which channels go doesn't change how many are left
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", snncompress.SilentNeuronsWarning)
            compressed = snncompress.apply(vgg16(classes), "magnitude", ratios, bits, data=x, timesteps=1, repair=None)
        profile = snncompress.profile(compressed, x, timesteps=1)
        assert f"{profile.n_params / 1e6:.2f}" == params
        assert f"{profile.size_mb:.2f}" == size
        widths = [compressed.get_submodule(f"conv{i}").out_channels for i in range(1, 14)]
        assert pruned in (None, widths)
        pruned = widths
