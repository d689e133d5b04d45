"""Save and load: bitwise the same network from a small file, whatever was done to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snncompress_baselines import WeightMagnitude
from snncompress_fire import Ablation
from snncompress_rescaw import ReScaW, Uniform
from spikingjelly.activation_based import neuron
from torch import nn

import snncompress
from snncompress import ModelError, OptionError, StorageError, load, plan_of, profile, save
from snncompress.contract import registry
from snncompress.contract.detection import find_adapter
from snncompress.model.parametrizations import weight_bits, weight_mask
from snncompress.running.data import Feed
from snncompress.saving.container import Container
from tests.equivalence import PAPER, same, snapshot
from tests.structure.test_blocks import DATA, network

OPTIONS: dict[str, Any] = {"data": DATA, "timesteps": 4, "progress": False}


def channels(net: nn.Module) -> nn.Module:
    return snncompress.apply(net, "magnitude", 0.4, None, **OPTIONS)


def weights(net: nn.Module, ratio: float = 0.7) -> nn.Module:
    return snncompress.apply(net, WeightMagnitude(scope="layer"), ratio, None, **OPTIONS)


def sparse(net: nn.Module) -> nn.Module:
    return weights(net, 0.97)


def sparser(net: nn.Module) -> nn.Module:
    return weights(net, 0.8)


WIDE = ReScaW(gamma="max", per_channel=False)  # so that quantized networks of random weights still fire


def bits(count: int, quantizer: Any = WIDE) -> Callable[[nn.Module], nn.Module]:
    return lambda net: snncompress.apply(net, None, bits=count, skip=[], quantizer=quantizer, **OPTIONS)


def blocks(net: nn.Module) -> nn.Module:
    return snncompress.apply(net, Ablation(), 0.4, None, **OPTIONS)


def truncated(net: nn.Module) -> nn.Module:
    return snncompress.apply(net, None, bits=None, truncate=2, **OPTIONS)


def chain(*steps: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def all_of_them(net: nn.Module) -> nn.Module:
        for step in steps:
            net = step(net)
        return net

    return all_of_them


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda net: net,
    "channels": channels,
    "weights": weights,
    "sparse": sparse,
    "1 bit": bits(1),
    "3 bits": bits(3),
    "8 bits": bits(8),
    "16 bits": bits(16),
    "uniform": bits(4, "uniform"),
    "per channel": bits(4, ReScaW(gamma="max", per_channel=True)),
    "least error": bits(4, ReScaW(gamma="mse", per_channel=True)),
    "least error per layer": bits(2, ReScaW(gamma="mse", per_channel=False)),
    "blocks": blocks,
    "timesteps": truncated,
    "mix": chain(blocks, channels, weights, bits(4)),
    "other mix": chain(weights, channels, bits(2), sparser, truncated),
}
BUILDS = {
    "spikingjelly": lambda: network("spikingjelly"),
    "multi-step": lambda: network("spikingjelly", multi_step=True),
    "snntorch": lambda: network("snntorch"),
}


def output(model: nn.Module) -> torch.Tensor:
    adapter = find_adapter(model)
    feed = Feed(adapter, DATA, 4)
    try:
        with torch.no_grad():
            return feed(model.eval(), feed.first())
    finally:
        adapter.reset(model)


MIXES = {"spikingjelly": "other mix", "snntorch": "mix"}
"""Of the ways that are made of others, which take long, those in the default run."""


@pytest.mark.parametrize(
    ("framework", "way"),
    [
        pytest.param(f, w, marks=pytest.mark.slow if w.endswith("mix") and MIXES.get(f) != w else ())
        for f in BUILDS
        for w in WAYS
    ],
)
def test_bitwise_the_same(framework: str, way: str, tmp_path: Path) -> None:
    small = WAYS[way](BUILDS[framework]())
    before, path = snapshot(small), tmp_path / "small.safetensors"
    save(small, path)
    assert same(before, snapshot(small))
    fresh = BUILDS[framework]()
    for parameter in fresh.parameters():
        nn.init.uniform_(parameter)
    untouched, state = snapshot(fresh), torch.get_rng_state()
    again = load(path, into=fresh)
    assert same(untouched, snapshot(fresh))
    assert torch.equal(state, torch.get_rng_state())
    for name, module in again.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            assert torch.equal(module.weight, small.get_submodule(name).weight), name
            assert weight_bits(module) == weight_bits(small.get_submodule(name))
            assert (weight_mask(module) is None) == (weight_mask(small.get_submodule(name)) is None)
    assert torch.equal(output(again), output(small))
    if way != "nothing":
        assert plan_of(again) == plan_of(small)
    save(again, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), neuron.IFNode(), nn.Linear(20, 9), neuron.IFNode()).to(dtype)

    x = torch.rand(4, 6).to(dtype)
    small = snncompress.apply(build(), "weight_magnitude", 0.5, 4, data=x, timesteps=2, skip=[])
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", into=build())
    assert again[0].weight.dtype == dtype
    assert torch.equal(again[0].weight, small[0].weight)
    assert torch.equal(again[2].weight, small[2].weight)
    with pytest.raises(StorageError, match=f"0.bias is {str(dtype)[6:]}.*and float32"):
        load(tmp_path / "small", into=build().float())


def test_a_weight_takes_its_bits(tmp_path: Path) -> None:
    """No more than the entropy of codes and mask, and a 50th.

    100 × 200 weights, even from −a to a, at 3 bits with γ = mean|W| = a/2: the values are a/7 apart. The six inner ones
    have a 14th of the weights each; the two at the ends the quarter that is clamped and half of an inner one's share,
    2/7. H = 2 · 2/7 · log2(7/2) + 6 · 1/14 · log2(14) = 2.664 bits, so 6,661 bytes instead of 7,500.

    Of 0.9 masked: the entropy of the values that are left, and of the mask H(0.1) = 0.469 bits a weight: 1,173 bytes;
    of 0.99 masked H(0.01) = 0.0808: 202.
    """

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(200, 100, bias=False), neuron.IFNode())

    def sizes(ratio: float) -> tuple[float, dict[str, int]]:
        options: dict[str, Any] = {"data": torch.rand(4, 200), "timesteps": 2, "skip": [], "quantizer": PAPER}
        small = snncompress.apply(build(), "weight_magnitude", ratio, 3, **options)
        save(small, tmp_path / "small")
        counts = small[0].weight[small[0].weight != 0].unique(return_counts=True)[1].double()
        entropy = float(-(counts * (counts / counts.sum()).log2()).sum() / 8)
        file = Container.read(tmp_path / "small")
        return entropy, {name: tensor.numel() * tensor.element_size() for name, tensor in file.tensors.items()}

    entropy, found = sizes(0.0)
    assert entropy == pytest.approx(6661, rel=0.03)
    assert found["0.weight.codes"] <= 1.02 * entropy
    for ratio, mask in ((0.9, 1173), (0.99, 202)):
        entropy, found = sizes(ratio)
        assert found["0.weight.codes"] <= 1.02 * entropy + 30  # and the stream's own table
        assert found[".plan.1"] <= 1.02 * mask + 30


def test_what_is_trained_on_stays_on_its_grid(tmp_path: Path) -> None:
    """The same gradients as before, and 4-bit weights that move from one of the sixteen values to another."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 30), neuron.LIFNode(), nn.Linear(30, 4))

    data = 4 * torch.rand(12, 6), torch.arange(12) % 4
    small = snncompress.apply(build(), None, bits=4, skip=[], data=data, timesteps=4, quantizer=PAPER)
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", into=build())
    flows = [snncompress.gradient_flow(model, data, timesteps=4).norms for model in (small, again)]
    assert flows[0] == flows[1]
    assert all(flows[0].values())
    before = again[2].weight.detach().clone()
    snncompress.finetune(again, [data] * 3, epochs=3, lr=0.05, timesteps=4)
    assert not torch.equal(before, again[2].weight)
    assert set(again[2].weight.unique().tolist()) <= set(small[2].weight.unique().tolist())


class Uneven(Uniform):
    """Values that come from no uniform grid."""

    name = "uneven"

    def tensor_quant(self, bits: int) -> nn.Module:
        class Sign(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return x + (x.sign() * x.abs().sqrt() - x).detach(), x.new_ones(()), x.new_zeros(()), x.new_tensor(2.0)

        return Sign()


def test_loading_takes_no_brevitas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes a second. Profiled and frozen, too; only a gradient needs it."""
    small = chain(weights, bits(4))(network("spikingjelly"))
    save(small, tmp_path / "small")
    for name in [name for name in sys.modules if name.partition(".")[0] == "brevitas"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "brevitas.function.ops_ste", None)
    monkeypatch.setitem(sys.modules, "snncompress_rescaw.modules", None)
    again = load(tmp_path / "small", into=network("spikingjelly"))
    assert profile(again, DATA, timesteps=4).size_mb == profile(small, DATA, timesteps=4).size_mb
    frozen = snncompress.freeze(again, DATA, timesteps=4)
    assert not hasattr(frozen[7], "parametrizations")
    with pytest.raises(ImportError):
        again(DATA[0])


def test_values_from_no_grid_are_kept_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snncompress.contract.registry.Registry.find", _find_uneven(registry.Registry.find))
    small = chain(weights, bits(4, Uneven()))(network("spikingjelly"))
    save(small, tmp_path / "small")
    assert "7.weight.values" in Container.read(tmp_path / "small").tensors
    again = load(tmp_path / "small", into=network("spikingjelly"))
    assert torch.equal(again[7].weight, small[7].weight)


def _find_uneven(find: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, kind, name: Uneven if name == "uneven" else find(self, kind, name)


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), neuron.IFNode(), nn.Linear(5, 5), neuron.IFNode(), nn.Linear(5, 3))
        net[2].weight = net[0].weight
        return net

    net = build()
    nn.init.constant_(net[0].weight, 0.25)
    save(net, tmp_path / "tied")
    assert "2.weight" not in Container.read(tmp_path / "tied").tensors
    again = load(tmp_path / "tied", into=build())
    assert again[0].weight is again[2].weight
    assert torch.equal(again[2].weight, net[2].weight)


@pytest.mark.parametrize("skip", [[], ["2"]])
def test_tied_floats_may_make_different_weights(skip: list[str], tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), neuron.IFNode(), nn.Linear(5, 5), neuron.IFNode(), nn.Linear(5, 3))
        net[2].weight = net[0].weight
        return net

    small = snncompress.apply(build(), None, bits=4, skip=skip, data=torch.rand(3, 5), timesteps=2)
    save(small, tmp_path / "tied")
    again = load(tmp_path / "tied", into=build())
    assert all(torch.equal(again[n].weight, small[n].weight) for n in (0, 2, 4))


class Planner(nn.Module):
    """Names that the file might use itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plan, self.packed = nn.Linear(6, 40), nn.Linear(40, 3)
        self.fire = neuron.IFNode()
        self.shape = nn.ParameterList([nn.Parameter(torch.rand(2)) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(self.fire(self.plan(x)))


def test_modules_of_any_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": torch.rand(3, 6), "timesteps": 2, "skip": []}
    small = snncompress.apply(Planner(), WeightMagnitude(scope="layer"), 0.5, 4, **options)
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", into=Planner())
    assert torch.equal(again.plan.weight, small.plan.weight)
    assert torch.equal(again.packed.weight, small.packed.weight)


def test_networks_that_no_plan_leads_to(tmp_path: Path) -> None:
    small = bits(4)(network("spikingjelly"))
    with pytest.raises(ModelError, match=r"its part '0'. Save that part"):
        save(nn.Sequential(small, nn.Identity()), tmp_path / "wrapped")
    with pytest.raises(ModelError, match="it is frozen"):
        save(snncompress.freeze(small, DATA, timesteps=2), tmp_path / "frozen")
    part = nn.Sequential(*list(small)[:3])
    with pytest.raises(ModelError, match="there is no plan"):
        save(part, tmp_path / "part")
    save(small, tmp_path / "small")
    with pytest.raises(OptionError, match="compressed already"):
        load(tmp_path / "small", into=small)


def test_a_mask_on_a_layer_that_grew(tmp_path: Path) -> None:
    """The block turned 20 channels into 2: behind it a layer of 10 · 2 weights becomes one of 10 · 20."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(20, 2), neuron.IFNode())
        return nn.Sequential(
            nn.Linear(3, 20), neuron.IFNode(), block, nn.Linear(2, 10), neuron.IFNode(), nn.Linear(10, 2)
        )

    options: dict[str, Any] = {"data": torch.rand(4, 3), "timesteps": 2}
    small = snncompress.apply(build(), Ablation(blocks=("2",)), 1.0, None,
                              **{**options, "data": (torch.rand(4, 3), torch.arange(4) % 2)})  # fmt: skip
    assert small[3].weight.shape == (10, 20)
    small = snncompress.apply(small, WeightMagnitude(scope="layer"), 0.5, None, **options)
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", into=build())[3].weight, small[3].weight)


@pytest.mark.parametrize("gamma", ["max", "mse"])
@pytest.mark.parametrize(
    "parts", [(nn.Linear, {}), (nn.Conv2d, {"kernel_size": 1}), (nn.ConvTranspose2d, {"kernel_size": 1})]
)
def test_scales_go_with_their_channels(parts: tuple[Any, dict[str, int]], gamma: Any, tmp_path: Path) -> None:
    """Quantized per channel, saved, loaded, then pruned: the channels that are left keep their weights."""
    kind, sizes = parts

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(6, 40, **sizes), neuron.IFNode(), kind(40, 8, **sizes), neuron.IFNode())

    x = torch.rand(3, 6) if kind is nn.Linear else torch.rand(3, 6, 4, 4)
    options: dict[str, Any] = {"data": x, "timesteps": 2, "skip": []}
    small = snncompress.apply(build(), None, bits=4, quantizer=ReScaW(gamma=gamma, per_channel=True), **options)
    save(small, tmp_path / "small")
    pruned = snncompress.apply(
        load(tmp_path / "small", into=build()), "magnitude", {"0": 0.4}, None, repair=None, **options
    )
    axis = 1 if kind is nn.ConvTranspose2d else 0
    kept = [c for c in range(40) if c not in plan_of(pruned).removed_channels()["0"]]
    assert len(kept) == 24
    assert torch.equal(pruned[0].weight, small[0].weight.index_select(axis, torch.tensor(kept)))
    assert torch.equal(pruned[2].weight, small[2].weight.index_select(1 - axis, torch.tensor(kept)))


def test_in_inference_mode(tmp_path: Path) -> None:
    save(bits(4)(network("spikingjelly")), tmp_path / "small")
    with torch.inference_mode():
        again = load(tmp_path / "small", into=network("spikingjelly"))
    snncompress.finetune(again, DATA, epochs=1, timesteps=2)


@pytest.mark.skipif(os.name != "posix", reason="permissions and links are those of POSIX")
def test_a_file_like_any_other(tmp_path: Path) -> None:
    net, path = network("spikingjelly"), tmp_path / "net"
    (tmp_path / "plain").touch()
    save(net, path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    save(net, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_ordinary_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    save(net, tmp_path / "cnn")
    again = load(tmp_path / "cnn", into=nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
    assert torch.equal(again[0].weight, net[0].weight)


def test_a_loaded_network_goes_on(tmp_path: Path) -> None:
    """Compressed further, profiled: as the one that was saved."""
    small = chain(channels, bits(4))(network("snntorch"))
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", into=network("snntorch"))
    a, b = (profile(m, DATA, timesteps=4) for m in (small, again))
    assert a == b
    more = weights(again)
    assert len(plan_of(more).edits) == len(plan_of(weights(small)).edits)
    save(more, tmp_path / "more")
    assert torch.equal(load(tmp_path / "more", into=network("snntorch"))[7].weight, more[7].weight)
