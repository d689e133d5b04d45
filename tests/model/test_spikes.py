"""Spikes of a byte each behave as the floats they stand for, or refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snncompress import DataError
from snncompress.model.spikes import Emitted, EmittedBytes, Spikes, counts_of, in_float

BYTES = torch.randint(0, 2, (2, 3, 4, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MAPS = BYTES[0].contiguous(memory_format=torch.channels_last)

STAY = {
    "view": lambda x: x.contiguous().view(3, -1),
    "flatten": lambda x: x.flatten(1),
    "index": lambda x: x[1:, :2, ..., None],
    "iterate": lambda x: list(x)[2],
    "stack": lambda x: torch.stack([x, x.flip(0)], 1),
    "cat": lambda x: torch.cat((x, x), dim=1),
    "split": lambda x: x.chunk(2, 1)[1],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "sum of two": lambda x: x + x.flip(0) + x,
    "product of two": lambda x: x * x.flip(0),
    "in place": lambda x: x.clone().add_(x),
    "max pool": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "uneven": nn.MaxPool2d((2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
    "dropout": nn.Dropout().eval(),
}
LEAVE = {
    "scaled": lambda x: x * 0.5,
    "shifted": lambda x: 1 - x,
    "less": lambda x: x - 2,
    "mean": lambda x: x.mean((2, 3)),
    "average": nn.AvgPool2d(2),
    "ceil": nn.MaxPool2d(4, ceil_mode=True),
    "with floats": lambda x: torch.cat([x, in_float(x) / 2]),
    "convolution": lambda x: F.conv2d(x, torch.ones(1, 4, 2, 2)),
    "double": lambda x: x.double() / 3,
    "operator": lambda x: torch.ops.aten.mul.Tensor(x, 0.3),
    "many": lambda x: sum([x] * 200),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "into floats": lambda x: torch.ones(3, 4, 6, 6).add_(x),
}


@pytest.mark.parametrize("what", [*STAY, *LEAVE])
def test_as_floats(what: str) -> None:
    func: Callable[[Any], Tensor] = {**STAY, **LEAVE}[what]
    spikes = Spikes(MAPS)
    made, wanted = func(spikes), func(in_float(spikes))
    assert isinstance(made, Spikes) == (what in STAY)
    assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(in_float(made), wanted)
    if isinstance(made, Spikes):
        assert int(made.counts.max()) <= made.most[0]
    assert torch.equal(spikes.counts, MAPS)


def test_about_them() -> None:
    spikes = Spikes(BYTES)
    assert (spikes.shape, spikes.dtype, len(spikes), spikes.dim()) == (BYTES.shape, torch.float32, 2, 5)
    assert (spikes.is_floating_point(), spikes.requires_grad) == (True, False)
    assert float(spikes.sum()) == int(BYTES.sum())
    assert "Spikes" not in repr(spikes)


def test_views_share_what_is_added() -> None:
    spikes = Spikes(BYTES.clone())
    view = spikes.view(-1)
    spikes += Spikes(BYTES)
    assert torch.equal(in_float(view), 2 * BYTES.view(-1).float())
    assert view.most == [2]


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.__iadd__(0.5),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.ops.aten.mul_.Tensor(x, 2.0),
    ],
)
def test_they_can_not_be_written_into(write: Callable[[Tensor], Any]) -> None:
    spikes = Spikes(MAPS.clone())
    with pytest.raises(DataError, match="integer=False"):
        write(spikes)
    assert torch.equal(spikes.counts, MAPS)


@pytest.mark.parametrize("odd", [0.5, -1.0, 128.0, float("nan"), float("inf"), 1e-9])
def test_what_is_not_whole_is_seen(odd: float) -> None:
    x = torch.tensor([0.0, 3.0, 127.0])
    assert torch.equal(counts_of(x), torch.tensor([0, 3, 127], dtype=torch.uint8))
    x[1] = odd
    assert counts_of(x) is None
    assert counts_of(Spikes(BYTES, [128])) is None


@pytest.mark.parametrize("emitted", [Emitted, EmittedBytes])
def test_emitted(emitted: type[Emitted]) -> None:
    """Timesteps that are all the same in memory get spikes of their own, in their layout."""
    x = torch.arange(12.0).view(1, 2, 3, 1, 2).contiguous().expand(4, 2, 3, 1, 2)
    emission = emitted(x)
    for t, (current, fired) in enumerate(emission.steps()):
        torch.ge(current, float(3 * t), out=fired)
    wanted = torch.stack([(x[0] >= 3 * t).float() for t in range(4)])
    assert torch.equal(in_float(emission.spikes), wanted)
