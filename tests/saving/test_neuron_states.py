"""What neurons remember of the last run stays out of files, also where it is a persistent buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import snncompress
from snncompress import StorageError
from snncompress.saving.container import Container
from tests.toy import BareAdapter, Charge, ToyAdapter, toy_layers


def compressed(bits: int | None = 4) -> nn.Module:
    model, x = toy_layers()
    return snncompress.apply(
        model, "magnitude", 0.5, bits, data=x, timesteps=3, skip=[], adapter=ToyAdapter(), progress=False
    )


def run(model: nn.Module) -> torch.Tensor:
    adapter = ToyAdapter()
    adapter.reset(model)
    with torch.no_grad():
        return adapter.run(model, toy_layers()[1], 3)


def test_states_stay_out_of_the_file(tmp_path: Path) -> None:
    small, path = compressed(), tmp_path / "small.safetensors"
    expected = run(small)  # leaves v [5, C] in the neurons
    assert small[1].v.shape == (5, 4)
    assert "1.v" in small.state_dict()
    snncompress.save(small, path, adapter=ToyAdapter())
    assert small[1].v.shape == (5, 4)
    names = Container.read(path).tensors
    assert {"1.threshold", "3.threshold"} <= set(names)
    assert not {"1.v", "3.v"} & set(names)
    assert torch.equal(run(snncompress.load(path, into=toy_layers()[0], adapter=ToyAdapter())), expected)


@pytest.mark.parametrize("shape", [(), (7, 8), (0,)])
def test_a_fresh_model_may_have_run(shape: tuple[int, ...], tmp_path: Path) -> None:
    small, path = compressed(), tmp_path / "small.safetensors"
    expected = run(small)
    snncompress.save(small, path, adapter=ToyAdapter())
    fresh = toy_layers()[0]
    fresh[1].v = torch.full(shape, 0.5)
    again = snncompress.load(path, into=fresh, adapter=ToyAdapter())
    assert torch.equal(fresh[1].v, torch.full(shape, 0.5))
    assert torch.equal(run(again), expected)


def test_a_moment_that_is_nan_can_be_saved(tmp_path: Path) -> None:
    small, path = compressed(), tmp_path / "small.safetensors"
    small[1].v = torch.tensor(float("nan"))
    snncompress.save(small, path, adapter=ToyAdapter())
    assert run(snncompress.load(path, into=toy_layers()[0], adapter=ToyAdapter())).isfinite().all()


def test_of_a_lone_neuron(tmp_path: Path) -> None:
    neuron, path = Charge(torch.rand(3)), tmp_path / "neuron.safetensors"
    neuron(torch.rand(2, 4, 3))
    snncompress.save(neuron, path, adapter=ToyAdapter())
    assert list(Container.read(path).tensors) == ["threshold"]
    assert torch.equal(
        snncompress.load(path, into=Charge(torch.rand(3)), adapter=ToyAdapter()).threshold, neuron.threshold
    )


def test_without_states_all_is_kept(tmp_path: Path) -> None:
    small, path = compressed(), tmp_path / "small.safetensors"
    run(small)
    snncompress.save(small, path, adapter=BareAdapter())
    assert Container.read(path).tensors["1.v"].shape == (5, 4)
    with pytest.raises(StorageError, match=r"1.v is float32 \[5, 4\] in the file and float32 \[\] in the model"):
        snncompress.load(path, into=toy_layers()[0], adapter=BareAdapter())
    again = snncompress.load(path, into=toy_layers()[0], adapter=ToyAdapter())  # whoever names them skips them
    assert torch.equal(run(again), run(small))


class Readout(nn.Module):
    """Sums up over time and never fires."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.v = x.sum(1)
        return self.v


class WideAdapter(ToyAdapter):
    def stateful(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: m for name, m in model.named_modules() if isinstance(m, (Charge, Readout))}


def test_what_else_remembers_stays_out_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), Charge(), Readout())

    model = build()
    expected = model(torch.ones(5, 2, 4))
    for adapter, names in ((WideAdapter(), set()), (ToyAdapter(), {"2.v"})):
        snncompress.save(model, tmp_path / "model.safetensors", adapter=adapter)
        tensors = Container.read(tmp_path / "model.safetensors").tensors
        assert set(tensors) == {"0.weight", "0.bias", "1.threshold"} | names
        again = snncompress.load(tmp_path / "model.safetensors", into=build(), adapter=WideAdapter())
        assert torch.equal(again(torch.ones(5, 2, 4)), expected)
