"""Neurons that hold layers, take all timesteps, or are used twice: their weights are counted, quantized and masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron, rnn
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.model.cells import layer_at
from tests.equivalence import same as unchanged
from tests.equivalence import snapshot


@pytest.fixture(autouse=True)
def _own_list() -> Iterator[None]:
    """snnTorch's ``utils.reset`` goes through every neuron ever built, and fails on a DeltaLeaky."""
    before = list(snn.SpikingNeuron.instances)
    yield
    snn.SpikingNeuron.instances[:] = before


X, IMAGES, Y = torch.rand(5, 3, 8), torch.rand(5, 3, 1, 6, 6), torch.arange(3)


class Steps(nn.Module):
    """snnTorch, looping over time: input → ``cell`` → linear → Leaky → linear; the cell keeps (output, *states)."""

    def __init__(self, cell: nn.Module, inputs: int, hidden: int, *, before: bool = True) -> None:
        super().__init__()
        self.a, self.l0 = (nn.Linear(8, inputs), snn.Leaky(beta=0.9, threshold=0.1)) if before else (None, None)
        self.cell, self.b, self.l2 = cell, nn.Linear(hidden, 10), snn.Leaky(beta=0.9, threshold=0.1)
        self.c = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        states: Any = self.start()
        m0, m2, out = self.l0 and self.l0.init_leaky(), self.l2.init_leaky(), []
        for step in x:
            if self.a is not None:
                step, m0 = self.l0(self.a(step), m0)
            step, *states = self.cell(step, *states)
            step, m2 = self.l2(self.b(step.flatten(1)), m2)
            out.append(self.c(step))
        return torch.stack(out)

    def start(self) -> Any:
        if isinstance(self.cell, snn.SLSTM):
            return self.cell.init_slstm()
        return self.cell.init_sconv2dlstm() if isinstance(self.cell, snn.SConv2dLSTM) else ((None, None),)


class Whole(nn.Module):
    """snnTorch, all timesteps at once: [T, N, C]."""

    def __init__(self, first: nn.Module, *, before: bool = True) -> None:
        super().__init__()
        self.a, self.first = nn.Linear(8, 12) if before else nn.Identity(), first
        self.b = nn.Linear(12, 10)
        self.second = snn.StateLeaky(beta=torch.linspace(0.5, 0.9, 10), channels=10, threshold=0.1, learn_beta=True)
        self.c, self.readout = nn.Linear(10, 3), snn.StateLeaky(beta=0.9, channels=3, output=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.a(x))
        h, _ = self.second(self.b(h[0] if isinstance(h, tuple) else h))
        return self.readout(self.c(h))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(8, 12), neuron.IFNode(v_threshold=0.1, step_mode="m")
        self.r, self.b = kind(12, 12, 2), nn.Linear(12, 10)
        self.n2, self.c = neuron.IFNode(v_threshold=0.1, step_mode="m"), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.n2(self.b(self.r(self.n(self.a(x)))[0])))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "SLSTM": (lambda: Steps(snn.SLSTM(12, 12, threshold=0.02), 12, 12), X),
    "wider SLSTM": (lambda: Steps(snn.SLSTM(8, 12, threshold=0.02), 8, 12), X),
    "SConv2dLSTM": (lambda: Steps(snn.SConv2dLSTM(1, 4, 3, threshold=0.02), 0, 4 * 36, before=False), IMAGES),
    "DeltaLeaky": (lambda: Steps(snn.DeltaLeaky(beta=0.9, delta_threshold=0.1), 12, 12), X),
    "StateLeaky": (lambda: Whole(snn.StateLeaky(beta=0.9, channels=12, threshold=0.1)), X),
    "LeakyParallel": (lambda: Whole(snn.LeakyParallel(12, 12, threshold=0.1)), X),
    "LinearLeaky": (lambda: Whole(snn.LinearLeaky(0.9, 8, 12, threshold=0.1), before=False), X),
    "SpikingLSTM": (lambda: Recurrent(rnn.SpikingLSTM), X),
    "SpikingGRU": (lambda: Recurrent(rnn.SpikingGRU), X),
    "SpikingVanillaRNN": (lambda: Recurrent(rnn.SpikingVanillaRNN), X),
    "LSTM": (lambda: Recurrent(nn.LSTM), X),
}
INNER = {
    "SLSTM": ["cell.lstm_cell.weight_ih", "cell.lstm_cell.weight_hh"],
    "wider SLSTM": ["cell.lstm_cell.weight_ih", "cell.lstm_cell.weight_hh"],
    "SConv2dLSTM": ["cell.conv"],
    "LinearLeaky": ["first.linear"],
    "LeakyParallel": ["first.rnn.weight_ih_l0"],
    "LSTM": [f"r.weight_{way}_l{n}" for n in (0, 1) for way in ("ih", "hh")],
    **{
        f"Spiking{kind}": [f"r.cells.{n}.linear_{way}" for n in (0, 1) for way in ("ih", "hh")]
        for kind in ("LSTM", "GRU", "VanillaRNN")
    },
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    find_adapter(model).reset(model)
    with torch.no_grad():
        out = model(x)
    find_adapter(model).reset(model)
    return out


def silence(indices: Tensor, module: nn.Module, args: Any, out: Any) -> Any:
    if isinstance(out, tuple):
        return out[0].index_fill(-1, indices, 0.0), *out[1:]
    return out.index_fill(-1, indices, 0.0)


@pytest.mark.parametrize("name", NETS)
def test_channels_are_right_or_whole(name: str) -> None:
    model, x = build(name), NETS[name][1]
    before = snapshot(model)
    for criterion in ("firing_rate", "taylor", "sca", "random"):
        small = snncompress.apply(model, criterion, 0.5, None, data=(x, Y), skip=[], repair=None)
        plan = snncompress.plan_of(small)
        gone = plan.removed_channels("neuron")
        assert len(small.b.weight) == 5
        assert all(n not in gone for n in ("cell", "first") if name not in ("DeltaLeaky", "StateLeaky"))
        silenced = build(name)
        for path, indices in gone.items():
            silenced.get_submodule(path).register_forward_hook(partial(silence, torch.tensor(indices)))
        assert torch.allclose(run(small, x), run(silenced, x), atol=1e-5)
        fresh = plan.apply(build(name))
        assert [p.shape for p in fresh.parameters()] == [p.shape for p in small.parameters()]
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("name", INNER)
def test_weights_inside_neurons_are_counted_quantized_and_masked(name: str, tmp_path: Path) -> None:
    model, x = build(name), NETS[name][1]
    rows = {row.name: row for row in snncompress.profile(model, x).layers}
    for inner in INNER[name]:
        weight = layer_at(model, inner).weight
        assert rows[inner].n_weights == weight.numel()
        lost = name == "wider SLSTM" and inner.endswith(
            "hh"
        )  # snnTorch forgets a state that isn't shaped like the input
        assert (rows[inner].n_ac + rows[inner].n_mac > 0) != lost
    few = snncompress.apply(model, None, bits=2, data=x, skip=[])
    sparse = snncompress.apply(model, "weight_magnitude", 0.5, None, data=x, skip=[], repair=None)
    for inner in INNER[name]:
        assert all(len(channel.unique()) <= 4 for channel in layer_at(few, inner).weight)
    zeros = {inner: layer_at(sparse, inner).weight == 0 for inner in INNER[name]}
    assert all(bool(z.any()) for z in zeros.values())
    snncompress.finetune(sparse, (x, Y), epochs=2, weight_decay=0.1)
    assert all(torch.equal(layer_at(sparse, inner).weight == 0, z) for inner, z in zeros.items())
    for compressed in (few, sparse):
        rows = {row.name: row for row in snncompress.profile(compressed, x).layers}
        for inner in INNER[name]:
            assert rows[inner].bits == (2 if compressed is few else 32)
            assert (rows[inner].sparsity or 0) >= (0 if compressed is few else 0.1)
        snncompress.save(compressed, tmp_path / "a.safetensors")
        again = snncompress.load(tmp_path / "a.safetensors", into=build(name))
        assert torch.equal(run(again, x), run(compressed.eval(), x))
        frozen = snncompress.freeze(compressed, x)
        assert torch.allclose(run(frozen, x), run(compressed, x), atol=1e-5)
        assert not any("parametrizations" in n for n, _ in frozen.named_modules())


def test_operations_inside_a_spiking_rnn_by_hand() -> None:
    """Each spike of the input meets 4·H synapses of linear_ih, each of the hidden state 4·H of linear_hh."""
    model = build("SpikingLSTM")
    inputs: dict[str, float] = dict.fromkeys(INNER["SpikingLSTM"], 0.0)
    for inner in inputs:

        def add(m: nn.Module, args: Any, inner: str = inner) -> None:
            inputs[inner] += float(args[0].sum())

        model.get_submodule(inner).register_forward_pre_hook(add)
    run(model, X)
    expected = {inner: spikes * 48 / 3 for inner, spikes in inputs.items()}
    rows = {row.name: row for row in snncompress.profile(model, X).layers}
    assert {inner: rows[inner].n_ac for inner in expected} == pytest.approx(expected)


def test_operations_inside_an_lstm_cell_by_hand() -> None:
    """Spikes meet the 4·H rows of weight_ih; the hidden state is analog, and H · 4·H products in every step."""
    model = build("SLSTM")
    inputs: list[float] = []
    hook = model.cell.lstm_cell.register_forward_pre_hook(lambda m, args: inputs.append(float(args[0].sum())))
    run(model, X)
    hook.remove()
    table = snncompress.profile(model, X)
    rows = {row.name: row for row in table.layers}
    assert rows["cell.lstm_cell.weight_ih"].n_ac == pytest.approx(sum(inputs) * 48 / 3)
    assert rows["cell.lstm_cell.weight_hh"].n_mac == 5 * 12 * 48
    assert table.n_params == sum(p.numel() for p in model.parameters())
    assert snncompress.temporal_analysis(model, X).energy_pj[-1] == pytest.approx(table.energy_pj)
    assert table.uncounted == ()


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell, nn.LSTMCell])
def test_cells_beside_neurons(kind: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.cell, self.b = (
                nn.Linear(8, 12),
                neuron.IFNode(v_threshold=0.1),
                kind(12, 6),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            h: Any = None
            for step in x:
                h = self.cell(self.n(self.a(step)), *(() if h is None else (h,)))
            return self.b(h[0] if isinstance(h, tuple) else h)

    torch.manual_seed(0)
    model = Net().eval()
    table = snncompress.profile(model, (X, Y))
    assert table.uncounted == ()
    assert next(row for row in table.layers if row.name == "cell.weight_hh").n_mac > 0
    small = snncompress.apply(model, "cqp", 0.5, 4, data=(X, Y), skip=[], finetune=1)
    assert bool((small.cell.weight_ih == 0).any())
    assert all(len(row.unique()) <= 17 for row in small.cell.weight_hh)
    left = snncompress.apply(model, "weight_magnitude", 0.5, None, data=(X, Y), skip=["cell.*"])
    assert torch.equal(left.cell.weight_ih, model.cell.weight_ih)


@pytest.mark.parametrize("name", ["DeltaLeaky", "StateLeaky", "LeakyParallel"])
def test_spikes_and_membranes(name: str) -> None:
    """Spikes of all timesteps, [T', N, C]; Ũ above the threshold where it fires."""
    model = build(name)
    path = "cell" if name == "DeltaLeaky" else "first"
    node, adapter = model.get_submodule(path), find_adapter(model)
    assert adapter.is_neuron(node)
    seen: list[tuple[Tensor, Tensor]] = []
    stop = adapter.observe(node, lambda s, u: seen.append((s, u)), membrane=True)
    first = run(model, X)
    stop()
    spikes, potential = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert spikes.shape == potential.shape == (5, 3, 12)
    assert 0 < float(spikes.mean()) < 1
    if name == "DeltaLeaky":
        charge = potential - torch.cat([torch.zeros(1, 3, 12), potential[:-1]])
        assert torch.equal(spikes, (charge.abs() > 0.1).float())
    else:
        assert torch.equal(spikes, (potential > 0.1).float())
    assert torch.equal(first, run(model, X))


# -- one neuron object in several places --


class Shared(nn.Module):
    """One Leaky, or one IFNode, behind three layers; the first and third of equal width."""

    def __init__(self, *, jelly: bool, widths: tuple[int, int, int] = (12, 10, 12)) -> None:
        super().__init__()
        a, b, c = widths
        self.a, self.b, self.c, self.d = nn.Linear(8, a), nn.Linear(a, b), nn.Linear(b, c), nn.Linear(c, 3)
        self.jelly = jelly
        self.l = neuron.IFNode(v_threshold=0.1, step_mode="m") if jelly else snn.Leaky(beta=0.9, threshold=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.jelly:
            for part in (self.a, self.b, self.c):
                x = self.l(part(x))
                functional.reset_net(self.l)
            return self.d(x)
        states, out = [self.l.init_leaky() for _ in range(3)], []
        for step in x:
            for n, part in enumerate((self.a, self.b, self.c)):
                step, states[n] = self.l(part(step), states[n])
            out.append(self.d(step))
        return torch.stack(out)


@pytest.mark.parametrize("jelly", [False, True])
@pytest.mark.parametrize("widths", [(12, 10, 12), (12, 12, 12), (12, 10, 8)])
@pytest.mark.filterwarnings("ignore::snncompress.NothingToDoWarning")
def test_a_neuron_used_in_several_places(jelly: bool, widths: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = Shared(jelly=jelly, widths=widths).eval()
    spikes = sum(widths) * 5
    table = snncompress.profile(model, X)
    assert next(row for row in table.layers if row.name == "l").n_neuron_updates == spikes
    for criterion in ("firing_rate", "magnitude"):
        small = snncompress.apply(model, criterion, 0.5, None, data=X, skip=[], repair=None)
        gone = snncompress.plan_of(small).removed_channels()
        kept = {n: [c for c in range(w) if c not in gone.get(n, [])] for n, w in zip("abc", widths, strict=True)}
        whys = {n: why for n, why in snncompress.plan_of(small).skipped.items() if n != "d"}
        assert set(whys) == ({*"abc"} if criterion == "firing_rate" and len(set(widths)) > 1 else set())
        assert all(
            why == f"no spiking neuron of its own follows {n}: use a criterion of weights" for n, why in whys.items()
        )
        for n, w in zip("abc", widths, strict=True):  # whole, or as much as was asked
            assert len(kept[n]) in (w, w // 2)
            assert len(small.get_submodule(n).weight) == len(kept[n])
        silenced = Shared(jelly=jelly, widths=widths).eval()
        silenced.load_state_dict(model.state_dict())
        with torch.no_grad():
            for n, reader in zip("abc", "bcd", strict=True):
                silenced.get_submodule(reader).weight[:, gone.get(n, [])] = 0
        assert torch.allclose(run(small, X), run(silenced, X), atol=1e-5)
    quantized = snncompress.apply(model, None, bits=4, data=X, skip=[], repair=None)
    assert all(len(c.unique()) <= 16 for c in quantized.b.weight)


def test_layers_of_spikingjelly_in_multi_step_mode_too() -> None:
    torch.manual_seed(0)
    shared = neuron.LIFNode(v_threshold=0.1, step_mode="m")
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), shared, layer.Conv2d(8, 8, 3, padding=1), shared, layer.Flatten(),
        layer.Linear(8 * 36, 3),
    ).eval()  # fmt: skip
    functional.set_step_mode(model, "m")
    small = snncompress.apply(model, "firing_rate", 0.5, 4, data=IMAGES, skip=["5"])
    run(small, IMAGES)
