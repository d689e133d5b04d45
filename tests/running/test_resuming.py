"""Runs that go on from where the last one stopped hand every layer what a run of the whole network does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.model.computed_once import evaluating
from snncompress.running import resuming
from snncompress.running.data import Feed
from snncompress.running.resuming import OffTrackError, Resumed, SameBatches

DATA = [torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "_FEWEST", 4)


class Residual(nn.Module):
    """Currents and spikes that go past layers, added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.lif = layer.Conv2d(3, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode()
        self.convs = nn.ModuleList(layer.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.lifs = nn.ModuleList(neuron.LIFNode() for _ in range(4))
        self.fc = layer.Linear(8, 5)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        current = self.norm(self.stem(x))
        spikes = self.lif(current)
        for number, (conv, lif) in enumerate(zip(self.convs, self.lifs, strict=True)):
            if number % 2:
                current = conv(spikes)
                spikes = lif(current)
            else:
                made = conv(spikes)
                made += current
                spikes = lif(made) + spikes
        return self.fc(spikes.mean((3, 4)))


class Loop(nn.Module):
    """Timesteps inside of forward, membrane potentials handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if n == 0 else 6, 6, 3, padding=1) for n in range(4))
        self.lifs = nn.ModuleList(snntorch.Leaky(beta=0.9) for _ in range(4))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        membranes = [lif.reset_mem() for lif in self.lifs]
        out = []
        for _ in range(3):
            h = x
            for n, (conv, lif) in enumerate(zip(self.convs, self.lifs, strict=True)):
                h, membranes[n] = lif(conv(h), membranes[n])
            out.append(self.fc(h.mean((2, 3))))
        return torch.stack(out)


class Feedback(Loop):
    """The last spikes come back to the first layer."""

    def forward(self, x: Tensor) -> Tensor:
        membranes = [lif.reset_mem() for lif in self.lifs]
        out, back = [], torch.zeros_like(x)
        for _ in range(3):
            h = x + back
            for n, (conv, lif) in enumerate(zip(self.convs, self.lifs, strict=True)):
                h, membranes[n] = lif(conv(h), membranes[n])
            back = self.fed_back(h)
            out.append(self.fc(h.mean((2, 3))))
        return torch.stack(out)

    def fed_back(self, h: Tensor) -> Tensor:
        return h[:, :3]


class Chain(Residual):
    """Layers in a row; what stands beside them is another's."""

    def forward(self, x: Tensor) -> Tensor:
        current = self.norm(self.stem(x))
        for number, (conv, lif) in enumerate(zip(self.convs, self.lifs, strict=True)):
            current = self.beside(number, conv(lif(current)), current)
        return self.fc(current.mean((3, 4)))

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made + current


class Comparing(Chain):
    """A threshold, which no gradient passes, and which nothing reaches on the first batch."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made + (current > 50).float() * current.detach()


class Reading(Chain):
    """What a neuron remembers."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made + self.lifs[0].v


class Gating(Chain):
    """A decision by numbers."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made if current.mean() > 0.1 else made + current


class Borrowing(Chain):
    """Another layer's weight."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        weight, shape = self.convs[-1].weight, made.shape
        return made + nn.functional.conv2d(made.flatten(0, 1), weight, padding=1).view(shape)


class Remembering(Chain):
    """Something from run to run."""

    greatest: Tensor | float = 0.0

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        self.greatest = current.abs().amax()
        return made


class Leaving(Chain):
    """By way of numpy."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made + torch.from_numpy(current.numpy() * 1)


class Masking(Chain):
    """As many as there are spikes."""

    def beside(self, number: int, made: Tensor, current: Tensor) -> Tensor:
        return made + current[current > 0].sum()


class Drawing(Chain):
    """Neurons that draw."""

    def __init__(self) -> None:
        super().__init__()
        self.lifs = nn.ModuleList(Noisy() for _ in range(4))
        functional.set_step_mode(self, "m")


class Noisy(neuron.IFNode):
    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return super().multi_step_forward(x_seq + 0.1 * torch.randn_like(x_seq))


class Held(Feedback):
    """They come back by a decision that no gradient passes."""

    def fed_back(self, h: Tensor) -> Tensor:
        return (h[:, :3] >= h[:, :3].amax(1, keepdim=True)).float()


FOLLOWED = [Residual, Loop, Feedback, Held, Chain, Comparing]
NOT_FOLLOWED = [Reading, Gating, Borrowing, Remembering, Leaving, Masking, Drawing]


def made(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Feed]:
    torch.manual_seed(0)
    net = kind().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.mul_(3)  # so that it spikes
    multi = any(isinstance(module, neuron.BaseNode) for module in net.modules())
    return net, Feed(find_adapter(net), DATA, 3 if multi else None)


def layers_of(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def handed(net: nn.Module, feed: Feed, name: str, batch: Any) -> list[Tensor]:
    """What a layer takes in; nothing runs after its last call."""
    found: list[Tensor] = []
    most = 1 if isinstance(net, Residual) else 3

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].clone())
        if len(found) == most:
            raise Stop

    handle = net.get_submodule(name).register_forward_pre_hook(take)
    torch.manual_seed(0)
    try:
        feed(net, batch)
    except Stop:
        pass
    finally:
        handle.remove()
        feed.adapter.reset(net)
    return found


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [*FOLLOWED, *NOT_FOLLOWED])
@pytest.mark.parametrize("limit", [2**30, 20_000])
def test_layers_are_handed_the_same_while_those_in_front_change(
    kind: Callable[[], nn.Module], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "_LIMIT", limit)
    net, feed = made(kind)
    with evaluating(net):
        runs = Resumed(net, feed, layers_of(net), seed=0)
        assert runs.works == (kind in FOLLOWED)
        for name in layers_of(net):
            for number, batch in enumerate(feed):
                wanted = handed(net, feed, name, batch)
                with runs.up_to(name, number, batch):
                    found = handed(net, feed, name, batch)
                assert len(found) == len(wanted)
                assert all(map(torch.equal, found, wanted))
            net.get_submodule(name).weight.mul_(0.9)  # as if it had been fitted
    if kind is Remembering:  # nothing of a trial is left in it
        assert net.greatest < 100


def test_what_is_done_does_not_run_again() -> None:
    net, feed = made(Residual)
    runs_of = dict.fromkeys(layers_of(net), 0)
    with evaluating(net):
        runs = Resumed(net, feed, layers_of(net), seed=0)
        originals = {name: net.get_submodule(name)._conv_forward for name in runs_of if name != "fc"}

        def counted(name: str) -> Callable[..., Tensor]:
            def forward(*args: Any) -> Tensor:
                runs_of[name] += 1
                return originals[name](*args)

            return forward

        for name in originals:
            net.get_submodule(name)._conv_forward = counted(name)
        for name in layers_of(net):
            for number, batch in enumerate(feed):
                with runs.up_to(name, number, batch):
                    handed(net, feed, name, batch)
    del runs_of["fc"]
    # up to it, where the run stops before it, no layer runs; up to the next one it does, for each of three batches
    assert set(runs_of.values()) == {3}


def test_batches_of_another_shape_are_run_whole() -> None:
    net, _ = made(Loop)
    data = [*DATA, DATA[0][:3], DATA[0][:1], torch.rand(4, 3, 5, 6)]
    feed = Feed(find_adapter(net), data, None)
    with evaluating(net):
        runs = Resumed(net, feed, layers_of(net), seed=0)
        for name in layers_of(net):
            for number, batch in enumerate(feed):
                wanted = handed(net, feed, name, batch)
                with runs.up_to(name, number, batch):
                    assert all(map(torch.equal, handed(net, feed, name, batch), wanted))
        assert sorted(runs._stages) == [0, 1, 2]  # nothing tells here which axis is that of samples


@pytest.mark.parametrize("kind", [Residual, Loop])
def test_repair_is_the_same_to_the_bit(kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net, feed = made(kind)
    data = torch.utils.data.DataLoader(torch.cat(DATA), 4)  # type: ignore[arg-type]
    how: dict[str, Any] = {"data": data, "timesteps": feed.timesteps, "progress": False, "skip": []}
    found = snncompress.apply(net, "magnitude", 0.5, 4, **how)
    monkeypatch.setattr(resuming, "_FEWEST", 1000)
    wanted = snncompress.apply(net, "magnitude", 0.5, 4, **how)
    assert snncompress.plan_of(found).origin["repaired"]
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


class Capricious(Loop):
    """Its first run on a batch is shorter than the others."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.runs > 12:
            out = out + super().forward(x)
        return out


def test_a_run_that_fails_is_told_and_ends_it() -> None:
    net, feed = made(Capricious)
    names = layers_of(net)
    with evaluating(net):
        runs = Resumed(net, feed, names, seed=0)
        assert runs.works
        batch = feed.first()
        for name in names[:3]:
            with runs.up_to(name, 0, batch):
                feed(net, batch)
        net.runs = 13
        with pytest.raises(OffTrackError), runs.up_to(names[3], 0, batch):
            feed(net, batch)
        assert not runs.works
        with runs.up_to(names[3], 0, batch):
            assert feed(net, batch).shape == (3, 4, 5)


def test_batches_are_the_same_as_long_as_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled:
        def __iter__(self) -> Iterator[Tensor]:
            yield from torch.rand(3, 2, 3, 6, 6)

    net, _ = made(Loop)
    feed = Feed(find_adapter(net), Shuffled(), None)
    runs = [Resumed(net, Feed(feed.adapter, DATA, None), layers_of(net), seed=0)]
    batches = SameBatches(feed, runs)
    first = [next(iter(batches)).x, *(batch.x for batch in batches)]
    assert len(first) == 4
    assert torch.equal(first[0], first[1])
    assert all(torch.equal(batch.x, x) for batch, x in zip(batches, first[1:], strict=True))
    buffer = torch.empty(2, 3, 6, 6)

    class Reusing:
        def __iter__(self) -> Iterator[Tensor]:
            yield from (buffer.fill_(n) for n in range(3))

    batches = SameBatches(Feed(feed.adapter, Reusing(), None), runs)
    assert [[float(batch.x.mean()) for batch in batches] for _ in range(2)] == [[0, 1, 2]] * 2
    monkeypatch.setattr(resuming, "_LIMIT", 100)
    batches = SameBatches(feed, runs)
    assert len(list(batches)) == 3
    assert not runs[0].works
    assert not torch.equal(next(iter(batches)).x, next(iter(batches)).x)
