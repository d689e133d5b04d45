"""Profiles of tiny networks, derived by hand, and what profiling must leave alone."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snncompress import DataError, ModelError, OptionError, UnknownNameError
from snncompress.extend import Adapter, EnergyModel, OperationCounts, Quantizer
from snncompress.measuring.conventions import Conventions
from snncompress.measuring.profiling import Comparison, Profile, compare, profile
from snncompress.model.parametrizations import quantize_weight

# ------------------------------------------------------------------------------------------
# A framework of ten lines.


class Fire(nn.Module):
    """Fires where the summed input passes 1, and is then reset to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        charged = self.v + x
        spikes = (charged >= 1).to(x)
        self.v = charged * (1 - spikes)
        return spikes


class ToyAdapter(Adapter):
    framework = "toy"

    def is_neuron(self, module: nn.Module) -> bool:
        return isinstance(module, Fire)

    def reset(self, model: nn.Module) -> None:
        for neuron in self.neurons(model).values():
            neuron.v = 0.0

    def run(self, model: nn.Module, x: Tensor, timesteps: int | None) -> Any:
        return model(x) if timesteps is None else torch.stack([model(x) for _ in range(timesteps)])

    def identities(self, model: nn.Module, stand_in: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def observe(self, neuron: nn.Module, observer: Any, *, membrane: bool) -> Callable[[], None]:
        return neuron.register_forward_hook(lambda m, args, out: observer(out.unsqueeze(0), None)).remove

    def remove_channels(self, neuron: nn.Module, indices: list[int], axis: int) -> None: ...


TOY = ToyAdapter()


class Same(Quantizer):
    """Quantizes nothing; only its bit width is of interest here."""

    name = "same"

    def tensor_quant(self, bits: int) -> nn.Module:
        class Unchanged(nn.Module):
            def forward(self, weight: Tensor) -> tuple[Tensor, ...]:
                return (weight,)

        return Unchanged()


def rows(result: Profile) -> dict[str, Any]:
    return {row.name: row for row in result.layers}


def linear(weights: list[list[float]], bias: bool = False) -> nn.Linear:
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias)
    layer.weight.data = torch.tensor(weights)
    return layer


def tiny() -> nn.Sequential:
    """3 inputs → 2 neurons → 2 outputs; one weight is pruned."""
    return nn.Sequential(linear([[0.5, 0.5, 0.5], [1.0, 0.0, -1.0]]), Fire(), linear([[1.0, 2.0], [3.0, 4.0]], True))


# ------------------------------------------------------------------------------------------
# By hand.


def test_a_network_of_five_synapses():
    # Input spikes (1, 1, 0) at both of 2 steps, one sample. Layer 0 has 5 synapses: input 0 starts 2, input 1
    # one, so 3 ACs per step. Both neurons get 1 per step, so both fire at both. Layer 2: 2 spikes · 2 outputs
    # per step.
    result = profile(tiny(), torch.tensor([[1.0, 1.0, 0.0]]), timesteps=2, adapter=TOY)
    found = rows(result)
    assert (found["0"].n_ac, found["0"].n_mac, found["0"].sparsity) == (6, 0, 1 / 6)
    assert (found["0"].input_rate, found["0"].firing_rate) == (2 / 3, None)
    assert (found["1"].firing_rate, found["1"].n_neuron_updates, found["1"].state_mb) == (1, 4, 8e-6)
    assert (found["2"].n_ac, found["2"].input_rate) == (8, 1)
    assert (result.n_ac, result.n_mac, result.firing_rate) == (14, 0, 1)
    assert result.energy_pj == pytest.approx(14 * 0.9)
    assert (result.n_params, result.size_mb) == (6 + 6, (6 + 4 + 2) * 4 / 1e6)
    assert result.sparsity == pytest.approx(1 / 10)
    assert (result.n_samples, result.n_batches) == (1, 1)


def test_analog_input_costs_products():
    # The same, fed 0.5: layer 0 costs 5 MACs, once; it charges neuron 0 by 0.75 and neuron 1 by 0, so that
    # neuron 0 fires at step 2: 1 of 4 chances. That spike meets 2 synapses.
    result = profile(tiny(), torch.full((1, 3), 0.5), timesteps=2, adapter=TOY)
    assert (result.n_mac, result.n_ac, result.firing_rate) == (5, 2, 0.25)
    assert result.energy_pj == pytest.approx(5 * 4.6 + 2 * 0.9)
    assert rows(result)["0"].input_rate is None


def test_counts_are_means_over_samples_or_batches():
    # Samples with 1, 2, 0 and 3 spikes into 2 outputs each, in batches of 3 and 1.
    net = nn.Sequential(linear([[1.0] * 3] * 2), Fire())
    x = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    data = [x[:3], x[3:]]
    assert profile(net, data, adapter=TOY).n_ac == 2 * 6 / 4
    per_batch = profile(net, data, adapter=TOY, conventions=Conventions(per="batch"))
    assert per_batch.n_ac == 2 * 6 / 2
    assert (per_batch.n_samples, per_batch.n_batches) == (4, 2)
    assert rows(per_batch)["1"].n_neuron_updates == 4 * 2 / 2


def test_one_fraction_in_the_whole_run_makes_a_layer_analog():
    net = nn.Sequential(linear([[1.0] * 3] * 2), Fire())
    data = [torch.ones(1, 3), torch.full((1, 3), 0.5), torch.ones(1, 3)]
    assert profile(net, data, adapter=TOY).n_mac == 6
    by_call = profile(net, data, adapter=TOY, conventions=Conventions(spike_scope="call"))
    assert (by_call.n_ac, by_call.n_mac) == (4, 2)


def test_firing_rate_weighs_populations_by_their_size():
    # 4 neurons that always fire, then 1 that never does: 4/5.
    net = nn.Sequential(linear([[1.0]] * 4), Fire(), linear([[-1.0] * 4]), Fire())
    result = profile(net, torch.ones(2, 1), timesteps=3, adapter=TOY)
    assert [row.firing_rate for row in result.layers if row.kind == "neuron"] == [1, 0]
    assert result.firing_rate == 0.8


def test_eleven_million_accumulates_cost_what_the_paper_says():
    # METHODS: 11.20 M AC and 4.23 M MAC are 0.0295 mJ.
    from snncompress.contract.registry import registry

    model = registry().resolve("energy model", "horowitz_45nm", EnergyModel)
    assert round(model.energy_pj(OperationCounts(11.20e6, 4.23e6)) * 1e-9, 4) == 0.0295


def test_conventions_reach_every_kind_of_row():
    # conv 1→2, 1×1 with bias, on 2×2 ones; BN; neurons (charged by 1: all fire); max-pooling; linear.
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.0), Fire(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)
    )
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    x = torch.ones(1, 1, 2, 2)

    def counts(**changed: Any) -> dict[str, tuple[float, float]]:
        result = profile(net, x, adapter=TOY, conventions=Conventions(**changed))
        return {row.name: (row.n_ac, row.n_mac) for row in result.layers if row.n_ac or row.n_mac}

    synapses = {"0": (8, 0), "5": (6, 0)}
    assert counts() == synapses
    assert counts(bias=True) == {"0": (8 + 8, 0), "5": (6 + 3, 0)}
    assert counts(batch_norm_ops=1) == {**synapses, "1": (0, 8)}
    assert counts(pooling=True) == {**synapses, "3": (8, 0)}
    assert counts(neuron_updates="in_totals") == {**synapses, "2": (8, 0)}


def test_neuron_updates_reach_the_energy_model_once():
    class Updates(EnergyModel):
        name = "updates"

        def energy_pj(self, counts: OperationCounts) -> float:
            return counts.n_neuron_updates * 10 + counts.n_ac

    x = torch.zeros(1, 3)
    assert profile(tiny(), x, adapter=TOY, energy_model=Updates()).energy_pj == 20
    counted = profile(
        tiny(), x, adapter=TOY, energy_model=Updates(), conventions=Conventions(neuron_updates="in_totals")
    )
    assert counted.energy_pj == 2


# ------------------------------------------------------------------------------------------
# Size.


def test_size_counts_bits_of_weights_and_32_for_the_rest():
    # 2·9 weights at 4 bits, 2 biases, BN 2 + 2 at 32 bits; the running statistics are buffers.
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Fire())
    quantize_weight(net[0], Same(), 4)
    result = profile(net, torch.ones(1, 1, 3, 3), adapter=TOY)
    assert result.size_mb == pytest.approx((18 * 4 + (2 + 4) * 32) / 8e6)
    assert (result.n_params, rows(result)["0"].bits, rows(result)["1"].bits) == (24, 4, None)


def pruned_vgg(early: float, late: float, classes: int, bits: int) -> nn.Module:
    """METHODS' spiking VGG-16 with conv 1-7 and 8-12 pruned: ⌈ratio · c⌉ channels gone."""

    def left(width: int, ratio: float) -> int:
        return width - int(-(-round(width * ratio, 6) // 1))

    widths = [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    ratios = [early] * 7 + [late] * 5 + [0.0]
    layers: list[nn.Module] = []
    channels = 3
    for number, (width, ratio) in enumerate(zip(widths, ratios, strict=True), 1):
        conv = nn.Conv2d(channels, channels := left(width, ratio), 3, padding=1, bias=False)
        if number > 1:
            quantize_weight(conv, Same(), bits)
        layers += [conv, nn.BatchNorm2d(channels), Fire()]
        if number in (2, 4, 7, 10):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, classes))


@pytest.mark.parametrize(
    ("early", "late", "classes", "params", "sizes"),
    [
        (0.45, 0.51, 10, 4.25, {8: 4.28, 4: 2.16, 2: 1.10}),
        (0.49, 0.80, 10, 1.42, {8: 1.45, 4: 0.74, 2: 0.39}),
        (0.45, 0.70, 100, 2.31, {8: 2.48, 4: 1.35, 2: 0.79}),
        (0.45, 0.78, 100, 1.68, {8: 1.85, 4: 1.04, 2: 0.63}),
    ],
)
def test_sizes_of_the_qp_snn_paper(early, late, classes, params, sizes):
    for bits, size in sizes.items():
        net = pruned_vgg(early, late, classes, bits)
        result = profile(net, torch.zeros(1, 3, 32, 32), adapter=TOY)
        assert (round(result.n_params / 1e6, 2), round(result.size_mb, 2)) == (params, size)


def test_rows_add_up_and_every_parameter_has_one():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))  # belongs to the model itself
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight  # shared: counts once
            self.fire = Fire()
            self.fire.decay = nn.Parameter(torch.tensor(0.5))
            self.norm = nn.LayerNorm(3)  # no row of its own kind
            self.unused = nn.Linear(3, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.fire(self.norm(self.b(self.a(x * self.scale))))

    net = Net()
    quantize_weight(net.unused, Same(), 2)
    result = profile(net, torch.rand(5, 3), timesteps=3, adapter=TOY)
    assert result.n_params == 3 + (9 + 3) + 3 + 1 + 6 + (21 + 7) == sum(p.numel() for p in net.parameters())
    found = rows(result)
    assert {name: row.kind for name, row in found.items()} == {
        "": "other", "a": "weight", "b": "weight", "fire": "neuron", "norm": "other", "unused": "weight",
    }  # fmt: skip
    assert (found["b"].n_params, found["b"].sparsity, found["fire"].n_params) == (3, 0, 1)
    assert (found["unused"].n_mac, found["unused"].input_rate) == (0, None)
    assert found["unused"].size_mb == (21 * 2 + 7 * 32) / 8e6
    for metric in ("n_params", "size_mb", "n_mac", "n_ac", "energy_pj", "n_neuron_updates", "state_mb"):
        assert getattr(result, metric) == sum(getattr(row, metric) for row in result.layers)


def test_a_masked_weight_counts_as_the_layer_sees_it():
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])

    net = nn.Sequential(nn.Linear(3, 2, bias=False), Fire())
    parametrize.register_parametrization(net[0], "weight", Mask())
    result = profile(net, torch.ones(1, 3), adapter=TOY)
    assert (result.n_ac, result.sparsity, result.n_params) == (2, 4 / 6, 6)
    assert result.size_mb == 6 * 4 / 1e6


# ------------------------------------------------------------------------------------------
# The model and the machine stay as they are.


def snapshot(net: nn.Module) -> Any:
    return (
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        torch.get_rng_state(),
        net[2].v,
    )


def equal(a: Any, b: Any) -> bool:
    states = all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    return states and a[1] == b[1] and torch.equal(a[2], b[2]) and a[3] is b[3]


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_untouched(fails):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Fire(), nn.Dropout(), nn.Flatten())
    net(torch.rand(2, 1, 3, 3))  # leaves a state, attached to a graph, in training mode
    net[1].eval()
    x = torch.rand(4, 1, 3, 3)
    before = snapshot(net)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch + torch.rand_like(batch))
        if fails:
            raise RuntimeError("halfway")
        return out

    if fails:
        with pytest.raises(DataError, match="halfway"):
            profile(net, x, adapter=TOY, forward=forward)
    else:
        profile(net, x, adapter=TOY, forward=forward)
    assert equal(before, snapshot(net))


def test_nothing_of_a_batch_is_kept():
    alive: list[weakref.ref[Tensor]] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        assert all(ref() is None for ref in alive)  # everything of earlier batches is gone
        hidden = model[0](batch)
        alive.append(weakref.ref(hidden))
        return model[2](model[1](hidden))

    profile(tiny(), (torch.rand(2, 3) for _ in range(4)), adapter=TOY, forward=forward)
    assert len(alive) == 5  # a rehearsal, and four batches


def test_a_forward_in_inference_mode_and_keyword_calls():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), Fire(), nn.Flatten())

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return model[2](model[1](model[0](input=batch)))

    x = torch.ones(3, 1, 3, 3)
    expected = profile(net, x, adapter=TOY)
    assert profile(net, x, adapter=TOY, forward=forward).layers == expected.layers


# ------------------------------------------------------------------------------------------
# How many samples.


def test_samples_come_from_output_labels_or_first_dimension():
    net = nn.Sequential(nn.Linear(3, 2), Fire())
    x = torch.ones(4, 5, 3)
    assert profile(net, x, adapter=TOY).n_samples == 4  # the neurons saw four rows
    assert profile(nn.Sequential(nn.Linear(3, 2)), x).n_samples == 5  # there are none: the output is [T, N, K]
    flat = nn.Sequential(nn.Linear(3, 2), Fire(), nn.Flatten(0))
    assert profile(flat, (x, torch.zeros(5, dtype=torch.long)), adapter=TOY).n_samples == 5
    assert profile(flat, torch.ones(7, 3), adapter=TOY).n_samples == 7
    with pytest.raises(DataError, match="how many samples"):
        profile(flat, [{"x": x}], adapter=TOY, forward=lambda model, batch: model(batch["x"]))


def test_errors():
    with pytest.raises(ModelError, match="not initialised yet"):
        profile(nn.LazyLinear(2), torch.ones(1, 3))
    with pytest.raises(UnknownNameError, match="energy model 'joule'"):
        profile(tiny(), torch.ones(1, 3), adapter=TOY, energy_model="joule")
    with pytest.raises(UnknownNameError, match="conventions 'syop'"):
        profile(tiny(), torch.ones(1, 3), adapter=TOY, conventions="syop")
    with pytest.raises(DataError, match=r"failed on a batch of shape \[1, 4\]"):
        profile(tiny(), torch.ones(1, 4), adapter=TOY)
    with pytest.raises(DataError, match="float64"):
        profile(tiny(), torch.ones(1, 3, dtype=torch.float64), adapter=TOY)


# ------------------------------------------------------------------------------------------
# Reports.


def test_a_profile_prints_units_and_conventions():
    text = str(profile(tiny(), torch.ones(1, 3), adapter=TOY, conventions="neurobench"))
    for part in (
        "energy (pJ)",
        "size (MB)",
        "total",
        "Sequential: 1 sample in 1 batch",
        "horowitz_45nm(ac_pj",
    ):
        assert part in text
    assert "conventions neurobench: per sample, exact counts, zero weights not counted" in text
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_profile_is_plain_json():
    result = profile(tiny(), torch.ones(1, 3), adapter=TOY)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["n_ac"] == result.n_ac
    assert plain["layers"][0]["sparsity"] == result.layers[0].sparsity
    assert plain["conventions"]["name"] == "snncompress"


def test_comparison():
    dense, half = tiny(), tiny()
    half[2].weight.data[0] = 0
    batches = iter([torch.ones(2, 3), torch.ones(1, 3)])  # used up by the first model, were it not kept
    result = compare({"dense": dense, "half": half}, batches, adapter=TOY)
    assert result.profiles["half"].n_samples == 3
    # Neuron 0 alone fires (input 1.5 and 0): layer 0 has 5 synapses, layer 2 two, of which one is left.
    assert result.ratios["half"]["n_ac"] == (5 + 1) / (5 + 2)
    assert (result.ratios["half"]["n_params"], result.ratios["half"]["n_mac"]) == (1, None)
    text = str(result)
    for part in ("dense", "half / dense", "energy (pJ)", "0.8571", "conventions snncompress"):
        assert part in text
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["profiles"]["dense"]["n_ac"] == 7


def test_comparison_takes_profiles_and_refuses_unlike_ones():
    x = torch.ones(1, 3)
    short = profile(tiny(), x, timesteps=1, adapter=TOY)
    result = compare({"T=4": tiny(), "T=1": short}, x, timesteps=4, adapter=TOY)
    assert result.ratios["T=1"]["n_neuron_updates"] == 0.25
    other = profile(tiny(), x, adapter=TOY, conventions="neurobench")
    with pytest.raises(OptionError, match="under different conventions"):
        Comparison({"a": short, "b": other})
    for wrong in ({}, [tiny()]):
        with pytest.raises(OptionError, match="mapping of names to networks"):
            compare(wrong, x, adapter=TOY)


# ------------------------------------------------------------------------------------------
# Real frameworks.


def test_recurrent_layers_inside_snntorch_neurons():
    snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
    neuron = snn.RLeaky(beta=0.5, threshold=0.5, linear_features=2, init_hidden=True)
    net = nn.Sequential(linear([[1.0], [1.0]]), neuron)
    nn.init.zeros_(neuron.recurrent.bias)
    nn.init.constant_(neuron.recurrent.weight, 0.25)
    found = rows(profile(net, torch.ones(1, 1), timesteps=3))
    # Both neurons fire at every step; the recurrent layer sees their spikes of the step before, none at the
    # first: 2 steps · 2 spikes · 2 synapses.
    assert found["1"].firing_rate == 1
    assert (found["1.recurrent"].n_ac, found["1.recurrent"].kind) == (8, "weight")
    assert found["1.recurrent"].n_params == 6


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_step_modes_of_spikingjelly_agree(step_mode):
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import functional, layer, neuron

    net = nn.Sequential(
        layer.Conv2d(1, 2, 2, bias=False), neuron.IFNode(), layer.Flatten(), layer.Linear(8, 3, bias=False)
    )
    nn.init.constant_(net[0].weight, 0.25)
    functional.set_step_mode(net, step_mode)
    # Every filter position sums to 1: all 8 neurons fire at each of 3 steps. Each of 4 output positions has 4
    # weights in each of 2 channels.
    result = profile(net, torch.ones(2, 1, 3, 3), timesteps=3)
    assert [row.n_ac for row in result.layers if row.kind == "weight"] == [3 * 4 * 4 * 2, 3 * 8 * 3]
    assert (result.firing_rate, result.n_neuron_updates, result.n_samples) == (1, 24, 2)
