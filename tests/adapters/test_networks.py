"""The networks of ``examples/networks``: sizes as published, and every channel criterion on a narrow copy of each."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.model.network import WEIGHT_LAYERS
from tests.end_to_end.test_truths import prune
from tests.equivalence import PAPER, largest_difference, outputs, same, snapshot
from tests.networks import Case, firing_rates, liven

CRITERIA = ["svs", "sca", "magnitude", "random", "firing_rate", "bn_scale", "taylor"]

SMALL = {
    "squeezenet": {"width": 1 / 8},
    "vgg16": {"width": 1 / 16},
    "resnet20": {"widths": (4, 6, 8, 12)},
    "sew_resnet18": {"width": 6},
    "vggsnn": {"width": 1 / 16, "size": 16},
    "mnasnet": {"width": 1 / 8},
    "xception": {"width": 1 / 32, "middle": 2},
    "mixnet": {"width": 1 / 8},
    "shufflenetv2": {"widths": (6, 16, 32, 48, 20), "units": (2, 3, 3)},
}
SHAPES = {"vggsnn": (2, 16, 16)}  # all others: 3×32×32

# Layers that keep their channels beside the classifier, and why.
WHOLE = {}


def build(name: str, **options: object) -> nn.Module:
    return getattr(importlib.import_module(f"examples.networks.{name}"), name)(**options)


def narrow(name: str, mode: str = "m", **options: object) -> Case:
    """A small network that fires, in double precision, with a batch of two for two timesteps."""
    torch.manual_seed(0)
    model = build(name, **SMALL[name], **options).double()
    functional.set_step_mode(model, mode)
    return liven(Case(model, torch.rand(2, *SHAPES.get(name, (3, 32, 32)), dtype=torch.float64), 2))


@pytest.fixture(scope="module", params=SMALL)
def network(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, narrow(request.param)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tracing doesn't depend on the criterion: done once per network for all of them."""
    trace = importlib.import_module("snncompress.structure.tracing").trace

    def cached(model: nn.Module, *args: object, **named: object) -> object:
        key = tuple((n, p.shape) for n, p in model.named_parameters())
        if key not in TRACES:
            TRACES[key] = trace(model, *args, **named)
        return copy.deepcopy(TRACES[key])

    monkeypatch.setattr("snncompress.pruning.run.trace", cached)
    return


TRACES: dict[object, object] = {}


def published(total: int, features: int) -> int:
    """A published count with a classifier of 1000 classes over ``features``, for ten classes."""
    return total - 990 * (features + 1)


def vgg(channels: list[int], features: int) -> int:
    """3×3 convolutions without bias, batch norm (two numbers per channel), a linear layer for ten classes."""
    return sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels)) + 10 * (features + 1)


def resnet(stem: int, stages: list[tuple[int, list[int]]]) -> int:
    """The same of ResNet-20; of each stage the width, and of its three blocks what stands between the convolutions."""
    total, before = 27 * stem + 2 * stem, stem
    for width, inner in stages:
        for between in inner:
            total += 9 * (before * between + between * width) + 2 * (between + width)
            before = width
    return total + 10 * (before + 1)


# depthwise convolutions of Xception, each of which has a batch norm here
XCEPTION = [64, 128, 128, 256, 256, 728, *[728] * 24, 728, 728, 1024, 1536]
SIZES = {
    "squeezenet": published(1_248_424, 512),  # torchvision's squeezenet1_0
    "vgg16": vgg([3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6], 512),
    "resnet20": 17_048_906,  # see resnet()
    "sew_resnet18": 11_173_962,  # the usual ResNet-18 with a 3×3 stem for CIFAR-10
    "vggsnn": vgg([2, 64, 128, 256, 256, 512, 512, 512, 512], 512 * 9),
    "mnasnet": published(4_383_312, 1280),  # torchvision's mnasnet1_0
    "xception": published(22_855_952, 2048) + 2 * sum(XCEPTION),  # Keras' trainable parameters
    "mixnet": 2_294_242,  # counted once: MixNet-S without squeeze-and-excitation, its 1×1 convolutions whole
    "shufflenetv2": published(2_278_604, 1024),  # torchvision's shufflenet_v2_x1_0
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_at_full_size(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    doc = importlib.import_module(f"examples.networks.{name}").__dict__[name].__doc__
    assert f"{SIZES[name]:,} parameters" in doc


@pytest.mark.parametrize(("a", "b", "published"), [(0.3, 0.6, 6.23), (0.35, 0.75, 3.88)])
def test_resnet20_of_qp_snn(a: float, b: float, published: float) -> None:
    """Its Table 10 (with a for the second convolutions of stage 2), by hand at full width, by the library at 1/8."""
    ratios = {"conv1": 0.1, "layer1.*": a, "layer1.[12].conv1": b, "layer2.*": a, "layer?.?.conv1": b,
              "layer1.0.conv1": a, "layer3.?.conv2": 0.0}  # fmt: skip

    def left(stem: int, one: int, two: int, three: int) -> int:
        def less(width: int, ratio: float) -> int:
            return width - math.ceil(round(ratio * width, 9))

        inner = [less(one, a), less(one, b), less(one, b)]
        stages = [(less(one, a), inner), (less(two, a), 3 * [less(two, b)]), (three, 3 * [less(three, b)])]
        return resnet(less(stem, 0.1), stages)

    assert resnet(64, [(128, 3 * [128]), (256, 3 * [256]), (512, 3 * [512])]) == SIZES["resnet20"]
    assert resnet(16, [(16, 3 * [16]), (32, 3 * [32]), (64, 3 * [64])]) == 269_722  # He et al.: 0.27 M
    assert round(left(64, 128, 256, 512) / 1e6, 2) == published

    torch.manual_seed(0)
    model = build("resnet20", widths=(8, 16, 32, 64)).double()
    case = liven(Case(model, torch.rand(2, 3, 8, 8, dtype=torch.float64), 2))
    small = prune(case, "magnitude", ratio=ratios, repair=None)
    assert sum(p.numel() for p in small.parameters()) == left(8, 16, 32, 64)
    assert largest_difference(model, small, case.feed) <= 1e-9


def test_fire_modules() -> None:
    """What METHODS gives for SqueezeNet, 736.5 k, lies between its features and the whole of version 1.0."""
    with torch.device("meta"):
        model = build("squeezenet")
    fires = {name: m for name, m in model.named_children() if name.startswith("fire")}
    assert list(fires) == [f"fire{i}" for i in range(2, 10)]
    parts = {f"{name}.{part}" for name in fires for part in ("squeeze", "expand1x1", "expand3x3")}
    assert parts <= {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    kept = sum(p.numel() for n, m in model.named_children() if n not in ("fire2", "fire3", "fire5", "fire7")
               for p in m.parameters())  # fmt: skip
    assert kept - 32 * 32 == 554_714  # fire4 then takes in the 96 channels of conv1 in the place of fire3's 128


def test_narrow_networks_fire(network: tuple[str, Case]) -> None:
    assert min(firing_rates(network[1]).values()) > 0


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_mask_equivalence_under_every_criterion(network: tuple[str, Case], criterion: str) -> None:
    name, case = network
    if (name, criterion) == ("squeezenet", "bn_scale"):  # which it has no batch norm for, as published
        case = narrow(name, norm=True)
    compressed = prune(case, criterion, ratio=0.4, data=(case.x, torch.arange(2)), repair=None)
    assert largest_difference(case.model, compressed, case.feed) <= 1e-9
    check_whole(name, case.model, snncompress.plan_of(compressed))


@pytest.mark.parametrize("name", SMALL)
def test_mask_equivalence_in_single_steps(name: str) -> None:
    case = narrow(name, "s")
    compressed = prune(case, "firing_rate", repair=None)
    assert largest_difference(case.model, compressed, case.feed) <= 1e-9
    check_whole(name, case.model, snncompress.plan_of(compressed))


def check_whole(name: str, model: nn.Module, plan: snncompress.Plan) -> None:
    """Every layer loses channels or is known to stay whole, for the known reason."""
    removed, reasons = plan.removed_channels(), WHOLE.get(name, {})
    for layer_name, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        if layer_name in removed:
            assert layer_name not in plan.skipped
            continue
        pattern = next((p for p in reasons if fnmatch.fnmatchcase(layer_name, p)), None)
        expected = reasons[pattern] if pattern else "is the classifier"
        assert any(part in plan.skipped[layer_name] for part in expected.split("|")), plan.skipped[layer_name]


REPAIRED = ("squeezenet", "resnet20", "vggsnn")  # the others, of many more layers, take long


@pytest.mark.usefixtures("traced_once")
def test_grid_replay_and_original(network: tuple[str, Case]) -> None:
    """Four bits: at most 16 values per layer; plan → JSON → the same model; the original as it was."""
    name, case = network
    before = snapshot(case.model)
    how = {} if name in REPAIRED else {"repair": None}
    compressed = prune(case, "svs", ratio=0.4, bits=4, quantizer=PAPER, **how)
    assert ("repaired" in snncompress.plan_of(compressed).origin) == (name in REPAIRED)
    assert same(before, snapshot(case.model))

    plan = snncompress.plan_of(compressed)
    quantized = [e.layer for e in plan.edits if e.kind == "quantize_weights"]
    layers = [n for n, m in case.model.named_modules() if isinstance(m, WEIGHT_LAYERS)]
    assert set(quantized) == set(layers)  # skip=[]: the first layer and the classifier too
    for layer_name in quantized:
        assert len(compressed.get_submodule(layer_name).weight.unique()) <= 16

    fresh = build(name, **SMALL[name]).double()
    functional.set_step_mode(fresh, "m")
    replayed = snncompress.Plan.from_json(plan.to_json()).apply(fresh).eval()
    wanted, got = compressed.state_dict(), replayed.state_dict()
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in got.items()}
    replayed.load_state_dict(wanted)
    for a, b in zip(outputs(compressed, case.feed), outputs(replayed, case.feed), strict=True):
        assert torch.equal(a, b)


def by_view(x: Tensor) -> Tensor:
    *front, c, h, w = x.shape
    return x.view(*front, 2, c // 2, h, w).transpose(-4, -3).reshape(*front, c, h, w)


def by_permutation(x: Tensor) -> Tensor:
    axes = [*range(x.dim() - 3), x.dim() - 2, x.dim() - 3, x.dim() - 1, x.dim()]
    return x.unflatten(-3, (2, -1)).permute(axes).contiguous().flatten(-4, -3)


def by_three(x: Tensor) -> Tensor:
    return x.unflatten(-3, (3, -1)).transpose(-4, -3).flatten(-4, -3)


def in_vain(x: Tensor) -> Tensor:
    return x.unflatten(-3, (2, -1)).flatten(-4, -3)


def hard_coded(x: Tensor) -> Tensor:
    return x.unflatten(-3, (2, 12)).transpose(-4, -3).flatten(-4, -3)


SHUFFLES = {"view": by_view, "permute": by_permutation, "three": by_three, "none": in_vain, "hard": hard_coded}


def chunks(x: Tensor) -> list[Tensor]:
    return list(x.chunk(2, -3))


def slices(x: Tensor) -> list[Tensor]:
    half = x.shape[-3] // 2
    return [x[..., :half, :, :], x[..., half:, :, :]]


def strides(x: Tensor) -> list[Tensor]:
    return [x[..., ::2, :, :], x[..., 1::2, :, :]]


def computed_sizes(x: Tensor) -> list[Tensor]:
    half = x.shape[-3] // 2
    return list(x.split([half, x.shape[-3] - half], -3))


def hard_coded_sizes(x: Tensor) -> list[Tensor]:
    return list(x.split([12, 12], -3))


def uneven_chunks(x: Tensor) -> list[Tensor]:
    one, two, three, four, five = x.chunk(5, -3)
    return [torch.cat([one, two, three[..., :2, :, :]], -3), torch.cat([three[..., 2:, :, :], four, five], -3)]


SPLITS = {
    "chunk": chunks, "slice": slices, "stride": strides, "computed": computed_sizes, "hard": hard_coded_sizes,
    "uneven": uneven_chunks,
}  # fmt: skip


class Shuffled(nn.Module):
    """Two convolutions side by side, shuffled; one half goes through another convolution; shuffled again."""

    def __init__(self, mode: str, shuffle: Callable[[Tensor], Tensor], split: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.shuffle, self.split = shuffle, split
        self.left, self.right = self._conv(2, 12), self._conv(2, 12)
        self.inner = self._conv(12, 12)
        self.last, self.fc = self._conv(24, 6), layer.Linear(6 * 64, 5)
        functional.set_step_mode(self, mode)

    def _conv(self, before: int, after: int) -> nn.Module:
        return nn.Sequential(layer.Conv2d(before, after, 3, padding=1), layer.BatchNorm2d(after), neuron.LIFNode())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.shuffle(torch.cat([self.left(x), self.right(x)], -3)))
        x = self.shuffle(torch.cat([a, self.inner(b)], -3))
        return self.fc(self.last(x).flatten(-3))


# what must be pruned: "all" that is shuffled, or "none" of it
WRITTEN = [
    ("view", "chunk", "all"), ("permute", "chunk", "all"), ("view", "slice", "all"), ("none", "chunk", "all"),
    ("none", "stride", "all"), ("hard", "chunk", "none"), ("view", "hard", "none"), ("view", "uneven", "none"),
    ("three", "chunk", "any"), ("view", "stride", "any"), ("view", "computed", "any"),
]  # fmt: skip


@pytest.mark.parametrize("mode", "sm")
@pytest.mark.parametrize(("shuffle", "split", "pruned"), WRITTEN)
def test_shuffles_and_splits_however_they_are_written(mode: str, shuffle: str, split: str, pruned: str) -> None:
    """Exact at every ratio, whatever is pruned; from what forward counts on with fixed numbers nothing goes."""
    model = Shuffled(mode, SHUFFLES[shuffle], SPLITS[split]).double()
    case = liven(Case(model, torch.rand(2, 2, 8, 8, dtype=torch.float64), 2))
    for ratio in (0.1, 0.3, 0.5, 0.7):
        compressed = prune(case, "random", ratio=ratio, repair=None)
        removed = snncompress.plan_of(compressed).removed_channels()
        assert largest_difference(model, compressed, case.feed) <= 1e-9
        assert len(removed["last.0"]) == math.ceil(6 * ratio)
        shuffled = {"left.0", "right.0", "inner.0"} & set(removed)
        assert pruned == "any" or shuffled == ({"left.0", "right.0", "inner.0"} if pruned == "all" else set())


class Groups(nn.Module):
    """torch's own channel shuffle between grouped convolutions, as in the first ShuffleNet."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.one, self.sn = layer.Conv2d(2, 12, 1), neuron.LIFNode()
        self.shuffle = layer.SeqToANNContainer(nn.ChannelShuffle(3)) if mode == "m" else nn.ChannelShuffle(3)
        self.two, self.sn2 = layer.Conv2d(12, 8, 3, padding=1), neuron.LIFNode()
        self.fc = layer.Linear(8 * 64, 5)
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.sn2(self.two(self.shuffle(self.sn(self.one(x))))).flatten(-3))


@pytest.mark.parametrize("mode", "sm")
def test_torchs_own_shuffle(mode: str) -> None:
    model = Groups(mode).double()
    case = liven(Case(model, torch.rand(2, 2, 8, 8, dtype=torch.float64), 2))
    compressed = prune(case, "svs", ratio=0.5, repair=None)
    removed = snncompress.plan_of(compressed).removed_channels()
    assert largest_difference(model, compressed, case.feed) <= 1e-9
    assert sorted(c % 4 for c in removed["one"]) == sorted([c % 4 for c in removed["one"][:2]] * 3)
