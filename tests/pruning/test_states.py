"""apply(state_bits=…): which grids neurons get, and that plans, files, profiles and pruning go on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from snncompress_rescaw import ReScaW
from snntorch.functional.quant import state_quant
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snncompress
from snncompress import ModelError, NothingToDoWarning, OptionError, Plan, QuantizeStates, plan_of, profile
from snncompress.contract.detection import find_adapter
from snncompress.model.fixed_point import state_grid
from snncompress.structure.stages import stages

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 3


def convolutions() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(1, 6, 3, bias=False), layer.BatchNorm2d(6), neuron.LIFNode(detach_reset=True),
        layer.Conv2d(6, 8, 3), neuron.LIFNode(tau=3.0, v_reset=None),
        layer.Flatten(), layer.Linear(128, 4),
    )  # fmt: skip


def apply(model: nn.Module, bits: int | None = 4, **options: Any) -> nn.Module:
    given = {"state_bits": 8, "data": X, "timesteps": 3, "progress": False, "ratio": None, **options}
    return snncompress.apply(model, given.pop("criterion", None), given.pop("ratio"), bits, **given)


def ran(model: nn.Module, timesteps: int = 3) -> torch.Tensor:
    with torch.no_grad():
        found = torch.stack([model.eval()(X) for _ in range(timesteps)])
    for module in model.modules():
        if hasattr(module, "reset") and module is not model:
            module.reset()
    return found


def test_steps_are_those_of_the_weights_times_powers_of_two() -> None:
    """Weights s · (n - 1.5) are odd halves of s, which go through a norm of gain γ/σ and a leak of a third."""
    model = convolutions()
    model[1].weight.data = torch.linspace(-2, 2, 6)
    small = apply(model, skip=[])
    for at, gain in ((2, 0.5 * model[1].weight / (1 + 1e-5) ** 0.5), (4, torch.full((8,), 1365 / 4096))):
        weight = small[at - 2 if at == 2 else at - 1].weight
        unit = torch.stack([row.unique().diff().min() / 2 for row in weight]).detach() * gain.abs().detach()
        powers = torch.log2(state_grid(small[at]).step.flatten() / unit)
        assert torch.allclose(powers, powers.round(), atol=1e-3)
    assert [e.neuron for e in plan_of(small).edits if isinstance(e, QuantizeStates)] == ["2", "4"]
    assert state_grid(apply(model, None)[2]).step.shape == ()
    one = snncompress.apply(
        nn.Sequential(nn.Linear(64, 6), neuron.IFNode(), nn.Linear(6, 2)), None, bits=4, data=X.flatten(1), timesteps=2,
        quantizer=ReScaW(per_channel=False), state_bits=8, skip=[], progress=False,
    )  # fmt: skip
    assert state_grid(one[1]).step.shape == ()
    (stage,) = (s for s in stages(one, find_adapter(one), lambda net: net(X.flatten(1))) if s.neuron)
    assert (stage.state_bits, stage.threshold_bits) == (8, 8)


def test_the_least_error() -> None:
    """Potentials 1 and -8/3 and θ = 1 are 3, -8 and 3 thirds, and 4 bits hold no less than -8."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(v_threshold=1.0))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, -8 / 3]])
    small = apply(net, None, data=torch.ones(2, 2), timesteps=1, state_bits=4)
    assert torch.isclose(state_grid(small[1]).step, torch.tensor(1 / 3))


def test_replayed_kept_in_a_file_priced_and_pruned(tmp_path: Path) -> None:
    model = convolutions()
    small = apply(model, skip=[], state_leak="shift")
    plan = plan_of(small)
    assert Plan.from_json(plan.to_json()) == plan
    assert "overflow=saturate, leak=shift" in str(plan)
    again = plan.apply(model)
    again.load_state_dict(small.state_dict())
    snncompress.save(small, tmp_path / "small.safetensors")
    loaded = snncompress.load(tmp_path / "small.safetensors", into=convolutions())
    wanted = ran(small)
    assert wanted.any()
    assert all(torch.equal(ran(model), wanted) for model in (again, loaded))
    frozen = ran(snncompress.freeze(small, X, timesteps=3))
    assert torch.allclose(frozen, wanted, atol=1e-5)
    rows = {row.name: row for row in profile(small, X, timesteps=3).layers}
    assert (rows["2"].bits, rows["2"].state_mb) == (8, 6 * 36 / 1e6)
    slim = apply(small, None, state_bits=None, criterion="magnitude", ratio={"0": 0.5}, repair=None)
    assert state_grid(slim[2]).step.shape == (3, 1, 1)
    replayed = plan_of(slim).apply(model)
    replayed.load_state_dict(slim.state_dict())
    assert torch.equal(ran(replayed), ran(slim))


def test_trained_through() -> None:
    model = convolutions()
    seen = []

    def tune(net: nn.Module) -> None:
        seen.append(state_grid(net[2]) is not None)
        net(X).square().sum().backward()
        seen.append(bool(net[0].parametrizations.weight.original.grad.any()))

    apply(model, skip=[], finetune=tune, state_bits={"2": 6})
    assert seen == [True, True]


def test_states_that_snntorch_rounds_itself_are_kept() -> None:
    """Sixteen levels are 4 bits."""
    net = nn.Sequential(nn.Linear(64, 4), snn.Leaky(0.9, init_hidden=True, state_quant=state_quant(num_bits=4)))
    with pytest.warns(NothingToDoWarning, match="its state has 4 bits by snntorch's own means"):
        small = snncompress.apply(net, None, bits=None, data=X.flatten(1), timesteps=2, state_bits=8)
    assert profile(small, X.flatten(1), timesteps=2).layers[-1].bits == 4


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"state_bits": 2}, OptionError, "state_bits must be a whole number from 3 to 32"),
        ({"state_bits": {"lif9": 8}}, OptionError, "'lif9' matches no neuron. The model's: 1"),
        ({"state_overflow": "carry"}, OptionError, "state_overflow must be 'saturate' or 'wrap'"),
        ({"state_leak": "none"}, OptionError, "state_leak must be 'exact' or 'shift'"),
        ({}, ModelError, r"The state of 1 \(Alpha\) can't be put on a grid of 8 bits.*'1': None"),
    ],
)
def test_what_cant_be_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    net = nn.Sequential(nn.Linear(64, 4), snn.Alpha(0.9, 0.8, init_hidden=True))
    with pytest.raises(error, match=said):
        apply(net, None, data=X.flatten(1), **options)
