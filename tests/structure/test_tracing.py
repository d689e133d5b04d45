"""Tracing leaves nothing behind, and what it computes doesn't grow with time where the network repeats it."""

from __future__ import annotations

import gc

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

from snncompress.contract.detection import find_adapter
from snncompress.model.copying import plain_copy
from snncompress.running.data import Feed
from snncompress.structure import random_parameters, tracing, trial


def network() -> nn.Sequential:
    made = nn.Sequential(
        layer.Conv2d(1, 4, 3), neuron.LIFNode(), layer.Conv2d(4, 6, 3), neuron.LIFNode(), layer.Flatten(),
        layer.Linear(96, 3),
    )  # fmt: skip
    for module in made:
        module.step_mode = "m"
    return made


@pytest.mark.parametrize("timesteps", [1, 5])
def test_no_copy_and_no_activation_is_left_and_time_is_not_tried(
    timesteps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, noted = list[nn.Module](), list[tuple[int, ...]]()
    monkeypatch.setattr(tracing, "plain_copy", lambda *given: copies.append(plain_copy(*given)) or copies[-1])
    left = trial._left
    monkeypatch.setattr(trial, "_left", lambda x, gone: (noted.append(tuple(x.shape)), left(x, gone))[1])
    model = network()
    adapter = find_adapter(model)
    gc.collect()
    gc.disable()
    try:
        before = _with_a_graph()
        found = tracing.trace(model, adapter, Feed(adapter, torch.rand(timesteps, 2, 1, 8, 8)).example())
        assert _with_a_graph() == before
    finally:
        gc.enable()
    assert [len(group.names("out")) for group in found.groups] == [1, 1]
    assert [p.numel() for p in copies[0].parameters()] == [0] * 6
    assert all(p.numel() for p in model.parameters())
    convolved = [shape for shape in noted if shape[-2:] in ((6, 6), (4, 4))]
    assert convolved
    assert {len(shape) for shape in convolved} == {4}  # [N, C, h, w]: one timestep


def _with_a_graph() -> int:
    return sum(isinstance(o, Tensor) and o.grad_fn is not None for o in gc.get_objects() if type(o) is Tensor)


def test_numbers_are_written_again_and_again_in_any_layout() -> None:
    numbers = torch.arange(5.0)
    for tensor in (torch.empty(3, 4), torch.empty(4, 3).T, torch.empty(3, 4, dtype=torch.float64)):
        random_parameters._fill(tensor, numbers)
        assert tensor.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]
    one = torch.empty(())
    random_parameters._fill(one, torch.full((1,), 7.0))
    assert one == 7


class Counted(nn.Module):
    """How often it fired beside what it says, as a loss would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.m = nn.Linear(6, 8), neuron.IFNode(), nn.Linear(8, 7), neuron.IFNode()
        self.c = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.n(self.a(x))
        second = self.m(self.b(first))
        return self.c(second), first.sum() + second.sum()


def test_what_counts_spikes_is_told_as_such() -> None:
    model = Counted()
    adapter = find_adapter(model)
    found = tracing.trace(model, adapter, Feed(adapter, torch.rand(2, 6)).example())
    for name in "ab":
        assert found.skipped[name] == f"the channels of {name} are part of the model's output"


class Stacked(nn.Module):
    """Hands its potential and spikes on as one tensor, and takes them apart in the next timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Conv2d(1, 8, 3), neuron.IFNode(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        now = self.n(self.a(x))
        state = torch.zeros(2, *now.shape)
        for _ in range(3):
            v, z = state
            v = 0.5 * v * (1 - z) + now + self.b(z)
            state = torch.stack([v, v.sigmoid()])
        return self.c(state[1])


def test_channels_that_come_round_under_other_numbers_end() -> None:
    model = Stacked()
    adapter = find_adapter(model)
    found = tracing.trace(model, adapter, Feed(adapter, torch.rand(2, 1, 4, 4)).example())
    assert found.skipped.keys() == {"c"}
