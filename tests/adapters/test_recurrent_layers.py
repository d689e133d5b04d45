"""torch's LSTM, GRU and RNN in spiking networks, and the one inside snnTorch's LeakyParallel."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.model.cells import layer_at, met_by
from snncompress.running.data import Feed
from tests.equivalence import largest_difference

X, Y = torch.rand(5, 3, 8), torch.arange(3)


class Net(nn.Module):
    """Linear → IF → Linear → IF → recurrent layer → Linear."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(8, 12), neuron.IFNode(v_threshold=0.1, step_mode="m")
        self.b, self.n1 = nn.Linear(12, 10), neuron.IFNode(v_threshold=0.1, step_mode="m")
        self.r = kind(10, 6, **options)
        self.c = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.b(self.n(self.a(x))))
        if self.r.batch_first:
            return self.c(self.r(x.transpose(0, 1))[0].transpose(0, 1))
        return self.c(self.r(x)[0])


KINDS = {
    "LSTM": partial(Net, nn.LSTM),
    "GRU": partial(Net, nn.GRU, batch_first=True, bidirectional=True),
    "RNN": partial(Net, nn.RNN, num_layers=2, bias=False),
}


def build(name: str) -> Net:
    torch.manual_seed(0)
    return KINDS[name]().eval()


def run(model: nn.Module) -> Tensor:
    functional.reset_net(model)
    with torch.no_grad():
        out: Tensor = model(X)
    functional.reset_net(model)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_inputs_go_with_the_neurons_that_feed_them(name: str) -> None:
    model = build(name)
    small = snncompress.apply(model, "random", 0.5, 4, data=X, skip=["c"], repair=None)
    plan = snncompress.plan_of(small)
    gone = plan.removed_channels("neuron")
    assert {n: len(indices) for n, indices in gone.items()} == {"n": 6, "n1": 5}
    assert small.r.input_size == small.r.weight_ih_l0.shape[1] == 5
    assert run(plan.apply(build(name))).shape == (5, 3, 3)
    small = snncompress.apply(model, "random", 0.5, None, data=X, skip=["c"], repair=None)
    for path, indices in snncompress.plan_of(small).removed_channels("neuron").items():
        hook = partial(_silence, torch.tensor(indices))
        model.get_submodule(path).register_forward_hook(hook)
    assert torch.allclose(run(small), run(model), atol=1e-6)


def _silence(indices: Tensor, module: nn.Module, args: Any, spikes: Tensor) -> Tensor:
    return spikes.index_fill(-1, indices, 0.0)


def test_a_compressed_layer_computes_with_its_weights_trains_and_is_copied() -> None:
    small = snncompress.apply(build("GRU"), "weight_magnitude", 0.5, 4, data=X, skip=[])
    zeros = {n: layer_at(small, f"r.{n}").weight == 0 for n in ("weight_ih_l0", "weight_hh_l0_reverse")}
    before = run(small)
    optimizer = torch.optim.SGD(small.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        functional.reset_net(small)
        optimizer.zero_grad()
        small(X).square().sum().backward()
        optimizer.step()
    functional.reset_net(small)
    assert not torch.equal(run(small), before)
    assert all(bool((getattr(small.r, n)[z] == 0).all()) for n, z in zeros.items())
    assert torch.equal(run(copy.deepcopy(small)), run(small))  # also with gradients on, right after a step
    plain = nn.GRU(10, 6, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for name in small.r._flat_weights_names:
            getattr(plain, name).copy_(getattr(small.r, name))
        spikes = (torch.rand(3, 5, 10) > 0.5).float()
        assert torch.allclose(plain(spikes)[0], small.r(spikes)[0], atol=1e-6)
        frozen = snncompress.freeze(small, X)
        assert torch.allclose(frozen.r(spikes)[0], plain(spikes)[0], atol=1e-6)
        assert type(frozen.r) is nn.GRU


def test_a_layer_that_puts_out_last_is_the_classifier() -> None:
    model = build("LSTM")
    model.c = nn.Identity()
    plan = snncompress.plan_of(snncompress.apply(model, "magnitude", 0.5, 4, data=X))
    back = "each of its outputs comes back to all in the next timestep, so they stay"
    assert plan.skipped == {"b": "it feeds the classifier", "r.weight_ih_l0": back, "r.weight_hh_l0": back}
    assert [e.layer for e in plan.edits if isinstance(e, snncompress.QuantizeWeights)] == ["b"]


# -- counting --


def _ones(rnn: nn.Module) -> None:
    for parameter in rnn.parameters():
        nn.init.ones_(parameter)


def test_what_each_weight_meets_by_hand() -> None:
    """h[t] = x[t] + h[t-1], forward (1, 1, 3) and backward (3, 2, 2) for x = (1, 0, 2); each level sums the two."""
    rnn = nn.RNN(1, 1, 2, "relu", bias=False, bidirectional=True)
    _ones(rnn)
    x = torch.tensor([1.0, 0.0, 2.0])

    def met(name: str, x: Tensor, rnn: nn.Module = rnn, hx: Tensor | None = None) -> list[float]:
        return met_by(layer_at(rnn, name), (x,), {} if hx is None else {"hx": hx}).flatten().tolist()

    levels = {
        "weight_ih_l0": [1, 0, 2], "weight_hh_l0": [0, 1, 1], "weight_hh_l0_reverse": [2, 2, 0],
        "weight_ih_l1": [1, 3, 1, 2, 3, 2], "weight_hh_l1": [0, 4, 7], "weight_hh_l1_reverse": [8, 5, 0],
    }  # fmt: skip
    for name, expected in levels.items():
        for shape in ((3, 1, 1), (3, 1)):  # a batch, a single sequence
            assert met(name, x.view(shape)) == expected
    rnn.batch_first = True
    assert all(met(name, x.view(1, 3, 1)) == expected for name, expected in levels.items())
    start = torch.zeros(4, 1, 1)
    start[1] = 5.0  # of level 0 backwards: its states are 8, 7, 7
    assert met("weight_hh_l0_reverse", x.view(1, 3, 1), hx=start) == [7, 7, 5]
    assert met("weight_ih_l1", x.view(1, 3, 1), hx=start) == [1, 8, 1, 7, 3, 7]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections_and_packed_sequences() -> None:
    """Analog wherever it isn't known: weight_hr meets H numbers in each of T steps of N samples."""
    rnn = nn.LSTM(3, 4, proj_size=2)
    x = torch.ones(5, 2, 3)
    shapes = {"weight_ih_l0": (5, 2, 3), "weight_hh_l0": (5, 2, 2), "weight_hr_l0": (5, 2, 4)}
    for name, shape in shapes.items():
        assert met_by(layer_at(rnn, name), (x,), {}).shape == shape
    packed = pack_padded_sequence(x, torch.tensor([5, 2]))
    assert torch.equal(met_by(layer_at(rnn, "weight_ih_l0"), (packed,), {}), packed.data)
    assert met_by(layer_at(rnn, "weight_hh_l0"), (packed,), {}).shape == (7, 2)


def test_a_profile_counts_them() -> None:
    """Per sample: each spike meets 3·H rows of both directions; T·H hidden states meet 3·H rows each."""
    model = build("GRU")
    spikes: list[float] = []
    hook = model.r.register_forward_pre_hook(lambda module, args: spikes.append(float(args[0].sum())))
    run(model)
    hook.remove()
    table = snncompress.profile(model, X)
    rows = {row.name: row for row in table.layers}
    for way in ("", "_reverse"):
        assert rows[f"r.weight_ih_l0{way}"].n_ac == pytest.approx(spikes[0] * 18 / 3)
        assert rows[f"r.weight_hh_l0{way}"].n_mac == 5 * 6 * 18
    assert table.n_params == sum(p.numel() for p in model.parameters())
    assert table.uncounted == ()
    assert snncompress.temporal_analysis(model, X).energy_pj[-1] == pytest.approx(table.energy_pj)


class Own(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(2 * x, hx)


def test_what_a_subclass_computes_with_its_weights_is_not_known() -> None:
    model = Net(Own)
    table = snncompress.profile(model, X)
    assert table.uncounted == ("lstm in r",)
    assert "r.weight_ih_l0" not in {row.name for row in table.layers}
    plan = snncompress.plan_of(snncompress.apply(model, "magnitude", 0.5, 4, data=X, skip=[]))
    assert "counts on how many" in plan.skipped["b"]


# -- LeakyParallel --


class Parallel(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.l1, self.l2 = (snn.LeakyParallel(i, o, threshold=0.1, **options) for i, o in ((8, 12), (12, 9)))
        self.c = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.l2(self.l1(x)))


def test_the_decays_of_a_leaky_parallel_stay_decays() -> None:
    """They stand on the diagonal of weight_hh: a grid without a zero would connect all with all, training too."""
    torch.manual_seed(0)
    model = Parallel(beta=0.9, learn_beta=True)
    small = snncompress.apply(model, "weight_magnitude", 0.5, 4, data=(X, Y), skip=[], finetune=2)
    decays: Tensor = small.l1.rnn.weight_hh_l0
    assert torch.equal(decays, decays.diag().diag())
    assert not torch.equal(decays, model.l1.rnn.weight_hh_l0)  # they learnt
    assert float((small.l2.rnn.weight_ih_l0 == 0).float().mean()) >= 0.4
    why = "it is 0 off its diagonal: a decay of each unit, not connections"
    assert snncompress.plan_of(small).skipped["l1.rnn.weight_hh_l0"] == why
    dense = Parallel(beta=0.3, weight_hh_enable=True)
    plan = snncompress.plan_of(snncompress.apply(dense, None, bits=4, data=X, skip=[]))
    assert {e.layer for e in plan.edits} >= {"l1.rnn.weight_hh_l0", "l2.rnn.weight_ih_l0"}


def test_a_network_whose_neurons_hold_all_weights() -> None:
    model = nn.Sequential(snn.LeakyParallel(8, 12, threshold=0.1), snn.LeakyParallel(12, 4, threshold=0.1))
    small = snncompress.apply(model, "weight_magnitude", 0.5, 4, timesteps=None, data=X)
    assert {e.layer for e in snncompress.plan_of(small).edits} == {"0.rnn.weight_ih_l0", "1.rnn.weight_ih_l0"}
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=X, skip=[])
    assert small[0].rnn.weight_ih_l0.shape == (6, 8)


@pytest.mark.parametrize("criterion", ["sca", "magnitude"])
def test_channels_of_a_leaky_parallel(criterion: str) -> None:
    """Unit i is relu(W_i x + b_i + d_i m_i): it knows of no other, so it goes with its row, bias, decay, threshold."""
    torch.manual_seed(0)
    build = partial(Parallel, beta=0.9, learn_beta=True, spike_grad=lambda x: (x > 0).to(x))
    model, x = build().double(), X.double()
    model.l1.threshold = torch.rand(12, dtype=torch.float64) / 4
    small = snncompress.apply(model, criterion, 0.5, None, data=x, skip=[], repair=None)
    kept = [i for i in range(12) if i not in snncompress.plan_of(small).removed_channels()["l1.rnn.weight_ih_l0"]]
    assert torch.equal(small.l1.rnn.weight_ih_l0, model.l1.rnn.weight_ih_l0[kept])
    assert torch.equal(small.l1.rnn.weight_hh_l0, model.l1.rnn.weight_hh_l0[kept][:, kept])
    assert torch.equal(small.l1.threshold, model.l1.threshold[kept])
    assert small.l2.rnn.weight_ih_l0.shape == (4, 6)
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-12
    fresh = build().double()
    fresh.l1.threshold = torch.rand(12)
    again = snncompress.plan_of(small).apply(fresh)
    assert [t.shape for t in again.state_dict().values()] == [t.shape for t in small.state_dict().values()]


def test_decays_that_are_left_learn() -> None:
    torch.manual_seed(0)
    model = Parallel(beta=0.9, learn_beta=True)
    small = snncompress.apply(model, "magnitude", 0.5, 4, data=(X, Y), skip=[], finetune=2)
    weight, decays = small.l1.rnn.weight_ih_l0, small.l1.rnn.weight_hh_l0
    assert weight.shape == (6, 8)
    assert all(len(row.unique()) <= 16 for row in weight)
    assert torch.equal(decays, decays.diag().diag())
    assert not bool((decays.diag() == 0.9).all())
    table = snncompress.profile(small, (X, Y))
    assert next(row for row in table.layers if row.name == "l1.rnn.weight_ih_l0").n_weights == 48


@pytest.mark.filterwarnings("ignore::snncompress.NothingToDoWarning")
def test_units_of_a_leaky_parallel_that_hear_one_another_stay() -> None:
    model = Parallel(beta=0.3, weight_hh_enable=True)
    small = snncompress.apply(model, "magnitude", 0.5, None, data=X, skip=[], repair=None)
    assert small.l1.rnn.weight_ih_l0.shape == (12, 8)
    why = "each of its outputs comes back to all in the next timestep, so they stay"
    assert snncompress.plan_of(small).skipped["l1.rnn.weight_ih_l0"] == why


def test_weights_inside_neurons_that_stay_have_a_reason() -> None:
    net = nn.Sequential(
        snn.SConv2dLSTM(1, 4, 3, threshold=0.01, init_hidden=True), nn.Flatten(), nn.Linear(64, 6),
        snn.RLeaky(0.9, linear_features=6, threshold=0.1, init_hidden=True), nn.Linear(6, 3),
    )  # fmt: skip
    x = torch.rand(2, 1, 4, 4)
    for kept, inner in (([], {"0.conv"}), (["2"], {"0.conv", "3.recurrent"})):
        small = snncompress.apply(net, "magnitude", 0.5, 4, data=x, timesteps=2, repair=None, skip={"prune": kept})
        skipped = snncompress.plan_of(small).skipped
        assert {name for name, why in skipped.items() if "a part of the neurons" in why} == inner


def test_a_spiking_layer_beside_a_concatenation_in_a_loop() -> None:
    """Its recurrent weights are cut on both sides, and on the side of the layer before, which has no neuron."""
    torch.manual_seed(0)
    loop = layer.LinearRecurrentContainer(neuron.IFNode(v_threshold=0.1), 10, 10, step_mode="m")
    model = nn.Sequential(nn.Linear(8, 10), loop, nn.Linear(10, 3))
    small = snncompress.apply(model, "random", 0.5, None, data=X, skip=[], repair=None)
    assert small[1].rc.weight.shape == (5, 10)
    for path, indices in snncompress.plan_of(small).removed_channels("neuron").items():
        model.get_submodule(path).register_forward_hook(partial(_silence, torch.tensor(indices)))
    with torch.no_grad():
        loop.rc.weight[:, snncompress.plan_of(small).removed_channels()["0"]] = 0
    assert torch.allclose(run(small), run(model), atol=1e-6)
