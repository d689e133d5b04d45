"""Weights that aren't what they seem: what a layer multiplies with is what is counted, or it is refused and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import snncompress
from snncompress import NothingToDoWarning
from snncompress.contract.detection import find_adapter
from snncompress.model.parametrizations import computed_weight
from snncompress.model.weights_in_use import computes_its_weight, weight_in_use
from snncompress.running.data import Feed
from tests.equivalence import largest_difference, outputs

X, Y = torch.rand(3, 1, 8, 8), torch.arange(3)


class Rounded(layer.Conv2d):
    """Three values a weight, as users write it."""

    def used(self) -> Tensor:
        scale = self.weight.abs().max()
        return torch.round(self.weight / scale) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.used(), self.bias)


class Inner(nn.Conv2d):
    """The same one floor down."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * (weight.abs() > 0.1), bias)


class ByHand(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class ByName(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Odd(nn.Linear):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.linear(x * time, self.weight.tanh())


class Switched(nn.Linear):
    rounds = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.round() if self.on else self.weight)


class QuantConv(base.StepModule, qnn.QuantConv2d):
    """Brevitas' layer in SpikingJelly's multi-step mode."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.step_mode = "m"

    def forward(self, x: Tensor) -> Tensor:
        return functional.seq_to_ann_forward(x, super().forward) if x.dim() == 5 else super().forward(x)


PLAIN = [
    nn.Conv2d(2, 4, 3), nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, (1, 2, 3)), nn.ConvTranspose2d(2, 4, 3), nn.Linear(3, 4),
    layer.Conv2d(2, 4, 3, padding=1), layer.Conv2d(2, 4, 3, step_mode="m"), layer.Linear(3, 3, step_mode="m"),
    layer.ConvTranspose2d(4, 4, 2, groups=4, step_mode="m"), nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    ByHand(3, 4), ByHand(3, 2), ByName(3, 3),
]  # fmt: skip
COMPUTED = [
    layer.WSConv2d(2, 4, 3), layer.WSConv2d(2, 4, 3, step_mode="m"), layer.WSLinear(3, 4), Rounded(2, 4, 3),
    Inner(2, 4, 3), qnn.QuantConv2d(2, 4, 3, weight_bit_width=2), qnn.QuantLinear(3, 2, bias=True), QuantConv(2, 4, 3),
]  # fmt: skip


def test_layers_that_multiply_with_their_weight() -> None:
    for module in PLAIN:
        assert computed_weight(module) == "", module
        assert torch.equal(weight_in_use(module), module.weight)
        module.train(False)
        assert not computes_its_weight(module)


def test_layers_that_do_not() -> None:
    for module in COMPUTED:
        assert computed_weight(module), module
        assert weight_in_use(module).shape == module.weight.shape
        assert not torch.equal(weight_in_use(module), module.weight)
    rounded = COMPUTED[3]
    assert torch.equal(weight_in_use(rounded), rounded.used())
    assert torch.allclose(weight_in_use(COMPUTED[0]), COMPUTED[0].get_weight())


def test_what_cannot_be_told_is_not_taken_for_plain() -> None:
    assert weight_in_use(Odd(3, 4)) is None
    assert "Odd" in computed_weight(Odd(3, 4))


def test_a_switch_is_seen() -> None:
    module = Switched(3, 4)
    assert computes_its_weight(module)
    module.on = False
    assert not computes_its_weight(module)


def test_looking_changes_nothing() -> None:
    """Neither random numbers nor what a layer counts."""

    class Counts(nn.Linear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x + torch.rand_like(x))

    module, state = Counts(3, 4), torch.get_rng_state()
    assert not computes_its_weight(module)
    assert float(module.calls) == 0
    assert torch.equal(state, torch.get_rng_state())


# -- in a network --


def net(middle: nn.Module, **fire: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode(v_threshold=0.2), middle, neuron.IFNode(v_threshold=0.2),
        layer.Conv2d(8, 6, 3, padding=1), neuron.IFNode(v_threshold=0.2), layer.Flatten(), layer.Linear(6 * 64, 3),
    )  # fmt: skip


def spikes_into(model: nn.Module, index: int) -> list[Tensor]:
    seen: list[Tensor] = []
    model[index].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for _ in range(3):
            model(X)
    functional.reset_net(model)
    return seen


def synapses(seen: list[Tensor], weight: Tensor) -> float:
    """Σ over spikes of the weights ≠ 0 that they meet, by a convolution of ones; 3 samples."""
    mask = weight.ne(0).double()
    return sum(float(F.conv2d(x.double(), mask, padding=1).sum()) for x in seen) / 3


@pytest.mark.parametrize("kind", [layer.WSConv2d, Rounded])
def test_computed_weights_are_counted_as_they_are_used_and_left_alone(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(1)
    model = net(kind(8, 8, 3, padding=1))
    row = snncompress.profile(model, X, timesteps=3).layers[2]
    used = weight_in_use(model[2])
    assert row.sparsity == pytest.approx(float(used.eq(0).double().mean()))
    assert row.n_ac == pytest.approx(synapses(spikes_into(model, 2), used))
    table = snncompress.profile(model, X, timesteps=3)
    assert table.uncounted == (f"bits of the weight that 2 ({kind.__name__}) computes",)
    assert "not counted: bits of the weight that 2" in str(table)
    assert table.to_dict()["uncounted"] == list(table.uncounted)
    for criterion in ("weight_magnitude", "cqp"):
        small = snncompress.apply(model, criterion, 0.5, None, data=(X, Y), timesteps=3, skip=[], repair=None)
        assert "another weight" in snncompress.plan_of(small).skipped["2"]
        assert torch.equal(small[2].weight, model[2].weight)
        assert bool((small[4].weight == 0).any())
    with pytest.warns(NothingToDoWarning, match=rf"'2': its forward computes another weight.*{kind.__name__}"):
        few = snncompress.apply(model, None, bits=2, data=X, timesteps=3, skip=[], repair=None)
    assert few[2].state_dict().keys() == model[2].state_dict().keys()
    assert set(snncompress.plan_of(few).skipped) == {"2"}
    assert all(len(channel.unique()) <= 4 for channel in few[4].weight)


class Signed(layer.Conv2d):
    """Signs, times a length that is learned and one of all inputs."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.length = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        length = self.length[:, None, None, None] * self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, length * self.weight.sign(), self.bias, padding=1)


@pytest.mark.parametrize(("kind", "cut"), [(layer.WSConv2d, True), (Signed, True), (Rounded, False)])
def test_computed_weights_are_cut_where_each_output_has_its_own(kind: type[nn.Conv2d], cut: bool) -> None:
    """What is computed over all inputs of an output bears that outputs go, not that inputs do."""
    model, x = net(kind(8, 8, 3, padding=1)).double(), X.double()
    small = snncompress.apply(model, "taylor", 0.5, None, data=(x, Y), timesteps=3, skip=[], repair=None)
    assert small[2].weight.shape[:2] == (4 if cut else 8, 8)
    assert small[4].weight.shape[0] == 3
    assert largest_difference(model, small, Feed(find_adapter(model), x, 3)) < 1e-9
    whole = snncompress.plan_of(small).skipped
    assert whole["0"].startswith("coupled with 2: its forward computes another weight from the stored one")
    assert ("2" in whole) is not cut
    if cut:
        own = next(p for n, p in small[2].named_parameters() if n in ("gain", "length"))
        assert len(own) == 4


# -- weight_norm --


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_both_kinds(norm: Any) -> None:
    model = net(norm(layer.Conv2d(8, 8, 3, padding=1)))
    row = snncompress.profile(model, X, timesteps=3).layers[2]
    assert row.n_ac == pytest.approx(synapses(spikes_into(model, 2), model[2].weight))
    small = snncompress.apply(model, "weight_magnitude", 0.5, None, data=X, timesteps=3, skip=[], repair=None)
    assert "its weight is computed" in snncompress.plan_of(small).skipped["2"]
    with pytest.warns(NothingToDoWarning, match="'2': its weight is computed"):
        few = snncompress.apply(model, None, bits=4, data=X, timesteps=3, skip=[], repair=None)
    assert torch.equal(few[2].weight, model[2].weight)
    assert all(len(channel.unique()) <= 16 for channel in few[4].weight)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_is_cut_exactly(norm: Any, dim: int | None) -> None:
    """Its length over all inputs follows those that are left, negative lengths and rows that come to nothing too."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return net(norm(layer.Conv2d(8, 8, 3, padding=1), dim=dim)).double()

    model, x = build(), X.double()
    keys = list(model.state_dict())
    v = next(p for n, p in model[2].named_parameters() if n.endswith(("weight_v", "original1")))
    g = next(p for n, p in model[2].named_parameters() if n.endswith(("weight_g", "original0")))
    with torch.no_grad():
        g.neg_()
        v[3:, 1:] = 0.0  # nothing is left of these rows, of which one stays, where channel 0 goes
        model[0].weight[0] = 0.0  # which has the lowest scores
        model[0].bias[0] = 0.0
        model(x[:1])
        functional.reset_net(model)
    for criterion in ("magnitude", "taylor"):
        small = snncompress.apply(model, criterion, 0.5, None, data=(x, Y), timesteps=3, skip=[], repair=None)
        assert largest_difference(model, small, Feed(find_adapter(model), x, 3)) < 1e-9
        assert small[2].weight.shape[:2] == (4, 4)
        assert bool(torch.isfinite(small[2].weight).all())
        assert list(small.state_dict()) == keys
        replayed = snncompress.plan_of(small).apply(build())
        replayed.load_state_dict(small.state_dict())
        feed = Feed(find_adapter(model), x, 3)
        assert all(torch.equal(a, b) for a, b in zip(outputs(small, feed), outputs(replayed, feed), strict=True))
        snncompress.finetune(small, (x, Y), timesteps=3)


# -- Brevitas --


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", [qnn.QuantConv2d, QuantConv])
def test_bits_and_zeros_of_brevitas_are_counted(kind: type[nn.Conv2d], bits: int) -> None:
    model = net(kind(8, 8, 3, padding=1, bias=False, weight_bit_width=bits))
    if kind is QuantConv:
        functional.set_step_mode(model, "m")
    table = snncompress.profile(model, X, timesteps=3)
    row, used = table.layers[2], model[2].quant_weight().value
    assert (row.bits, row.size_mb) == (bits, pytest.approx(576 * bits / 8e6))
    assert row.sparsity == pytest.approx(float(used.eq(0).double().mean()))
    assert table.uncounted == ()
    if kind is not QuantConv:
        assert row.n_ac == pytest.approx(synapses(spikes_into(model, 2), used))


SCALES: list[dict[str, Any]] = [
    {},
    {"weight_scaling_per_output_channel": True},
    {"weight_scaling_impl_type": "parameter_from_stats"},
    {"weight_scaling_impl_type": "parameter_from_stats", "weight_scaling_per_output_channel": True},
]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", [qnn.QuantConv2d, QuantConv])
def test_brevitas_layers_are_pruned_in_channels(kind: type[nn.Conv2d], scales: dict[str, Any], tmp_path: Path) -> None:
    def build() -> nn.Module:
        made = net(kind(8, 8, 3, padding=1, bias=True, weight_bit_width=4, **scales)).eval()
        functional.set_step_mode(made, "m" if kind is QuantConv else "s")
        return made

    model = build()
    x = X.expand(3, *X.shape) if kind is QuantConv else X
    with torch.no_grad():
        model(x)
    functional.reset_net(model)
    for name, parameter in model.named_parameters():
        if "scaling" in name:  # learned since
            parameter.data *= torch.rand_like(parameter) + 1
    small = snncompress.apply(model, "magnitude", 0.5, None, data=X, timesteps=3, skip=[], repair=None)
    gone = snncompress.plan_of(small).removed_channels()
    assert [len(small[i].weight) for i in (0, 2, 4)] == [4, 4, 3]
    assert small[2].weight_quant.is_quant_enabled
    kept = [[c for c in range(8) if c not in gone[i]] for i in ("0", "2")]
    assert torch.equal(small[2].weight, model[2].weight[kept[1]][:, kept[0]])
    if scales.get("weight_scaling_impl_type"):  # a learned scale stays, so the grid does
        wanted = model[2].quant_weight().value[kept[1]][:, kept[0]]
        assert torch.equal(small[2].quant_weight().value, wanted)
        for i in gone:
            if i in ("0", "2", "4"):
                silence = torch.tensor(gone[i])
                model[int(i) + 1].register_forward_hook(
                    lambda m, a, out, s=silence: out.index_fill(-3, s.to(out.device), 0.0)
                )
        with torch.no_grad():
            for a, b in ((model, small),) * 3:
                assert torch.allclose(a(x), b(x), atol=1e-5)
    snncompress.save(small, tmp_path / "small.safetensors")
    loaded = snncompress.load(tmp_path / "small.safetensors", build())  # on a network that has learned no scale yet
    assert torch.equal(loaded[2].quant_weight().value, small[2].quant_weight().value)
    snncompress.finetune(small, (X, Y), timesteps=3)


def test_brevitas_layers_keep_their_single_weights_and_their_bits() -> None:
    model = net(qnn.QuantConv2d(8, 8, 3, padding=1, weight_bit_width=4))
    small = snncompress.apply(model, "weight_magnitude", 0.5, None, data=X, timesteps=3, skip=[], repair=None)
    assert "Brevitas quantizes its weight already" in snncompress.plan_of(small).skipped["2"]
    with pytest.warns(NothingToDoWarning, match=r"'2': Brevitas quantizes its weight already \(QuantConv2d\)"):
        few = snncompress.apply(model, None, bits=2, data=X, timesteps=3, skip=[], repair=None)
    assert [e.layer for e in snncompress.plan_of(few).edits] == ["0", "4", "7"]


# -- products outside layers --


class Outside(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode(v_threshold=0.2)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.b, self.n2, self.fc = layer.Conv2d(8, 8, 3, padding=1), neuron.IFNode(v_threshold=0.2), nn.Linear(512, 8)
        self.how, self.attention = how, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x))
        h = F.conv2d(h, self.kernel, padding=1) if self.how == "conv2d" else self.b(h)
        h = self.fc(self.n2(h).flatten(1))
        if self.how == "matmul":
            return h @ h.t() @ h
        if self.how == "linear":
            return F.linear(h, self.fc.weight[:, :8])
        if self.how == "multi_head_attention_forward":
            return self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        return h


@pytest.mark.parametrize("how", ["none", "conv2d", "matmul", "linear", "multi_head_attention_forward"])
def test_products_outside_layers_are_named(how: str) -> None:
    where = "attention" if how == "multi_head_attention_forward" else "Outside"
    rules = snncompress.Conventions(attention="not counted")
    table = snncompress.profile(Outside(how), X, timesteps=2, conventions=rules)
    assert table.uncounted == (() if how == "none" else (f"{how} in {where}",))
    assert ("\nnot counted: " in str(table)) == (how != "none")


def test_channels_that_meet_a_parameter_of_no_layer_stay() -> None:
    model = Outside("conv2d")
    model.b = nn.Identity()  # it isn't called, and would be another reason
    with pytest.warns(snncompress.NothingToDoWarning):
        small = snncompress.apply(model, "magnitude", 0.5, None, data=X, timesteps=2, skip=[], repair=None)
    assert small.a.weight.shape[0] == 8
    assert snncompress.plan_of(small).skipped["a"].endswith("forward, behind n, counts on how many there are")
