"""A layer whose analog input is the same at every timestep multiplies once, however the network repeats it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")

from spikingjelly.activation_based import functional, layer, neuron

from snncompress.measuring.conventions import PRESETS, Conventions
from snncompress.measuring.profiling import profile
from snncompress.measuring.temporal import temporal_analysis

T, N = 4, 3
X = torch.rand(N, 5, generator=torch.Generator().manual_seed(0))
EVERY_STEP = Conventions(direct_encoding="every step")


class Net(nn.Module):
    """5 → 6 neurons → 2, and a ``forward`` that spreads its input over time in one of many ways. [T, N, 2]."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], mode: str = "s") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = layer.Linear(5, 6), layer.Linear(6, 2)
        self.fire, self.out = neuron.IFNode(v_threshold=0.2), neuron.IFNode(v_threshold=0.2)
        self.run, self.steps = run, T
        functional.set_step_mode(self, mode)

    def rest(self, current: Tensor) -> Tensor:
        return self.out(self.last(self.fire(current)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def one_step(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(x))


def own_loop(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.rest(net.stem(x)) for _ in range(net.steps)])


def written_over(net: Net, x: Tensor) -> Tensor:
    frame = torch.empty_like(x)  # one buffer, another content in every step
    return torch.stack([net.rest(net.stem(frame.copy_(x).mul_(step + 0.5))) for step in range(net.steps)])


def own_repeat(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(x.expand(net.steps, *x.shape)))


def flattened(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(x.repeat(net.steps, 1)).view(net.steps, len(x), -1))


def batch_first(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(x[:, None].repeat(1, net.steps, 1)).transpose(0, 1))


def samples_first(net: Net, x: Tensor) -> Tensor:
    """[N·T, ...], as layers of [N, T, ...] are wrapped."""
    return net.rest(net.stem(x.repeat_interleave(net.steps, 0)).view(len(x), net.steps, -1).transpose(0, 1))


def stem_once(net: Net, x: Tensor) -> Tensor:
    current = net.stem(x)
    return torch.stack([net.rest(current) for _ in range(net.steps)])


def stem_once_repeated(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(x).expand(net.steps, len(x), 6))


def noisy(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.rest(net.stem(x + 0.1 * step)) for step in range(net.steps)])


def fading(net: Net, x: Tensor) -> Tensor:
    return net.rest(net.stem(torch.stack([x * 0.5**step for step in range(net.steps)])))


def stem_macs(net: nn.Module, data: Any, rules: Conventions | None = None, timesteps: int | None = None) -> float:
    return next(row.n_mac for row in profile(net, data, timesteps=timesteps, conventions=rules).layers)


@pytest.mark.parametrize("mode", ["s", "m"])
def test_constant_current_is_multiplied_once(mode: str) -> None:
    net = Net(one_step, mode)
    assert stem_macs(net, X, timesteps=T) == 5 * 6
    assert stem_macs(net, [X, X[:2] * 0.5], timesteps=T) == 5 * 6  # each batch has its own image
    assert stem_macs(net, X, EVERY_STEP, timesteps=T) == T * 5 * 6
    for preset in ("neurobench", "spikingjelly", "syops"):
        assert stem_macs(net, X, PRESETS[preset], timesteps=T) >= T * 5 * 6
    assert stem_macs(net, X, Conventions(spike_scope="call", zero_inputs=False), timesteps=T) == 5 * 6


@pytest.mark.parametrize(
    ("run", "mode"),
    [(own_loop, "s"), (own_repeat, "m"), (flattened, "m"), (batch_first, "m"), (samples_first, "m")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("samples", [N, 1])
def test_networks_that_repeat_the_image_themselves(run: Any, mode: str, samples: int) -> None:
    net = Net(run, mode)
    assert stem_macs(net, X[:samples]) == 5 * 6
    assert stem_macs(net, X[:samples], EVERY_STEP) == T * 5 * 6


@pytest.mark.parametrize(("run", "mode"), [(stem_once, "s"), (stem_once_repeated, "m")])
@pytest.mark.parametrize("x", [X, X[:1], torch.cat([X[:1]] * T)], ids=["three", "one", "as many alike as timesteps"])
def test_a_stem_that_runs_before_time_begins_costs_what_it_does(run: Any, mode: str, x: Tensor) -> None:
    net = Net(run, mode)
    assert stem_macs(net, x) == stem_macs(net, x, EVERY_STEP) == 5 * 6


@pytest.mark.parametrize(("run", "mode"), [(noisy, "s"), (written_over, "s"), (fading, "m")])
@pytest.mark.parametrize("x", [X, torch.cat([X[:1]] * T)], ids=["three", "as many alike as timesteps"])
def test_an_input_that_changes_is_multiplied_at_every_step(run: Any, mode: str, x: Tensor) -> None:
    assert stem_macs(Net(run, mode), x) == T * 5 * 6


def test_the_preset_of_qp_snn_is_its_formula() -> None:
    """4×4 pixels of ½ under a 3×3 filter of ½: each position is charged by its 4, 6 or 9 quarters, so
    that all 16 neurons fire at each of 3 steps. E = 0.9 · T · SOPs + 4.6 · MACs: 2 SOPs a spike, 9 · 16 MACs once."""
    net = nn.Sequential(
        layer.Conv2d(1, 1, 3, padding=1, bias=False), neuron.IFNode(), layer.Flatten(), layer.Linear(16, 2)
    )
    nn.init.constant_(net[0].weight, 0.5)
    nn.init.zeros_(net[3].weight)  # it exists
    found = profile(net, torch.full((1, 1, 4, 4), 0.5), timesteps=3, conventions="qp_snn")
    assert found.energy_pj == pytest.approx(0.9 * 3 * 32 + 4.6 * 144)


def test_one_batch_that_changes_decides_for_the_layer() -> None:
    constant = X.expand(T, N, 5)
    changes = constant.clone()
    changes[-1, 0, 0] += 1
    net = Net(one_step, "m")
    assert stem_macs(net, [constant] * 2) == 5 * 6
    for data in ([constant, changes], [changes, constant], [constant[:2], changes, constant]):
        steps = sum(len(batch) for batch in data) / len(data)
        assert stem_macs(net, data) == steps * 5 * 6


def test_batches_that_happen_to_be_whole_numbers() -> None:
    """A blank image among grey ones: the layer is analog all the same, and as constant as it was."""
    for mode in ("s", "m"):
        net = Net(one_step, mode)
        for data in ([torch.zeros(1, 5), X], [X, torch.ones(1, 5), X]):
            assert stem_macs(net, data, timesteps=T) == 5 * 6


def test_spikes_count_at_every_step_though_they_are_constant() -> None:
    net = Net(one_step)
    found = profile(net, torch.ones(1, 5), timesteps=T).layers[0]
    assert (found.n_ac, found.n_mac) == (T * 5 * 6, 0)


def test_two_layers_before_the_first_neuron() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), neuron.IFNode(), nn.Linear(6, 2), neuron.IFNode())
    assert profile(net, X, timesteps=T).n_mac == 5 * 4 + 4 * 6


def test_biases_of_a_constant_input_are_added_once() -> None:
    rules = Conventions(bias=True)
    found = profile(Net(one_step), X, timesteps=T, conventions=rules).layers
    assert (found[0].n_ac, found[0].n_mac) == (6, 30)
    assert found[1].n_ac >= T * 2  # the last layer's, at every step


@pytest.mark.parametrize(
    ("run", "mode"),
    [(own_loop, "s"), (own_repeat, "m"), (stem_once, "s"), (noisy, "s"), (fading, "m")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_analysis_over_time_counts_alike(run: Any, mode: str) -> None:
    net, wanted = Net(run, mode), []
    found = temporal_analysis(net, [X, X[:2]]).energy_pj
    for net.steps in range(1, T + 1):
        wanted.append(profile(net, [X, X[:2]]).energy_pj)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_current_that_changes_late_costs_no_more_before() -> None:
    """Constant for two steps, then another: once as far as step 2, at every step from 3 on."""

    def run(net: Net, x: Tensor) -> Tensor:
        return torch.stack([net.rest(net.stem(x + (step > 1))) for step in range(net.steps)])

    net, wanted = Net(run), []
    found = temporal_analysis(net, X).energy_pj
    for net.steps in range(1, T + 1):
        wanted.append(profile(net, X).energy_pj)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert wanted[2] - wanted[1] > 2 * 30 * 4.6
