"""A bench lets nothing out: no public call but finetune moves a generator, or anything of the user's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import DataError, ModelError
from snncompress.contract.detection import find_adapter
from snncompress.model.chance import seeded, state_of
from snncompress.running.bench import bench
from snncompress.running.data import Feed
from snncompress.running.sameness import all_same, same, wired_outputs
from tests.equivalence import same as unchanged
from tests.equivalence import snapshot
from tests.export.common import needs_onnx_export


class Noisy(nn.Module):
    """Everything that draws: torch, numpy, Python."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.lif, self.two = nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 8)
        self.lif2, self.three = neuron.LIFNode(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.rand_like(x) + 0.01 * float(np.random.rand()) + 0.01 * random.random()
        return self.three(self.lif2(2 * self.two(self.lif(2 * self.one(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), neuron.IFNode())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def plain() -> nn.Module:
    blocks = Block(), Block()
    net = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(), *blocks, nn.Linear(8, 3))
    for layer in (net[0], blocks[0].body[0], blocks[1].body[0]):
        layer.weight.data.abs_().mul_(2)
    return net


def cnn() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def loader(generator: torch.Generator | None = None) -> DataLoader[Any]:
    data = TensorDataset(torch.rand(12, 6), torch.arange(12) % 3)
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


Call = Callable[[Any, Path], object]
T: dict[str, Any] = {"timesteps": 4}
CALLS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "apply": (Noisy, lambda m, p: snncompress.apply(m[0], "taylor", 0.5, 4, data=m[1], finetune=1, **T)),
    "apply to single weights": (plain, lambda m, p: snncompress.apply(m[0], "cqp", 0.5, 4, data=m[1], truncate=2, **T)),
    "block_search": (plain, lambda m, p: snncompress.block_search(m[0], m[1], epochs=1, **T)),
    "collapse": (Noisy, lambda m, p: snncompress.collapse(m[0], m[1], **T)),
    "compare": (Noisy, lambda m, p: snncompress.compare({"a": m[0], "b": m[0]}, m[1], **T)),
    "convert": (cnn, lambda m, p: snncompress.convert(m[0], neuron="if", data=m[1], timesteps=8)),
    "evaluate": (Noisy, lambda m, p: snncompress.evaluate(m[0], m[1], **T)),
    "export to ONNX": (plain, lambda m, p: snncompress.export(m[0], p / "net.onnx", data=m[1], **T)),
    "export to NIR": (plain, lambda m, p: snncompress.export(m[0], p / "net.nir", data=m[1], **T)),
    "fits": (Noisy, lambda m, p: snncompress.fits(m[0], "loihi2", data=m[1], **T)),
    "apply for a chip": (plain, lambda m, p: snncompress.apply(m[0], "random", data=m[1], target="loihi2", **T)),
    "freeze": (Noisy, lambda m, p: snncompress.freeze(m[0], m[1], **T)),
    "gradient_flow": (Noisy, lambda m, p: snncompress.gradient_flow(m[0], m[1], **T)),
    "profile": (Noisy, lambda m, p: snncompress.profile(m[0], m[1], **T)),
    "refresh": (Noisy, lambda m, p: snncompress.refresh(m[0], m[1], **T)),
    "repair": (plain, lambda m, p: snncompress.repair(m[0], m[0], m[1], **T)),
    "report": (Noisy, lambda m, p: snncompress.report({"a": m[0]}, m[1], path=p / "report.html", **T)),
    "robustness": (plain, lambda m, p: snncompress.robustness(m[0], ["svs", "snip"], m[1], **T)),
    "save and load": (Noisy, lambda m, p: (snncompress.save(m[0], p / "n"), snncompress.load(p / "n", into=m[0]))),
    "scores": (Noisy, lambda m, p: snncompress.scores(m[0], "random", m[1], **T)),
    "search": (plain, lambda m, p: snncompress.search(m[0], m[1], {"ratio": [0.5]}, "accuracy", trials=1, **T)),
    "sensitivity": (Noisy, lambda m, p: snncompress.sensitivity(m[0], m[1], "svs", (0.5,), **T)),
    "temporal_analysis": (Noisy, lambda m, p: snncompress.temporal_analysis(m[0], m[1], **T)),
    "threshold_sweep": (plain, lambda m, p: snncompress.threshold_sweep(m[0], m[1], (0.5,), 0.5, **T)),
    "utilization": (Noisy, lambda m, p: snncompress.utilization(m[0], bits=2)),
}  # fmt: skip
QUIET = {
    "no_sync", "plan_of", "criteria", "quantizers", "schedulers", "energy_models", "targets", "plugins",
    "cross_entropy", "finetune", "frozen_layers",
}  # fmt: skip


def generators() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "generator of its own"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_onnx_export if name == "export to ONNX" else ()) for name in CALLS]
)
def test_no_call_moves_a_generator(name: str, own: bool, tmp_path: Path) -> None:
    build, call = CALLS[name]
    generator = torch.Generator().manual_seed(3) if own else None
    model, data = build(), loader(generator)
    before, drawn, untouched = generators(), generator and generator.get_state(), snapshot(model)
    call((model, data), tmp_path)
    assert generators() == before
    assert generator is None or torch.equal(generator.get_state(), drawn)
    assert unchanged(untouched, snapshot(model))


def test_every_public_call_is_in_that_test() -> None:
    functions = {n for n in snncompress.__all__ if callable(f := getattr(snncompress, n)) and not isinstance(f, type)}
    assert functions - QUIET == {word for name in CALLS for word in name.split() if word in functions}


def test_a_call_that_raises_moves_none_either() -> None:
    model, x = Noisy(), torch.rand(4, 7)
    before = generators()
    with pytest.raises(DataError):
        snncompress.apply(model, data=x, timesteps=2)
    assert generators() == before


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_are_what_the_work_needs_whatever_holds_outside(grad: Callable[[], Any], gradients: bool) -> None:
    with grad(), bench(Noisy(), torch.rand(4, 6), 2, gradients=gradients):
        assert torch.is_grad_enabled() == gradients
        assert not torch.is_inference_mode_enabled()


def test_what_is_solved_is_solved_in_the_networks_precision_and_measured_in_that_of_outside() -> None:
    net, x, seen = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(), nn.Linear(8, 3)), torch.rand(16, 6), set()
    net[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))

    def compressed() -> nn.Module:
        small = snncompress.apply(net, "reconstruction", 0.5, 4, data=x, timesteps=2, skip=[], progress=False)
        return snncompress.freeze(small, x, timesteps=2, integer=True)

    outside = compressed()
    with torch.autocast("cpu", torch.bfloat16):
        assert unchanged(snapshot(compressed())["tensors"], snapshot(outside)["tensors"])
        assert seen == {torch.float32}
        snncompress.profile(net, x, timesteps=2)
    assert seen == {torch.float32, torch.bfloat16}


def test_noise_inside_the_model_is_the_same_in_runs_that_are_compared() -> None:
    model = Noisy()
    with bench(model, torch.rand(4, 6), 2, seed=5) as table:
        run = table.feed.example()
        once, twice = (wired_outputs(table.model, table.adapter, run) for _ in range(2))
        assert all(map(torch.equal, once, twice))
        table.reseed()
        first = torch.rand(1), np.random.rand(), random.random()
        table.reseed()
        assert first == (torch.rand(1), np.random.rand(), random.random())
    with seeded(model, 1):
        a = torch.rand(2)
    with seeded(model, 2):
        assert not torch.equal(a, torch.rand(2))


def test_a_random_model_is_pruned_frozen_and_analysed() -> None:
    """Without seeds its own noise would pass for a difference."""
    model = Noisy()
    small = snncompress.apply(model, "magnitude", 0.5, None, data=torch.rand(4, 6), timesteps=3, skip=[])
    assert (small.one.out_features, small.two.out_features) == (4, 4)
    assert snncompress.collapse(small, torch.rand(4, 6), timesteps=3).one.out_features == 4


@pytest.mark.parametrize(
    ("generator", "shared"),
    [
        (torch.Generator(), True), (np.random.default_rng(0), False), (np.random.RandomState(0), False),
        (random.Random(0), False),
    ],
)  # fmt: skip
def test_generators_of_the_model_or_its_class_are_where_they_were(generator: Any, shared: bool) -> None:
    class Drawing(Noisy):
        """Draws an encoding of its own."""

        def forward(self, x: Tensor) -> Tensor:
            own: Any = self.own
            given = {"generator": own} if isinstance(own, torch.Generator) else {}
            draws = torch.rand(6, **given) if given else torch.tensor([own.random() for _ in range(6)]).to(x)
            return super().forward((draws < x).to(x))

    model = Drawing()
    holder: Any = Drawing if shared else model
    holder.own = generator
    before = repr(state_of(generator))
    small = snncompress.apply(model, "magnitude", 0.5, None, data=torch.rand(4, 6), timesteps=3, skip=[], repair=None)
    assert small.one.out_features == 4
    assert repr(state_of(generator)) == before


@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float64, 1e-8), (torch.float32, 3e-4), (torch.bfloat16, 0.08), (torch.float16, 0.03)]
)
def test_same_is_rounding_and_no_more(dtype: torch.dtype, slack: float) -> None:
    ones = torch.ones(3, dtype=dtype)
    assert same(ones, ones + torch.tensor([0, 0, slack], dtype=dtype))
    assert not same(ones, ones + torch.tensor([0, 0, 2 * slack], dtype=dtype))
    assert not same(ones, ones[:2])
    assert not same(ones, torch.full_like(ones, torch.nan))
    assert not same(torch.full_like(ones, torch.inf), torch.full_like(ones, torch.inf))
    assert not all_same([ones], [])
    assert all_same([ones[:0]], [ones[:0]])


class Images(torch.utils.data.Dataset[Any]):
    def __init__(self, size: int = 100) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.size:
            raise IndexError
        return torch.full((6,), index / 100), index % 3


def test_a_dataset_is_data() -> None:
    model = plain()
    batches = list(Feed(find_adapter(model), Images(), 2))
    assert [len(batch.x) for batch in batches] == [64, 36]
    assert torch.equal(torch.cat([batch.y for batch in batches]), torch.arange(100) % 3)
    small = snncompress.apply(model, "taylor", 0.5, None, data=Images(), timesteps=2, skip=[])
    assert small[0].out_features == 4
    assert snncompress.evaluate(model, Images(), timesteps=2).n_samples == 100
    with pytest.raises(DataError, match="hold no batch"):
        snncompress.profile(model, Images(0), timesteps=2)


class Words(Images):
    def __getitem__(self, index: int) -> Any:
        return object(), index


def test_a_dataset_of_something_else() -> None:
    with pytest.raises(DataError, match="Samples of this dataset, such as a object, can't be stacked"):
        snncompress.profile(plain(), Words(), timesteps=2)


def test_batches_come_on_the_models_device() -> None:
    """A device that every machine has: meta, whose tensors have shapes and no values."""
    model = plain().to("meta")
    raw = {"x": torch.rand(4, 6), "rest": [torch.arange(4), "name"]}
    batch = Feed(find_adapter(model), [raw], forward=lambda m, b: m(b["x"]), on=model).first()
    assert batch.raw["x"].device.type == batch.raw["rest"][0].device.type == "meta"
    assert batch.raw["rest"][1] == "name"
    pair = Feed(find_adapter(model), (torch.rand(4, 6), torch.arange(4)), 2, on=model).first()
    assert pair.x.device.type == pair.y.device.type == "meta"
    here = [raw]
    assert Feed(find_adapter(plain()), here, forward=lambda m, b: b, on=plain()).first().raw is raw


def test_frozen_networks_are_refused_where_a_plan_is_needed(tmp_path: Path) -> None:
    model, data = plain(), (torch.rand(4, 6), torch.arange(4) % 3)
    frozen = snncompress.freeze(model, data, timesteps=2)
    plan = snncompress.plan_of(snncompress.apply(model, None, bits=4, data=data, timesteps=2))
    holder = nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), frozen)
    for net, where in ((frozen, "it is frozen"), (holder, "its part '2' is frozen")):
        for call in (
            lambda net: snncompress.apply(net, "magnitude", 0.5, None, data=data, timesteps=2),
            lambda net: snncompress.collapse(net, data, timesteps=2),
            lambda net: snncompress.sensitivity(net, data, "magnitude", (0.5,), timesteps=2),
            lambda net: snncompress.block_search(net, data, timesteps=2),
            lambda net: snncompress.save(net, tmp_path / "frozen"),
            plan.apply,
        ):
            with pytest.raises(ModelError, match=where):
                call(net)
    assert not (tmp_path / "frozen").exists()
    assert snncompress.profile(frozen, data, timesteps=2).n_samples == 4  # what needs no plan works


def test_models_of_torch_compile_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 2))
    whole, part = torch.compile(net, backend="eager"), nn.Sequential(torch.compile(net, backend="eager"))
    for model, message in ((whole, r"Take model\._orig_mod"), (part, r"Put 0\._orig_mod in its place")):
        with pytest.raises(ModelError, match=message):
            snncompress.apply(model, data=torch.rand(2, 4), timesteps=2)
    with pytest.raises(ModelError, match=r"Take model\._orig_mod"):
        snncompress.convert(torch.compile(cnn(), backend="eager"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_models_of_torch_jit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"compiled by torch\.jit"):
        snncompress.profile(torch.jit.trace(cnn(), torch.rand(2, 6)), torch.rand(2, 6))
