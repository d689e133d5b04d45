"""Spiking transformers, small, with attention and residual streams as their authors write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from spikingjelly.activation_based.layer.attention import ChannelQKAttention, SpikeDrivenSelfAttention
from torch import Tensor, nn

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, outputs

WIDTH, HEADS = 16, 2


def fire(threshold: float = 0.1) -> nn.Module:
    return neuron.LIFNode(v_threshold=threshold, step_mode="m")


class Layer(nn.Module):
    """A linear layer on tokens [T, N, L, C], shaped as ``width`` says, and its batch norm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(before, after), nn.BatchNorm1d(after)

    def forward(self, x: Tensor, width: int) -> Tensor:
        y = self.linear(x.flatten(0, 1))
        return self.bn(y.transpose(-1, -2)).transpose(-1, -2).reshape(*x.shape[:3], width).contiguous()


def heads(x: Tensor) -> Tensor:
    t, n, length, width = x.shape
    return x.reshape(t, n, length, HEADS, width // HEADS).permute(0, 1, 3, 2, 4).contiguous()


def softmax_free(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Spikformer: q·kᵀ·v, head by head."""
    x = (heads(q) @ heads(k).transpose(-2, -1)) @ heads(v) * 0.25
    return x.transpose(2, 3).reshape(q.shape)


def linear_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q·(kᵀ·v): the same, associated the other way, as with many tokens."""
    return (heads(q) @ (heads(k).transpose(-2, -1) @ heads(v)) * 0.25).transpose(2, 3).reshape(q.shape)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("tnhid,tnhjd->tnhij", heads(q), heads(k))
    return torch.einsum("tnhij,tnhjd->tnihd", scores, heads(v)).reshape(q.shape)


def driven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Spike-driven transformer: k·v summed over the tokens, times q, channel by channel."""
    return (k * v).sum(2, keepdim=True) * q


def by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """QKFormer: which tokens pass is a sum over the channels of q, head by head."""
    return (heads(q).sum(-1, keepdim=True) * heads(k * v)).transpose(2, 3).reshape(q.shape)


ATTENTIONS = {f.__name__: f for f in (softmax_free, linear_first, einsum, driven, by_token)}


class Block(nn.Module):
    """Attention and MLP; ``currents``: neurons come first, and the stream is one of currents."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], *, currents: bool, own: bool) -> None:
        super().__init__()
        self.attention, self.currents, self.own, self.dim, self.hidden = attention, currents, own, WIDTH, 2 * WIDTH
        self.layers = nn.ModuleDict({n: Layer(WIDTH, WIDTH) for n in ("q", "k", "v", "proj")})
        self.layers["up"], self.layers["down"] = Layer(WIDTH, self.hidden), Layer(self.hidden, WIDTH)
        names = [*self.layers, "attn"]
        self.lifs = nn.ModuleDict({n: fire(0.5 if n == "attn" else 0.1) for n in names})

    def forward(self, x: Tensor) -> Tensor:
        width = self.dim if self.own else x.shape[-1]
        y = self.lifs["proj"](x) if self.currents else x
        q, k, v = (self.lifs[n](self.layers[n](y, width)) for n in "qkv")
        y = self.layers["proj"](self.lifs["attn"](self.attention(q, k, v)), x.shape[-1])
        x = x + (y if self.currents else self.lifs["proj"](y))
        y = self.lifs["down"](x) if self.currents else x
        y = self.layers["down"](self.lifs["up"](self.layers["up"](y, self.hidden)), x.shape[-1])
        return x + (y if self.currents else self.lifs["down"](y))


class Transformer(nn.Module):
    def __init__(self, attention: str, *, currents: bool, own: bool) -> None:
        super().__init__()
        self.embed, self.bn, self.lif = nn.Conv2d(2, WIDTH, 2, 2), nn.BatchNorm2d(WIDTH), fire()
        self.blocks = nn.ModuleList(Block(ATTENTIONS[attention], currents=currents, own=own) for _ in range(2))
        self.last, self.head = fire() if currents else nn.Identity(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t, n = x.shape[:2]
        x = self.lif(self.bn(self.embed(x.flatten(0, 1))).unflatten(0, (t, n))).flatten(3).transpose(2, 3)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean(2))


class Joint(nn.Module):
    """One layer makes q, k and v; ``apart``: the neuron behind sees heads on an axis of their own."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.embed, self.lif, self.apart = nn.Linear(6, WIDTH), fire(), apart
        self.qkv, self.qkv_lif, self.attn_lif = nn.Linear(WIDTH, 3 * WIDTH), fire(), fire(0.5)
        self.proj, self.proj_lif, self.head = nn.Linear(WIDTH, WIDTH), fire(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.embed(x))
        q, k, v = (heads(part) for part in self.qkv_lif(self.qkv(x)).chunk(3, -1))
        y = q @ k.transpose(-2, -1) @ v * 0.25
        y = y if self.apart else y.transpose(2, 3).flatten(3)
        y = self.attn_lif(y)
        y = y.transpose(2, 3).flatten(3) if self.apart else y
        return self.head(x + self.proj_lif(self.proj(y)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("criterion", ["firing_rate", "svs"])
def test_q_k_and_v_of_one_layer(apart: bool, criterion: str) -> None:
    model = Joint(apart=apart).double().eval()
    x = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    small = snncompress.apply(model, criterion, 0.5, None, data=x, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x)
    assert set(plan.skipped) == {"head"}
    assert small.qkv.weight.shape == (3 * WIDTH // 2, WIDTH // 2)
    gone = plan.removed_channels()["qkv"]
    part = 3 * WIDTH // (3 * HEADS)
    assert [gone.count(i) for i in range(part)] == [gone.count(i + part) for i in range(part)]
    assert largest_difference(model, small, feed) < 1e-9
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("currents", [False, True])
def test_a_transformer_shrinks_whole_and_exactly(attention: str, currents: bool) -> None:
    model = Transformer(attention, currents=currents, own=False).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.bias, 0.0, 0.5)
    x = torch.rand(3, 2, 2, 6, 6, dtype=torch.float64)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x)
    assert set(plan.skipped) == {"head"}
    assert all(len(gone) in (WIDTH // 2, WIDTH) for gone in plan.removed_channels().values())
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])
    assert largest_difference(model, small, feed) < 1e-9
    replayed = snncompress.Plan.from_json(plan.to_json()).apply(model)
    assert torch.equal(outputs(replayed, feed)[0], outputs(small, feed)[0])


class Dual(nn.Module):
    """SpikingResformer: one layer makes two tensors of each head; the first is multiplied with what it reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lif, self.w = nn.Linear(6, WIDTH), fire(), nn.Linear(WIDTH, 2 * WIDTH)
        self.attn_lif, self.out_lif = fire(0.5), fire(0.2)
        self.proj, self.last, self.head = nn.Linear(WIDTH, WIDTH), fire(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        (t, n, length, width), x = stream.shape, self.lif(stream)
        y = self.w(x).transpose(2, 3).reshape(t, n, HEADS, 2 * width // HEADS, length)
        first, second = y[..., : width // HEADS, :], y[..., width // HEADS :, :]
        each = x.transpose(2, 3).reshape(t, n, HEADS, width // HEADS, length)
        mixed = second @ self.attn_lif(first.transpose(-1, -2) @ each * WIDTH**-0.5)
        spikes = self.out_lif(mixed.reshape(t, n, width, length)).transpose(2, 3)
        return self.head(self.last(stream + self.proj(spikes)))


def test_halves_of_heads_that_meet_the_stream_they_are_made_of() -> None:
    model = Dual().double().eval()
    x = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    small = snncompress.apply(model, "random", 0.5, None, data=x, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x)
    assert set(plan.skipped) == {"head"}
    gone, half = plan.removed_channels(), WIDTH // HEADS
    assert small.w.weight.shape == (WIDTH, WIDTH // 2)
    assert [i for i in gone["w"] if i % WIDTH < half] == [i + half * (i // half) for i in gone["embed"]]
    assert largest_difference(model, small, feed) < 1e-9
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])


class Gated(nn.Module):
    """A neuron says which tokens pass, one number per head, or which channels, in each head by itself.

    As ``joint``, q and k are the halves of what one layer makes, and of unlike use.
    """

    def __init__(self, *, tokens: bool, joint: bool) -> None:
        super().__init__()
        self.embed, self.lif, self.tokens, self.joint = nn.Linear(6, WIDTH), fire(), tokens, joint
        self.q, self.proj = nn.Linear(WIDTH, WIDTH + joint * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k = self.q if joint else nn.Linear(WIDTH, WIDTH)
        self.q_lif, self.k_lif, self.gate, self.proj_lif = fire(), fire(), fire(0.5), fire()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.embed(x))
        if self.joint:
            q, k = self.q_lif(self.q(x)).reshape(*x.shape[:-1], 2 * HEADS, -1).transpose(2, 3).chunk(2, 2)
        else:
            q, k = heads(self.q_lif(self.q(x))), heads(self.k_lif(self.k(x)))
        y = self.gate(q.sum(4 if self.tokens else 3, keepdim=True)) * k
        return self.head(x + self.proj_lif(self.proj(y.transpose(2, 3).flatten(3))))


@pytest.mark.parametrize(("tokens", "joint"), [(False, False), (True, False), (True, True)])
def test_a_neuron_that_sees_heads(tokens: bool, joint: bool) -> None:
    model = Gated(tokens=tokens, joint=joint).double().eval()
    x = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    small = snncompress.apply(model, "random", 0.5, None, data=x, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x)
    assert set(plan.skipped) == {"head"}
    assert small.q.weight.shape == (WIDTH if joint else WIDTH // 2, WIDTH // 2)
    assert small.k.weight.shape == small.q.weight.shape
    assert largest_difference(model, small, feed) < 1e-9
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])


def test_a_model_that_bears_no_other_numbers_keeps_what_is_lost() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.grad_fn is None or float(x.detach().abs().max()) < 1e-6, "numbers of the segments"
            return x

    model = Joint(apart=False).double().eval()
    model.embed = nn.Sequential(model.embed, nn.Identity())
    nn.init.zeros_(model.embed[0].weight)
    nn.init.zeros_(model.embed[0].bias)
    model.lif = nn.Sequential(Strict(), model.lif)
    x = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    plan = snncompress.plan_of(snncompress.apply(model, "magnitude", 0.5, None, data=x, skip=[], repair=None))
    assert "qkv" in plan.skipped


def test_of_every_head_as_many_channels_go() -> None:
    model = Transformer("softmax_free", currents=False, own=False).double().eval()
    x = torch.rand(3, 2, 2, 6, 6, dtype=torch.float64)
    plan = snncompress.plan_of(snncompress.apply(model, "random", 0.5, None, data=x, skip=[], repair=None))
    gone = plan.removed_channels()["blocks.0.layers.q.linear"]
    per_head = WIDTH // HEADS
    assert [i for i in gone if i < per_head] == [i - per_head for i in gone if i >= per_head]


def test_attention_of_its_own_width_shrinks_without_the_stream() -> None:
    """Where the width of q, k and v is an attribute, each block's shrinks by itself."""
    model = Transformer("driven", currents=False, own=True).double().eval()
    x = torch.rand(3, 2, 2, 6, 6, dtype=torch.float64)
    ratio = {"blocks.0.layers.[qkv].*": 0.5}
    small = snncompress.apply(model, "random", ratio, None, data=x, skip=[], repair=None)
    assert (small.blocks[0].dim, small.blocks[1].dim) == (WIDTH // 2, WIDTH)
    assert small.head.in_features == WIDTH
    assert largest_difference(model, small, Feed(find_adapter(model), x)) < 1e-9


class AtTwoWidths(nn.Module):
    """One neuron behind layers of 8 and 6, with a sum over channels at which torch-pruning gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fire = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4), neuron.PSN(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire(self.a(x)).flip(-1)
        return self.c(self.fire(self.b(x)).cumsum(-1))


def test_a_neuron_at_several_widths_leaves_its_layers_whole() -> None:
    options = {"data": torch.rand(3, 2, 6), "skip": [], "repair": None}
    with pytest.warns(snncompress.NothingToDoWarning):
        small = snncompress.apply(AtTwoWidths(), "random", 0.5, None, **options)
    assert set(snncompress.plan_of(small).skipped) == {"a", "b", "c"}


class TokenMask(nn.Module):
    """QKFormer as its authors write it: the sum over a head's channels of q drives a neuron, which gates those of k."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.attn_lif = number, fire(0.5)
        self.layers = nn.ModuleDict({n: nn.Conv1d(WIDTH, WIDTH, 1) for n in ("q", "k", "proj")})
        self.lifs = nn.ModuleDict({n: fire() for n in self.layers})
        self.embed, self.lif, self.head = nn.Conv1d(6, WIDTH, 1), fire(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t, n = x.shape[:2]
        x = self.lif(self.embed(x.flatten(0, 1)).unflatten(0, (t, n)))
        t, n, width, length = x.shape
        q, k = (
            self.lifs[name](self.layers[name](x.flatten(0, 1)).reshape(x.shape)).reshape(
                t, n, self.number, width // self.number, length
            )
            for name in "qk"
        )
        y = (self.attn_lif(q.sum(3, keepdim=True)) * k).flatten(2, 3)
        y = self.lifs["proj"](self.layers["proj"](y.flatten(0, 1)).reshape(t, n, width, length))
        return self.head((x + y).mean(3))


@pytest.mark.parametrize("number", [1, HEADS])
def test_what_gates_a_whole_head_stays_where_some_of_its_channels_go(number: int) -> None:
    model = TokenMask(number).double().eval()
    x = torch.rand(3, 2, 6, 5, dtype=torch.float64)
    small = snncompress.apply(model, "firing_rate", 0.5, None, data=x, skip=[], repair=None)
    plan, feed = snncompress.plan_of(small), Feed(find_adapter(model), x)
    assert set(plan.skipped) == {"head"}
    gone = plan.removed_channels()
    assert {name: len(gone[name]) for name in gone} == dict.fromkeys(gone, WIDTH // 2)
    assert "attn_lif" not in plan.removed_channels("neuron")
    per_head = WIDTH // number
    assert all(len([i for i in gone["layers.k"] if i // per_head == h]) == per_head // 2 for h in range(number))
    assert largest_difference(model, small, feed) < 1e-9
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])


class Attended(nn.Module):
    """One of SpikingJelly's attentions, which reads how many heads there are, and may how wide they are."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.lif = layer.Conv2d(2, WIDTH, 1, step_mode="m"), fire()
        self.attention, self.last, self.head = attention, fire(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.embed(x))
        y = self.attention(x if isinstance(self.attention, SpikeDrivenSelfAttention) else x.flatten(3))
        return self.head(self.last(y).flatten(3).mean(3))


@pytest.mark.parametrize(
    "attention",
    [
        lambda: ChannelQKAttention(WIDTH, 1),  # q and k, halves of one layer, meet again
        lambda: ChannelQKAttention(WIDTH, 2),
        lambda: SpikeDrivenSelfAttention(WIDTH, 4),  # as many heads as channels in each
    ],
)
def test_attentions_of_spikingjelly(attention: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Attended(attention()).double().eval()
    for node in find_adapter(model).neurons(model).values():
        node.v_threshold = 0.05
    x = torch.rand(3, 2, 2, 3, 3, dtype=torch.float64)
    small = snncompress.apply(model, "random", 0.5, None, data=x, skip=[], repair=None)
    assert set(snncompress.plan_of(small).skipped) == {"head"}
    layers = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}
    assert {name: small.get_submodule(name).out_channels for name in layers} == {n: w // 2 for n, w in layers.items()}
    feed = Feed(find_adapter(model), x)
    assert largest_difference(model, small, feed) < 1e-9
    assert not torch.allclose(outputs(model, feed)[0], outputs(small, feed)[0])
