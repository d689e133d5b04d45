"""KL divergence, accuracy and energy over timesteps: derived by hand, and against profiles of truncated runs."""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from snncompress import DataError, ModelError, OptionError, profile
from snncompress.extend import EnergyModel, OperationCounts
from snncompress.measuring.temporal import TemporalAnalysis, temporal_analysis
from tests.networks import Case, ClassStyle, liven

EPSILON = 1e-6


class Replay(nn.Module):
    """Returns its input [T, N, K]; the neuron is there to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = neuron.IFNode(step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        self.neuron(x)
        return x


def analysed(outputs: Any, labels: list[int] | None = None, **options: Any) -> TemporalAnalysis:
    """The analysis of a network that answers ``outputs`` [T, N, K]."""
    x = torch.as_tensor(outputs, dtype=torch.float32)
    return temporal_analysis(Replay(), x if labels is None else (x, torch.tensor(labels)), **options)


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p ‖ q) of two distributions, each smoothed: (p + ε) / (1 + K·ε)."""
    p, q = ([(v + EPSILON) / (1 + len(d) * EPSILON) for v in d] for d in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# ------------------------------------------------------------------------------------------
# By hand.


def test_two_classes_three_steps() -> None:
    # One sample. Spikes by step: (1, 1), (1, 0), (0, 0), so counts (1, 1), (2, 1), (2, 1) and distributions
    # (1/2, 1/2), (2/3, 1/3), (2/3, 1/3): KL_1 = 1/2·ln(3/4) + 1/2·ln(3/2) = 0.0589, KL_2 = 0. All of it lies between
    # steps 1 and 2, so the answer has settled at step 2. A tie at step 1 goes to class 0, as argmax does.
    result = analysed([[[1, 1]], [[1, 0]], [[0, 0]]], labels=[0])
    assert result.kl == pytest.approx((0.5 * math.log(0.75) + 0.5 * math.log(1.5), 0), abs=1e-6)
    assert result.kl[1] == 0
    assert result.cumulative == (1, 1)
    assert (result.t_star, result.timesteps, result.accuracy) == (2, 3, (1, 1, 1))


def test_the_mean_is_over_samples_and_silence_is_uniform() -> None:
    # Sample 0 is silent, then says class 1; sample 1 says class 0, then class 1 twice.
    # Distributions: (1/2, 1/2), (0, 1), (0, 1) and (1, 0), (1/2, 1/2), (1/3, 2/3).
    spikes = [[[0, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]]
    result = analysed(spikes, labels=[1, 1], mode="smoothed")
    first = (divergence([0.5, 0.5], [0, 1]) + divergence([1, 0], [0.5, 0.5])) / 2
    second = divergence([0.5, 0.5], [1 / 3, 2 / 3]) / 2
    assert result.kl == pytest.approx((first, second), rel=1e-9)
    assert result.cumulative == pytest.approx((first / (first + second), 1), rel=1e-9)
    assert result.accuracy == (0, 0.5, 1)  # argmax of a tie is class 0
    # By default what sample 0 does from silence to its first spike says nothing, ε aside.
    alone = divergence([1, 0], [0.5, 0.5]) / 2
    assert analysed(spikes).kl == pytest.approx((alone, second), rel=1e-9)


def test_no_answer_before_most_samples_have_spoken() -> None:
    # Four samples say class 1 once, at steps 1, 1, 2 and 3: nobody changes his mind, so all KL is 0. Half have spoken
    # after step 1, three quarters after step 2, all after step 3 of 4.
    spikes = [[[0, 0]] * 4 for _ in range(4)]
    for sample, step in enumerate((0, 0, 1, 2)):
        spikes[step] = [list(s) for s in spikes[step]]
        spikes[step][sample] = [0, 1]
    assert not any(analysed(spikes).kl)
    assert [analysed(spikes, share=share).t_star for share in (0.5, 0.75, 0.95, 1.0)] == [1, 2, 3, 3]
    assert analysed([[[0, 0]]] * 3).t_star == 1  # who never speaks isn't waited for


def test_single_steps_of_the_mean_sample() -> None:
    # The same spikes; means by step: (1/2, 0), (0, 1), (0, 1/2): all for class 0, all for 1, all for 1.
    result = analysed([[[0, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]], mode="step")
    assert result.kl == pytest.approx((divergence([1, 0], [0, 1]), 0), rel=1e-9)
    assert (result.t_star, result.mode, result.accuracy) == (2, "step", None)


def test_samples_that_swap_their_minds_are_seen_one_by_one_only() -> None:
    swap = [[[1, 0], [0, 1]], [[0, 3], [3, 0]]]
    assert analysed(swap, mode="step").t_star == 1
    assert analysed(swap).t_star == 2


def test_potentials_are_softmaxed_over_their_mean() -> None:
    # Values 1 and -1, then 0 and 2 for class 0, 0 for class 1. Means by step: (1, 0), (0, 0) and so on.
    result = analysed([[[1.0, 0.0]], [[-1.0, 0.0]], [[1.5, 0.0]]])
    softmax = [[1 / (1 + math.exp(-m)), 1 / (1 + math.exp(m))] for m in (1, 0, 0.5)]
    assert result.kl == pytest.approx((divergence(*softmax[:2]), divergence(*softmax[1:])), rel=1e-9)


def test_one_fraction_in_any_batch_makes_all_outputs_potentials() -> None:
    spikes, potentials = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[0.5, 0.0]], [[0.0, 0.0]]])
    result = temporal_analysis(Replay(), [spikes, potentials])
    by_hand = [
        divergence(*(torch.tensor(m, dtype=torch.float64).softmax(0).tolist() for m in means))
        for means in ([[1, 0], [0.5, 0.5]], [[0.5, 0], [0.25, 0]])
    ]
    assert result.kl == pytest.approx((sum(by_hand) / 2,), rel=1e-9)


def test_batches_only_split_the_work() -> None:
    x, y = torch.randint(0, 3, (5, 6, 4)).float(), torch.randint(0, 4, (6,))
    for mode in ("cumulative", "step"):
        whole = temporal_analysis(Replay(), (x, y), mode=mode)
        parts = temporal_analysis(Replay(), [(x[:, :1], y[:1]), (x[:, 1:], y[1:])], mode=mode)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-9)
        assert (parts.accuracy, parts.t_star, parts.n_samples) == (whole.accuracy, whole.t_star, 6)


@pytest.mark.parametrize(("share", "expected"), [(0.9, 2), (0.95, 3), (0.99, 4), (1, 4)])
def test_the_share_decides(share: float, expected: int) -> None:
    # Counts (1, 0), (1, 1), (2, 1), (3, 1), (3, 1): the largest change comes first, the last step changes nothing.
    p = [[1, 0], [1 / 2, 1 / 2], [2 / 3, 1 / 3], [3 / 4, 1 / 4]]
    kl = [divergence(*pair) for pair in itertools.pairwise(p)]
    shares = [sum(kl[:t]) / sum(kl) for t in (1, 2, 3)]
    result = analysed([[[1, 0]], [[0, 1]], [[1, 0]], [[1, 0]], [[0, 0]]], share=share)
    assert result.cumulative == pytest.approx((*shares, 1), rel=1e-9)
    assert result.t_star == expected


def test_nothing_changes_after_the_first_step() -> None:
    """Twice the same evidence is the same distribution; smoothing doesn't blur that."""
    assert analysed([[[1, 0]], [[1, 0]], [[1, 0]]]).t_star == 1
    assert analysed([[[0, 0]], [[0, 0]]]).cumulative == (0,)
    single = analysed([[[1, 0]]])
    assert (single.kl, single.cumulative, single.t_star, single.timesteps) == ((), (), 1, 1)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5), st.sampled_from([1, 0.3]), st.integers(0, 999))
def test_cumulative_shares_rise_to_one(steps: int, samples: int, classes: int, unit: float, seed: int) -> None:
    torch.manual_seed(seed)
    outputs = unit * torch.randint(0, 3, (steps, samples, classes))
    for mode in ("cumulative", "smoothed", "step"):
        result = analysed(outputs, mode=mode)
        assert all(v >= 0 for v in result.kl)
        assert list(result.cumulative) == sorted(result.cumulative)
        assert 1 <= result.t_star <= steps
        assert result.cumulative[-1:] in (((1,), ()) if sum(result.kl) else ((0,), ()))
        assert mode == "cumulative" or sum(result.kl) or result.t_star == 1


# ------------------------------------------------------------------------------------------
# Energy is that of profiles.


def spikingjelly_net(mode: str) -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(), layer.AvgPool2d(2),
        layer.Conv2d(4, 4, 3), neuron.IFNode(), layer.Flatten(), layer.Linear(16, 3), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(net, mode)
    return liven(Case(net, torch.rand(3, 1, 8, 8), 5)).model


def snntorch_net(kind: str) -> nn.Module:
    options = {"init_hidden": True, "threshold": 0.3}
    hidden = snn.Leaky(beta=0.7, **options) if kind == "Leaky" else snn.RLeaky(beta=0.7, linear_features=6, **options)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), hidden, nn.Linear(6, 3), snn.Leaky(beta=0.7, **options))
    return liven(Case(net, torch.rand(3, 1, 8, 8), 5)).model


class Updates(EnergyModel):
    """Prices everything, so that nothing goes uncounted."""

    name = "updates"

    def energy_pj(self, counts: OperationCounts) -> float:
        return counts.n_ac + 3 * counts.n_mac + 5 * counts.n_neuron_updates**0.5


@pytest.mark.parametrize("energy_model", ["horowitz_45nm", Updates()])
@pytest.mark.parametrize(
    "build",
    [
        lambda: spikingjelly_net("s"),
        lambda: spikingjelly_net("m"),
        lambda: snntorch_net("Leaky"),
        lambda: snntorch_net("R"),
    ],
    ids=["spikingjelly-s", "spikingjelly-m", "snntorch", "snntorch-recurrent"],
)
def test_energy_is_that_of_a_profile_with_fewer_timesteps(
    build: Callable[[], nn.Module], energy_model: str | EnergyModel
) -> None:
    net, x, y = build(), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = temporal_analysis(net, batches, timesteps=5, energy_model=energy_model)
    wanted = [profile(net, batches, timesteps=t, energy_model=energy_model).energy_pj for t in range(1, 6)]
    assert found.energy_pj == pytest.approx(wanted, rel=1e-9)
    assert 0 < wanted[0] < wanted[-1]


def test_energy_where_time_is_in_the_input() -> None:
    """Every batch size of its own, N = T among them; event data whose first steps are spikes, and later ones aren't."""
    net = spikingjelly_net("m")
    x = (torch.rand(5, 8, 1, 8, 8) > 0.6).float()
    x[3:] *= 0.5
    batches = [x[:, :2], x[:, 2:7], x[:, 7:]]
    found = temporal_analysis(net, batches)
    wanted = [profile(net, [b[:t] for b in batches]).energy_pj for t in range(1, 6)]
    assert found.energy_pj == pytest.approx(wanted, rel=1e-9)
    # The first layer's ACs have become MACs in all five steps.
    assert wanted[3] - wanted[2] > 2 * (wanted[2] - wanted[1])


def test_as_many_samples_as_timesteps() -> None:
    net, x, y = spikingjelly_net("m"), torch.rand(5, 5, 1, 8, 8), torch.zeros(5, dtype=torch.long)
    found = temporal_analysis(net, (x, y))
    assert found.timesteps == 5
    assert found.energy_pj[1] == pytest.approx(profile(net, x[:2]).energy_pj, rel=1e-9)


def test_energy_where_the_model_loops_itself() -> None:
    net = ClassStyle(lambda width, maps: snn.Leaky(beta=0.7, threshold=0.3), (3, 4), 5)
    liven(Case(net, torch.rand(3, 1, 8, 8), None))
    batches = [torch.rand(4, 1, 8, 8), torch.rand(5, 1, 8, 8)]
    found, wanted = temporal_analysis(net, batches), []
    for net.steps in range(1, 6):
        wanted.append(profile(net, batches).energy_pj)
    assert found.energy_pj == pytest.approx(wanted, rel=1e-9)


class Odd(nn.Module):
    """Layers that are called otherwise than once a step: a static encoder, one for all steps, one twice a step."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.num_steps, self.extra = 4, extra
        self.encode, self.project, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.lif = snn.Leaky(beta=0.9, threshold=0.1)

    def forward(self, x: Tensor) -> Tensor:
        current = self.project(self.encode(x).repeat(self.num_steps, 1, 1))
        membrane, spikes = self.lif.init_leaky(), []
        for step in range(self.num_steps):
            spike, membrane = self.lif(self.shared(self.shared(current[step])), membrane)
            spikes.append(spike)
        for _ in range(self.extra):
            self.shared(current[0])
        return torch.stack(spikes)


def test_energy_of_layers_that_are_not_called_once_a_step() -> None:
    net, x = Odd(), torch.rand(4, 4)
    found, wanted = temporal_analysis(net, x), []
    for net.num_steps in range(1, 5):
        wanted.append(profile(net, x).energy_pj)
    assert found.energy_pj == pytest.approx(wanted, rel=1e-9)


def test_calls_that_belong_to_no_step_are_refused() -> None:
    with pytest.raises(ModelError, match="'shared' is called 9 times in 4 timesteps"):
        temporal_analysis(Odd(extra=1), torch.rand(4, 4))


# ------------------------------------------------------------------------------------------
# What else it must do.


def test_accuracy_at_every_step_is_that_of_the_running_sum() -> None:
    net, x, y = snntorch_net("Leaky"), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,))
    result = temporal_analysis(net, (x, y), timesteps=5)
    for t in range(1, 6):
        utils.reset(net)
        with torch.no_grad():
            scores = torch.stack([net(x) for _ in range(t)]).sum(0)
        assert result.accuracy is not None
        assert result.accuracy[t - 1] == float((scores.argmax(1) == y).double().mean())


def test_the_first_of_several_outputs_and_forward() -> None:
    net = ClassStyle(lambda width, maps: snn.Leaky(beta=0.7, threshold=0.3), (3, 4), 3)
    x = torch.rand(2, 1, 8, 8)
    by_forward = temporal_analysis(net, [{"x": x}], forward=lambda model, batch: model(batch["x"])[0])
    assert by_forward == temporal_analysis(net, x)  # the model returns (spikes, membranes)


def test_the_model_and_the_random_state_stay() -> None:
    net = snntorch_net("Leaky").train()
    net[2].mem = torch.full((3, 6), 0.25)
    before = {k: v.clone() for k, v in net.state_dict().items()}, net[2].mem.clone(), torch.get_rng_state()
    temporal_analysis(net, torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), timesteps=3)
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert torch.equal(net[2].mem, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())


def test_one_pass_that_keeps_nothing() -> None:
    """A sample is rehearsed; then every batch runs once, and everything of the batch before is gone."""
    seen: list[int] = []
    alive: list[weakref.ref[Tensor]] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        assert all(ref() is None for ref in alive)
        output = model(batch * 1.0)
        seen.append(output.shape[1])
        alive.append(weakref.ref(output))
        return output

    temporal_analysis(Replay(), [torch.ones(3, n, 2) for n in (4, 2, 1)], forward=forward)
    assert seen == [4, 4, 4, 2, 1]  # of the bench, of the steps, and the batches


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    temporal_analysis(Replay(), [torch.ones(2, 1, 2)] * 2, progress=lambda *news: told.append(news))
    assert told == [("temporal analysis", 0, 2), ("temporal analysis", 1, 2)]


def test_errors() -> None:
    x = torch.ones(2, 3, 2)

    class Mean(Replay):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(0)

    with pytest.raises(DataError, match=r"returned shape \[1, 2\].*forward=lambda"):
        temporal_analysis(Mean(), x)
    with pytest.raises(DataError, match=r"\[2, 1, 1\]"):
        temporal_analysis(Replay(), x[:, :, :1])
    with pytest.raises(DataError, match=r"Labels must be class indices \[3\].* not \[4\]"):
        temporal_analysis(Replay(), (x, torch.zeros(4, dtype=torch.long)))
    with pytest.raises(DataError, match="same number of timesteps"):
        temporal_analysis(Replay(), [x, torch.ones(4, 3, 2)])
    with pytest.raises(DataError, match="NaN"):
        temporal_analysis(Replay(), x, forward=lambda model, batch: model(batch) / 0 * 0)
    for share in (0, 1.5, True, "0.95", math.nan):
        with pytest.raises(OptionError, match="share must be"):
            analysed(x, share=share)
    with pytest.raises(OptionError, match="mode must be"):
        analysed(x, mode="single")


def test_layers_of_another_length_are_refused() -> None:
    net = spikingjelly_net("m")
    with pytest.raises(DataError, match="same number of timesteps"):
        temporal_analysis(net, [torch.rand(5, 2, 1, 8, 8), torch.rand(4, 2, 1, 8, 8)])


def test_a_table_and_plain_values() -> None:
    result = analysed([[[1, 1]], [[1, 0]], [[0, 0]]], labels=[0])
    lines = str(result).splitlines()
    assert lines[0] == "Replay: 2 of 3 timesteps reach 95 % of the KL divergence (cumulative)"
    assert lines[1].split("   ") == ["  t", "KL(t ‖ t+1)", "cumulative", "accuracy", "energy (pJ)"]
    assert lines[4].split()[0] == "*2"
    assert "accuracy" not in str(analysed([[[1, 1]]]))
    assert result.to_dict()["cumulative"] == [1, 1]


def test_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    result = analysed([[[1, 1]], [[1, 0]], [[0, 0]]], labels=[0])
    ax = figure.Figure().subplots()
    assert result.plot(ax) is ax
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert list(drawn["cumulative KL"].get_ydata()) == [0, 1, 1]
    assert list(drawn["accuracy"].get_ydata()) == [1, 1, 1]
    assert drawn["t* = 2"].get_xdata()[0] == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"pip install .snncompress\[plots\]"):
        result.plot()
