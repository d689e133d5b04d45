"""Repair: what the neurons integrate comes back, never gets worse, and what must hold of a compressed network holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, OptionError, PlanError, SyntheticDataWarning, load, plan_of, repair, save
from snncompress.contract.detection import find_adapter
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.parametrizations import weight_mask
from snncompress.pruning.least_squares import Sums, solved
from snncompress.running.data import Feed
from tests.equivalence import same, snapshot
from tests.networks import Case, liven, snntorch_cases, spikingjelly_cases

T = 4


def conv(framework: str, *, norm: bool = True, bias: bool = False) -> nn.Module:
    torch.manual_seed(1)

    def fire() -> nn.Module:
        return neuron.LIFNode() if framework != "snntorch" else snn.Leaky(0.7, init_hidden=True)

    def bn(width: int) -> nn.Module:
        return layer.BatchNorm2d(width) if norm else nn.Identity()

    net = nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1, bias=bias), bn(16), fire(), layer.MaxPool2d(2),
        layer.Conv2d(16, 16, 3, padding=1, bias=bias), bn(16), fire(), layer.Flatten(),
        layer.Linear(256, 24, bias=bias), fire(), layer.Linear(24, 5),
    )  # fmt: skip
    if framework == "multi-step":
        functional.set_step_mode(net, "m")
    return liven(Case(net, torch.rand(32, 2, 8, 8), T)).model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(24, 2, 8, 8, generator=generator), torch.arange(24) % 5) for _ in range(3)]


def layer_outputs(net: nn.Module, name: str, feed: Feed) -> Tensor:
    """What a layer puts out in every timestep, less the mean of the norm behind it: [calls, ...]."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    with torch.no_grad():
        for batch in feed:
            feed(net, batch)
    handle.remove()
    feed.adapter.reset(net)
    steps = torch.cat([y if y.dim() in (3, 5) else y.unsqueeze(0) for y in seen])  # [T · batches, N, C, ...]
    norm = dict(net.named_modules()).get(str(int(name) + 1))
    if isinstance(norm, nn.BatchNorm2d):
        steps = steps - norm.running_mean.view(-1, 1, 1)
    return steps


def integrated(steps: Tensor, decay: float) -> Tensor:
    """u[t] = decay · u[t-1] + y[t], anew for each batch."""
    u: Any = 0.0
    found = []
    for t, y in enumerate(steps):
        u = (decay * u if t % T else 0.0) + y
        found.append(u)
    return torch.stack(found).double()


@pytest.mark.parametrize("framework", ["single-step", "multi-step", "snntorch"])
@pytest.mark.parametrize(("criterion", "ratio"), [("magnitude", 0.5), ("lamp", 0.8), (None, 0.0)])
@pytest.mark.parametrize("bits", [None, 2])
def test_every_layer_integrates_more_of_what_it_did(
    framework: str, criterion: str | None, ratio: float, bits: int | None
) -> None:
    """Truth 8, measured from outside: with the upstream as repaired, a layer's new weights beat its old ones."""
    if criterion is None and bits is None:
        return
    net, data = conv(framework).eval(), batches()
    options: dict[str, Any] = {"data": data, "timesteps": T, "skip": []}
    bare = snncompress.apply(net, criterion, ratio, bits, repair=None, **options)
    fitted = repair(bare, net, data, timesteps=T)
    removed = plan_of(fitted).removed_channels()
    feed = Feed(find_adapter(net), data, T)
    repaired = plan_of(fitted).origin["repaired"]
    assert repaired
    for name in repaired:
        swapped = copy.deepcopy(fitted)
        for key, value in bare.state_dict().items():
            if key.startswith((f"{name}.", f"{int(name) + 1}.")):
                swapped.state_dict()[key].copy_(value)
        decay = {"snntorch": 0.7}.get(framework, 0.5) if name != "10" else 0.0
        before = layer_outputs(net, name, feed)
        kept = [c for c in range(before.shape[2]) if c not in removed.get(name, [])]
        wanted = integrated(before[:, :, kept], decay)
        errors = [
            (integrated(layer_outputs(n, name, feed), decay) - wanted).square().sum().item() for n in (fitted, swapped)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-4)
    total = [
        (layer_outputs(n, "10", feed) - layer_outputs(net, "10", feed)).square().sum().item() for n in (fitted, bare)
    ]
    assert total[0] < 0.7 * total[1]


@settings(max_examples=12)
@given(case=st.one_of(spikingjelly_cases(), snntorch_cases()))
def test_generated_networks(case: Case) -> None:
    """Repaired networks run, keep the structure of bare ones, and leave the original as it is."""
    before = snapshot(case.model)
    options: dict[str, Any] = {"data": case.x, "timesteps": case.timesteps, "skip": []}
    bare = snncompress.apply(case.model, "magnitude", 0.4, None, repair=None, **options)
    fitted = snncompress.apply(case.model, "magnitude", 0.4, None, repair="membrane", **options)
    assert plan_of(fitted).edits == plan_of(bare).edits
    assert {k: v.shape for k, v in fitted.state_dict().items()} == {k: v.shape for k, v in bare.state_dict().items()}
    assert all(bool(torch.isfinite(v).all()) for v in fitted.state_dict().values())
    assert same(before, snapshot(case.model))
    again = snncompress.apply(case.model, "magnitude", 0.4, None, repair="membrane", **options)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fitted.state_dict().items())


def test_what_nothing_changed_upstream_of_stays_bitwise() -> None:
    net, data = conv("single-step").eval(), batches()
    fitted = snncompress.apply(net, "magnitude", {"8": 0.5}, None, data=data, timesteps=T, repair="membrane", skip=[])
    assert plan_of(fitted).origin["repaired"] == ["10"]
    for key, value in fitted.state_dict().items():
        if not key.startswith(("8.", "9.", "10.")):
            assert torch.equal(value, net.state_dict()[key])
    kept = [c for c in range(24) if c not in plan_of(fitted).removed_channels()["8"]]
    assert torch.equal(fitted[8].weight, net[8].weight[kept])


def test_with_nothing_removed_nothing_changes() -> None:
    net, data = conv("single-step").eval(), batches()
    copied = copy.deepcopy(net)
    same_net = repair(copied, net, data, timesteps=T)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in same_net.state_dict().items())
    with pytest.raises(PlanError, match="holds no plan"):
        plan_of(same_net)


@pytest.mark.parametrize("quantizer", ["rescaw", "uniform"])
def test_masks_and_grids_hold(quantizer: str, tmp_path: Path) -> None:
    net, data = conv("single-step").eval(), batches()
    options: dict[str, Any] = {"data": data, "timesteps": T, "skip": [], "quantizer": quantizer, "repair": "membrane"}
    small = snncompress.apply(net, "lamp", 0.7, 3, **options)
    bare = snncompress.apply(net, "lamp", 0.7, 3, **{**options, "repair": None})
    counts = [sum(int(m.sum()) for n in net.modules() if (m := weight_mask(n)) is not None) for net in (small, bare)]
    assert counts[0] == counts[1]
    for module in small.modules():
        if isinstance(module, WEIGHT_LAYERS):
            mask = weight_mask(module)
            assert mask is not None
            assert not module.weight[~mask].any()
            rows = module.weight.detach().flatten(1)
            assert all(len(set(row[row != 0].tolist())) <= 8 for row in rows)
    save(small, tmp_path / "small")
    loaded = load(tmp_path / "small", into=conv("single-step"))
    for key in ("0", "4", "8", "10"):
        assert torch.equal(loaded.get_submodule(key).weight, small.get_submodule(key).weight)
    replayed = plan_of(small).apply(conv("single-step"))
    assert replayed.state_dict().keys() == small.state_dict().keys()


def test_a_network_from_a_file_is_repaired_by_a_call_of_its_own() -> None:
    net, data = conv("single-step").eval(), batches()
    with pytest.warns(SyntheticDataWarning):
        bare = snncompress.apply(net, "magnitude", 0.5, None, timesteps=T, skip=[])
    before = snapshot(bare), snapshot(net)
    fitted = repair(bare, net, data, timesteps=T)
    assert same(before[0], snapshot(bare))
    assert same(before[1], snapshot(net))
    assert plan_of(fitted).edits == plan_of(bare).edits
    assert plan_of(fitted).origin["repaired"] == ["4", "8", "10"]
    feed = Feed(find_adapter(net), data, T)
    wanted = layer_outputs(net, "10", feed)
    errors = [(layer_outputs(n, "10", feed) - wanted).square().sum() for n in (fitted, bare)]
    assert errors[0] < 0.7 * errors[1]
    other = conv("single-step")
    other[0], other[1] = layer.Conv2d(2, 12, 3, padding=1), layer.BatchNorm2d(12)
    other[4] = layer.Conv2d(12, 16, 3, padding=1)
    with pytest.raises(PlanError, match=r"'0' has 8 output channels, and 12 in the network .* less the 8 that"):
        repair(bare, other, data, timesteps=T)


@pytest.mark.parametrize("where", ["norm", "bias", "nowhere"])
def test_the_intercept_goes_where_there_is_one(where: str) -> None:
    net = conv("single-step", norm=where == "norm", bias=where == "bias").eval()
    small = snncompress.apply(net, "magnitude", 0.5, None, data=batches(), timesteps=T, skip=[], repair="membrane")
    assert (small[4].bias is not None) == (where == "bias")
    removed = plan_of(small).removed_channels()
    if where == "norm":
        kept = [c for c in range(16) if c not in removed["4"]]
        assert not torch.equal(small[5].running_mean, net[5].running_mean[kept])
        assert torch.equal(small[5].running_var, net[5].running_var[kept])


class OwnLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.lif = nn.ModuleList(snn.Leaky(beta=0.9) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [lif.init_leaky() for lif in self.lif]
        for _ in range(5):
            z = x
            for n, linear in enumerate((self.one, self.two, self.three)):
                z, states[n] = self.lif[n](3 * linear(z), states[n])
        return z


def test_a_loop_of_ones_own_and_forward() -> None:
    torch.manual_seed(0)
    net, data = OwnLoop(), [{"x": torch.rand(40, 6)}]
    small = snncompress.apply(
        net, "magnitude", 0.5, None, data=data, forward=lambda m, b: m(b["x"]), skip=[], repair="membrane"
    )
    assert plan_of(small).origin["repaired"] == ["two", "three"]


def test_recurrent_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16), snn.RLeaky(beta=0.8, linear_features=16, init_hidden=True), nn.Linear(16, 8),
        snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 3),
    )  # fmt: skip
    net[0].weight.data *= 4
    small = snncompress.apply(
        net, "magnitude", 0.5, None, data=torch.rand(40, 6), timesteps=5, skip=[], repair="membrane"
    )
    assert "1.recurrent" in plan_of(small).origin["repaired"]


@pytest.mark.parametrize("samples", [1, 2])
def test_fewer_samples_than_inputs(samples: int) -> None:
    net = conv("single-step").eval()
    x = torch.rand(samples, 2, 8, 8)
    small = snncompress.apply(net, "random", 0.5, 4, data=x, timesteps=1, skip=[], repair="membrane")
    assert all(bool(torch.isfinite(v).all()) for v in small.state_dict().values())


def test_silent_and_constant_inputs() -> None:
    net = conv("single-step").eval()
    for x in (torch.zeros(4, 2, 8, 8), torch.ones(4, 2, 8, 8)):
        small = snncompress.apply(net, "magnitude", 0.5, 4, data=x, timesteps=2, skip=[], repair="membrane")
        assert all(bool(torch.isfinite(v).all()) for v in small.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    net = conv("single-step").eval().to(dtype)
    data = [x.to(dtype) for x, _ in batches()]
    small = snncompress.apply(net, "magnitude", 0.5, None, data=data, timesteps=2, skip=[], repair="membrane")
    assert small[4].weight.dtype == dtype
    assert plan_of(small).origin["repaired"] == ["4", "8", "10"]


def test_it_is_repeated_in_every_step_and_starts_from_what_was_trained() -> None:
    net, data = conv("single-step").eval(), batches()
    calls: list[Tensor] = []

    def tuner(model: nn.Module) -> None:
        calls.append(model[10].weight.detach().clone())

    options: dict[str, Any] = {"data": data, "timesteps": T, "skip": [], "scheduler": "iterative", "finetune": tuner}
    snncompress.apply(net, "magnitude", 0.5, None, repair="membrane", **options)
    fitted, calls = calls, []
    snncompress.apply(net, "magnitude", 0.5, None, repair=None, **options)
    assert len(fitted) == len(calls) > 1
    assert all(not torch.equal(a, b) for a, b in zip(fitted, calls, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_a_stopped_run_ends_as_one_that_went_through(trains: bool, tmp_path: Path) -> None:
    net, data = conv("single-step").eval(), batches()

    def tuner(model: nn.Module) -> None:
        with torch.no_grad():
            model[10].bias += torch.rand(5)

    options: dict[str, Any] = {"data": data, "timesteps": T, "skip": [], "scheduler": "iterative", "repair": "membrane"}
    options |= {"finetune": tuner if trains else None}

    def run(**more: Any) -> nn.Module:
        return snncompress.apply(net, "magnitude", {"4": 0.5, "8": 0.5}, 4, **options, **more)

    def stop(what: str, done: int, total: int | None) -> None:
        if what.startswith("step 3/"):
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path, progress=stop)
    resumed = run(checkpoint=tmp_path)
    assert plan_of(resumed) == plan_of(whole)
    assert "10" in plan_of(resumed).origin["repaired"]
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


class TwoSizes(nn.Module):
    """One convolution on maps of two sizes, in every timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lif = nn.Conv2d(2, 8, 3, padding=1), neuron.LIFNode()
        self.shared, self.other, self.fc = nn.Conv2d(8, 6, 3, padding=1), neuron.IFNode(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.lif(3 * self.first(x))
        small = self.shared(nn.functional.max_pool2d(spikes, 2)).mean((2, 3))
        return self.fc(self.other(3 * (self.shared(spikes).mean((2, 3)) + small)))


def test_a_layer_that_is_called_on_maps_of_two_sizes() -> None:
    torch.manual_seed(0)
    net = TwoSizes()
    options: dict[str, Any] = {"data": torch.rand(20, 2, 8, 8), "timesteps": 3, "skip": ["fc"]}
    small = snncompress.apply(net, "magnitude", {"first": 0.5}, None, repair="membrane", **options)
    assert "shared" in plan_of(small).origin["repaired"]
    assert all(bool(torch.isfinite(value).all()) for value in small.state_dict().values())


def test_what_is_no_network() -> None:
    net = conv("single-step")
    with pytest.raises(ModelError, match=r"model must be a torch\.nn\.Module, not str"):
        repair(net, "net", batches(), timesteps=T)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_least_squares_by_another_road(masked: bool) -> None:
    """Against torch's lstsq on the raw samples, row by row on each row's support."""
    torch.manual_seed(0)
    u, y = torch.randn(200, 1, 12, dtype=torch.float64), torch.randn(200, 1, 5, dtype=torch.float64)
    sums = Sums(1, 12, 5, u.device)
    for part_u, part_y in zip(u.split(50), y.split(50), strict=True):
        sums.add(part_u, part_y)
    support = torch.rand(1, 5, 12) > 0.5 if masked else torch.ones(1, 5, 12, dtype=torch.bool)
    theta = solved(sums, torch.zeros(1, 5, 12, dtype=torch.float64), 1e-12, support if masked else None)
    for row in range(5):
        on = support[0, row]
        wanted = torch.linalg.lstsq(u[:, 0, on], y[:, 0, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(theta[0, row, on], wanted, rtol=1e-6, atol=1e-8)
        assert not theta[0, row, ~on].any()
    residual = (y[:, 0] - u[:, 0] @ theta[0].T).square().sum(0)
    torch.testing.assert_close(sums.errors(theta)[0], residual, rtol=1e-8, atol=1e-8)


def test_sums_that_cant_be_solved_leave_the_start() -> None:
    sums, start = Sums(1, 3, 2, torch.device("cpu")), torch.ones(1, 2, 3, dtype=torch.float64)
    assert torch.equal(solved(sums, start, 1e-3), start)  # no data at all
    sums.add(torch.full((4, 1, 3), torch.nan), torch.ones(4, 1, 2))
    assert torch.equal(solved(sums, start, 1e-3), start)


@pytest.mark.parametrize("framework", ["single-step", "snntorch"])
def test_real_data_are_repaired_on_and_synthetic_ones_are_not(framework: str) -> None:
    """What nobody asks for: the membrane where data are given, bare removal where they are made up."""
    net = conv(framework).eval()
    options: dict[str, Any] = {"data": batches(), "timesteps": T, "skip": []}
    default, asked, bare = (
        snncompress.apply(net, "magnitude", 0.5, 4, **options, **how)
        for how in ({}, {"repair": "membrane"}, {"repair": None})
    )
    assert plan_of(default) == plan_of(asked)
    assert plan_of(default).origin["repair"] == "membrane"
    assert plan_of(bare).origin["repair"] is None
    assert all(
        torch.equal(a, b) for a, b in zip(default.state_dict().values(), asked.state_dict().values(), strict=True)
    )
    assert not torch.equal(default[10].weight, bare[10].weight)
    with pytest.warns(SyntheticDataWarning):
        made_up = snncompress.apply(net, "magnitude", 0.5, 4, timesteps=T, skip=[])
    assert plan_of(made_up).origin["repair"] is None
    assert torch.equal(made_up[10].weight, bare[10].weight)


def test_of_many_samples_the_first_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = conv("single-step").eval(), batches()
    options: dict[str, Any] = {"timesteps": T, "skip": []}
    monkeypatch.setattr("snncompress.pruning.fitting._SAMPLES", 25)
    few = snncompress.apply(net, "magnitude", 0.5, None, data=data, **options)
    monkeypatch.undo()
    two, all_three = (snncompress.apply(net, "magnitude", 0.5, None, data=part, **options) for part in (data[:2], data))
    weights = [one[8].weight for one in (few, two, all_three)]
    assert torch.equal(weights[0], weights[1])  # two batches of 24
    assert not torch.equal(weights[0], weights[2])


def test_only_timesteps_go_and_nothing_is_repaired() -> None:
    net = snncompress.apply(conv("single-step").eval(), "magnitude", 0.5, None, data=batches(), timesteps=T, skip=[])
    short = snncompress.apply(net, None, bits=None, data=batches(), timesteps=T, truncate=2)
    assert plan_of(short).timesteps == 2
    assert "repaired" not in plan_of(short).origin
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), short.state_dict().values(), strict=True))


def test_wrong_options() -> None:
    net, data = conv("single-step"), batches()
    with pytest.raises(
        OptionError, match="repair must be 'auto', 'membrane', 'current', None or, for blocks, 'reinit', not 'glue'"
    ):
        snncompress.apply(net, "magnitude", 0.5, None, data=data, timesteps=T, repair="glue")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="kind must be 'membrane' or 'current', not None"):
        repair(net, net, data, kind=None, timesteps=T)  # type: ignore[arg-type]
