"""Truths 2-5 and 7 of the architecture, on networks of both frameworks; `tests/generated/` is for 1, 3, 4 and more."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import snncompress
import snncompress.extend
from snncompress import NothingToDoWarning, SilentNeuronsWarning
from snncompress.model.edits import RemoveChannels
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.running.data import Feed
from tests.equivalence import PAPER, outputs, same, silenced, snapshot
from tests.networks import Case, snntorch_cases, spikingjelly_cases

CRITERIA = ["svs", "sca", "magnitude", "random", "firing_rate"]


def prune(case: Case, criterion: str = "random", **options: object) -> nn.Module:
    options = {"ratio": 0.5, "bits": None, "data": case.x, "timesteps": case.timesteps, "skip": [], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentNeuronsWarning)
        warnings.simplefilter("ignore", NothingToDoWarning)
        return snncompress.apply(case.model, criterion, **options)


ANY = st.one_of(spikingjelly_cases(), snntorch_cases())
fewer = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@fewer
@given(case=ANY, bits=st.integers(1, 16), order=st.sampled_from(["qp", "pq"]))
def test_grid_on_any_network(case: Case, bits: int, order: str) -> None:
    compressed = prune(case, "magnitude", bits=bits, order=order, quantizer=PAPER)
    quantized = [e for e in snncompress.plan_of(compressed).edits if e.kind == "quantize_weights"]
    assert quantized
    for edit in quantized:
        module = compressed.get_submodule(edit.layer)
        assert len(module.weight.unique()) <= 2**bits
        _, scale, zero_point, _ = module.parametrizations.weight[0].tensor_quant(
            module.parametrizations.weight.original
        )
        steps = module.weight.detach() / scale + zero_point
        torch.testing.assert_close(steps, steps.round(), atol=2e-2 if bits > 12 else 1e-3, rtol=0)


@fewer
@given(case=ANY, bits=st.sampled_from([None, 4]))
def test_accounting_on_any_network(case: Case, bits: int | None) -> None:
    """AC counts equal the (spike, existing synapse) pairs, summed where they arrive: conv(|x|, W ≠ 0)."""
    model = prune(case, "magnitude", bits=bits)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WEIGHT_LAYERS) and not hasattr(module, "parametrizations"):
                module.weight[torch.rand_like(module.weight) < 0.3] = 0
    rules = snncompress.Conventions(averaged_spikes="multiplications")  # additions: tests/measuring/
    profile = snncompress.profile(model, case.x, timesteps=case.timesteps, conventions=rules)
    pairs: dict[str, float] = {}
    analog: set[str] = set()

    def count(name: str) -> object:
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0].detach().double().abs()
            if not torch.equal(x, x.round()):
                analog.add(name)
            synapses = (module.weight != 0).double()
            if isinstance(module, nn.Linear):
                arrived = nn.functional.linear(x, synapses)
            else:
                x = x.flatten(0, x.dim() - 4)
                arrived = nn.functional.conv2d(x, synapses, None, module.stride, module.padding, 1, module.groups)
            pairs[name] = pairs.get(name, 0.0) + float(arrived.sum())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, WEIGHT_LAYERS):
            module.register_forward_pre_hook(count(name))
    outputs(model, case.feed)
    rows = {row.name: row for row in profile.layers}
    for name, found in pairs.items():
        if name in analog:
            assert rows[name].n_ac == 0
        else:
            assert rows[name].n_ac == pytest.approx(found / len(case.x), rel=1e-12)
    assert profile.size_mb == pytest.approx(
        sum(
            p.numel() * (4 if bits and ".parametrizations." in n else 32) for n, p in model.named_parameters()
        ) / 8e6
    )  # fmt: skip


def test_the_equivalence_check_can_fail() -> None:
    """Silencing one channel too few must be noticed."""
    torch.manual_seed(0)
    case = spikingjelly_case()
    compressed = prune(case, repair=None)
    plan = snncompress.plan_of(compressed)
    edit = next(e for e in plan.edits if isinstance(e, RemoveChannels))
    wrong = snncompress.Plan(tuple(e for e in plan.edits if e is not edit), plan.skipped, plan.origin)
    expected = outputs(silenced(case.model, wrong, case.feed), case.feed)
    got = outputs(compressed, case.feed)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, got, strict=True))


def spikingjelly_case() -> Case:
    from spikingjelly.activation_based import functional, layer, neuron

    from tests.networks import liven

    torch.manual_seed(1)
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(), layer.MaxPool2d(2),
        layer.Conv2d(8, 12, 3, padding=1, bias=False), layer.BatchNorm2d(12), neuron.LIFNode(), layer.AvgPool2d(2),
        layer.Flatten(), layer.Linear(48, 20), neuron.LIFNode(), layer.Linear(20, 10),
    ).double()  # fmt: skip
    functional.set_step_mode(model, "m")
    return liven(Case(model, torch.rand(4, 1, 8, 8, dtype=torch.float64), 4))


def snntorch_case() -> Case:
    import snntorch as snn

    from tests.networks import liven

    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), snn.Leaky(beta=0.5, init_hidden=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), snn.RLeaky(beta=0.5, conv2d_channels=12, kernel_size=3, init_hidden=True),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), snn.Leaky(beta=torch.rand(20), init_hidden=True),
        nn.Linear(20, 10), snn.Leaky(beta=0.5, init_hidden=True, output=True),
    )  # fmt: skip
    return liven(Case(model, torch.rand(4, 1, 8, 8), 4))


CASES = pytest.mark.parametrize("make", [spikingjelly_case, snntorch_case])


@CASES
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["qp", "pq"])
def test_grid(make: object, bits: int, order: str) -> None:
    """A b-bit weight has at most 2^b values, each on γ·{-1, -1 + 2/s, …, 1}, s = 2^b - 1, γ = mean|W|."""
    case = make()
    compressed = prune(case, bits=bits, order=order, quantizer=PAPER)
    quantized = [e.layer for e in snncompress.plan_of(compressed).edits if e.kind == "quantize_weights"]
    assert len(quantized) == (5 if make is snntorch_case else 4)
    for name in quantized:
        module = compressed.get_submodule(name)
        weight = module.weight.detach()
        assert len(weight.unique()) <= 2**bits
        gamma = module.parametrizations.weight.original.abs().mean()
        steps = (weight / gamma + 1) / 2 * (2**bits - 1)
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert steps.min() >= -1e-4
        assert steps.max() <= 2**bits - 1 + 1e-4


@CASES
@pytest.mark.parametrize("training", [True, False])
def test_original_untouched(make: object, training: bool) -> None:
    case = make()
    case.model.train(training)
    case.model[0].register_forward_hook(lambda *_: None)
    case.feed(case.model, case.feed.first())  # leaves membrane potentials, with a live graph, in the neurons
    case.model[0].weight.grad = torch.ones_like(case.model[0].weight)
    before = snapshot(case.model)
    y = torch.arange(4) % 5
    compressed = snncompress.apply(
        case.model, "svs", 0.5, 4, data=(case.x, y), timesteps=4, finetune=2, scheduler="iterative"
    )
    assert same(before, snapshot(case.model))
    assert {m.training for m in compressed.modules()} == {training}
    assert len(compressed[0]._forward_hooks) == 1
    assert type(compressed) is type(case.model)


@CASES
@pytest.mark.parametrize("stage", ["calibration", "finetune", "score"])
def test_original_untouched_when_apply_raises_halfway(make: object, stage: str) -> None:
    case = make()
    before = snapshot(case.model)

    class Broken(snncompress.extend.Criterion):
        name = "broken"
        needs = frozenset({"spikes"})

        def observe(self, layer, state, spikes, membrane):
            if stage == "calibration":
                raise ZeroDivisionError("boom")

        def score(self, layer, state):
            return torch.arange(layer.channels) if stage != "score" else None

    def tune(model: nn.Module) -> None:
        raise KeyboardInterrupt

    expected = KeyboardInterrupt if stage == "finetune" else snncompress.PluginError
    with pytest.raises(expected):
        snncompress.apply(
            case.model,
            Broken(),
            0.5,
            4,
            data=case.x,
            timesteps=4,
            finetune=tune if stage == "finetune" else None,
        )
    assert same(before, snapshot(case.model))


def test_snapshot_comparison_can_fail() -> None:
    case = spikingjelly_case()
    before = snapshot(case.model)
    with torch.no_grad():
        case.model[0].weight[0, 0, 0, 0] += 1e-12
    assert not same(before, snapshot(case.model))


@CASES
@pytest.mark.parametrize("scheduler", ["one_shot", "iterative"])
@pytest.mark.parametrize("order", ["qp", "pq"])
def test_replay(make: object, scheduler: str, order: str) -> None:
    """plan → JSON → fresh model → the same keys and shapes, and with the weights the same outputs."""
    case = make()
    fresh = copy.deepcopy(case.model)
    compressed = prune(case, bits=4, scheduler=scheduler, order=order)
    plan = snncompress.Plan.from_json(snncompress.plan_of(compressed).to_json())
    assert plan == snncompress.plan_of(compressed)
    for module in fresh.modules():  # a newly built model has other weights
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    replayed = plan.apply(fresh)
    wanted, got = compressed.state_dict(), replayed.state_dict()
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in got.items()}
    replayed.load_state_dict(wanted)
    for a, b in zip(outputs(compressed, case.feed), outputs(replayed, case.feed), strict=True):
        assert torch.equal(a, b)


@CASES
@pytest.mark.parametrize("criterion", [*CRITERIA, "taylor"])
def test_determinism(make: object, criterion: str) -> None:
    plans, weights = [], []
    for _ in range(2):
        case = make()
        torch.manual_seed(torch.seed() % 1000)  # whatever state the user's generator is in
        data = Feed(case.feed.adapter, (case.x, torch.arange(4)), 4).first().raw
        compressed = prune(case, criterion, bits=4, data=data, finetune=1, seed=3)
        plans.append(snncompress.plan_of(compressed).to_json())
        weights.append(torch.cat([p.detach().flatten() for p in compressed.parameters()]))
    assert plans[0] == plans[1]
    assert torch.equal(*weights)


@CASES
def test_removed_channels_are_indices_of_the_original(make: object) -> None:
    """After three steps, the rows that are left are exactly the original's rows that the plan doesn't name."""
    case = make()
    compressed = prune(case, scheduler="iterative", ratio=0.6)
    removed = snncompress.plan_of(compressed).removed_channels()
    name = "0"
    keep = [c for c in range(8) if c not in removed[name]]
    assert len(removed[name]) == 5  # ⌈0.6·8⌉
    assert torch.equal(compressed.get_submodule(name).weight, case.model.get_submodule(name).weight[keep])
