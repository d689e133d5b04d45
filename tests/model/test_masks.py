"""Single weights: masks as edits, how many go, in which layers, and what happens when channels and bits go too."""

from __future__ import annotations

import base64
import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snncompress_baselines import WeightMagnitude, WeightRandom
from snncompress_cqp import CQP
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import snncompress
from snncompress import EmptyLayerWarning, MaskWeights, NothingToDoWarning, Plan, PlanError
from snncompress.contract.detection import find_adapter
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import stored_weight, weight_mask
from tests.end_to_end.test_zombies import dead, moved, noise, removed
from tests.equivalence import PAPER, largest_difference, outputs, same, snapshot
from tests.networks import Case, liven


def spikingjelly_case() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1), neuron.IFNode(), layer.MaxPool2d(2),
        layer.Conv2d(6, 6, 3, padding=1, groups=6), neuron.IFNode(),
        layer.ConvTranspose2d(6, 4, 2, stride=2), neuron.IFNode(), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(64, 12), neuron.LIFNode(),
        layer.LinearRecurrentContainer(neuron.IFNode(), 12, 12), layer.Linear(12, 5),
    ).double()  # fmt: skip
    functional.set_step_mode(net[:-2], "m")
    net[-2].step_mode = net[-1].step_mode = "m"
    return liven(Case(net, torch.rand(4, 1, 8, 8, dtype=torch.float64), 3))


def snntorch_case() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), snn.Leaky(beta=0.5, init_hidden=True),
        nn.Conv1d(6, 8, 3, padding=1, groups=2), snn.Leaky(beta=0.5, init_hidden=True),
        nn.ConvTranspose1d(8, 4, 2, stride=2), snn.Leaky(beta=0.5, init_hidden=True), nn.MaxPool1d(4),
        nn.Flatten(), nn.Linear(32, 12), snn.RLeaky(beta=0.5, linear_features=12, init_hidden=True),
        nn.Linear(12, 5),
    )  # fmt: skip
    return liven(Case(net, torch.rand(4, 2, 16), 3))


CASES = pytest.mark.parametrize("make", [spikingjelly_case, snntorch_case])
Make = Callable[[], Case]
LABELS = torch.arange(4)
WITHIN = WeightMagnitude(scope="layer")


def prune(case: Case, criterion: Any = WITHIN, ratio: Any = 0.5, bits: Any = None, **options: Any) -> Any:
    """Of a case, or of its model where one is given."""
    model = options.pop("model", case.model)
    options = {"data": (case.x, LABELS), "timesteps": case.timesteps, "skip": [], **options}
    return snncompress.apply(model, criterion, ratio, bits, **options)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)}


def sizes(model: nn.Module) -> dict[str, int]:
    return {name: module.weight.numel() for name, module in layers_of(model).items()}


def lost(model: nn.Module) -> dict[str, int]:
    return {name: int(gone.sum()) for name, gone in removed(model).items()}


def test_packed_by_hand() -> None:
    """1011 0001 | 01(00 0000) = B1 40; in sixes 101100 010100 0000(00) = 44 20 0 = s U A, and = for the third byte."""
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
    edit = MaskWeights.of("fc", mask)
    assert edit.to_dict() == {"edit": "mask_weights", "layer": "fc", "shape": (2, 5), "kept": "sUA="}
    assert torch.equal(edit.mask(), mask)
    assert Plan.from_json(Plan((edit,)).to_json()).edits == (edit,)
    with pytest.raises(PlanError, match=r"a mask of 2 bytes for a weight of shape \[-2, -5\]"):
        replace(edit, shape=(-2, -5)).mask()
    net = nn.Sequential(nn.Linear(5, 2), neuron.IFNode())
    replace(edit, layer="0").apply(net, find_adapter(net))
    MaskWeights.of("0", torch.ones(2, 5).bool()).apply(net, find_adapter(net))  # the earlier mask stays in force
    assert torch.equal(noise(net)[0].weight != 0, mask)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31), st.floats(0, 1))
def test_packing_and_unpacking_any_mask(shape: list[int], seed: int, share: float) -> None:
    """Also one that lies otherwise in memory."""
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).transpose(0, -1)
    edit = Plan.from_json(Plan((MaskWeights.of("fc", mask),)).to_json()).edits[0]
    assert torch.equal(edit.mask(), mask)
    text = "".join(str(int(bit)) for bit in mask.flatten().tolist())
    whole = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2)
    assert base64.b64decode(edit.kept) == whole.to_bytes(-(-len(text) // 8), "big")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kept", "s$A=", "isn't base64"),
        ("kept", "sÜA=", "isn't base64"),
        ("kept", "sUAA", "a mask of 3 bytes"),
        ("kept", "", "a mask of 0 bytes"),
        ("shape", [5, 2], r"shape \[2, 5\], the plan's mask is \[5, 2\]"),
        ("shape", [-2, -5], r"a weight of shape \(-2, -5\)"),
        ("shape", None, "Damaged edit"),
        ("shape", ["2", 5], "Damaged edit"),
        ("layer", "nowhere", "has no module 'nowhere'"),
        ("layer", "1", "1 is a IFNode, of which no single weights can be removed"),
        ("layer", "2", "2 is a BatchNorm1d, of which no single weights can be removed"),
        ("layer", "3", "can't be removed: its weight is computed by _WeightNorm"),
        ("layer", "4", "can't be removed: its weight is computed from other parameters"),
    ],
)
def test_a_damaged_mask_is_refused_and_the_model_stays(field: str, value: object, said: str) -> None:
    net = nn.Sequential(
        nn.Linear(5, 2), neuron.IFNode(), nn.BatchNorm1d(2),
        parametrizations.weight_norm(nn.Linear(5, 2)), torch_prune.identity(nn.Linear(5, 2), "weight"),
    )  # fmt: skip
    data = json.loads(Plan((MaskWeights("0", (2, 5), "sUA="),)).to_json())
    Plan.from_json(json.dumps(data)).apply(net)  # undamaged it works
    data["edits"][0][field] = value
    before = snapshot(net)
    with pytest.raises(PlanError, match=said):
        Plan.from_json(json.dumps(data)).edits[0].apply(net, find_adapter(net))
    assert same(before, snapshot(net))


@CASES
@pytest.mark.parametrize("bits", [None, 3])
def test_replayed_on_a_fresh_model(make: Make, bits: int | None) -> None:
    case = make()
    small = prune(case, CQP(scope="layer"), 0.6, bits, scheduler="iterative")
    again = Plan.from_json(snncompress.plan_of(small).to_json()).apply(noise(make().model))
    assert again.state_dict().keys() == small.state_dict().keys()
    for name in sizes(small):
        assert torch.equal(weight_mask(again.get_submodule(name)), weight_mask(small.get_submodule(name)))
    assert not torch.equal(outputs(again, case.feed)[0], outputs(small, case.feed)[0])
    again.load_state_dict(small.state_dict())
    assert torch.equal(outputs(again, case.feed)[0], outputs(small, case.feed)[0])


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    make=st.sampled_from([spikingjelly_case, snntorch_case]),
    percents=st.lists(st.integers(1, 80), min_size=1, max_size=3, unique=True).map(sorted),
    scope=st.sampled_from(["layer", "global"]),
    scheduler=st.sampled_from(["one_shot", "iterative", "gradual"]),
    bits=st.sampled_from([None, 2]),
)
def test_what_was_asked_is_exactly_what_goes(
    make: Make, percents: list[int], scope: Any, scheduler: str, bits: int | None
) -> None:
    """⌊percent · n / 100⌋ of every layer, or of all together; pruned further, what went before counts and stays."""
    case = make()
    small, before = case.model, {}
    for percent in percents:
        small = prune(case, WeightRandom(scope=scope), percent / 100, bits, model=small, scheduler=scheduler)
        bits = None
        if scope == "global":
            assert sum(lost(small).values()) == percent * sum(sizes(small).values()) // 100
        else:
            wanted = {n: percent * size // 100 for n, size in sizes(small).items()}
            assert lost(small) == {n: count for n, count in wanted.items() if count}
        assert {n: int((small.get_submodule(n).weight == 0).sum()) for n in lost(small)} == lost(small)
        now = removed(small)
        assert all(bool((now[n] | ~gone).all()) for n, gone in before.items())
        before = now
    with pytest.warns(NothingToDoWarning):
        again = prune(case, WeightRandom(scope=scope), percents[0] / 200, model=small)  # less than is gone already
    assert snncompress.plan_of(again).edits == snncompress.plan_of(small).edits


@CASES
def test_of_equal_scores_the_first_go(make: Make) -> None:
    """In the order of the weight's memory, also in a transposed convolution; then in the order of the layers."""
    case = make()
    with torch.no_grad():
        for name in sizes(case.model):
            case.model.get_submodule(name).weight.fill_(0.5)
    for name, gone in removed(prune(case, ratio=0.3)).items():
        assert torch.equal(gone.flatten(), torch.arange(gone.numel()) < int(0.3 * gone.numel())), name
    with pytest.warns(EmptyLayerWarning, match=r"'\d' has lost all its weights to 'weight_magnitude'.*scope='layer'"):
        small = prune(case, WeightMagnitude(scope="global"), 0.5, 4)
    everything = removed(small)
    flat = torch.cat([everything.get(n, torch.zeros(size)).flatten() for n, size in sizes(case.model).items()])
    assert torch.equal(flat.bool(), torch.arange(len(flat)) < len(flat) // 2)
    assert bool(torch.isfinite(outputs(small, case.feed)[0]).all())


def test_a_ratio_for_each_layer_and_layers_left_whole() -> None:
    case = snntorch_case()
    case.model.insert(9, nn.Linear(12, 12))
    case.model[9].weight = case.model[10].recurrent.weight
    small = prune(case, CQP(scope="layer"), {"0": 0.5, "2": 0.25, "1*": 0.0}, skip=["8"])
    assert lost(small) == {"0": 18, "2": 18}  # of 36 and 72
    shared = "9 and 10.recurrent share their weight"
    assert snncompress.plan_of(small).skipped == {
        "4": "no key of ratio matches it", "8": "skip names it", "9": shared, "10.recurrent": shared,
        "11": "ratio is 0",
    }  # fmt: skip
    assert small[9].weight is small[10].recurrent.weight


@CASES
@pytest.mark.parametrize("bits", [None, 2])
def test_every_kind_of_layer_is_masked_and_stays_so(make: Make, bits: int | None) -> None:
    """Convolutions in one and two dimensions, depthwise, grouped, transposed; linear and recurrent layers."""
    case = make()
    small = prune(case, CQP(scope="layer"), 0.5, bits)
    assert set(lost(small)) == set(sizes(case.model))
    before = {n: small.get_submodule(n).weight.detach().clone() for n in sizes(small)}
    snncompress.finetune(noise(small), (case.x, LABELS), epochs=2, lr=0.01, timesteps=case.timesteps)
    assert moved(small)
    assert dead(small)
    for name, old in before.items():
        assert not torch.equal(old, small.get_submodule(name).weight), name


# Layer → by whose channels its weight's rows (dimension 0) and columns go, and columns for a channel behind a flatten.
WIRES: dict[Make, dict[str, tuple[str, str, int]]] = {
    spikingjelly_case: {
        "0": ("0", "", 1), "3": ("0", "", 1), "5": ("0", "5", 1), "9": ("9", "5", 16), "11.rc": ("11.rc", "9 11.rc", 1),
    },
    snntorch_case: {
        "2": ("2", "0", 1), "4": ("2", "4", 1), "8": ("8", "4", 8), "9.recurrent": ("8", "8", 1), "10": ("", "8", 1),
    },
}  # fmt: skip


@CASES
def test_channels_removed_from_masked_layers(make: Make) -> None:
    """Depthwise, transposed, behind a flatten, recurrent: the mask loses the rows and columns of the channels."""
    case = make()
    masked = prune(case, WeightRandom(scope="layer"), 0.4)
    mixed = prune(case, "random", 0.5, model=masked, repair=None)
    gone, masks = snncompress.plan_of(mixed).removed_channels(), removed(masked)
    for name, (row, column, times) in WIRES[make].items():
        rows = [i for i in range(masks[name].shape[0]) if i not in gone.get(row, [])]
        parts = column.split() or [""]  # a recurrent layer takes in what is before it, and its own output
        width = masks[name].shape[1] // times // len(parts)
        lost = {width * n + i for n, part in enumerate(parts) for i in gone.get(part, [])}
        columns = [i for i in range(masks[name].shape[1]) if i // times not in lost]
        assert torch.equal(~weight_mask(mixed.get_submodule(name)), masks[name][rows][:, columns]), name
        assert not {row, *parts} - {""} - gone.keys()
    assert largest_difference(masked, mixed, case.feed) <= 1e-5
    noise(mixed)
    assert all(bool((m.weight[~weight_mask(m)] == 0).all()) for m in layers_of(mixed).values())


EVENTS: dict[str, dict[str, Any]] = {
    "weights": {"criterion": WITHIN, "ratio": 0.5},
    "channels": {"criterion": "magnitude", "ratio": 0.3},
    "bits": {"criterion": None, "bits": 3, "quantizer": PAPER},
}


@CASES
@pytest.mark.parametrize("order", list(itertools.permutations(EVENTS)), ids=" ".join)
def test_weights_channels_and_bits_in_any_order(make: Make, order: tuple[str, ...]) -> None:
    case = make()
    small = case.model
    for event in order:
        small = prune(case, model=small, repair=None, **EVENTS[event])
    again = Plan.from_json(snncompress.plan_of(small).to_json()).apply(case.model)
    assert torch.equal(outputs(again, case.feed)[0], outputs(small, case.feed)[0])
    noise(small)
    for name in sizes(small):
        module = small.get_submodule(name)
        mask, weight, stored = weight_mask(module), module.weight.detach(), stored_weight(module).detach()
        assert torch.equal(weight != 0, mask)
        gamma = stored[mask].abs().mean()  # of the weights that exist, whatever noise has made of the others
        number = (weight[mask] / gamma + 1) / 2 * 7
        torch.testing.assert_close(number, number.round(), atol=1e-4, rtol=0)
        assert 0 <= number.round().min() < number.round().max() <= 7
        assert bool((stored[~mask] != 0).any())


@CASES
def test_original_untouched_when_apply_raises_halfway(make: Make) -> None:
    class Failing(CQP):
        name = "failing"

        def select(self, scores: Tensor, count: int) -> Tensor:
            if bool(scores.isinf().any()):  # at the second step
                raise ZeroDivisionError
            return super().select(scores, count)

    case = make()
    case.feed(case.model.train(), case.feed.first())
    before = snapshot(case.model)
    with pytest.raises(ZeroDivisionError):
        prune(case, Failing(scope="layer"), 0.5, 4, finetune=1, scheduler="iterative")
    assert same(before, snapshot(case.model))


@pytest.mark.parametrize(
    ("make", "criterion"), [(spikingjelly_case, "cqp"), (snntorch_case, "weight_random"), (snntorch_case, "snip")]
)
def test_same_seed_same_plan(make: Make, criterion: str) -> None:
    plans = []
    for seed in (3, 3, 4):
        case = make()
        torch.manual_seed(len(plans))  # whatever state the user's generator is in
        small = prune(case, criterion, 0.5, 4, scheduler="iterative", finetune=1, seed=seed)
        plans.append(snncompress.plan_of(small))
    assert plans[0].to_json() == plans[1].to_json()
    assert criterion != "weight_random" or plans[0].edits != plans[2].edits


@CASES
@pytest.mark.parametrize("bits", [None, 4])
def test_fewer_synapses_cause_fewer_operations(make: Make, bits: int | None) -> None:
    """AC counts against every (spike, existing synapse) pair, one by one, on binary input."""
    case = make()
    case.x = (case.x > 0.5).to(case.x.dtype)
    first = []
    for ratio in (0.0, 0.4, 0.8):
        small = prune(case, ratio=ratio, bits=bits) if ratio else case.model
        rows = {row.name: row for row in snncompress.profile(small, case.x, timesteps=case.timesteps).layers}
        for name, size in sizes(small).items():
            assert rows[name].sparsity == (int(ratio * size) / size)
        first.append(rows[next(iter(sizes(small)))].n_ac)
        for name, pairs in pairs_of(small, case).items():
            assert rows[name].n_ac == pairs / len(case.x)
            assert pairs > 0 or ratio
    assert first[0] > first[1] > first[2] > 0


def pairs_of(model: nn.Module, case: Case) -> dict[str, int]:
    """Linear layer → pairs of a spike and a synapse that exists, counted one by one."""
    model, inputs = copy.deepcopy(model), {n: [] for n, m in layers_of(model).items() if isinstance(m, nn.Linear)}
    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, seen=seen: seen.extend(x[0].flatten(0, -2)))
    outputs(model, case.feed)
    alive = {name: (model.get_submodule(name).weight != 0).t().tolist() for name in inputs}
    return {n: sum(sum(alive[n][i]) for x in seen for i, s in enumerate(x.tolist()) if s) for n, seen in inputs.items()}
