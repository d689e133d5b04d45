"""snnTorch: every neuron, reset and delay, per-neuron parameters, recurrent weights, class-style time loops."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from snntorch import utils
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from tests.end_to_end.test_truths import prune
from tests.equivalence import PAPER, largest_difference
from tests.networks import Case, liven

X = torch.rand(3, 1, 8, 8)


def compress(model: nn.Module, x: Tensor = X, timesteps: int | None = 3, **options: object) -> nn.Module:
    """Prune to a half and check mask equivalence (float32: snnTorch's ATan allows no more)."""
    case = liven(Case(model, x, timesteps))
    compressed = prune(case, "magnitude", repair=None, **options)
    assert largest_difference(case.model, compressed, case.feed) <= 1e-4
    return compressed


def sequential(hidden: nn.Module) -> nn.Sequential:
    """conv 1→8, the neurons under test on 8 maps of 8×8, a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), hidden, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        snn.Leaky(beta=0.5, init_hidden=True, output=True),
    )  # fmt: skip


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("kind", [snn.Leaky, snn.Synaptic, snn.RLeaky])
def test_reset_mechanisms(kind: type[nn.Module], reset: str, delay: bool) -> None:
    options = {"init_hidden": True, "reset_mechanism": reset, "reset_delay": delay}
    options |= {"alpha": 0.7} if kind is snn.Synaptic else {}
    options |= {"conv2d_channels": 8, "kernel_size": 3} if kind is snn.RLeaky else {}
    compressed = compress(sequential(kind(beta=0.6, **options)))
    assert compressed[0].out_channels == 4
    assert compressed[1].reset_mechanism == reset


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("shape", [(), (8, 1, 1), (1, 8, 1, 1), (8, 8, 8), (8,), (8, 8)])
def test_parameters_per_channel_follow_their_channel(learn: bool, shape: tuple[int, ...]) -> None:
    """[C, 1, 1], [1, C, 1, 1] and [C, H, W] shrink; [W] and [H, W] broadcast over channels and stay."""
    beta, threshold = torch.rand(shape) * 0.5 + 0.3, torch.rand(shape) * 0.5 + 0.3
    node = snn.Leaky(beta=beta, threshold=threshold, learn_beta=learn, learn_threshold=learn, init_hidden=True)
    compressed = compress(sequential(node))
    keep = [c for c in range(8) if c not in snncompress.plan_of(compressed).removed_channels()["0"]]
    if shape in [(8, 1, 1), (8, 8, 8)]:
        beta = beta[keep]
    elif shape == (1, 8, 1, 1):
        beta = beta[:, keep]
    assert torch.equal(compressed[1].beta, beta)
    assert isinstance(compressed[1].beta, nn.Parameter) is learn
    assert isinstance(compressed[1].threshold, nn.Parameter) is learn


@pytest.mark.parametrize("kind", [snn.RLeaky, snn.RSynaptic])
@pytest.mark.parametrize("bits", [None, 4])
def test_all_to_all_recurrent_weights_lose_both_sides(kind: type[nn.Module], bits: int | None) -> None:
    extra = {"alpha": 0.7} if kind is snn.RSynaptic else {}
    node = kind(beta=0.6, conv2d_channels=8, kernel_size=3, init_hidden=True, **extra)
    model = sequential(node)
    original = node.recurrent.weight.detach().clone()
    case = Case(model, X, 3)
    compressed = prune(case, "magnitude", bits=bits, quantizer=PAPER, repair=None)
    keep = [c for c in range(8) if c not in snncompress.plan_of(compressed).removed_channels()["0"]]
    recurrent = compressed[1].recurrent
    stored = recurrent.parametrizations.weight.original if bits else recurrent.weight
    assert torch.equal(stored, original[keep][:, keep])
    assert recurrent.out_channels == recurrent.in_channels == compressed[1].conv2d_channels == 4
    if bits:
        assert len(recurrent.weight.unique()) <= 2**bits


@pytest.mark.parametrize("learn", [True, False])
def test_one_to_one_recurrent_weights(learn: bool) -> None:
    node = snn.RLeaky(beta=0.6, all_to_all=False, V=torch.rand(8, 1, 1), learn_recurrent=learn, init_hidden=True)
    compressed = compress(sequential(node))
    assert compressed[1].V.shape == (4, 1, 1)
    assert compressed[1].recurrent.V is compressed[1].V


class Tutorial(nn.Module):
    """As in snnTorch's tutorials: explicit membranes, a loop over num_steps, stacked records."""

    def __init__(self, steps: int = 5, hidden_records: bool = False, potentials: bool = False) -> None:
        super().__init__()
        self.steps, self.hidden_records, self.potentials = steps, hidden_records, potentials
        self.fc1, self.lif1 = nn.Linear(64, 30), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(30, 24), snn.Synaptic(alpha=0.5, beta=0.9)
        self.fc3, self.lif3 = nn.Linear(24, 10), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mem1, mem3 = self.lif1.init_leaky(), self.lif3.init_leaky()
        syn2, mem2 = self.lif2.init_synaptic()
        hidden, spikes, membranes = [], [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(mem1 if self.potentials else spk1), syn2, mem2)
            spk3, mem3 = self.lif3(self.fc3(spk2), mem3)
            hidden.append(spk1)
            spikes.append(spk3)
            membranes.append(mem3)
        records = [torch.stack(spikes), torch.stack(membranes)]
        return tuple([*records, torch.stack(hidden)] if self.hidden_records else records)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_class_style(steps: int) -> None:
    compressed = compress(Tutorial(steps), timesteps=None)
    assert set(snncompress.plan_of(compressed).removed_channels()) == {"fc1", "fc2"}


def test_channels_that_the_output_shows_stay() -> None:
    compressed = compress(Tutorial(hidden_records=True), timesteps=None)
    plan = snncompress.plan_of(compressed)
    assert set(plan.removed_channels()) == {"fc2"}
    assert plan.skipped["fc1"] == "the channels of fc1 are part of the model's output"


def test_channels_whose_membrane_potential_is_read_stay() -> None:
    """A neuron whose spikes are 0 has a potential all the same, so without it fc2 would get another current."""
    compressed = compress(Tutorial(potentials=True), timesteps=None)
    plan = snncompress.plan_of(compressed)
    assert set(plan.removed_channels()) == {"fc2"}
    assert "forward reads membrane potentials" in plan.skipped["fc1"]


class ExplicitRecurrence(nn.Module):
    """A recurrent weight layer of its own: its feedback shows at the second timestep only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.back, self.lif1 = nn.Linear(64, 30), nn.Linear(30, 30), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(30, 10), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes = x.new_zeros(x.shape[1], self.back.in_features)
        out = []
        for frame in x:
            spikes, mem1 = self.lif1(self.fc1(frame.flatten(1)) + self.back(spikes), mem1)
            spk2, mem2 = self.lif2(self.fc2(spikes), mem2)
            out.append(spk2)
        return torch.stack(out)


@pytest.mark.parametrize("given", ["sequence", "constant current"])
def test_explicit_recurrence(given: str) -> None:
    if given == "sequence":
        compressed = compress(ExplicitRecurrence(), torch.rand(6, 3, 1, 8, 8), None)
    else:
        compressed = compress(ExplicitRecurrence(), X, 6)
    back = compressed.back
    assert (back.out_features, back.in_features) == (15, 15)


def test_forward_runs_anything() -> None:
    """A model that takes its states as arguments."""

    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1, self.fc2 = nn.Linear(64, 30), snn.Leaky(beta=0.9), nn.Linear(30, 10)

        def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
            spikes, mem = self.lif1(self.fc1(x), mem)
            return self.fc2(spikes), mem

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mem, out = model.lif1.init_leaky(), []
        for _ in range(batch["steps"]):
            y, mem = model(batch["image"].flatten(1), mem)
            out.append(y)
        return torch.stack(out)

    model = Stepped()
    data = [{"image": X * 5, "steps": 4}]
    compressed = snncompress.apply(model, "svs", 0.5, None, data=data, forward=run, skip=[])
    assert compressed.fc1.out_features == 15
    assert run(compressed, data[0]).shape == (4, 3, 10)


def test_utils_reset_sees_the_compressed_model() -> None:
    """snnTorch's own reset walks a class-wide list, which copies are not on by themselves."""
    compressed = compress(sequential(snn.Leaky(beta=0.9, init_hidden=True)))
    compressed(X)
    assert compressed[1].mem.abs().sum() > 0
    utils.reset(compressed)
    assert compressed[1].mem.abs().sum() == 0


def test_observed_membrane_is_before_reset() -> None:
    """Leaky, β = 0.5, constant input 0.9, θ = 1, subtract: Ũ = 0.9, 1.35 (spike), 0.5·1.35 + 0.9 - 1 = 0.575."""
    node = snn.Leaky(beta=0.5, init_hidden=True)
    adapter = find_adapter(nn.Sequential(node))
    seen: list[tuple[Tensor, Tensor | None]] = []
    stop = adapter.observe(node, lambda s, u: seen.append((s, u)), membrane=True)
    for _ in range(3):
        node(torch.full((1, 1), 0.9))
    stop()
    torch.testing.assert_close(torch.cat([u for _, u in seen]).flatten(), torch.tensor([0.9, 1.35, 0.575]))
    assert torch.cat([s for s, _ in seen]).flatten().tolist() == [0, 1, 0]
    assert "fire" not in vars(node)


def test_inhibition_is_left_whole() -> None:
    """Winner takes all: every channel depends on the others."""
    with pytest.warns(UserWarning, match="Inhibition"):
        node = snn.Leaky(beta=0.9, init_hidden=True, inhibition=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), node, nn.Linear(8, 4))
    plan = snncompress.plan_of(compress(model))
    assert not plan.removed_channels()
    assert "inhibition lets only the strongest neuron fire" in plan.skipped["1"]


class NormPerStep(nn.Module):
    """A batch norm for every timestep, as in BNTT."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv, self.lif = nn.Conv2d(1, 8, 3, padding=1), snn.Leaky(beta=0.9)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(steps))
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        mem, out = self.lif.init_leaky(), []
        for norm in self.norms:
            spikes, mem = self.lif(input_=norm(self.conv(x)), mem=mem)
            out.append(self.fc(spikes.flatten(1)))
        return torch.stack(out)


def test_a_norm_for_every_timestep() -> None:
    compressed = compress(NormPerStep(5), timesteps=None)
    assert [norm.num_features for norm in compressed.norms] == [4] * 5


def test_neurons_with_weights_of_their_own_are_left_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), snn.Leaky(beta=0.5, init_hidden=True), nn.Conv2d(6, 4, 1),
        snn.SConv2dLSTM(4, 6, 3, init_hidden=True), nn.Flatten(), nn.Linear(384, 10),
    )  # fmt: skip
    plan = snncompress.plan_of(compress(model))
    assert set(plan.removed_channels()) == {"0"}
    assert "2" in plan.skipped


def test_buffers_of_a_neuron_of_ones_own_survive() -> None:
    class Gated(snn.Leaky):
        def __init__(self) -> None:
            super().__init__(beta=0.5, init_hidden=True)
            self.register_buffer("gate", torch.ones(1), persistent=False)

        def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor:
            return super().forward(input_ * self.gate, mem)

    assert compress(sequential(Gated()))[1].gate.tolist() == [1]


def test_a_training_loop_of_snntorch_s_own_as_finetune() -> None:
    """``utils.reset`` must see the model that is being tuned, and leave the user's alone."""
    model = sequential(snn.Leaky(beta=0.9, init_hidden=True))
    model(X)
    before = model[1].mem.clone()
    y = torch.tensor([0, 1, 2])

    def tune(net: nn.Module) -> None:
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            utils.reset(net)
            loss = nn.functional.cross_entropy(torch.stack([net(X)[1] for _ in range(3)]).mean(0), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    known = len(snn.SpikingNeuron.instances)
    small = snncompress.apply(model, "magnitude", 0.5, 4, data=(X, y), timesteps=3, finetune=tune, skip=[])
    assert torch.equal(model[1].mem, before)
    assert len(snn.SpikingNeuron.instances) == known + 2
    assert small[0].out_channels == 4
