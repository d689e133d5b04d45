"""Integer layers: the same spikes as in float, given the same inputs; what can't be one says why."""

from __future__ import annotations

import io
from typing import Any

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, freeze, frozen_layers
from snncompress.contract.detection import find_adapter
from snncompress.export import integer_layers
from snncompress.export.integer_layers import Codes, IntegerLayer, codes, make_float, make_integer
from snncompress.model.grids import Grid
from snncompress.model.spikes import Spikes, in_float
from tests.equivalence import PAPER
from tests.export.test_freezing import DATA, X, agree, network, scores, trained_norms

needs_operators = pytest.mark.skipif(bool(integer_layers.unavailable()), reason=integer_layers.unavailable())
pytestmark = needs_operators


def quantized(net: nn.Module, bits: int = 4, **options: Any) -> nn.Module:
    return snncompress.apply(net, None, bits=bits, data=DATA, timesteps=4, skip=[], progress=False, **options).eval()


def flips(frozen: nn.Module, other: nn.Module, x: Tensor = X) -> tuple[int, int]:
    """How many spikes of ``frozen`` the layers of ``other``, fed the same, decide otherwise; of how many."""
    adapter = find_adapter(frozen)
    twins = dict(other.named_modules())
    gone, all_of_them, drive = 0, 0, {}

    def taken(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            with torch.no_grad():
                drive[id(output)] = twins[name].forward(in_float(args[0]))

        return hook

    def fired(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal gone, all_of_them
            spikes = in_float(output)
            with torch.no_grad():
                expected = in_float(twins[name](drive.get(id(args[0]), in_float(args[0]))))
            gone += int((expected != spikes).sum())
            all_of_them += spikes.numel()

        return hook

    handles = []
    for name, module in frozen.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            handles.append(module.register_forward_hook(taken(name)))
        elif adapter.is_neuron(module):
            handles.append(module.register_forward_hook(fired(name)))
    adapter.reset(other)
    scores(frozen, x)
    for handle in handles:
        handle.remove()
    return gone, all_of_them


@pytest.mark.parametrize(
    ("framework", "bits"), [("multi-step", 1), ("multi-step", 8), ("snntorch", 7), ("snntorch", 8), ("spikingjelly", 4)]
)
def test_the_same_spikes(framework: str, bits: int) -> None:
    net = quantized(network(framework), bits)
    whole, plain = freeze(net, X, timesteps=4, integer=True), freeze(net, X, timesteps=4)
    assert [row.integer for row in frozen_layers(whole).layers] == [False, True, True, True]
    assert frozen_layers(whole).layers[0].why == "its input isn't spikes"
    gone, spikes = flips(whole, plain)
    assert spikes > 16 * 4 * 20
    assert gone <= spikes * 1e-3
    assert agree(scores(whole), scores(plain))
    assert agree(scores(whole), scores(net))
    assert type(scores(whole)) is Tensor


@pytest.mark.parametrize("seed", range(6))
def test_generated_layers(seed: int) -> None:
    """Any convolution or linear layer against float64, sums of up to three spikes coming in."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        a, b, groups = pick(4, 6), pick(2, 12), pick(1, 2)
        lead = pick((3,), (2, 3))
        if kind is nn.Linear:
            made: Any = nn.Linear(a, b, bias=pick(True, False))
            shape = (*lead, a)
        else:
            padding = pick(0, 1, "same", "valid")
            stride = 1 if isinstance(padding, str) else pick(1, 2)
            made = kind(
                a, b, 3, stride=stride, padding=padding, dilation=pick(1, 2), groups=groups, bias=pick(True, False)
            )
            shape = (*lead, a, *[7] * (made.weight.dim() - 2))
        numbers = torch.randint(-127, 128, made.weight.shape, generator=g)
        scale = torch.rand(b, generator=g) - 0.3  # a folded batch norm may turn the sign
        made.weight.data = numbers * scale.view(-1, *[1] * (numbers.dim() - 1))
        x = Spikes(torch.randint(0, 4, shape, generator=g).to(torch.uint8), [3])
        wide = in_float(x).double()
        flat = wide.view(-1, *wide.shape[len(lead) :])
        wanted = nn.Module.__call__(made.double(), flat).view(*lead, *nn.Module.__call__(made, flat).shape[1:])
        made.float().requires_grad_(False)
        assert make_integer(made, Codes(numbers.to(torch.int8))) == ""
        assert torch.allclose(made(x).double(), wanted, rtol=1e-5, atol=1e-4)
        assert made._numbers is None  # held once, packed
        assert torch.equal(made.numbers, numbers)
        assert torch.allclose(made(in_float(x) / 2), made._in_float(in_float(x) / 2))  # guarded
        make_float(made)
        assert type(made) is kind
        assert torch.allclose(made.weight, numbers * scale.view(-1, *[1] * (numbers.dim() - 1)))


def test_codes_by_hand() -> None:
    """ReScaW's 8 bits have 256 values around 0: n - 127.5, in bytes n - 128 with half a number more for each."""
    rescaw, centred = Grid(torch.tensor(0.1), 127.5, 8), Grid(torch.tensor(0.1), 128.0, 8)
    numbers, mask = torch.tensor([0.0, 127, 128, 255]), torch.tensor([True, True, False, True])
    found: Any = codes(rescaw, numbers, None)
    assert (found.numbers.tolist(), found.offset) == ([-128, -1, 0, 127], 0.5)
    found = codes(centred, numbers, mask)
    assert (found.numbers.tolist(), found.offset) == ([-128, -1, 0, 127], 0.0)
    assert "no number for the weights that were removed" in codes(rescaw, numbers, mask)
    assert "16 bits" in codes(Grid(torch.tensor(0.1), 0.0, 16), torch.tensor([4000.0]), None)
    found = codes(Grid(torch.tensor(0.1), 7.5, 4), torch.tensor([0.0, 15.0, 3.0]), torch.tensor([True, True, False]))
    assert found.numbers.tolist() == [-15, 15, 0]


def test_pruned_weights_and_files(tmp_path: Any) -> None:
    """Removed weights are codes of 0; a file holds bytes, and what is loaded computes the same."""
    net = network("multi-step")
    net = snncompress.apply(net, "weight_magnitude", 0.5, 4, data=DATA, timesteps=4, progress=False).eval()
    frozen = freeze(net, X, timesteps=4, integer="auto")
    integer: Any = frozen[4]
    assert isinstance(integer, IntegerLayer)
    assert float((integer.numbers == 0).float().mean()) > 0.4
    wanted = scores(frozen)
    for model in (frozen, freeze(net, X, timesteps=4)):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(scores(torch.load(buffer, weights_only=False)), scores(model))
    assert torch.equal(scores(frozen), wanted)
    fresh = freeze(net, X, timesteps=4, integer=True)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(frozen.state_dict())
    assert torch.equal(scores(fresh), wanted)
    both = {"i": frozen, "f": freeze(net, X, timesteps=4)}
    layers = {kind: frozen_layers(model).layers[1].n_bytes for kind, model in both.items()}
    assert layers == {"i": 12 * 8 * 9 + 2 * 4 * 12, "f": 4 * (12 * 8 * 9 + 12)}


def test_snntorch_can_be_stored() -> None:
    frozen = freeze(quantized(network("snntorch")), X, timesteps=4, integer=True)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    assert torch.equal(scores(torch.load(buffer, weights_only=False)), scores(frozen))


class Residual(nn.Module):
    """Sums and views of spikes, a layer used twice, neurons without an equation, averages, a transposed convolution."""

    def __init__(self, *, write: bool = False) -> None:
        super().__init__()
        self.write = write
        self.conv1, self.conv2, self.twice, self.after_other = (layer.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.up, self.mean, self.fc = layer.ConvTranspose2d(4, 4, 2, 2), layer.Linear(4, 4), layer.Linear(4, 3)
        self.fire = nn.ModuleList([neuron.IFNode(v_threshold=0.3) for _ in range(6)])
        self.other = neuron.QIFNode(v_threshold=0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire[0](self.conv1(x))
        x = x.view(len(x), -1).view(x.shape)  # whatever the layout in memory
        x = x + self.fire[1](self.conv2(x))
        if self.write:
            x[:] = x * 2
        x = x + self.fire[2](self.twice(x))
        x = x + self.fire[3](self.twice(x))
        x = self.other(self.fire[4](self.up(x)))
        x = self.after_other(x)
        x = self.mean(self.fire[5](x).mean((2, 3)))
        return self.fc(x)


def residual(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = 3 * torch.rand(8, 4, 6, 6)
    net = trained_norms(Residual(**options))
    return snncompress.apply(net, None, bits=4, data=x, timesteps=3, skip=[], progress=False).eval(), x


def test_each_layer_goes_its_way_and_says_why() -> None:
    net, x = residual()
    whole = freeze(net, x, timesteps=3, integer=True)
    why = {row.name: row.why for row in frozen_layers(whole).layers}
    assert {name for name, reason in why.items() if not reason} == {"conv2", "twice", "after_other"}
    assert why["conv1"] == why["mean"] == why["fc"] == "its input isn't spikes"
    assert "has no integer form" in why["up"]
    assert "conv2" in str(frozen_layers(whole))
    assert "Instructions" in str(frozen_layers(whole))
    assert agree(scores(whole, x, 3), scores(freeze(net, x, timesteps=3), x, 3))


def test_a_network_that_writes_into_spikes_stays_in_float() -> None:
    net, x = residual(write=True)
    frozen = freeze(net, x, timesteps=3, integer="auto")
    assert not any(row.integer for row in frozen_layers(frozen).layers)
    assert agree(scores(frozen, x, 3), scores(net, x, 3))
    with pytest.raises(ModelError, match="can't hand its spikes on"):
        freeze(net, x, timesteps=3, integer=True)


def test_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    net = quantized(network("multi-step"))
    wanted = freeze(net, X, timesteps=4, integer=True)
    expected = scores(wanted)
    monkeypatch.setattr(integer_layers, "unavailable", lambda: "this build of torch has none")
    assert agree(scores(wanted), expected)  # made elsewhere
    frozen = freeze(net, X, timesteps=4, integer="auto")
    assert {row.why for row in frozen_layers(frozen).layers[1:]} == {"this build of torch has none"}
    with pytest.raises(ModelError, match=r"has none.*integer='auto'"):
        freeze(net, X, timesteps=4, integer=True)


def test_bad_options() -> None:
    for odd in ("yes", None, 8):
        with pytest.raises(OptionError, match="integer must be True, False, 'auto' or 'full'"):
            freeze(network("multi-step"), X, timesteps=4, integer=odd)
    with pytest.raises(ModelError, match="8: its weight isn't quantized"):
        freeze(network("multi-step"), X, timesteps=4, integer=True)


def test_sums_that_may_not_fit() -> None:
    """2³¹ / 127² is 133,144: so many weights of 127 may meet so many numbers of 127."""
    for width, why in ((133_144, ""), (133_145, "a sum of its inputs might exceed 32 bits")):
        wide = nn.Linear(width, 1, bias=False).requires_grad_(False)
        wide.weight.fill_(127.0)
        assert integer_layers.refusal(wide, Codes(torch.full((1, width), 127, dtype=torch.int8))) == why


def test_layers_that_pad_otherwise_or_compute_something_else() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    for made, said in (
        (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), "pad with zeros, not 'circular'"),
        (nn.Conv2d(8, 12, 2, padding="same"), "pad both sides alike"),
        (Doubled(8, 12, 3, padding=1), "Doubled computes something else"),
    ):
        net = network("multi-step")
        functional.set_step_mode(net, "s")
        net[4] = made
        net = quantized(net, quantizer=PAPER)
        frozen = freeze(net, X, timesteps=4, integer=True)
        assert said in frozen_layers(frozen).layers[1].why
        assert agree(scores(frozen), scores(net))


def test_exports_of_an_integer_network(tmp_path: Any) -> None:
    nir = pytest.importorskip("nir")
    net = nn.Sequential(nn.Linear(4, 6), snn.Leaky(beta=0.5, init_hidden=True, reset_mechanism="zero"), nn.Linear(6, 2))
    x = torch.rand(3, 4)
    net = snncompress.apply(net, None, bits=4, data=x, timesteps=2, skip=[], progress=False)
    graphs = []
    for model in (net, freeze(net, x, timesteps=2, integer=True)):
        snncompress.export(model, tmp_path / "net.nir", data=x, timesteps=2)
        graphs.append(nir.read(tmp_path / "net.nir"))
    assert graphs[0].edges == graphs[1].edges
    assert torch.allclose(*(torch.as_tensor(graph.nodes["2"].weight) for graph in graphs))


def test_measured_and_frozen_again() -> None:
    """Profiles count an integer layer's weight at its bits, and its operations as those in float."""
    net = quantized(network("multi-step"))
    whole, plain = freeze(net, X, timesteps=4, integer=True), freeze(net, X, timesteps=4)
    counts = [snncompress.profile(model, X, timesteps=4) for model in (whole, plain)]
    assert [(row.n_ac, row.n_mac, row.n_params) for row in counts[0].layers] == [
        (row.n_ac, row.n_mac, row.n_params) for row in counts[1].layers
    ]
    conv = next(row for row in counts[0].layers if row.name == "4")
    assert (conv.bits, conv.size_mb) == (4, (12 * 8 * 9 * 4 + 12 * 32) / 8e6)
    again = freeze(whole, X, timesteps=4, integer=True)
    assert torch.equal(scores(again), scores(whole))
    back = freeze(whole, X, timesteps=4)
    assert not any(row.integer for row in frozen_layers(back).layers)
    assert agree(scores(back), scores(plain))
    with torch.inference_mode():
        assert torch.equal(scores(whole), scores(again))
