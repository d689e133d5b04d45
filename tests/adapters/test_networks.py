"""The networks of ``examples/networks``: sizes as published, and every channel criterion on a narrow copy of each."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from torch import nn

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
    "vggsnn": {"width": 1 / 16, "image_size": 16},
    "spikingformer": {"depth": 1, "dim": 16, "heads": 2},
    "mnasnet": {"width": 1 / 8, "stages": [(3, 2, 24, 3, 2), (5, 2, 40, 6, 2)]},
    "xception": {"width": 1 / 32, "middle": 2},
    "mixnet": {"width": 1 / 8, "stages": [((3,), 1, 16, 1, 1), ((3, 5, 7), 2, 24, 6, 1), ((3, 5), 1, 24, 3, 1)]},
    "shufflenetv2": {"widths": (6, 16, 32, 48, 20), "units": (2, 3, 3)},
}
SHAPES = {"vggsnn": (2, 16, 16)}  # all others: 3×32×32

# Layers that keep their channels beside the classifier, and why.
WHOLE = {}
# Layers that read a residual stream without a neuron between.
READERS = {"spikingformer": ["fc"]}


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


def transformer(dim: int, classes: int, depth: int = 4, bias: bool = True) -> tuple[int, int]:
    """Of Spikingformer, the weights that are quantized by default, and all other parameters."""
    embedding = [3, dim // 8, dim // 4, dim // 2, dim, dim]
    first, *later = (9 * a * b for a, b in itertools.pairwise(embedding))
    norms = 2 * sum(embedding[1:]) + depth * 2 * (3 * dim + dim + 4 * dim + dim)  # q, k, v; proj; MLP
    biases = depth * (dim + 4 * dim + dim) if bias else 0
    weights = sum(later) + depth * (3 + 1 + 4 + 4) * dim**2
    return weights, first + norms + biases + classes * (dim + 1)


# depthwise convolutions of Xception, each of which has a batch norm here
XCEPTION = [64, 128, 128, 256, 256, 728, *[728] * 24, 728, 728, 1024, 1536]
SIZES = {
    "squeezenet": published(1_248_424, 512),  # torchvision's squeezenet1_0
    "vgg16": vgg([3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6], 512),
    "resnet20": 17_048_906,  # see resnet()
    "sew_resnet18": 11_173_962,  # the usual ResNet-18 with a 3×3 stem for CIFAR-10
    "vggsnn": vgg([2, 64, 128, 256, 256, 512, 512, 512, 512], 512 * 9),
    "spikingformer": sum(transformer(384, 10)),  # 9.32 M in its paper
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


# QP-SNN's Table 10, and the same with a hundred classes: parameters in M, MB at 8, 4 and 2 bits
RESNET20 = [
    (10, 0.3, 0.6, 6.23, [6.27, 3.16, 1.61]),
    (10, 0.35, 0.75, 3.88, [3.92, 1.98, 1.02]),
    (100, 0.3, 0.6, 6.27, [6.45, 3.35, 1.79]),
    (100, 0.35, 0.75, 3.93, [4.10, 2.17, 1.20]),
]


def resnet20_left(classes: int, a: float, b: float, stem: int, one: int, two: int, three: int) -> tuple[int, int]:
    """All parameters, and those of stem, batch norms and classifier; a for the second convolutions of stage 2 too."""

    def less(width: int, ratio: float) -> int:
        return width - math.ceil(round(ratio * width, 9))

    inner = [less(one, a), less(one, b), less(one, b)]
    stages = [(less(one, a), inner), (less(two, a), 3 * [less(two, b)]), (three, 3 * [less(three, b)])]
    total = resnet(less(stem, 0.1), stages) + (classes - 10) * (three + 1)
    norms = less(stem, 0.1) + sum(3 * width + sum(inner) for width, inner in stages)
    return total, 27 * less(stem, 0.1) + 2 * norms + classes * (three + 1)


@pytest.mark.parametrize(("classes", "a", "b", "published", "megabytes"), RESNET20)
def test_resnet20_of_qp_snn(classes: int, a: float, b: float, published: float, megabytes: list[float]) -> None:
    assert resnet(64, [(128, 3 * [128]), (256, 3 * [256]), (512, 3 * [512])]) == SIZES["resnet20"]
    assert resnet(16, [(16, 3 * [16]), (32, 3 * [32]), (64, 3 * [64])]) == 269_722  # He et al.: 0.27 M
    total, full = resnet20_left(classes, a, b, 64, 128, 256, 512)
    assert round(total / 1e6, 2) == published
    assert [round(((total - full) * bits + 32 * full) / 8e6, 2) for bits in (8, 4, 2)] == megabytes


@pytest.mark.parametrize(("classes", "a", "b"), [(10, 0.3, 0.6), (100, 0.35, 0.75)])
def test_resnet20_shrinks_as_by_hand(classes: int, a: float, b: float) -> None:
    """At an eighth of the widths."""
    ratios = {"conv1": 0.1, "layer1.*": a, "layer1.[12].conv1": b, "layer2.*": a, "layer?.?.conv1": b,
              "layer1.0.conv1": a, "layer3.?.conv2": 0.0}  # fmt: skip
    model = build("resnet20", num_classes=classes, widths=(8, 16, 32, 64)).double()
    case = liven(Case(model, torch.rand(2, 3, 8, 8, dtype=torch.float64), 1))
    small = snncompress.apply(model, "magnitude", ratios, None, data=case.x, timesteps=1, repair=None)
    assert largest_difference(model, small, case.feed) <= 1e-9
    small = snncompress.apply(small, None, bits=4, data=case.x, timesteps=1, repair=None, rounding="nearest")
    profile = snncompress.profile(small, case.x, timesteps=1)
    total, full = resnet20_left(classes, a, b, 8, 16, 32, 64)
    assert (profile.n_params, profile.size_mb) == (total, pytest.approx(((total - full) * 4 + 32 * full) / 8e6))


def test_spikingformer_of_qp_snn() -> None:
    """Its Table 4: 18.64 MB at 16 bits; two thirds of every width at 4 bits, 2.25 MB, in one call.

    By hand at full width, by the library at 1/8. The 18.64 are those of ten classes, the 2.25 of a hundred.
    """

    def megabytes(weights: int, others: int) -> float:
        return (4 * weights + 32 * others) / 8e6

    assert round(2 * sum(transformer(384, 10)) / 1e6, 2) == 18.64
    assert [round(megabytes(*transformer(256, 100, bias=b)), 2) for b in (False, True)] == [2.25, 2.27]
    assert 0.447 < sum(transformer(256, 100, bias=False)) / sum(transformer(384, 10)) < 0.448  # 44.74 %

    model = build("spikingformer", num_classes=100, depth=1, dim=48, heads=2)
    x = torch.rand(1, 3, 32, 32)
    small = snncompress.apply(model, "magnitude", 1 / 3, 4, data=x, timesteps=1, repair=None)
    assert math.isclose(snncompress.profile(small, x, timesteps=1).size_mb, megabytes(*transformer(32, 100, depth=1)))


@pytest.mark.parametrize("name", SIZES)
def test_keys_of_a_mapping_are_what_a_reader_would_try(name: str) -> None:
    """conv1 or stage2.0.conv1, not conv1.0: a convolution has a name of its own."""
    with torch.device("meta"):
        model = build(name, **SMALL[name])
    layers = [n for n, m in model.named_modules() if isinstance(m, WEIGHT_LAYERS)]
    assert [n for n in layers if n.rpartition(".")[2].isdigit() and ".convs." not in n] == []
    assert {"conv1", "embed.conv1"} & set(layers)


@pytest.mark.parametrize(("name", "image_size", "pixels"), [("vgg16", 64, 4), ("vggsnn", 64, 16)])
def test_other_image_sizes(name: str, image_size: int, pixels: int) -> None:
    """Half of all channels but the last convolution's, 4 bits: first layer, batch norms and classifier at 32 bits."""
    model = build(name, num_classes=7, image_size=image_size, in_channels=3, width=1 / 16)
    x = torch.rand(1, 3, image_size, image_size)
    assert isinstance(model.pool4, layer.MaxPool2d)
    small = snncompress.apply(model, "magnitude", 0.5, 4, data=x, timesteps=1, repair=None, rounding="nearest")
    widths = [m.out_channels for n, m in model.named_children() if n.startswith("conv")]
    channels = [3, *(width // 2 for width in widths[:-1]), widths[-1]]
    first, *weights = (9 * before * after for before, after in itertools.pairwise(channels))
    full = first + 2 * sum(channels[1:]) + 7 * (widths[-1] * pixels + 1)
    profile = snncompress.profile(small, x, timesteps=1)
    assert profile.n_params == sum(weights) + full
    assert math.isclose(profile.size_mb, (4 * sum(weights) + 32 * full) / 8e6)


def test_neurons_of_tet() -> None:
    """u ← u/2 + I, hard reset; between 0 and 2 the slope of the triangle, 1 − |u − 1|."""
    lif = importlib.import_module("examples.networks.blocks").undivided_lif
    current = torch.tensor([0.6, 1.3, -0.5, 3.0], requires_grad=True)
    node = lif(triangle=True)
    spikes = node(current)
    spikes.sum().backward()
    assert spikes.tolist() == [0, 1, 0, 1]
    assert torch.allclose(current.grad, torch.tensor([0.6, 0.7, 0.0, 0.0]))
    assert torch.allclose(node.v, torch.tensor([0.6, 0.0, -0.5, 0.0]))
    assert node(torch.tensor([0.6, 0.9, 0.0, 0.0])).tolist() == [0, 0, 0, 0]  # 0.9, 0.9, -0.25, 0
    assert torch.allclose(node.v, torch.tensor([0.9, 0.9, -0.25, 0.0]))


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
    assert largest_difference(case.model, compressed, case.feed, READERS.get(name, ())) <= 1e-9
    check_whole(name, case.model, snncompress.plan_of(compressed))


@pytest.mark.parametrize("name", SMALL)
def test_mask_equivalence_in_single_steps(name: str) -> None:
    case = narrow(name, "s")
    compressed = prune(case, "firing_rate", repair=None)
    assert largest_difference(case.model, compressed, case.feed, READERS.get(name, ())) <= 1e-9
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
