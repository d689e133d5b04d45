"""Scores batch by batch, and whether batches agree: derived by hand, and against what apply() removes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snncompress_fire import Ablation
from snncompress_svs import SVS
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, ModelError, OptionError, PluginError, UnknownNameError
from snncompress.model.parametrizations import weight_mask
from snncompress.studies.heat_maps import Robustness, Scores
from tests.end_to_end.test_truths import snntorch_case, spikingjelly_case

T: dict[str, Any] = {"timesteps": 4}


def subtracting() -> nn.Module:
    return neuron.IFNode(v_reset=None)


def integrating() -> nn.Module:
    return snn.Leaky(beta=1.0, init_hidden=True, threshold=0.999)


FRAMEWORKS = pytest.mark.parametrize("fire", [subtracting, integrating], ids=["spikingjelly", "snntorch"])


def net(fire: Callable[[], nn.Module] = subtracting) -> nn.Sequential:
    """Input i drives neuron i alone: with the input 1/k it fires at every k-th step."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), fire(), nn.Linear(2, 2, bias=False))
    nn.init.eye_(model[0].weight)
    return model


def batches(*inputs: tuple[float, float]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor([x]), torch.tensor([0])) for x in inputs]


@FRAMEWORKS
def test_avgcoss_by_hand(fire: Callable[[], nn.Module]) -> None:
    # Four steps; inputs (1, 0), (1, 1), (0.5, 1) fire at rates
    #     s1 = (1, 0)     s2 = (1, 1)     s3 = (1/2, 1)          (two of four steps where the input is 1/2)
    # with cosines s1·s2 / (‖s1‖ ‖s2‖) = 1/√2, s1·s3 = (1/2) / (√5/2) = 1/√5, s2·s3 = (3/2) / (√2 · √5/2) = 3/√10.
    # Eq. 15 is their mean, 0.70100. At ratio 1/2 the lowest of two goes: channel 1 of s1, channel 0 of s2, where both
    # are equal, and channel 0 of s3: only s2 and s3 agree, so one pair of three.
    data = batches((1.0, 0.0), (1.0, 1.0), (0.5, 1.0))
    found = snncompress.scores(net(fire), "firing_rate", data, **T)
    assert found.values["0"].tolist() == [[1, 0], [1, 1], [0.5, 1]]
    result = snncompress.robustness(net(fire), "firing_rate", data, ratio=0.5, **T)
    expected = (1 / math.sqrt(2) + 1 / math.sqrt(5) + 3 / math.sqrt(10)) / 3
    assert expected == pytest.approx(0.70100, abs=1e-5)
    assert result.cosine == {"firing_rate": {"0": pytest.approx(expected, rel=1e-12)}}
    assert result.minimum == {"firing_rate": pytest.approx(expected, rel=1e-12)}
    assert result.agreement == {"firing_rate": {"0": pytest.approx(1 / 3)}}
    assert (result.batches, result.ratio, list(result.skipped)) == (3, 0.5, ["2"])


def test_silent_batches_point_nowhere() -> None:
    # (1, 0), nothing, (1, 0): cosines 0, 1, 0. All silent: no direction at all, and what would go is decided by ties.
    data = batches((1.0, 0.0), (0.0, 0.0), (1.0, 0.0))
    assert snncompress.robustness(net(), "svs", data, **T).cosine["svs"]["0"] == pytest.approx(1 / 3)
    with pytest.warns(snncompress.SilentNeuronsWarning, match=r"Neurons '1' never fired .* the 'svs', 'sca' scores"):
        silent = snncompress.robustness(net(), ["svs", "sca"], data[1:2] * 2, ratio=0.5, **T)
    assert silent.minimum == {"svs": None, "sca": None}
    assert silent.agreement["svs"] == {"0": None}


@pytest.mark.parametrize(
    ("make", "criterion"),
    [(spikingjelly_case, name) for name in ("svs", "taylor", "cqp", "obs")] + [(snntorch_case, "random")],
)
def test_each_batch_is_scored_as_apply_scores_it(make: Callable[[], Any], criterion: str) -> None:
    """What its scores put lowest is what apply() removes when that batch is all it sees."""
    case = make()
    x = torch.rand(18, 1, 8, 8, dtype=case.x.dtype)
    data = [(x[:8], torch.arange(8) % 3), (x[8:], torch.arange(10) % 3)]
    options: dict[str, Any] = {"timesteps": 4, "seed": 3}
    result = snncompress.robustness(case.model, [criterion, "sca"], data, ratio=0.5, **options)
    found = snncompress.scores(case.model, criterion, data, **options)
    kept_whole: dict[str, Any] = {"skip": [], "repair": None}
    small = [snncompress.apply(case.model, criterion, 0.5, None, data=[b], **kept_whole, **options) for b in data]
    for name, values in found.values.items():
        a, b = values.flatten(1).double()
        assert result.cosine[criterion][name] == pytest.approx(float(a @ b / a.norm() / b.norm()))
        if values.dim() > 2:
            gone = [~weight_mask(m.get_submodule(name)).flatten() for m in small]
        else:
            gone = [torch.zeros(len(a), dtype=torch.bool) for _ in small]
            for mask, model, s in zip(gone, small, (a, b), strict=True):
                mask[snncompress.plan_of(model).removed_channels()[name]] = True
                assert s[mask].max() <= s[~mask].min()
        both = float((gone[0] & gone[1]).sum()) / float(gone[0].sum() + gone[1].sum())
        assert result.agreement[criterion][name] == pytest.approx(2 * both)


def test_all_criteria_share_one_pass() -> None:
    told: list[tuple[str, int, int | None]] = []
    options: dict[str, Any] = {"progress": lambda *news: told.append(news), "ratio": 0.5, **T}
    data, model = batches((1.0, 0.5), (0.5, 1.0)), net()
    together = snncompress.robustness(model, ["svs", "sca", "taylor", "weight_gradient", "obs"], data, **options)
    assert told == [("calibrating svs, sca, taylor, weight_gradient, obs", n, 2) for n in range(2)]
    for name in together.cosine:
        alone = snncompress.robustness(model, name, data, **options)
        assert (alone.cosine[name], alone.agreement[name]) == (together.cosine[name], together.agreement[name])
    assert list(together.cosine["svs"]) == ["0"]
    assert list(together.cosine["obs"]) == ["0", "2"]
    assert not together.skipped  # the classifier's single weights are scored


def test_coupled_layers_and_what_cannot_go() -> None:
    body = nn.Sequential(layer.Conv2d(4, 4, 3, padding=1), neuron.IFNode())

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    model = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), neuron.IFNode(), Residual(), layer.Flatten(), layer.Linear(64, 2)
    )
    data = [torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)]
    result = snncompress.robustness(model, "magnitude", data, layers="2.*", ratio=0.9, **T)
    assert result.cosine == {"magnitude": {"0": pytest.approx(1), "2.body.0": pytest.approx(1)}}
    assert result.agreement == {"magnitude": {"0": None, "2.body.0": None}}  # ⌈0.9 · 4⌉ would be all
    with pytest.raises(OptionError, match="layers names '4', which can't be pruned: 4 is the classifier"):
        snncompress.scores(model, "magnitude", data, layers=["4"], **T)


def test_neurons_of_ones_own() -> None:
    class Fires(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
            return (x > 0.5).float()

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Fires(), nn.Linear(2, 2))
    nn.init.eye_(model[0].weight)
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    found = snncompress.scores(model, "firing_rate", x, neurons=Fires, time_dim=1)
    assert found.values["0"].tolist() == [[1, 0.5]]
    again = snncompress.scores(
        model, "firing_rate", [{"x": x}], forward=lambda m, b: m(b["x"]), neurons=Fires, time_dim=1
    )
    assert torch.equal(again.values["0"], found.values["0"])


def test_errors() -> None:
    data = batches((1.0, 0.5), (0.5, 1.0))
    with pytest.raises(DataError, match=r"AvgCosS compares batches, and these data are a single one.*x\.split\(64\)"):
        snncompress.robustness(net(), "svs", data[0], **T)
    for call in (snncompress.scores, snncompress.robustness):
        with pytest.raises(UnknownNameError, match="Did you mean 'svs'"):
            call(net(), "svss", data, **T)
        with pytest.raises(OptionError, match="'ablation' scores blocks; only channels and weights"):
            call(net(), Ablation(), data, **T)
        with pytest.raises(OptionError, match="seed must be"):
            call(net(), "svs", data, seed=-1, **T)
        with pytest.raises(DataError, match="'taylor' needs labels"):
            call(net(), "taylor", [x for x, _ in data], **T)
        with pytest.raises(DataError, match="data must be"):
            call(net(), "svs", None, **T)
        with pytest.raises(OptionError, match="matches no weight layer"):
            call(net(), "svs", data, layers="conv*", **T)
        with pytest.raises(PluginError, match="no batch normalization"):
            call(net(), "bn_scale", data, **T)
        with pytest.raises(ModelError, match="nothing to score"):
            call(nn.Sequential(neuron.IFNode()), "svs", data, **T)
    with pytest.raises(OptionError, match="criterion svs stands there twice"):
        snncompress.robustness(net(), ["svs", SVS()], data, **T)
    with pytest.raises(OptionError, match="at least one entry"):
        snncompress.robustness(net(), [], data, **T)
    with pytest.raises(OptionError, match="ratio must be"):
        snncompress.robustness(net(), "svs", data, ratio=1.0, **T)
    both = snncompress.robustness(net(), ["svs", SVS(epsilon=0.1)], data, ratio=0.5, **T)
    assert list(both.cosine) == ["svs", "svs(epsilon=0.1)"]


# ------------------------------------------------------------------------------------------
# What comes back.

NAN = float("nan")
SCORES = Scores({"a": torch.tensor([[1.0, 4.0, NAN], [2.0, 4.0, NAN]])}, "svs", {"b": "it is last"}, "Net")
ROBUST = Robustness({"svs": {"a": 0.5, "b": 0.75}, "cqp": {"b": None}}, {"svs": {"a": 1.0}, "cqp": {}}, 0.4, 2)


def test_tables() -> None:
    lines = [line.split() for line in str(SCORES).splitlines()]
    assert lines[0] == ["Net:", "scores", "of", "svs,", "each", "of", "2", "batches", "alone"]
    assert lines[3] == ["a", "2", "1.5", "2.75", "4", "1.25", "0.25"]
    assert lines[-1] == ["left", "out:", "b:", "it", "is", "last"]
    lines = [line.split() for line in str(ROBUST).splitlines()]
    assert lines[3:6] == [["a", "0.5000"], ["b", "0.7500"], ["minimum", "0.5000"]]
    assert lines[6][-4:] == ["about", "40", "by", "chance"]


def test_plain_values() -> None:
    for result in (SCORES, ROBUST):
        assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert SCORES.to_dict()["values"] == {"a": [[1, 4, None], [2, 4, None]]}
    assert ROBUST.minimum == {"svs": 0.5, "cqp": None}


def test_plots_draw_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    panel = SCORES.plot(module.Figure()).axes[0]
    assert panel.images[0].get_array().filled(-1).tolist() == [[1, 4, -1], [2, 4, -1]]
    assert panel.get_title() == "layer a: 3 kernels, AvgCosS 0.976"  # (1·2 + 16) / (√17 · √20)
    left, right = ROBUST.plot(module.Figure()).axes
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[0.5, 0.75], []]
    assert list(right.get_lines()[0].get_ydata()) == [100]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["svs: 0.500", "cqp"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for result in (SCORES, ROBUST):
        with pytest.raises(OptionError, match=r'pip install "snncompress\[plots\]"'):
            result.plot()
