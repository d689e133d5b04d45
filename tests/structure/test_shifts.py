"""Batch norms and depthwise convolutions between neurons and the layer that reads them: silent channels add to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import snncompress
from snncompress import PlanError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, outputs

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fire() -> nn.Module:
    return neuron.LIFNode(v_threshold=0.1)


def drawn(norm: nn.Module) -> nn.Module:
    """With statistics and parameters of its own."""
    for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.2, 0.2)):
        if getattr(norm, name) is not None:
            nn.init.uniform_(getattr(norm, name), low, high)
    return norm


def norm(channels: int = 8) -> nn.Module:
    return drawn(nn.BatchNorm2d(channels))


def between(*modules: nn.Module, reader: nn.Module, behind: int) -> nn.Module:
    """Neurons, what is tried, and a layer that reads it."""
    rest = (fire(), nn.Flatten(), nn.Linear(behind, 3))
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), fire(), *modules, reader, *rest).double().eval()


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def depthwise(padding: int = 1, *, bias: bool = True) -> nn.Module:
    return nn.Conv2d(8, 8, 3, groups=8, padding=padding, bias=bias)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "1 x 1": lambda: between(norm(), reader=nn.Conv2d(8, 6, 1, bias=False), behind=384),
    "no border": lambda: between(norm(), nn.MaxPool2d(2), reader=nn.Conv2d(8, 6, 3), behind=24),
    "a border like what it borders": lambda: between(
        norm(), reader=nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"), behind=384
    ),
    "a flatten": lambda: between(norm(), nn.AvgPool2d(4), nn.Flatten(), reader=nn.Linear(32, 6), behind=6),
    "channels last": lambda: between(norm(), nn.AvgPool2d(4), ChannelsLast(), reader=nn.Linear(32, 6), behind=6),
    "behind a flatten": lambda: between(
        nn.AvgPool2d(4), nn.Flatten(), drawn(nn.BatchNorm1d(32)), reader=nn.Linear(32, 6, bias=False), behind=6
    ),
    "two": lambda: between(norm(), norm(), reader=nn.Conv2d(8, 6, 1), behind=384),
    "no statistics": lambda: between(
        drawn(nn.BatchNorm2d(8, track_running_stats=False)), reader=nn.Conv2d(8, 6, 1), behind=384
    ),
    "no parameters": lambda: between(drawn(nn.BatchNorm2d(8, affine=False)), reader=nn.Conv2d(8, 6, 1), behind=384),
    "depthwise": lambda: between(depthwise(), reader=nn.Conv2d(8, 6, 1), behind=384),
    "separable": lambda: between(depthwise(bias=False), norm(), reader=nn.Conv2d(8, 6, 1, bias=False), behind=384),
    "both ways": lambda: between(norm(), depthwise(0), norm(), reader=nn.Conv2d(8, 6, 1, bias=False), behind=216),
}
BORDERED: dict[str, Callable[[], nn.Module]] = {
    "zeros at the border": lambda: between(norm(), reader=nn.Conv2d(8, 6, 3, padding=1), behind=384),
    "a depthwise border": lambda: between(norm(), depthwise(), reader=nn.Conv2d(8, 6, 1), behind=384),
    "transposed": lambda: between(norm(), reader=nn.ConvTranspose2d(8, 6, 2, 2), behind=1536),
}


def pruned(model: nn.Module) -> nn.Module:
    return snncompress.apply(model, "random", 0.5, None, data=X, timesteps=3, skip=[], repair=None)


@pytest.mark.parametrize("name", EXACT)
def test_what_silent_channels_add_goes_to_the_bias(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EXACT[name]()
    small = pruned(model)
    assert small[0].out_channels == 4
    feed = Feed(find_adapter(model), X, 3)
    assert largest_difference(model, small, feed) < 1e-9
    plan = snncompress.plan_of(small)
    assert "when silent" in str(plan.edits[0].describe())
    again = snncompress.Plan.from_json(plan.to_json()).apply(model)
    snncompress.save(small, tmp_path / "small")
    loaded = snncompress.load(tmp_path / "small", into=EXACT[name]())
    for other in (again, loaded):
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), small.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("name", BORDERED)
def test_what_no_bias_can_take_up_stays(name: str) -> None:
    torch.manual_seed(0)
    small = pruned(BORDERED[name]())
    assert small[0].out_channels == 8
    assert "something adds to silent channels" in snncompress.plan_of(small).skipped["0"]


def test_a_constant_by_hand() -> None:
    """0 becomes (0 - 1) · 2 / √(3 + 1) + 4 = 3, and of it a reader with weights 1 and 2 makes 9, beside its bias 5."""
    norm = nn.BatchNorm1d(2, eps=1.0)
    model = nn.Sequential(
        nn.Linear(3, 2), neuron.IFNode(), norm, nn.Linear(2, 1), neuron.IFNode(), nn.Linear(1, 1)
    ).eval()
    for tensor, value in ((norm.running_mean, 1), (norm.weight, 2), (norm.running_var, 3), (norm.bias, 4)):
        nn.init.constant_(tensor, value)
    model[3].weight.data, model[3].bias.data = torch.tensor([[7.0, 3.0]]), torch.tensor([5.0])
    small = snncompress.apply(
        model, "magnitude", {"0": 0.5}, None, data=torch.rand(2, 3), timesteps=2, skip=[], repair=None
    )
    kept = 7.0 if 1 in snncompress.plan_of(small).removed_channels()["0"] else 3.0
    assert small[3].weight.item() == kept
    assert small[3].bias.item() == 5 + 3 * (10 - kept)


def test_repair_and_training_go_on_from_there() -> None:
    torch.manual_seed(0)
    model = EXACT["separable"]()
    y = torch.arange(3)
    small = snncompress.apply(
        model, "random", 0.5, None, data=(X, y), timesteps=3, skip=[], repair="membrane", finetune=1
    )
    assert small[0].out_channels == 4
    frozen = snncompress.freeze(small, X, timesteps=3)
    feed = Feed(find_adapter(model), X, 3)
    assert torch.allclose(outputs(small.eval(), feed)[0], outputs(frozen, feed)[0])


def test_a_plan_that_moves_what_cannot_be_moved() -> None:
    torch.manual_seed(0)
    model = EXACT["1 x 1"]()
    data = json.loads(snncompress.plan_of(pruned(model)).to_json())
    (shift,) = data["edits"][0]["shifts"]
    for wrong in ({"through": ["1"]}, {"through": ["3"]}, {"reader": "0"}, {"through": ["9"]}):
        data["edits"][0]["shifts"] = [{**shift, **wrong}]
        with pytest.raises(PlanError):
            snncompress.Plan.from_json(json.dumps(data)).apply(model)
    for bad in ({"through": []}, {"adjacent": 1}):
        data["edits"][0]["shifts"] = [{**shift, **bad}]
        with pytest.raises(PlanError):
            snncompress.Plan.from_json(json.dumps(data))
