"""Accuracy against sparsity and threshold: derived by hand, and against what apply() removes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import snntorch as snn
import torch
from snncompress_cqp import CQP
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import DataError, ModelError, OptionError, PluginError, UnknownNameError
from snncompress.contract.detection import find_adapter
from snncompress.extend import CriticalityCriterion, Layer
from snncompress.measuring.evaluation import accuracy
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores
from snncompress.studies.curves import Sensitivity, ThresholdSweep
from snncompress.studies.sweeps import sensitivity, threshold_sweep
from tests.end_to_end.test_truths import snntorch_case, spikingjelly_case
from tests.equivalence import same, snapshot
from tests.networks import Residual

# Class 0 once, class 1 twice: a network that always says class 0 is right in 1 of 3.
DATA = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])

# networks of a few weights: where some are protected, other layers may lose all
pytestmark = pytest.mark.filterwarnings("ignore::snncompress.EmptyLayerWarning")


def leaky() -> nn.Module:
    return snn.Leaky(beta=0.5, init_hidden=True)


FRAMEWORKS = pytest.mark.parametrize("fire", [neuron.IFNode, leaky], ids=["spikingjelly", "snntorch"])


def tiny(fire: Callable[[], nn.Module] = neuron.IFNode) -> nn.Sequential:
    """Input i fires neuron i (2 and 1.5 reach the threshold 1, 0.1 and 0.2 don't), which speaks for class i."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), fire(), nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[2.0, 0.1], [0.2, 1.5]])
    net[2].weight.data = torch.tensor([[0.5, -0.2], [-0.3, 0.4]])
    return net


def conv(fire: Callable[[], nn.Module]) -> nn.Sequential:
    """The same with a convolution of three channels, the last of which never fires."""
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), fire(), nn.Flatten(), nn.Linear(3, 2, bias=False))
    net[0].weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.5], [0.0, 0.1]])[..., None, None]
    net[3].weight.data = torch.tensor([[0.5, -0.2, 0.0], [-0.3, 0.4, 0.0]])
    return net


# ------------------------------------------------------------------------------------------
# Layer by layer.


@FRAMEWORKS
def test_single_weights_by_hand(fire: Callable[[], nn.Module]) -> None:
    # Layer 0 loses 0.1 and 0.2, which fire nothing; then 1.5, so that input 1 fires nothing, all scores are 0, and
    # argmax says class 0. Layer 2 loses -0.2 and -0.3, which leaves (0.5, 0) and (0, 0.4); then 0.4, so that class 1
    # scores 0 as class 0 does. ⌊0.99 · 4⌋ is 3 again.
    result = sensitivity(tiny(fire), DATA, "weight_magnitude", (0, 0.5, 0.75, 0.99), timesteps=1, repair=None)
    assert result.dense == 1
    assert result.accuracy == {"0": (1, 1, 1 / 3, 1 / 3), "2": (1, 1, 1 / 3, 1 / 3)}
    assert (result.ratios, result.criterion, result.title) == ((0, 0.5, 0.75, 0.99), "weight_magnitude", "Sequential")


@FRAMEWORKS
def test_channels_by_hand(fire: Callable[[], nn.Module]) -> None:
    # L1 norms 2, 1.5 and 0.1. ⌈3/3⌉ = 1 removes the last channel, ⌈0.5 · 3⌉ = 2 also the one of class 1, ⌈0.9 · 3⌉
    # would be all.
    data = DATA[0][..., None, None], DATA[1]
    options: dict[str, Any] = {"timesteps": 1, "repair": None}
    result = sensitivity(conv(fire), data, "magnitude", (1 / 3, 0.5, 0.9), layers="0", **options)
    assert result.accuracy == {"0": (1, 1 / 3, None)}
    # 2 of 6 weights, and 5 of 6, of the same layer: the zeros first, then 0.1 and 1.5.
    weights = sensitivity(conv(fire), data, "weight_magnitude", (0.5, 0.9), layers=["0"], **options)
    assert weights.accuracy == {"0": (1, 1 / 3)}


def test_the_test_data_decide_the_accuracy() -> None:
    seen = sensitivity(tiny(), DATA, "weight_magnitude", (0.75,), test=(DATA[0][1:], DATA[1][1:]), timesteps=1)
    assert (seen.dense, seen.accuracy["0"]) == (1, (0,))


@pytest.mark.parametrize(
    ("make", "criterion"),
    [
        (spikingjelly_case, "svs"),
        (spikingjelly_case, "cqp"),
        (spikingjelly_case, "random"),
        (snntorch_case, "taylor"),
        (snntorch_case, "weight_random"),
    ],
)
def test_each_point_is_what_apply_removes(make: Callable[[], Any], criterion: str) -> None:
    case = make()
    x = torch.rand(40, 1, 8, 8, dtype=case.x.dtype)
    y = labels(case.model, x)
    options: dict[str, Any] = {"timesteps": 4, "seed": 3}
    result = sensitivity(case.model, (x, y), criterion, (0.5, 0.8), **options)
    assert result.dense == 1
    assert len({a for row in result.accuracy.values() for a in row}) > 1
    for name, row in result.accuracy.items():
        for ratio, found in zip(result.ratios, row, strict=True):
            small = snncompress.apply(case.model, criterion, {name: ratio}, None, data=(x, y), **options)
            assert found == float((labels(small, x) == y).double().mean())


def labels(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says itself."""
    model.eval()
    feed = Feed(find_adapter(model), x, 4)
    with torch.no_grad():
        return class_scores(feed(model, feed.first())).argmax(1)


@pytest.mark.parametrize("make", [spikingjelly_case, snntorch_case])
def test_repair_gives_accuracy_back(make: Callable[[], Any]) -> None:
    case = make()
    x = torch.rand(40, 1, 8, 8, dtype=case.x.dtype)
    data = x, labels(case.model, x)
    points = {}
    for kind in ("membrane", "current", None):
        layers = sensitivity(case.model, data, "magnitude", (0.5, 0.8), timesteps=4, repair=kind)
        thresholds = threshold_sweep(case.model, data, (0.5, 1.0), 0.7, timesteps=4, repair=kind)
        assert layers.repair == thresholds.repair == kind
        assert (
            (f"repaired on the {kind}" in str(layers)) == (f"repaired on the {kind}" in str(thresholds)) == bool(kind)
        )
        points[kind] = [a for row in layers.accuracy.values() for a in row], thresholds.accuracy
    for kind in ("membrane", "current"):
        for found, bare in zip(points[kind], points[None], strict=True):
            assert sum(found) > sum(bare) + 0.1 * len(bare)


def test_coupled_layers_share_one_measurement() -> None:
    body = nn.Sequential(layer.Conv2d(4, 4, 3, padding=1), neuron.IFNode())
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), neuron.IFNode(), Residual(body, nn.Identity()),
        layer.Conv2d(4, 3, 1), neuron.IFNode(), layer.Flatten(), layer.Linear(48, 2),
    )  # fmt: skip
    told: list[int | None] = []
    data = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    options: dict[str, Any] = {"timesteps": 2, "progress": lambda what, done, total: told.append(total)}
    result = sensitivity(net, data, "magnitude", (0.25, 0.5), **options)
    assert list(result.accuracy) == ["0", "2.body.0"]
    assert result.accuracy["0"] == result.accuracy["2.body.0"]
    assert told == [2, 2]  # one unit, two ratios
    assert result.skipped == {"3": "it feeds the classifier", "6": result.skipped["6"]}
    alone = sensitivity(net, data, "magnitude", (0.5,), layers="2.*", timesteps=2)
    assert alone.accuracy["0"] == alone.accuracy["2.body.0"] == result.accuracy["0"][1:]


def test_layers_by_name_and_glob() -> None:
    case = spikingjelly_case()
    data = case.x, torch.arange(4)

    def named(criterion: str, layers: Any) -> list[str]:
        return list(sensitivity(case.model, data, criterion, (0.5,), layers=layers, timesteps=4).accuracy)

    assert named("weight_magnitude", None) == ["0", "4", "9", "11"]
    assert named("magnitude", None) == ["0", "4"]
    assert named("magnitude", ("0", "9")) == ["0", "9"]
    assert named("magnitude", "*") == ["0", "4", "9"]
    with pytest.raises(OptionError, match=r"layers names '11', which can't be pruned: .*Leave it out"):
        named("magnitude", ["4", "11"])
    with pytest.raises(OptionError, match=r"layers: 'conv\*' matches no weight layer\. The model's: 0, 4, 9, 11"):
        named("magnitude", "conv*")
    for wrong in ([], 3):
        with pytest.raises(OptionError, match="layers must be a list with at least one entry"):
            named("magnitude", wrong)
    with pytest.raises(OptionError, match=r"No layer is left to prune\. .*'0': it feeds the classifier\.$"):
        sensitivity(tiny(), DATA, "magnitude", timesteps=1)


# ------------------------------------------------------------------------------------------
# Threshold by threshold.


@dataclass(frozen=True)
class Protector(CriticalityCriterion):
    """Removes the largest weights first, but for those whose size over the largest is above τ."""

    name: ClassVar[str] = "protector"
    granularity: ClassVar[Any] = "weight"
    tau: float = 0.9

    def criticality(self, layer: Layer, state: Any) -> Tensor:
        return layer.weight.abs() / layer.weight.abs().max()

    def score(self, layer: Layer, state: Any) -> Tensor:
        return 10 * (self.criticality(layer, state) > self.tau) - layer.weight.abs()


@FRAMEWORKS
def test_thresholds_by_hand(fire: Callable[[], nn.Module]) -> None:
    # Criticalities 1, 0.05, 0.1, 0.75; two of four weights go. τ = 0.5 protects 2 and 1.5: 0.2 and 0.1 go, which
    # changes nothing. τ = 0.8 protects 2 alone: 1.5 goes, and class 1 with it. τ = 1 protects nothing, τ = 0 all, so
    # that 2 and 1.5 go, and all that is left to say is class 0.
    taus = (0.0, 0.5, 0.8, 1.0)
    result = threshold_sweep(tiny(fire), DATA, taus, {"0": 0.5}, Protector(), timesteps=1, repair=None)
    assert (result.dense, result.taus, result.ratio, result.criterion) == (1, taus, {"0": 0.5}, "protector")
    assert result.accuracy == (1 / 3, 1, 1 / 3, 1 / 3)
    assert result.protected == (1, 0.5, 0.25, 0)
    assert result.sparsity == (0.5,) * 4


@pytest.mark.parametrize("criterion", [CQP(alpha=0.5), CQP(unit="input"), CQP(scope="global")])
@pytest.mark.parametrize("make", [spikingjelly_case, snntorch_case])
def test_each_threshold_is_what_apply_removes(make: Callable[[], Any], criterion: CQP) -> None:
    case = make()
    x = torch.rand(40, 1, 8, 8, dtype=case.x.dtype)
    y = labels(case.model, x)
    taus = (0.05, 0.5, 1.0)
    result = threshold_sweep(case.model, (x, y), taus, 0.7, criterion, timesteps=4)
    sizes = [m.weight.numel() for m in case.model.modules() if isinstance(m, WEIGHT_LAYERS)]
    for tau, found, sparsity in zip(taus, result.accuracy, result.sparsity, strict=True):
        chosen = dataclasses.replace(criterion, tau=tau)
        small = snncompress.apply(case.model, chosen, 0.7, None, data=(x, y), timesteps=4)
        assert found == float((labels(small, x) == y).double().mean())
        gone = [int(0.7 * n + 1e-9) for n in sizes]
        assert sparsity == (sum(gone) if criterion.scope == "layer" else int(0.7 * sum(sizes))) / sum(sizes)
    assert list(result.protected) == sorted(result.protected, reverse=True)
    assert result.protected[0] > result.protected[-1] == 0


def test_protection_as_the_scores_have_it() -> None:
    """A score of 2 or more is a critical weight's: the shares are of the same comparison."""
    seen: list[Tensor] = []

    class Spy(CQP):
        def score(self, layer: Layer, state: Any) -> Tensor:
            seen.append(super().score(layer, state))
            return seen[-1]

    result = threshold_sweep(tiny(), DATA, (0.1, 0.3, 0.5), 0.5, Spy(), timesteps=1)
    shares = [float(torch.cat([s.flatten() for s in seen[2 * i : 2 * i + 2]]).ge(2).double().mean()) for i in range(3)]
    assert list(result.protected) == shares
    assert 0 < shares[0] < 1


def test_selection_has_the_threshold_too() -> None:
    asked: list[float] = []

    class Choosy(Protector):
        def select(self, scores: Tensor, count: int) -> Tensor:
            asked.append(self.tau)
            return super().select(scores, count)

    threshold_sweep(tiny(), DATA, (0.1, 1.0), {"0": 0.5}, Choosy(), timesteps=1)
    assert asked == [0.1, 1.0]


def test_every_threshold_meets_the_same_chance() -> None:
    drawn: list[Tensor] = []

    class Chance(Protector):
        def score(self, layer: Layer, state: Any) -> Tensor:
            drawn.append(torch.rand(layer.weight.shape, generator=layer.generator))
            return drawn[-1]

    threshold_sweep(tiny(), DATA, (0.1, 1.0), {"0": 0.5}, Chance(), timesteps=1, seed=4)
    snncompress.apply(tiny(), Chance(), {"0": 0.5}, None, data=DATA, timesteps=1, seed=4)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("sweep", [sensitivity, threshold_sweep])
def test_data_are_scored_once(sweep: Callable[..., Any]) -> None:
    calls = {"scoring": 0, "measuring": 0}

    def forward(model: nn.Module, batch: Any) -> Tensor:
        calls["scoring" if torch.is_grad_enabled() else "measuring"] += len(batch[0]) == 1  # not the trace's, of 3
        return model(batch[0])

    x, y = DATA
    batches = [(x, y), *[(x[:1], y[:1])] * 4]
    if sweep is sensitivity:
        sweep(tiny(), batches, "cqp", (0.5, 0.75), forward=forward, repair=None)
        points = 2 * 2
    else:
        sweep(tiny(), batches, (0.1, 0.5, 1.0), forward=forward, repair=None)
        points = 3
    assert calls == {"scoring": 4, "measuring": 4 * (points + 1)}


@pytest.mark.parametrize(
    ("criterion", "lacking"),
    [
        ("weight_magnitude", "a dataclass field 'tau', a method criticality"),
        ("svs", "granularity 'weight', a dataclass field 'tau'"),
        ("sca", "granularity 'weight'"),
    ],
)
def test_a_criterion_without_threshold(criterion: str, lacking: str) -> None:
    with pytest.raises(OptionError, match=rf"{criterion}' lacks .*{lacking}.* Take 'cqp'"):
        threshold_sweep(tiny(), DATA, criterion=criterion, timesteps=1)


def test_a_criticality_of_another_shape() -> None:
    class Wrong(Protector):
        def criticality(self, layer: Layer, state: Any) -> Tensor:
            return torch.ones(3)

    with pytest.raises(PluginError, match=r"criticality\(\) must return one score per weight, \[2, 2\], not \[3\]"):
        threshold_sweep(tiny(), DATA, criterion=Wrong(), timesteps=1)


def test_ratios_of_a_threshold_sweep() -> None:
    result = threshold_sweep(tiny(), DATA, (1.0,), {"2": 0.25}, timesteps=1)
    assert (result.ratio, result.sparsity) == ({"2": 0.25}, (0.25,))
    with pytest.raises(OptionError, match=r"No layer is left to prune\. '0': ratio is 0; '2': ratio is 0"):
        threshold_sweep(tiny(), DATA, ratio=0, timesteps=1)
    shared = tiny()
    shared[2].weight = shared[0].weight
    with pytest.raises(OptionError, match=r"ratio names '0', which can't be pruned: 0 and 2 share their weight"):
        threshold_sweep(shared, DATA, ratio={"0": 0.5}, timesteps=1)
    with pytest.raises(OptionError, match=r"ratio: 'fc' matches no weight layer"):
        threshold_sweep(tiny(), DATA, ratio={"fc": 0.5}, timesteps=1)


# ------------------------------------------------------------------------------------------
# What both must do.

BOTH = pytest.mark.parametrize("sweep", [sensitivity, threshold_sweep])


@pytest.mark.parametrize(("make", "sweep"), [(snntorch_case, threshold_sweep), (spikingjelly_case, sensitivity)])
def test_the_model_and_the_random_state_stay(make: Callable[[], Any], sweep: Callable[..., Any]) -> None:
    case = make()
    case.model.train()
    case.model[0].eval()
    data = DataLoader(TensorDataset(case.x, torch.arange(4)), batch_size=2, shuffle=True)
    before = snapshot(case.model)
    first = sweep(case.model, data, timesteps=4, seed=5)
    assert same(before, snapshot(case.model))
    torch.rand(7)
    assert sweep(case.model, data, timesteps=4, seed=5) == first


def test_another_seed_removes_others() -> None:
    case = spikingjelly_case()
    x = torch.rand(30, 1, 8, 8, dtype=case.x.dtype)
    data = x, labels(case.model, x)
    a, b, c = (sensitivity(case.model, data, "weight_random", (0.7,), timesteps=4, seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_every_point_meets_the_same_noise() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0] + torch.randn_like(batch[0]))

    x, y = torch.eye(2).repeat(50, 1), torch.arange(100) % 2
    result = sensitivity(tiny(), (x, y), "weight_magnitude", (0, 0, 0), forward=noisy)
    assert 0.5 < result.dense < 1
    assert set(result.accuracy["0"] + result.accuracy["2"]) == {result.dense}


@BOTH
def test_an_error_halfway_leaves_the_model(sweep: Callable[..., Any]) -> None:
    net, calls = tiny(leaky).train(), []
    before = snapshot(net)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        calls.append(model)
        if len(calls) > 6:
            raise RuntimeError("halfway")
        return model(batch[0])

    with pytest.raises(DataError, match="halfway"):
        sweep(net, DATA, forward=forward)
    assert same(before, snapshot(net))


@BOTH
def test_progress_is_told(sweep: Callable[..., Any]) -> None:
    told: list[tuple[str, int, int | None]] = []
    sweep(tiny(), [DATA, DATA], timesteps=1, progress=lambda *news: told.append(news))
    points = [("measuring accuracy", n, 10) for n in range(10)]  # two layers at five ratios; ten thresholds
    assert told == [("calibrating cqp", 0, 2), ("calibrating cqp", 1, 2), *points]


@BOTH
def test_errors(sweep: Callable[..., Any]) -> None:
    points = "ratios" if sweep is sensitivity else "taus"
    for value in (-0.1, 1.5, True, "0.5", float("nan"), None):
        with pytest.raises(OptionError, match=f"{points} must be"):
            sweep(tiny(), DATA, **{points: [value]}, timesteps=1)
    for values in ([], "0.5", 0.5):
        with pytest.raises(OptionError, match=f"{points} must be a list with at least one entry"):
            sweep(tiny(), DATA, **{points: values}, timesteps=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'cqp'"):
        sweep(tiny(), DATA, criterion="cpq", timesteps=1)
    with pytest.raises(OptionError, match="seed must be"):
        sweep(tiny(), DATA, seed=-1, timesteps=1)
    with pytest.raises(DataError, match="Accuracy needs labels"):
        sweep(tiny(), DATA[0], timesteps=1)
    with pytest.raises(DataError, match="Accuracy needs labels"):
        sweep(tiny(), DATA, test=DATA[0], timesteps=1)
    with pytest.raises(DataError, match="no labels"):
        sweep(tiny(), DATA[0], test=DATA, timesteps=1)
    with pytest.raises(DataError, match="data must be"):
        sweep(tiny(), None, timesteps=1)
    with pytest.raises(DataError, match="float64"):
        sweep(tiny(), DATA, test=(DATA[0].double(), DATA[1]), timesteps=1)
    with pytest.raises(DataError, match="Labels range from 0 to 4, but the model has 2 classes"):
        sweep(tiny(), DATA, test=(DATA[0], torch.tensor([0, 1, 4])), timesteps=1)
    with pytest.raises(ModelError, match="no spiking neuron"):
        sweep(nn.Linear(2, 2), DATA, timesteps=1)
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        sweep(nn.Sequential(neuron.IFNode()), DATA, timesteps=1)


def test_accuracy() -> None:
    # Classes 0 and 1 are said: 2 of 3 right in the first batch, 1 of 1 in the second: 3 of 4, not (2/3 + 1)/2.
    net = tiny().train()
    net[0].eval()
    batches = [(DATA[0], torch.tensor([0, 1, 0])), (DATA[0][:1], torch.tensor([[0.7, 0.3]]))]
    assert accuracy(net, Feed(find_adapter(net), batches, 2)) == 3 / 4
    assert [m.training for m in net] == [False, True, True]
    assert net[1].v == 0  # SpikingJelly's state before the first timestep


# ------------------------------------------------------------------------------------------
# What comes back.

SENSITIVITY = Sensitivity(0.9, {"a[0]": (0.8, 0.4), "b": (0.9, None)}, (0.5, 0.95), "svs", {"c": "it is first"}, "Net")
SWEEP = ThresholdSweep(0.9, (0.5, 1.0), (0.3, 0.8), (0.25, 0.0), (0.875, 0.875), {"a": 0.9}, "cqp", "Net")


def test_tables() -> None:
    assert str(SENSITIVITY).splitlines() == [
        "Net: accuracy (%) with one layer pruned by svs; 90.0 before",
        " layer   50 % removed   95 % removed",
        " ───────────────────────────────────",
        " a[0]            80.0           40.0",
        " b               90.0",
        "empty: no channel would be left",
        "left out: c: it is first",
    ]
    lines = [line.split() for line in str(SWEEP).splitlines()]
    assert lines[1] == ["τ", "accuracy", "protected", "sparsity"]
    assert lines[3:5] == [["0.5", "30.0", "25.0", "87.5"], ["1", "80.0", "0.0", "87.5"]]


@pytest.mark.parametrize("result", [SENSITIVITY, SWEEP])
def test_plain_values(result: Any) -> None:
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain == result.to_dict()
    assert set(plain) == {field.name for field in dataclasses.fields(result)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.dense = 1.0


def test_plots_draw_the_data() -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    ax = figure.Figure().subplots()
    assert SENSITIVITY.plot(ax) is ax
    assert drawn(ax) == {"a[0]": ([50, 95], [80, 40]), "b": ([50], [90]), "dense": ([0, 1], [90, 90])}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("removed from the layer (%)", "accuracy (%)")
    ax = figure.Figure().subplots()
    assert SWEEP.plot(ax) is ax
    assert drawn(ax) == {
        "accuracy": ([0.5, 1], [30, 80]),
        "protected weights": ([0.5, 1], [25, 0]),
        "accuracy, dense": ([0, 1], [90, 90]),
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("criticality threshold τ", "accuracy, protected share (%)")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn(ax))


def drawn(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (pytest.approx(list(line.get_xdata())), pytest.approx(list(line.get_ydata())))
        for line in ax.get_lines()
    }


@pytest.mark.parametrize("result", [SENSITIVITY, SWEEP])
def test_a_figure_of_its_own_or_none(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("shown"))
    before = pyplot.get_fignums()
    ax = result.plot()
    assert len(ax.get_lines()) == 3
    assert len(pyplot.get_fignums()) == len(before) + 1
    pyplot.close(ax.figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r'pip install "snncompress\[plots\]"'):
        result.plot()
