"""SpikingJelly: step modes, neurons, containers, norms, recurrence, and the models of its own folder."""

from __future__ import annotations

import importlib
import operator

import pytest
import torch
import torch.nn.utils.prune
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import NothingToDoWarning
from snncompress.contract.detection import find_adapter
from snncompress.model.edits.channels import Width
from tests.end_to_end.test_truths import prune
from tests.equivalence import PAPER, largest_difference, same, snapshot
from tests.networks import Case, firing_rates, liven

X = torch.rand(3, 1, 8, 8, dtype=torch.float64)


def compress(
    model: nn.Module, x: Tensor = X, timesteps: int | None = 3, readers: tuple[str, ...] = (), **options: object
) -> snncompress.Plan:
    """Prune to a half, check mask equivalence, return the plan; ``readers`` are layers that read no neurons."""
    case = liven(Case(model.double(), x, timesteps))
    compressed = prune(case, "magnitude", repair=None, **options)
    assert largest_difference(case.model, compressed, case.feed, readers) <= 1e-9
    return snncompress.plan_of(compressed)


def convolutional(node: type[nn.Module] = neuron.LIFNode, mode: str = "s", **options: object) -> nn.Sequential:
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), node(**options), layer.MaxPool2d(2),
        layer.Conv2d(8, 12, 3, padding=1), layer.BatchNorm2d(12), node(**options), layer.AvgPool2d(2),
        layer.Flatten(), layer.Linear(48, 20), node(**options), layer.Linear(20, 10), node(**options),
    )  # fmt: skip
    functional.set_step_mode(model, mode)
    return model


NEURONS = [
    neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.KLIFNode, neuron.EIFNode, neuron.QIFNode,
    neuron.IzhikevichNode,
]  # fmt: skip


@pytest.mark.parametrize("node", NEURONS)
@pytest.mark.parametrize("mode", "sm")
def test_every_neuron_in_both_step_modes(node: type[nn.Module], mode: str) -> None:
    plan = compress(convolutional(node, mode))
    assert set(plan.removed_channels()) == {"0", "1", "4", "5", "9"}


@pytest.mark.parametrize("mode", "sm")
def test_defaults_leave_the_classifier_and_what_feeds_it(mode: str) -> None:
    plan = compress(convolutional(mode=mode), skip=None)
    assert set(plan.removed_channels()) == {"0", "1", "4", "5"}
    assert plan.skipped["9"] == "it feeds the classifier"
    assert plan.skipped["11"] == "11 is the classifier: its outputs are the model's"


def test_observed_membrane_is_before_reset() -> None:
    """LIF, τ = 2, constant input 1.8, soft reset: Ũ = 0.9, 1.35 (spike), then from 0.35: 1.075 (spike)."""
    for mode in "sm":
        node = neuron.LIFNode(tau=2.0, v_reset=None, step_mode=mode)
        adapter = find_adapter(nn.Sequential(node))
        seen: list[tuple[Tensor, Tensor | None]] = []
        stop = adapter.observe(node, lambda s, u, seen=seen: seen.append((s, u)), membrane=True)
        x = torch.full((1, 1), 1.8)
        _ = node(x.expand(3, 1, 1)) if mode == "m" else [node(x) for _ in range(3)]
        stop()
        torch.testing.assert_close(torch.cat([u for _, u in seen]).flatten(), torch.tensor([0.9, 1.35, 1.075]))
        assert torch.cat([s for s, _ in seen]).flatten().tolist() == [0, 1, 1]
        assert not isinstance(node.surrogate_function, type(None))
        assert "Tap" not in type(node.surrogate_function).__name__


class OwnTime(nn.Module):
    """Repeats its input over its own T, as SpikingJelly's tutorials do, or loops over single steps."""

    def __init__(self, steps: int, mode: str) -> None:
        super().__init__()
        self.steps, self.mode, self.net = steps, mode, convolutional(neuron.IFNode, mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "m":
            return self.net(x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)).mean(0)
        return torch.stack([self.net(x) for _ in range(self.steps)]).mean(0)


@pytest.mark.parametrize("mode", "sm")
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_models_with_their_own_time(mode: str, steps: int) -> None:
    plan = compress(OwnTime(steps, mode), timesteps=None)
    assert set(plan.removed_channels()) == {"net.0", "net.1", "net.4", "net.5", "net.9"}


def test_plain_layers_in_containers() -> None:
    model = nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)), neuron.LIFNode(step_mode="m"),
        layer.SeqToANNContainer(nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)),
        neuron.LIFNode(step_mode="m"),
        layer.MultiStepContainer(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), neuron.IFNode()),
        layer.StepModeContainer(False, "m", nn.Flatten(), nn.Linear(7 * 16, 10)),
    )  # fmt: skip
    assert set(compress(model).removed_channels()) == {"0.0", "0.1", "2.1", "2.2", "4.0", "4.1"}


def test_time_aware_batch_norms() -> None:
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 8), neuron.LIFNode(),
        layer.Conv2d(8, 6, 3, padding=1), layer.TemporalEffectiveBatchNorm2d(3, 6), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(384, 10),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    assert set(compress(model).removed_channels()) == {"0", "1", "3", "4"}


def test_batch_norms_through_time_without_a_shift() -> None:
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), layer.BatchNormThroughTime2d(3, 8), neuron.LIFNode(),
        layer.Conv2d(8, 6, 3, padding=1), neuron.LIFNode(), layer.Flatten(), layer.Linear(384, 10),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    plan = snncompress.plan_of(prune(Case(model.double(), X, 3), "magnitude"))
    assert {"0", "3"} < set(plan.removed_channels())


def test_recurrent_containers() -> None:
    model = nn.Sequential(
        layer.Flatten(), layer.Linear(64, 32), neuron.LIFNode(),
        layer.ElementWiseRecurrentContainer(nn.Sequential(nn.Linear(32, 32), neuron.LIFNode()), operator.add),
        layer.LinearRecurrentContainer(nn.Sequential(nn.Linear(32, 24), neuron.LIFNode()), 32, 24),
        layer.Linear(24, 10),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    plan = compress(model, timesteps=4, readers=("4.sub_module.0",))
    assert {"4.rc", "1", "3.sub_module.0"} <= set(plan.removed_channels())  # coupled through the feedback sum
    (edit,) = (edit for edit in plan.edits if edit.layer == "4.sub_module.0")
    assert edit.widths == (Width("4", "sub_module_out_features", 24, 12),)  # the container makes zeros of that width


class Branches(nn.Module):
    """Two convolutions concatenated, then a grouped and a depthwise one."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.left, self.right = layer.Conv2d(1, 6, 3, padding=1), layer.Conv2d(1, 4, 1)
        self.sn_left, self.sn_right, self.sn = neuron.IFNode(), neuron.IFNode(), neuron.IFNode()
        self.join = layer.Conv2d(10, 12, 1)
        self.grouped = layer.Conv2d(12, 8, 3, padding=1, groups=4)
        self.depthwise = layer.Conv2d(8, 8, 3, padding=1, groups=8)
        self.sn_grouped, self.sn_depthwise = neuron.IFNode(), neuron.IFNode()
        self.fc = layer.Linear(8 * 64, 10)
        self.channels = 1 if mode == "s" else 2
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.sn_left(self.left(x)), self.sn_right(self.right(x))], self.channels)
        x = self.sn_grouped(self.grouped(self.sn(self.join(x))))
        return self.fc(self.sn_depthwise(self.depthwise(x)).flatten(self.channels))


@pytest.mark.parametrize("mode", "sm")
def test_concatenation_groups_and_depthwise(mode: str) -> None:
    removed = compress(Branches(mode)).removed_channels()
    assert {k: len(v) for k, v in removed.items()} == {
        "left": 3,
        "right": 2,
        "join": 8,
        "grouped": 4,
        "depthwise": 4,
    }  # fmt: skip - join: ⌈0.5·3⌉ = 2 of 3 in each of the 4 groups that take it in
    assert sorted(c % 3 for c in removed["join"]) == sorted([c % 3 for c in removed["join"][:2]] * 4)


class ConcatenatedFlatten(nn.Module):
    """A concatenation whose consumer is a linear layer behind a flatten."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.left, self.right = layer.Conv2d(1, 6, 3, padding=1), layer.Conv2d(1, 4, 1)
        self.sn_left, self.sn_right = neuron.IFNode(), neuron.IFNode()
        self.fc = layer.Linear(10 * 64, 10)
        self.channels = 1 if mode == "s" else 2
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        both = [self.sn_left(self.left(x)), self.sn_right(self.right(x))]
        return self.fc(torch.cat(both, self.channels).flatten(self.channels))


@pytest.mark.parametrize("mode", "sm")
def test_flattened_concatenation(mode: str) -> None:
    assert set(compress(ConcatenatedFlatten(mode)).removed_channels()) == {"left", "right"}


class PerTimestep(neuron.LIFNode):
    """A threshold for every timestep: as many entries as the layer may have channels, but not one per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(0.1, 0.5, 3))
        self.register_memory("t", -1)

    def single_step_functional_forward(self, inputs: tuple, states: tuple, **named: object) -> tuple:
        t = states[1] + 1
        spikes, states = super().single_step_functional_forward((inputs[0] + self.offset[t],), states, **named)
        return spikes, (states[0], t)


def test_parameters_that_are_not_per_channel_stay() -> None:
    model = nn.Sequential(layer.Flatten(), layer.Linear(64, 8), PerTimestep(), layer.Linear(8, 5))
    plan = compress(model, timesteps=3)
    assert set(plan.removed_channels()) == {"1"}
    assert plan.apply(model)[2].offset.shape == (3,)


class OneNeuronForAll(nn.Module):
    """A stateless use of one neuron after several layers, and one weight used twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (layer.Linear(8, 8) for _ in range(4))
        self.sn = neuron.IFNode()
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        for fc in (self.a, self.b, self.c):
            self.sn.reset()
            x = self.sn(fc(x))
        return self.d(x)


@pytest.mark.parametrize("tied", [True, False])
def test_shared_neurons_and_weights(tied: bool) -> None:
    plan = compress(OneNeuronForAll(tied), timesteps=1)
    assert plan.skipped["d"] == "d is the classifier: its outputs are the model's"
    if tied:
        assert plan.skipped["b"] == plan.skipped["c"] == "b and c share their weight"


@pytest.mark.parametrize("how", ["spectral_norm", "prune"])
def test_computed_weights_are_left_whole(how: str) -> None:
    model = convolutional()
    if how == "spectral_norm":  # over all outputs: without some of them the others' weights would change
        nn.utils.parametrizations.spectral_norm(model[4])
    else:
        torch.nn.utils.prune.l1_unstructured(model[4], "weight", 0.3)
    compressed = prune(Case(model.double(), X, 2), "magnitude", skip=None)
    plan = snncompress.plan_of(compressed)
    assert "its weight is computed" in plan.skipped["4"]
    assert compressed(X).shape == (3, 10)
    with pytest.warns(NothingToDoWarning, match="'4': its weight is computed"):
        quantized = snncompress.apply(model, None, bits=4, data=X, timesteps=2, skip=[], repair=None)
    assert "4" not in [edit.layer for edit in snncompress.plan_of(quantized).edits] != []
    with pytest.raises(snncompress.PlanError, match="4 can't be quantized: its weight is computed"):
        snncompress.QuantizeWeights("4", "uniform", 4, {}).check(model)


def test_multi_step_neurons_outside_base_node() -> None:
    """PSN takes all timesteps at once through a weight of its own."""
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.LIFNode(), layer.Conv2d(8, 6, 3, padding=1), neuron.PSN(3),
        layer.Flatten(), layer.Linear(384, 10),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    plan = snncompress.plan_of(prune(Case(model.double(), X, 3), "magnitude"))
    assert {"0", "2"} <= set(plan.removed_channels())


@pytest.mark.parametrize("context", ["autocast", "no_grad", "inference_mode"])
def test_contexts_around_the_call(context: str) -> None:
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    model, x, y = convolutional().float(), 4 * X.float(), torch.arange(3)
    with contexts[context]():
        small = snncompress.apply(model, "taylor", 0.5, 4, data=(x, y), timesteps=2, finetune=1)
    assert small[0].out_channels == 4
    assert small[4].out_channels == 6


def test_frozen_layers_are_scored_and_stay_frozen() -> None:
    model = convolutional().float()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    small = snncompress.apply(model, "taylor", 0.5, 4, data=(4 * X.float(), torch.arange(3)), timesteps=2)
    assert small[0].out_channels == 4
    assert not any(p.requires_grad for p in small.parameters())


class Reshapes(nn.Module):
    """Mixes channels with positions, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sn = layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode()
        self.mix, self.sn2 = layer.Conv2d(8, 6, 1), neuron.IFNode()
        self.fc = layer.Linear(6 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sn(self.conv(x))
        x = x.reshape(len(x), 8, 8, 8).permute(0, 3, 1, 2)  # width becomes the channels
        return self.fc(self.sn2(self.mix(x)).flatten(1))


def test_what_cannot_be_followed_is_left_whole_and_named() -> None:
    plan = compress(Reshapes())
    assert set(plan.removed_channels()) == {"mix"}
    assert "can't be removed safely" in plan.skipped["conv"]


def test_norm_after_the_neuron_is_left_whole() -> None:
    """A batch norm adds its shift to silent channels, which no bias can make up for where zeros are padded."""
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode(), layer.BatchNorm2d(8), layer.Conv2d(8, 6, 3, padding=1),
        neuron.IFNode(), layer.Flatten(), layer.Linear(384, 10),
    )  # fmt: skip
    plan = compress(model)
    assert set(plan.removed_channels()) == {"3"}
    assert "not the same as silencing" in plan.skipped["0"]


SINGLE = ("s", 0.0, neuron.IFNode)
MULTI = ("m", None, neuron.ParametricLIFNode)  # None: soft reset
ZOO = [
    ("sew_resnet", "sew_resnet18", {"cnf": "ADD"}, SINGLE),
    ("sew_resnet", "sew_resnet18", {"cnf": "ADD"}, MULTI),
    ("sew_resnet", "sew_resnext50_32x4d", {"cnf": "ADD"}, MULTI),
    ("spiking_resnet", "spiking_resnet18", {}, SINGLE),
    ("spiking_resnet", "spiking_resnet18", {}, MULTI),
    ("spiking_vgg", "spiking_vgg11_bn", {}, MULTI),
]


@pytest.mark.usefixtures("torchvision_ops")
@pytest.mark.parametrize(
    ("module", "name", "options", "how"),
    [
        pytest.param(*z, id=f"{z[1]}-{z[3][0]}", marks=() if number == 1 else pytest.mark.slow)
        for number, z in enumerate(ZOO)
    ],
)
def test_model_zoo(
    module: str, name: str, options: dict[str, str], how: tuple[str, float | None, type[nn.Module]]
) -> None:
    mode, v_reset, node = how
    build = getattr(importlib.import_module(f"spikingjelly.activation_based.model.{module}"), name)
    model = build(spiking_neuron=node, num_classes=10, v_reset=v_reset, **options).double()
    functional.set_step_mode(model, mode)
    case = liven(Case(model, torch.rand(2, 3, 32, 32, dtype=torch.float64), 2))
    assert min(firing_rates(case).values()) > 0
    before = snapshot(model)
    compressed = prune(case, "magnitude", repair=None)
    assert same(before, snapshot(model))
    assert largest_difference(model, compressed, case.feed) <= 1e-9
    plan = snncompress.plan_of(compressed)
    if "vgg" not in name:  # half a gigabyte of classifier
        assert snncompress.plan_of(prune(case, "magnitude", repair=None)) == plan
        twice = [prune(case, "magnitude", bits=4, quantizer=PAPER, repair=None) for _ in range(2)]
        quantized = snncompress.plan_of(twice[0]).apply(model)
        keys = {k: v.shape for k, v in twice[1].state_dict().items()}
        assert {k: v.shape for k, v in quantized.state_dict().items()} == keys
        weights = [m.weight for m in quantized.modules() if hasattr(m, "parametrizations")]
        assert all(len(w.unique()) <= 16 for w in weights)
        assert len(weights) > 15
    assert set(plan.skipped) == {"classifier.6" if "vgg" in name else "fc"}


def test_attention_shrinks_head_by_head() -> None:
    from spikingjelly.activation_based.model import spikformer_cifar10

    model = spikformer_cifar10()
    functional.set_step_mode(model, "m")
    case = Case(model, torch.rand(1, 3, 32, 32), 2)
    plan = snncompress.plan_of(prune(case, "magnitude", repair=None))
    assert set(plan.skipped) == {"head"}
    heads, width = model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim
    gone = torch.tensor(plan.removed_channels()["blocks.0.attn.qkv_conv_bn.0"])
    each = [gone[gone // width == part] % width for part in range(3 * heads)]
    assert all(torch.equal(part, each[0]) for part in each)
