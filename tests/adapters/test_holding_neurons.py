"""Spiking neurons of the user's own that hold more than numbers: norms, lists, layers over time, recurrent layers."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

import snncompress
from snncompress import NothingToDoWarning

from .test_own_neurons import Case, Line, Step, Surrogate, run


class Holding(Surrogate):
    """Numbers for each channel in a norm, and in modules, mappings and lists."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm, self.gains = nn.BatchNorm1d(channels), nn.ParameterDict({"x": torch.rand(channels) + 1})
        self.more = {"x": [torch.rand(channels)]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(0, 1)).view(x.shape) * self.gains["x"]
        return super().forward(x + self.more["x"][0])


class Recurrent(Surrogate):
    """What fires comes back by a layer, or by a matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.layer, self.matrix = nn.Linear(channels, channels), nn.Parameter(torch.randn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out = [torch.zeros_like(x[0])]
        for current in x:
            s = out[-1]
            out.append(super().forward((current + self.layer(s) + s @ self.matrix)[None])[0])
        return torch.stack(out[1:])


class Mixing(Recurrent):
    """Layers that currents go through, not spikes."""

    def forward(self, x: Tensor) -> Tensor:
        return Surrogate.forward(self, self.layer(x))


@pytest.mark.parametrize("kind", [Holding, Recurrent])
def test_what_keeps_channels_apart_or_feeds_spikes_back_is_cut_along(kind: type[Surrogate]) -> None:
    case = Case(lambda: Line(kind), Surrogate, 0, torch.rand(6, 5, 8))
    model = case.build().eval()
    small = snncompress.apply(model, "magnitude", 0.5, None, data=case.x, skip=[], repair=None, **case.named)
    assert [len(small.get_submodule(n).weight) for n in ("f1", "f2")] == [8, 6]
    gone = snncompress.plan_of(small).removed_channels()
    with torch.no_grad():
        for name, neuron, reader in (("f1", model.a, model.f2), ("f2", model.b, model.f3)):
            reader.weight[:, gone[name]] = 0
            if kind is Recurrent:
                neuron.layer.weight[:, gone[name]] = 0
                neuron.matrix[gone[name]] = 0
    assert torch.allclose(run(small, case), run(model, case), atol=1e-5)


def test_neurons_whose_currents_are_mixed_stay_whole() -> None:
    case = Case(lambda: Line(Mixing), Surrogate, 0, torch.rand(6, 5, 8))
    with pytest.warns(NothingToDoWarning, match=r"a \(Mixing\) holds values .*, or they depend on one another"):
        snncompress.apply(case.build(), "magnitude", 0.5, None, data=case.x, skip=[], **case.named)


def test_a_neuron_that_holds_a_layer_over_time_is_cut() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            nn.init.constant_(self.fc.bias, -0.2)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, Step.apply(self.fc(x.movedim(0, -1)))).movedim(-1, 0)

    case = Case(lambda: Line(lambda c: Parallel()), Parallel, 0, torch.rand(6, 5, 8))
    model = case.build().eval()
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=case.x, skip=[], repair=None, **case.named)
    assert [len(small.get_submodule(n).weight) for n in ("f1", "f2", "a.fc")] == [8, 6, 6]
    gone = snncompress.plan_of(small).removed_channels()
    with torch.no_grad():
        model.f2.weight[:, gone["f1"]] = 0
        model.f3.weight[:, gone["f2"]] = 0
    assert torch.allclose(run(small, case), run(model, case), atol=1e-5)
