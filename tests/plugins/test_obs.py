from __future__ import annotations

import pytest
import snntorch as snn
import torch
from snncompress_obs import OBS
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snncompress
from snncompress import OptionError, plan_of
from snncompress.extend import Inputs, Layer


def moments(u: torch.Tensor) -> Inputs:
    """Of samples [n, D] without leak."""
    u = u.double()
    gram = (u.T @ u)[None]
    return Inputs(gram.diagonal(dim1=1, dim2=2), u.sum(0)[None], float(len(u)), gram)


def make_layer(weight: torch.Tensor, inputs: Inputs | None) -> Layer:
    return Layer("fc", nn.Linear(*weight.shape[::-1]), weight, None, None, (), torch.Generator(), inputs)


def test_a_saliency_is_what_is_lost_when_the_others_are_fitted_again() -> None:
    torch.manual_seed(0)
    u, weight = torch.rand(50, 4).double() @ torch.rand(4, 4).double(), torch.randn(3, 4).double()
    score = OBS("layer", damping=0.0).score(make_layer(weight, moments(u)), None)
    wanted = u @ weight.T
    for j in range(4):  # by brute force: least squares without input j, with an intercept
        rest = torch.cat([u[:, [i for i in range(4) if i != j]], torch.ones(50, 1).double()], 1)
        left = wanted - rest @ torch.linalg.lstsq(rest, wanted).solution
        assert torch.allclose(score[:, j], left.square().sum(0), rtol=1e-6)


def test_two_inputs_that_say_the_same_are_cheap() -> None:
    torch.manual_seed(0)
    u = torch.rand(50, 3)
    u[:, 1] = u[:, 0] + 0.01 * torch.rand(50)
    score = OBS("layer").score(make_layer(torch.ones(1, 3), moments(u)), None)
    assert float(score[0, :2].max()) < 0.1 * float(score[0, 2])


def test_without_a_gram_matrix_inputs_count_as_independent() -> None:
    inputs = Inputs(torch.tensor([[5.0, 2.0]]).double(), torch.tensor([[2.0, 0.0]]).double(), 4.0, None)
    score = OBS("layer", damping=0.0).score(make_layer(torch.tensor([[1.0, 2.0]]), inputs), None)
    assert score.tolist() == [[4.0, 8.0]]  # 1² · (5 − 2² / 4), 2² · 2


def test_a_layer_that_was_never_called_is_scored_by_magnitude() -> None:
    assert OBS("layer").score(make_layer(torch.tensor([[1.0, -3.0]]), None), None).tolist() == [[1.0, 9.0]]


@pytest.mark.parametrize("options", [{"scope": "all"}, {"damping": -1.0}, {"damping": float("nan")}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="obs"):
        OBS(**options)  # type: ignore[arg-type]


def net(framework: str) -> nn.Module:
    torch.manual_seed(0)
    if framework == "snntorch":
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, groups=2), snn.Leaky(0.8, init_hidden=True), nn.ConvTranspose2d(8, 4, 3, groups=2),
            snn.Leaky(0.8, init_hidden=True), nn.Flatten(), nn.Linear(256, 5),
        )  # fmt: skip
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(), layer.Flatten(),
        layer.Linear(288, 16), neuron.LIFNode(), layer.Linear(16, 5),
    )  # fmt: skip


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_it_removes_what_it_was_asked_to(framework: str) -> None:
    model = net(framework)
    small = snncompress.apply(model, "obs", 0.75, 4, data=3 * torch.rand(16, 2, 8, 8), timesteps=4)
    weights = [m.weight for m in small.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == pytest.approx(0.75 * total, abs=1)
    assert plan_of(small).origin["criterion"] == {"name": "obs", "options": {"scope": "global", "damping": 0.01}}
