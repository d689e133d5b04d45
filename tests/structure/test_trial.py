"""What forward does with channels that no graph shows: removed exactly, or left whole with a reason in plain words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.structure.tracing import trace
from tests.equivalence import largest_difference

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = "safely|not the same|can't be followed|slice takes|tied|split|spiking neuron follows|map evenly"


class Net(nn.Module):
    """Two convolutions and a classifier; ``between`` sees the spikes of the second, ``before`` its currents."""

    def __init__(self, between: Callable[[Tensor], Tensor], before: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(3, width, 3, padding=1), neuron.LIFNode(v_threshold=0.05)
        self.c2, self.before = nn.Conv2d(width, width, 3, padding=1), before or nn.Identity()
        self.n2, self.between = neuron.LIFNode(v_threshold=0.05), between
        self.c3, self.n3 = nn.Conv2d(width, 6, 1), neuron.LIFNode(v_threshold=0.05)
        self.f = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n2(self.before(self.c2(self.n(self.c(x)))))
        return self.f(self.n3(self.c3(self.between(h))).mean((2, 3)))


def prune(model: nn.Module, seed: int = 0, ratio: float = 0.5) -> snncompress.Plan:
    """The plan of a removal that was held against the silenced original."""
    model.double().eval()
    small = snncompress.apply(model, "random", ratio, None, data=X, timesteps=3, skip=[], repair=None, seed=seed)
    feed = Feed(find_adapter(model), X, 3)
    assert largest_difference(model, small, feed) < 1e-9
    plan = snncompress.plan_of(small)
    for why in plan.skipped.values():
        assert not any(text in why for text in ("Error", "tensor", "torch", "dimension"))
    return plan


NAMED = {
    "the first": lambda h: h * h[:, 0].unsqueeze(1),
    "the last": lambda h: h * h[:, -1:],
    "the fourth": lambda h: h + h[:, 3:4],
    "from the end": lambda h: torch.cat([h[:, -3:], h[:, :-3]], 1),
    "the mirror image": lambda h: h.flip(1),
    "the neighbour": lambda h: h + h.roll(1, 1),
    "all before": lambda h: h.cumsum(1),
    "all": lambda h: h - h.mean(1, keepdim=True),
    "the strongest": lambda h: h * (h == h.amax(1, keepdim=True)),
    "a constant for each": lambda h: h * torch.linspace(0.5, 1.0, 8, dtype=h.dtype).view(-1, 1, 1),
    "a sum with something": lambda h: h + 0.1,
    "a permutation": lambda h: h[:, torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])],
}


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize("width", [8, 2])
def test_channels_named_in_forward_stay(what: str, width: int) -> None:
    if width == 2 and what in ("the fourth", "a permutation", "a constant for each", "from the end"):
        return  # written for eight
    for seed in range(3):
        plan = prune(Net(NAMED[what], width=width), seed)
        assert set(plan.removed_channels()) == {"c", "c3"}
        assert plan.skipped["c2"]


def test_of_all_but_the_last_those_may_go() -> None:
    for seed in range(3):
        plan = prune(Net(lambda h: F.pad(h[:, :-1], (0, 0, 0, 0, 0, 1))), seed)
        assert len(plan.removed_channels()["c2"]) == 4
        assert 7 not in plan.removed_channels()["c2"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_normalization_over_channels_keeps_them(groups: int) -> None:
    assert set(prune(Net(nn.Identity(), nn.GroupNorm(groups, 8))).removed_channels()) <= {"c", "c3"}
    assert set(prune(Net(nn.GroupNorm(groups, 8))).removed_channels()) <= {"c", "c3"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(8, 8), nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True),
        nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8),
    ],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_a_normalization_of_each_channel(norm: nn.Module) -> None:
    """Before the neuron it hides nothing from the layer behind; between the neuron and that layer it may add.

    What a batch norm adds goes to the bias of that layer.
    """
    prune(Net(nn.Identity(), norm))
    if getattr(norm, "bias", None) is not None:
        nn.init.constant_(norm.bias, 0.3)
    gone = prune(Net(norm)).removed_channels()
    assert ("c2" in gone) if isinstance(norm, nn.BatchNorm2d) else ("c2" not in gone or norm.bias is None)


def test_a_slope_for_all_channels_keeps_none() -> None:
    assert "c2" in prune(Net(nn.PReLU())).removed_channels()


def test_what_hides_a_difference_from_the_output_hides_it_not_from_the_trial() -> None:
    """The mean over a normalized map is 0 whatever came in."""
    net = Net(nn.Sigmoid())  # 0.5 of silence
    net.n3 = nn.Sequential(nn.InstanceNorm2d(6, affine=True), net.n3)
    assert "c2" not in prune(net).removed_channels()


class Dropping(nn.Module):
    """Dropout and noise that never rest, in the shape of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, training=True) * torch.rand_like(x) * torch.bernoulli(x.clamp(0, 1))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def traced(model: nn.Module) -> dict[str, str]:
    model.double().eval()
    adapter = find_adapter(model)
    return trace(model, adapter, Feed(adapter, X, 3).example(), timesteps=3).skipped


def test_noise_in_the_shape_of_the_channels_is_the_same_on_both_sides() -> None:
    assert set(traced(Net(Dropping()))) == {"f"}
    assert set(traced(Net(nn.Identity(), Noise()))) == {"f"}


def test_noise_on_silent_channels_is_something_added() -> None:
    assert "not the same" in traced(Net(Noise()))["c2"]


class Uncertain(nn.Module):
    """Another function each time that it, or a copy of it, is called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Uncertain.calls += 1
        return x * Uncertain.calls


class Counting(Uncertain):
    """Another function each time, which only its own calls decide: of two copies the next ones are the same."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_network_that_is_another_each_time() -> None:
    assert "each time" in traced(Net(Uncertain()))["c"]
    assert set(traced(Net(Counting()))) == {"f"}


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)


def test_numbers_that_are_none_are_named_as_such() -> None:
    why = traced(Net(nn.Identity(), Singular()))
    assert "NaN or infinite numbers at n2" in why["c"]


class Small(nn.Module):
    """Bears spikes and no other numbers, but where it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_grad_enabled() or bool(((x == 0) | (x == 1)).all())
        return x


def test_a_network_that_bears_no_other_numbers() -> None:
    assert "a trial with other numbers in the network failed behind n2" in traced(Net(Small()))["c"]


class Power(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (10 * x) ** 9


def test_nothing_overflows_however_deep() -> None:
    parts = [part for _ in range(40) for part in (nn.Conv2d(8, 8, 1), Power(), neuron.IFNode())]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), neuron.IFNode(), *parts, nn.Flatten(), nn.Linear(512, 3)).eval()
    adapter = find_adapter(net)
    network = trace(net, adapter, Feed(adapter, X.float(), 2).example(), timesteps=2)
    assert len(network.groups) == 41


def test_a_graph_that_torch_pruning_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises whatever it comes upon: then nothing is pruned, and nothing raised."""

    def fail(nodes: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("snncompress.structure.graphs.find_reshapings", fail)
    assert set(traced(Net(nn.Identity())).values()) == {
        "its channels can't be followed through what forward does with them"
    }


class Plain(neuron.SimpleBaseNode):
    """A threshold per channel in a plain tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = torch.full((channels, 1, 1), 0.3, dtype=torch.float64)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.5 + x

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.theta)


class Remembered(Plain):
    """In a memory, as SpikingJelly's maintainers advise."""

    def __init__(self, channels: int) -> None:
        neuron.SimpleBaseNode.__init__(self)
        self.register_memory("theta", torch.full((channels, 1, 1), 0.3, dtype=torch.float64))


class Learned(Plain):
    """In a parameter."""

    def __init__(self, channels: int) -> None:
        neuron.SimpleBaseNode.__init__(self)
        self.theta = nn.Parameter(torch.linspace(0.0, 0.5, channels, dtype=torch.float64).view(-1, 1, 1))


class Swapped(Learned):
    """The mirror image of what it holds."""

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.theta.flip(0))


@pytest.mark.parametrize(("kind", "goes"), [(Plain, True), (Remembered, True), (Learned, True), (Swapped, False)])
def test_what_neurons_hold_per_channel(kind: type[Plain], goes: bool) -> None:
    net = Net(nn.Identity())
    net.n2 = kind(8)
    plan = prune(net)
    assert ("c2" in plan.removed_channels()) == goes
    if not goes:
        assert f"n2 ({kind.__name__}) holds values for each" in plan.skipped["c2"]


def test_states_handed_in_are_tried_with_the_decay() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lif, self.b = nn.Linear(5, 8), snn.Leaky(beta=torch.linspace(0.1, 0.9, 8)), nn.Linear(8, 3)
            self.out = snn.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> Tensor:
            mem, mem_out, spikes = self.lif.init_leaky(), self.out.init_leaky(), []
            for _ in range(3):
                spk, mem = self.lif(self.a(x), mem)
                spk, mem_out = self.out(self.b(spk), mem_out)
                spikes.append(spk)
            return torch.stack(spikes)

    small = snncompress.apply(Loop(), "magnitude", 0.5, None, data=torch.rand(4, 5), skip=[], repair=None)
    assert small.lif.beta.shape == (4,)


class Branched(nn.Module):
    """``head`` reads the first layer's spikes where ``taken`` says so."""

    def __init__(self, taken: Callable[[Branched, Tensor], bool], head: nn.Module) -> None:
        super().__init__()
        self.c, self.n, self.head, self.taken = layer.Conv2d(3, 8, 3, padding=1), neuron.IFNode(), head, taken
        self.c2, self.n2, self.f = layer.Conv2d(8, 6, 3, padding=1), neuron.IFNode(), layer.Linear(384, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.n(self.c(x))
        out = self.f(self.n2(self.c2(h)).flatten(1))
        return (out, self.head(h)) if self.taken(self, x) else out


HEADS = {
    "convolution": lambda: nn.Conv2d(8, 5, 1),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 5)),
    "pooled": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "taken",
    [lambda net, x: net.training, lambda net, x: bool(x.mean() > 0.9), lambda net, x: hasattr(net, "flag")],
    ids=["training", "data", "flag"],
)
def test_what_a_branch_that_is_not_taken_reads_stays(head: str, taken: Callable[[Branched, Tensor], bool]) -> None:
    net = Branched(taken, HEADS[head]())
    plan = prune(net)
    assert "c" not in plan.removed_channels()
    small = plan.apply(net).train()
    small.flag = True
    for x in (X, 0 * X + 1):
        snncompress.profile(small, x, timesteps=None)


def test_a_layer_that_is_left_over_keeps_nothing() -> None:
    """Nothing but the constructor speaks of it."""
    net = Branched(lambda net, x: False, HEADS["linear"]())
    net.old = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(512, 5))
    net.head = nn.Identity()
    assert set(prune(net).removed_channels()) == {"c", "c2"}


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.extra, self.flag = layer.Conv2d(6, 8, 1), neuron.IFNode(), layer.Conv2d(8, 8, 1), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.c(x))
        return self.extra(x) if self.flag else x


def test_code_sees_what_goes_through_its_module_alone() -> None:
    net = nn.Sequential(
        layer.Conv2d(3, 8, 1), neuron.IFNode(0.1), layer.Conv2d(8, 6, 1), neuron.IFNode(0.1), Flagged(),
        layer.Flatten(), layer.Linear(512, 3),
    )  # fmt: skip
    plan = prune(net)
    assert set(plan.removed_channels()) == {"0", "2"}
    assert "4.extra, which the model never calls on this input" in plan.skipped["4.c"]


def test_a_layer_that_no_branch_could_feed_is_no_reader() -> None:
    plan = prune(Branched(lambda net, x: False, nn.Linear(7, 9)))
    assert set(plan.removed_channels()) == {"c", "c2"}
    assert plan.skipped["head"]
