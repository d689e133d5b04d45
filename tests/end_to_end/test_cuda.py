"""The whole road on a GPU: the model stays there, data come from the CPU, and plans are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, same, snapshot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

STEPS = 4


def spikingjelly_net() -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(decay_input=False),
        layer.MaxPool2d(2), layer.Conv2d(8, 12, 3, padding=1), neuron.ParametricLIFNode(v_threshold=0.5),
        layer.Flatten(), layer.Linear(192, 16), neuron.IFNode(), layer.Linear(16, 3),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


class SnnTorchNet(nn.Module):
    """A loop over timesteps, neurons with their states handed on, one of them recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.lif1 = snntorch.Leaky(beta=torch.full((8, 1, 1), 0.9), learn_beta=True)
        self.fc1 = nn.Linear(512, 16)
        self.lif2 = snntorch.RLeaky(beta=0.8, linear_features=16)
        self.fc2 = nn.Linear(16, 3)
        self.lif3 = snntorch.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        mem1, (spk2, mem2), mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        out = []
        for step in x:
            spk1, mem1 = self.lif1(self.conv(step), mem1)
            spk2, mem2 = self.lif2(self.fc1(spk1.flatten(1)), spk2, mem2)
            spk3, mem3 = self.lif3(self.fc2(spk2), mem3)
            out.append(spk3)
        return torch.stack(out)


NETS = {"spikingjelly": spikingjelly_net, "snntorch": SnnTorchNet}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = NETS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # so that it spikes
    return made.eval()


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loader(labels: bool = True) -> Any:
    x = torch.rand(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(24) % 3
    return DataLoader(TensorDataset(x, y) if labels else TensorDataset(x), 8)


def devices(model: nn.Module) -> set[str]:
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("criterion", ["svs", "sca", "firing_rate", "taylor", "magnitude", "random"])
def test_channels_go_exactly_and_as_on_the_cpu(net: nn.Module, criterion: str) -> None:
    on_cpu = snncompress.apply(net, criterion, 0.5, None, data=loader(), timesteps=STEPS, repair=None)
    net.cuda()
    before, state = snapshot(net), torch.cuda.get_rng_state()
    small = snncompress.apply(net, criterion, 0.5, None, data=loader(), timesteps=STEPS, repair=None)
    assert same(before, snapshot(net))
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert devices(small) == {"cuda"}
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
    if criterion in ("magnitude", "random"):  # scores of weights alone: to the bit those of the CPU
        assert snncompress.plan_of(small).edits == snncompress.plan_of(on_cpu).edits
    images = torch.cat([x for (x,) in loader(labels=False)]).cuda()
    assert largest_difference(net, small, Feed(find_adapter(net), images, STEPS)) < 1e-4


def test_as_many_channels_go_where_convolutions_round_their_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(
            layer.Conv2d(2, 64, 3, padding=1), layer.BatchNorm2d(64), neuron.LIFNode(), layer.Conv2d(64, 128, 3),
            layer.BatchNorm2d(128), neuron.LIFNode(), layer.Conv2d(128, 128, 3), layer.BatchNorm2d(128),
            neuron.LIFNode(), layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(128, 3),
        )  # fmt: skip
        functional.set_step_mode(made, "m")
        return made.eval()

    how: dict[str, Any] = {"data": loader(), "timesteps": STEPS, "repair": None, "skip": []}
    on_cpu = snncompress.apply(net(), "magnitude", 0.4, None, **how)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as it is unless a user says otherwise
    on_gpu = snncompress.apply(net().cuda(), "magnitude", 0.4, None, **how)
    assert snncompress.plan_of(on_gpu).edits == snncompress.plan_of(on_cpu).edits


@pytest.mark.parametrize("criterion", ["obs", "lamp", "cqp", "weight_magnitude"])
def test_single_weights_bits_and_repair(net: nn.Module, criterion: str, tmp_path: Path) -> None:
    net.cuda()
    small = snncompress.apply(net, criterion, 0.7, 4, data=loader(), timesteps=STEPS)
    assert devices(small) == {"cuda"}
    assert snncompress.plan_of(small).origin["repaired"]
    x = next(iter(loader()))[0].cuda().expand(STEPS, -1, -1, -1, -1)
    with torch.no_grad():
        wanted = small(x)
        functional.reset_net(small)
        snncompress.save(small, tmp_path / "small.safetensors")
        loaded = snncompress.load(tmp_path / "small.safetensors", NETS[_framework(net)]()).cuda().eval()
        torch.testing.assert_close(loaded(x), wanted)
        functional.reset_net(loaded)
        torch.testing.assert_close(snncompress.freeze(small)(x), wanted)


def _framework(net: nn.Module) -> str:
    return "snntorch" if isinstance(net, SnnTorchNet) else "spikingjelly"


def test_repair_is_that_of_the_cpu(net: nn.Module) -> None:
    how: dict[str, Any] = {"data": loader(), "timesteps": STEPS, "repair": "current"}
    on_cpu = snncompress.apply(net, "magnitude", 0.5, None, **how)
    on_gpu = snncompress.apply(net.cuda(), "magnitude", 0.5, None, **how)
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, rtol=1e-2, atol=1e-2, msg=name)


def test_profile_finetune_evaluate_refresh(net: nn.Module) -> None:
    on_cpu = snncompress.profile(net, loader(), timesteps=STEPS)
    net.cuda()
    on_gpu = snncompress.profile(net, loader(), timesteps=STEPS)
    assert on_gpu.n_params == on_cpu.n_params
    assert on_gpu.energy_pj == pytest.approx(on_cpu.energy_pj, rel=1e-2)
    small = snncompress.apply(net, "magnitude", 0.5, 4, data=loader(), timesteps=STEPS, refresh=True)
    snncompress.finetune(small, loader(), epochs=1, timesteps=STEPS, progress=False)
    assert devices(small) == {"cuda"}
    assert 0 <= snncompress.evaluate(small, loader(), timesteps=STEPS).accuracy <= 1


def test_a_schedule_with_fine_tuning_and_a_checkpoint(net: nn.Module, tmp_path: Path) -> None:
    net.cuda()
    how: dict[str, Any] = {"scheduler": "gradual", "finetune": 1, "checkpoint": tmp_path / "checkpoint"}
    small = snncompress.apply(net, "magnitude", 0.5, 4, data=loader(), timesteps=STEPS, progress=False, **how)
    again = snncompress.apply(net, "magnitude", 0.5, 4, data=loader(), timesteps=STEPS, progress=False, **how)
    assert snncompress.plan_of(again).edits == snncompress.plan_of(small).edits
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_fewer_timesteps(net: nn.Module) -> None:
    small = snncompress.apply(net.cuda(), None, bits=None, timesteps=STEPS, data=loader(), truncate=2)
    assert devices(small) == {"cuda"}
