"""A layer as a matrix: patches times rows are what the layer puts out, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from snncompress.model.patches import as_matrix, as_weight, outputs, patches, positions, samples_first

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Conv1d(3, 5, 3, padding="same"), (2, 3, 11)),
    (nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (2, 4, 5, 6)),
    (nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 4, 3, padding=2, groups=4), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_patches_times_rows_are_the_outputs(layer: Any, shape: tuple[int, ...], most: int) -> None:
    layer, x = layer.double(), torch.rand(shape, dtype=torch.float64)
    y = layer(x)
    where = positions(layer, y, most, torch.Generator().manual_seed(0))
    assert len(where) == min(most, max(1, y[0, 0].numel() if y.dim() > 2 else 1))
    made = torch.einsum("ngd,grd->ngr", patches(layer, x, where), as_matrix(layer, layer.weight))
    made = made + layer.bias.view(made.shape[1], -1)
    torch.testing.assert_close(made, outputs(layer, y, where), rtol=1e-12, atol=1e-12)
    assert torch.equal(as_weight(layer, as_matrix(layer, layer.weight), layer.weight), layer.weight)


@pytest.mark.parametrize(("layer", "shape"), LAYERS[:3], ids=["linear", "1-D", "2-D"])
def test_leading_axes_are_samples(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.rand(3, *shape)
    assert torch.equal(samples_first(layer, x), x.flatten(0, 1))
    assert torch.equal(samples_first(layer, x[0, 0]), x[0, :1])
