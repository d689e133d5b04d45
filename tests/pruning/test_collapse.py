"""collapse(): which channels are dead, derived by hand; and that nothing else changes."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from snncompress_baselines import WeightMagnitude
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import MaskWeights, ModelError, Plan, QuantizeWeights, collapse, plan_of
from snncompress.model.parametrizations import mask_weight, stored_weight, weight_mask
from snncompress.model.plan import attach
from tests.equivalence import PAPER, outputs, same, snapshot
from tests.networks import Case, Residual, firing_rates


def net(first: list[list[float]], bias: list[float], second: list[list[float]], fire: nn.Module | None = None) -> Case:
    """Linear → IF (threshold 1) → Linear with these weights, on two samples of two features, for 4 steps."""
    model = nn.Sequential(
        layer.Linear(len(first[0]), len(first)),
        fire or neuron.IFNode(),
        layer.Linear(len(first), len(second), bias=False),
    ).double()
    for module, weight in ((model[0], first), (model[2], second)):
        module.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    model[0].bias = nn.Parameter(torch.tensor(bias, dtype=torch.float64))
    return Case(model, torch.tensor([[0.7, 0.4], [0.2, 0.9]], dtype=torch.float64), 4)


def collapsed(case: Case, **options: object) -> nn.Module:
    """Collapse, having seen that the output stays and that the original isn't touched."""
    before = snapshot(case.model)
    small = collapse(case.model, case.x, timesteps=case.timesteps, **options)
    assert same(before, snapshot(case.model))
    for a, b in zip(
        outputs(case.model, case.feed), outputs(small, Case(small, case.x, case.timesteps).feed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9) if a.dtype == torch.float64 else almost(a, b)
    return small


def almost(a: Tensor, b: Tensor) -> None:
    """float32 outputs, of which a sum within rounding of the threshold may flip a spike."""
    assert a.shape == b.shape
    off = (a - b).abs() > 1e-4 * a.abs().max().clamp_min(1)
    assert off.double().mean() <= 0.01


def gone(model: nn.Module, name: str = "0") -> list[int]:
    return plan_of(model).removed_channels().get(name, [])


def zero(module: nn.Module, *rows: int, columns: tuple[int, ...] = ()) -> None:
    """No weights, and no bias, to these rows; no weights from these columns."""
    with torch.no_grad():
        module.weight[list(rows)] = 0
        module.weight[:, list(columns)] = 0
        if module.bias is not None:
            module.bias[list(rows)] = 0


# (a) unread


def test_what_nothing_reads_goes_for_any_number_of_timesteps() -> None:
    case = net([[1, 1], [2, 2], [1, 2]], [0, 5, 0], [[1, 0, 2], [3, 0, 4]])
    assert firing_rates(case)["1"] > 0.5
    assert gone(collapsed(case)) == [1]
    assert gone(collapse(case.model)) == [1]  # without data: noise of the shape it takes, no warning


def test_a_single_weight_keeps_a_channel() -> None:
    assert gone(collapsed(net([[1, 1], [2, 2]], [0, 0], [[1, 0], [3, 1e-30]]))) == []


def test_behind_a_flatten_every_position_counts() -> None:
    model = nn.Sequential(layer.Conv2d(1, 3, 3), neuron.IFNode(), layer.Flatten(), layer.Linear(3 * 4, 2)).double()
    case = Case(model, torch.rand(2, 1, 4, 4, dtype=torch.float64), 3)
    zero(model[3], columns=(0, 1, 2, 3, 4, 5, 6))  # all four of channel 0, three of channel 1
    small = collapsed(case)
    assert gone(small) == [0]
    assert small[3].weight.shape == (2, 8)


def test_the_classifier_keeps_its_outputs() -> None:
    case = net([[1, 1], [2, 2]], [0, 0], [[0, 0], [1, 1]])
    small = collapsed(case)
    assert gone(small) == gone(small, "2") == []


def test_removing_a_channel_frees_those_before_it() -> None:
    """The last layer doesn't read b1; only b1 reads a0 and a2. So b1 goes, then a0 and a2."""
    model = nn.Sequential(
        layer.Linear(2, 3), neuron.IFNode(), layer.Linear(3, 2), neuron.IFNode(), layer.Linear(2, 2)
    ).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0, 1.0, 0], [1, 1, 1]]))
    zero(model[4], columns=(1,))
    case = Case(model, torch.rand(3, 2, dtype=torch.float64), 3)
    small = collapsed(case)
    assert (gone(small, "2"), gone(small, "0")) == ([1], [0, 2])
    assert [e.layer for e in plan_of(small).edits] == ["2", "0"]


# (b) silent


@pytest.mark.parametrize(("timesteps", "expected"), [(4, [1]), (8, [])])
def test_a_bias_that_needs_more_steps_than_are_run_is_silent(timesteps: int, expected: list[int]) -> None:
    """0.2 per step reaches the threshold 1 in the fifth."""
    case = net([[1, 1], [0, 0]], [0, 0.2], [[1, 2], [3, 4]])
    case.timesteps = timesteps
    assert gone(collapsed(case)) == expected
    assert gone(collapse(case.model, timesteps=timesteps)) == expected


def test_silence_is_not_believed_where_the_number_of_timesteps_is_a_guess() -> None:
    case = net([[1, 1], [0, 0], [1, 1]], [0, 0.2, 0], [[1, 2, 0], [3, 4, 0]])
    assert gone(collapse(case.model)) == [2]


def test_a_channel_that_data_could_wake_stays() -> None:
    """Its only weight is negative, so no sample here wakes it; another one would."""
    assert gone(collapsed(net([[1, 1], [0, -1]], [0, 0], [[1, 2], [3, 4]]))) == []


def test_a_spike_in_any_step_counts() -> None:
    """0.3 per step: a spike in the fourth of six steps only."""
    case = net([[1, 1], [0, 0]], [0, 0.3], [[1, 2], [3, 4]])
    case.timesteps = 6
    assert gone(collapsed(case)) == []


@pytest.mark.parametrize("threshold", [0.0, -0.5])
def test_a_neuron_that_fires_at_rest_stays(threshold: float) -> None:
    weights = [[1, 1], [0, 0]], [0, 0], [[1, 2], [3, 4]]
    assert gone(collapsed(net(*weights, fire=neuron.IFNode(v_threshold=threshold)))) == []
    assert gone(collapsed(net(*weights))) == [1]


@pytest.mark.parametrize(("shift", "expected"), [(1.5, []), (0.3, [1])])
def test_the_shift_of_batch_norm_counts(shift: float, expected: list[int]) -> None:
    """Its running mean and variance are 0 and 1, so the channel gets its shift, in every step."""
    model = nn.Sequential(
        layer.Conv2d(1, 2, 1, bias=False), layer.BatchNorm2d(2), neuron.IFNode(), layer.Flatten(), layer.Linear(8, 2)
    ).double()
    zero(model[0], 1)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([2.0, shift]))
    case = Case(model.eval(), torch.rand(2, 1, 2, 2, dtype=torch.float64), 3)
    assert gone(collapsed(case)) == expected


def test_silence_is_that_of_eval_mode() -> None:
    """Running mean -2: the channel gets 2 per step in eval mode, and 0 where batch norm sees its constant 0."""
    model = nn.Sequential(
        layer.Conv2d(1, 2, 1, bias=False), layer.BatchNorm2d(2), neuron.IFNode(), layer.Flatten(), layer.Linear(8, 2)
    ).double()
    zero(model[0], 1)
    model[1].running_mean.fill_(-2)
    small = collapse(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), timesteps=3)
    assert gone(small) == []
    assert small.training
    assert small[1].training
    assert small[1].running_mean.tolist() == [-2, -2]


@pytest.mark.parametrize(("both", "after"), [(False, []), (True, [1])])
@pytest.mark.parametrize("spikes", [True, False])
def test_all_layers_that_a_residual_connection_adds_up_must_be_silent(
    both: bool, after: list[int], spikes: bool
) -> None:
    body = [layer.Linear(3, 3, bias=False), *([neuron.IFNode()] if spikes else [])]
    block = Residual(nn.Sequential(*body), nn.Identity() if spikes else neuron.IFNode())
    model = nn.Sequential(layer.Linear(2, 3, bias=False), neuron.IFNode(), block, layer.Linear(3, 2)).double()
    with torch.no_grad():
        for module in (model[0], body[0]):
            module.weight.abs_().add_(0.2)
    zero(model[0], 1)
    if both:
        zero(body[0], 1)
    case = Case(model, torch.rand(3, 2, dtype=torch.float64), 4)
    assert gone(collapsed(case)) == after


def test_all_neurons_of_a_channel_must_be_silent() -> None:
    """Nothing leads to channel 1 of either layer; the first population fires from its bias, the second is silent."""
    body = layer.Linear(3, 3, bias=False)
    block = Residual(nn.Sequential(body, neuron.IFNode()), nn.Identity())
    model = nn.Sequential(layer.Linear(2, 3), neuron.IFNode(), block, layer.Linear(3, 2)).double()
    zero(model[0], 1)
    zero(body, 1)
    case = Case(model, torch.rand(3, 2, dtype=torch.float64), 4)
    assert gone(collapsed(case)) == [1]
    nn.init.constant_(model[0].bias, 2.0)
    assert gone(collapsed(case)) == []


# recurrence, groups, kernels, inhibition


def recurrent(weight: list[list[float]]) -> Case:
    """Channel 2 has no input weights, and channel 1 isn't read; ``weight`` is what leads from channel to channel."""
    fire = snn.RLeaky(beta=0.5, linear_features=3, init_hidden=True)
    model = nn.Sequential(nn.Linear(2, 3), fire, nn.Linear(3, 2))
    zero(model[0], 2)
    zero(model[2], columns=(1,))
    with torch.no_grad():
        fire.recurrent.weight.copy_(torch.tensor(weight))
        fire.recurrent.bias.zero_()
        model[0].bias[:2] = 2.0
    return Case(model, torch.rand(3, 2), 4)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([[1.0, 0, 0], [1, 0.5, 0], [0, 0, 0.5]], [1, 2]),  # from a channel to itself doesn't count
        ([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]], [2]),  # 1 leads to 0, which is read
        ([[1.0, 0, 0], [1, 1, 0], [0.1, 0, 0]], [1]),  # 0 leads to 2
        ([[1.0, 0, 0], [1, 1, 0], [0, 0.1, 0]], []),  # 1 leads to 2, which may fire then, and is read
    ],
)
def test_recurrent_weights_lead_from_channel_to_channel(weight: list[list[float]], expected: list[int]) -> None:
    case = recurrent(weight)
    small = collapsed(case)
    assert gone(small) == expected
    assert small[1].recurrent.weight.shape == (3 - len(expected),) * 2


@pytest.mark.parametrize("other", [2, 3])
def test_grouped_convolutions_lose_the_same_positions_in_each_group(other: int) -> None:
    """Channels 0 1 | 2 3 feed two groups: 0 is unread, and goes only where 2 is unread too."""
    model = nn.Sequential(
        layer.Conv2d(1, 4, 1), neuron.IFNode(), layer.Conv2d(4, 4, 1, groups=2), neuron.IFNode(), layer.Flatten(),
        layer.Linear(16, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[2].weight[:2, 0] = 0
        model[2].weight[2:, other - 2] = 0
    case = Case(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), 2)
    assert gone(collapsed(case)) == ([0, 2] if other == 2 else [])


def test_depthwise_convolutions_go_with_their_channel() -> None:
    """Nothing leads to channel 1, so neither population fires there; channel 2 is unread behind the second."""
    model = nn.Sequential(
        layer.Conv2d(1, 4, 1, bias=False), neuron.IFNode(), layer.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        neuron.IFNode(), layer.Flatten(), layer.Linear(16, 2),
    ).double()  # fmt: skip
    zero(model[0], 1)
    zero(model[5], columns=(8, 9, 10, 11))
    small = collapsed(Case(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), 3))
    assert gone(small) == gone(small, "2") == [1, 2]
    assert small[2].groups == 2


def test_transposed_convolutions_have_their_weight_the_other_way_round() -> None:
    model = nn.Sequential(
        layer.Conv2d(1, 3, 1), neuron.IFNode(), layer.ConvTranspose2d(3, 4, 2, bias=False), neuron.IFNode(),
        layer.Flatten(), layer.Linear(36, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[2].weight[0] = 0  # nothing reads 0 of the first layer
        model[2].weight[:, 3] = 0  # nothing leads to 3 of the second
    small = collapsed(Case(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), 3))
    assert (gone(small), gone(small, "2")) == ([0], [3])


def test_neurons_with_inhibition_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="unstable"):
        fire = snn.Leaky(beta=0.5, init_hidden=True, inhibition=True)
    model = nn.Sequential(nn.Linear(2, 3), fire, nn.Linear(3, 2))
    zero(model[2], columns=(1,))
    small = collapsed(Case(model, torch.rand(2, 2), 3))
    assert gone(small) == []
    assert "inhibition" in plan_of(small).skipped["0"]


class Sideways(nn.Module):
    """A sum over channels reads spikes without a weight; the image reaches the neurons without one."""

    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.sums = sums
        self.conv, self.fire = layer.Conv2d(1, 4, 3, padding=1), neuron.IFNode()
        self.flat, self.fc, self.last = layer.Flatten(), layer.Linear(4 * 16, 5), neuron.IFNode()
        self.out = layer.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.fire(self.conv(x) if self.sums else self.conv(x) + x)
        current = self.fc(self.flat(spikes))
        if self.sums:
            current = current + spikes.sum((1, 2, 3)).unsqueeze(1)
        return self.out(self.last(current))


@pytest.mark.parametrize("sums", [True, False])
def test_ways_without_weights_are_found_by_trying(sums: bool) -> None:
    case = Case(Sideways(sums).double(), 0.1 * torch.rand(3, 1, 4, 4, dtype=torch.float64), 3)
    if sums:
        zero(case.model.fc, columns=tuple(range(16)))  # fc doesn't read channel 0, the sum does; torch-pruning
        zero(case.model.out, columns=(0,))  # ties it to channel 0 of fc, which nothing reads
        nn.init.constant_(case.model.conv.bias, 0.6)
    else:
        zero(case.model.conv, 0)  # no weight leads to channel 0, where the image alone is too weak to fire
    small = collapsed(case)
    assert sums or "conv" not in plan_of(small).skipped
    assert gone(small, "conv") == []


# what stays


def test_one_channel_stays_where_a_layer_is_empty() -> None:
    case = net([[0, 0], [0, 0], [0, 0]], [0, 0, 0], [[0, 0, 0], [0, 0, 0]])
    assert gone(collapsed(case)) == [1, 2]


def test_one_channel_stays_in_each_group() -> None:
    model = nn.Sequential(
        layer.Conv2d(1, 4, 1), neuron.IFNode(), layer.Conv2d(4, 6, 1, groups=2), neuron.IFNode(), layer.Flatten(),
        layer.Linear(24, 2),
    ).double()  # fmt: skip
    zero(model[2], *range(6))
    small = collapsed(Case(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), 2))
    assert gone(small) == [1, 3]
    assert gone(small, "2") == [1, 2, 4, 5]


def test_of_a_quantized_layer_go_the_channels_that_move_no_grid() -> None:
    """Nothing reads 1 and 2, but only 2 has no weight that γ, the mean of them all, counts."""
    case = net([[1, 0.5], [9, 9], [0.3, -1]], [0, 0, 0], [[1, 0, 0], [3, 0, 0]])
    mask = MaskWeights.of("0", torch.tensor([[True, True], [True, True], [False, False]]))
    case.model = Plan((QuantizeWeights("0", "rescaw", 4, PAPER.options()), mask)).apply(case.model)
    assert gone(collapsed(case)) == [2]


@pytest.mark.parametrize("masked", [True, False])
def test_the_grid_of_a_quantized_layer_does_not_move(masked: bool) -> None:
    """γ is the mean of the |w| that exist: without channel 1, whose weights are larger, it would be another."""
    case = net([[1, 0.5], [9, 9], [0.3, -1]], [0, 0, 0], [[1, 0, 2], [3, 0, 4]])
    mask = torch.tensor([[True, False], [True, True]])[:, [0, 0, 1]]
    mask[:, 1] = False
    edits = [QuantizeWeights("0", "rescaw", 4, PAPER.options()), MaskWeights.of("2", mask)]
    if masked:
        edits.append(MaskWeights.of("0", torch.tensor([[True, True], [False, False], [True, True]])))
    case.model = Plan(tuple(edits)).apply(case.model)
    assert gone(collapsed(case)) == ([1] if masked else [])
    free = Plan((QuantizeWeights("0", "uniform", 4, {}), *edits[1:])).apply(
        net([[1, 0.5], [9, 9], [0.3, -1]], [0, 0, 0], [[1, 0, 2], [3, 0, 4]]).model
    )
    assert gone(collapsed(Case(free, case.x, 4))) == [1]  # its grid is the same whatever weights there are


def test_masks_follow_and_hold() -> None:
    case = net([[1, 1], [2, 2], [1, 2]], [0, 5, 0], [[1, 7, 2], [3, 7, 4]])
    mask_weight(case.model[0], torch.tensor([[True, False], [True, True], [False, True]]))
    mask_weight(case.model[2], torch.tensor([[True, False, True], [False, False, True]]))
    with torch.no_grad():
        stored_weight(case.model[2]).add_(0.5)  # as an optimizer may: what is stored under a mask doesn't count
    small = collapsed(case)
    assert gone(small) == [1]
    assert weight_mask(small[0]).tolist() == [[True, False], [False, True]]
    assert weight_mask(small[2]).tolist() == [[True, True], [False, True]]
    with torch.no_grad():
        stored_weight(small[2]).fill_(1)
    assert small[2].weight.tolist() == [[1, 1], [0, 1]]


# the model that comes back


def test_flags_hooks_and_frozeparameters_stay() -> None:
    case = net([[1, 1], [2, 2], [1, 2]], [0, 5, 0], [[1, 0, 2], [3, 0, 4]])
    case.model[0].weight.requires_grad_(False)
    case.model.train()
    case.model[2].eval()
    case.model[2].register_forward_hook(lambda *_: None)
    small = collapsed(case)
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in case.model.named_modules()}
    assert [p.requires_grad for p in small.parameters()] == [False, True, True]
    assert len(small[2]._forward_hooks) == 1


def test_where_nothing_is_dead_an_equal_copy_comes_back() -> None:
    case = net([[1, 1], [2, 2]], [0, 0], [[1, 2], [3, 4]])
    plain = collapsed(case)
    assert plan_of(plain).edits == ()
    assert plain.state_dict().keys() == case.model.state_dict().keys()
    pruned = snncompress.apply(case.model, WeightMagnitude(scope="layer"), 0.25, None, data=case.x, timesteps=4)
    assert plan_of(collapse(pruned, case.x, timesteps=4)) == plan_of(pruned)


def test_the_plan_continues_and_so_does_compression() -> None:
    """Half of two layers' weights, then what died, then half of the channels that are left."""
    torch.manual_seed(3)
    model = nn.Sequential(layer.Linear(6, 20), neuron.IFNode(), layer.Linear(20, 4)).double()
    data = {"data": torch.rand(4, 6, dtype=torch.float64), "timesteps": 4}
    pruned = snncompress.apply(model, "weight_random", 0.8, None, skip=[], **data)
    small = collapse(pruned, **data)
    died = gone(small)
    assert died
    plan = plan_of(small)
    assert plan.edits[:2] == plan_of(pruned).edits
    assert plan.origin["before"] == plan_of(pruned).origin
    assert "2" in plan_of(collapse(model, **data)).skipped
    kept = Plan((), {"0": "of its reasons", "2": "of others"}, {})
    attach(model, kept)
    assert plan_of(collapse(model, **data)) == kept
    zero(model[2], columns=(3,))
    assert plan_of(collapse(model, **data)).skipped == {"2": "of others"}
    again = snncompress.apply(small, "magnitude", 0.5, None, skip=[], **data)
    assert again[0].out_features == (20 - len(died)) // 2
    assert snncompress.profile(small, **data).n_params < snncompress.profile(pruned, **data).n_params


def test_a_model_without_layers_or_neurons_is_refused() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        collapse(nn.Sequential(neuron.IFNode()))
    with pytest.raises(ModelError, match="no spiking neuron"):
        collapse(nn.Linear(2, 2))
