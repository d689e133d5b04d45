"""Whole blocks: found by structure, replaced by wires, and what follows is mended."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import snntorch as snn
import torch
import torch_pruning as tp
from snncompress_fire import SCHEDULES, Ablation, Fire, Keep
from snncompress_schedules import Iterative
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

import snncompress
from snncompress import ModelError, NothingToDoWarning, OptionError, Plan, PlanError, plan_of
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.structure.blocks import Block, find_blocks
from snncompress.structure.tracing import trace
from tests.equivalence import same, snapshot


def fire(framework: str) -> nn.Module:
    return neuron.LIFNode() if framework == "spikingjelly" else snn.Leaky(beta=0.5, init_hidden=True)


class FireModule(nn.Module):
    def __init__(self, framework: str, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        conv = layer.Conv2d if framework == "spikingjelly" else nn.Conv2d
        self.squeeze, self.squeeze_fire = conv(inputs, squeeze, 1), fire(framework)
        self.expand1x1, self.fire1x1 = conv(squeeze, expand, 1), fire(framework)
        self.expand3x3, self.fire3x3 = conv(squeeze, expand, 3, padding=1), fire(framework)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_fire(self.squeeze(x))
        return torch.cat([self.fire1x1(self.expand1x1(x)), self.fire3x3(self.expand3x3(x))], -3)


class Residual(nn.Module):
    def __init__(self, framework: str, channels: int) -> None:
        super().__init__()
        conv, norm = (layer.Conv2d, layer.BatchNorm2d) if framework == "spikingjelly" else (nn.Conv2d, nn.BatchNorm2d)
        self.conv, self.norm, self.fire = conv(channels, channels, 3, padding=1), norm(channels), fire(framework)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fire(self.norm(self.conv(x)))


def network(framework: str, multi_step: bool = False) -> nn.Module:
    torch.manual_seed(0)
    conv, pool, flat, linear = (
        (layer.Conv2d, layer.MaxPool2d, layer.Flatten, layer.Linear)
        if framework == "spikingjelly"
        else (nn.Conv2d, nn.MaxPool2d, nn.Flatten, nn.Linear)
    )
    net = nn.Sequential(
        conv(3, 8, 3, padding=1), fire(framework),
        FireModule(framework, 8, 4, 6), FireModule(framework, 12, 4, 6), pool(2), FireModule(framework, 12, 4, 8),
        Residual(framework, 16), conv(16, 4, 1), fire(framework), flat(), linear(4 * 9, 5),
    )  # fmt: skip
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()  # so that every neuron fires
    if multi_step:
        functional.set_step_mode(net, "m")
    return net


DATA = [(2 * torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5)]
MODELS = pytest.mark.parametrize(
    ("framework", "multi_step"), [("spikingjelly", False), ("spikingjelly", True), ("snntorch", False)]
)


def found(net: nn.Module, blocks: object = None) -> tuple[Block, ...]:
    adapter = find_adapter(net)
    run = Feed(adapter, DATA, 4).example()
    return find_blocks(net, adapter, run, trace(net, adapter, run, timesteps=4), blocks)


def remove(net: nn.Module, criterion: object, ratio: float = 0.5, **options: object) -> nn.Module:
    return snncompress.apply(net, criterion, ratio, None, data=DATA, timesteps=4, progress=False, **options)


def gone(model: nn.Module) -> list[str]:
    return [e.name for e in plan_of(model).edits]


@MODELS
def test_found_by_structure(framework: str, multi_step: bool) -> None:
    assert found(network(framework, multi_step)) == (
        Block("2", "fire", 8, 12, ("3.squeeze",)),
        Block("3", "fire", 12, 12, ("5.squeeze",)),
        Block("5", "fire", 12, 16, ("6.conv", "7")),  # the residual sum hands its channels on
        Block("6", "residual", 16, 16, ("7",)),
    )


def test_named_by_the_user() -> None:
    net = network("spikingjelly")
    assert [b.name for b in found(net, "[23]")] == ["2", "3"]
    assert [b.name for b in found(net, lambda name, module: isinstance(module, Residual))] == ["6"]
    with pytest.raises(OptionError, match="'fire9' matches no module"):
        found(net, ["fire9"])
    with pytest.raises(ModelError, match=r"'4' can't be removed: it holds no weight layer"):
        found(net, "4")
    outer = nn.Sequential(
        nn.Sequential(layer.Conv2d(3, 4, 3, stride=2), neuron.LIFNode()), layer.Flatten(), layer.Linear(16, 5)
    )
    with pytest.raises(
        ModelError, match=r"'0' can't be removed: it turns \[1, 3, 6, 6\] into \[1, 4, 2, 2\], which no"
    ):
        found(outer, "0")


@MODELS
@pytest.mark.parametrize("repair", ["membrane", "current", None, "reinit"])
def test_removed_mended_and_replayed(framework: str, multi_step: bool, repair: str | None) -> None:
    net = network(framework, multi_step)
    before = snapshot(net)
    small = remove(net, Keep(keep=(1,), blocks=("2", "3", "6")), repair=repair)
    assert same(before, snapshot(net))
    assert gone(small) == ["2", "6"]
    assert small[3].squeeze.in_channels == 8  # what the first convolution puts out
    assert small[3].squeeze.weight.shape == (4, 8, 1, 1)
    fits = repair in ("membrane", "current")
    assert ("3.squeeze" in plan_of(small).origin.get("repaired", [])) == fits
    assert plan_of(small).origin.get("repair") == repair
    again = Plan.from_json(plan_of(small).to_json()).apply(network(framework, multi_step))
    again.load_state_dict(small.state_dict())
    x = DATA[0][0]
    adapter = find_adapter(small)
    with torch.no_grad():
        a, b = (Feed(adapter, x, 4)(m, Feed(adapter, x, 4).first()) for m in (small, again))
    assert torch.equal(a, b)
    snncompress.finetune(small, DATA, timesteps=4)
    assert snncompress.profile(small, DATA, timesteps=4).n_params < snncompress.profile(net, DATA, timesteps=4).n_params
    both = remove(small, "magnitude", 0.25)  # channels of what is left
    assert len(plan_of(both).edits) > 2


def test_bare_removal_keeps_the_first_channels_and_pads_with_zeros() -> None:
    net = network("spikingjelly")
    old = net[3].squeeze.weight.detach().clone()  # 12 inputs
    small = remove(net, Keep(keep=(1,), blocks=("2", "3")), repair=None)
    assert torch.equal(small[3].squeeze.weight, old[:, :8])
    wide = nn.Sequential(  # the block narrows 6 channels to 4, so what follows needs two more
        nn.Sequential(layer.Conv2d(3, 6, 1), neuron.LIFNode()),
        nn.Sequential(layer.Conv2d(6, 4, 1), neuron.LIFNode()),
        layer.Conv2d(4, 2, 1), neuron.LIFNode(), layer.Flatten(), layer.Linear(72, 5),
    )  # fmt: skip
    old = wide[2].weight.detach().clone()
    small = remove(wide, Keep(keep=(), blocks=("1",)), repair=None)
    assert torch.equal(small[2].weight[:, :4], old)
    assert not small[2].weight[:, 4:].any()


def test_reinit_draws_new_weights_where_the_width_changes_and_there_alone() -> None:
    net = network("spikingjelly")
    small = remove(net, Keep(keep=(1,), blocks=("2", "3", "6")), repair="reinit")
    drawn = small[3].squeeze.weight
    assert 0.5 / 8**0.5 < drawn.abs().max() <= 1 / 8**0.5  # uniform within ±1/√(fan-in)
    assert (drawn < 0).any()  # as no weight of the network is
    assert torch.equal(small[7].weight, net[7].weight)
    replayed = plan_of(small).apply(network("spikingjelly"))
    assert torch.equal(replayed[3].squeeze.weight, drawn)


@pytest.mark.parametrize("behind", ["convolution", "linear"])
def test_repair_gives_back_what_a_linear_block_did(behind: str) -> None:
    """x = A x' at every position, so W A gives what W gave: least squares find it, or what does as well on the data."""
    torch.manual_seed(0)
    rest = (
        [layer.Conv2d(5, 6, 3, padding=1, bias=False), neuron.IFNode(), layer.Flatten(), layer.Linear(6 * 36, 5)]
        if behind == "convolution"
        else [layer.Flatten(), layer.Linear(5 * 36, 7), neuron.IFNode(), layer.Linear(7, 5)]
    )
    mix = nn.Sequential(layer.Conv2d(4, 5, 1, bias=False))
    net = nn.Sequential(layer.Conv2d(3, 4, 3, padding=1), neuron.IFNode(), mix, *rest).double()
    data = [(3 * torch.rand(16, 3, 6, 6).double(), torch.arange(16) % 5)]
    options = {"data": data, "timesteps": 4}
    feed = Feed(find_adapter(net), data, 4)
    with torch.no_grad():
        wanted = feed(net, feed.first())
        bare, fitted = (
            feed(snncompress.apply(net, Keep(keep=(), blocks=("2",)), 0.5, None, repair=kind, **options), feed.first())
            for kind in (None, "membrane")
        )
    assert wanted.std() > 0.01
    torch.testing.assert_close(fitted, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bare, wanted, atol=1e-2)


@MODELS
def test_ablation_removes_what_the_loss_misses_least(framework: str, multi_step: bool) -> None:
    net = network(framework, multi_step)
    losses = {}

    def loss_without(name: str) -> float:
        """By hand: the residual block as a wire is a block whose neurons are silent."""
        copy = network(framework, multi_step)
        if name:
            copy[6] = nn.Identity()
        adapter = find_adapter(copy)
        feed = Feed(adapter, DATA, 4)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(feed(copy.eval(), feed.first()).mean(0), DATA[0][1]))

    class Spy(Ablation):
        name = "spy"

        def score_blocks(self, blocks, loss_without):
            scores = super().score_blocks(blocks, loss_without)
            losses.update(zip(blocks, scores, strict=True))
            return scores

    small = remove(net.eval(), Spy(), 0.34)
    assert losses["6"] == pytest.approx(loss_without("6") - loss_without(""), abs=1e-6)
    assert gone(small) == [min(losses, key=losses.get)]


def test_greedy_removal_scores_again_after_every_step() -> None:
    seen = []

    class Spy(Ablation):
        name = "spy"

        def score_blocks(self, blocks, loss_without):
            seen.append(tuple(blocks))
            return list(range(len(blocks)))  # the first goes

    remove(network("spikingjelly"), Spy(blocks=("2", "3", "6")), 0.99, scheduler="iterative")
    assert seen == [("2", "3", "6"), ("2", "3", "6"), ("3", "6")]  # ⌊0.33·3⌋ = 0, then 1, then 2 of 3


def test_fire_takes_fire_modules_only() -> None:
    small = remove(network("spikingjelly"), "fire", 0.99)
    assert set(gone(small)) <= {"2", "3"}
    assert "behind it the widths don't fit" in plan_of(small).skipped["5"]  # 12 channels into a residual sum of 16


class Eight(nn.Sequential):
    def __init__(self) -> None:
        blocks = [FireModule("spikingjelly", 4 if i == 0 else 6, 2, 3) for i in range(8)]
        super().__init__(
            layer.Conv2d(3, 4, 1), neuron.LIFNode(), *blocks, layer.Conv2d(6, 2, 1), neuron.LIFNode(),
            layer.Flatten(), layer.Linear(72, 5),
        )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_the_paper(name: str) -> None:
    if name == "full":
        with pytest.warns(NothingToDoWarning):
            small = remove(Eight(), Keep.named(name))
    else:
        small = remove(Eight(), Keep.named(name))
    # F2 … F9 are modules 2 … 9 here
    assert sorted({*range(2, 10)} - {int(n) for n in gone(small)}) == sorted(SCHEDULES[name])


def test_what_cannot_be() -> None:
    with pytest.raises(OptionError, match="no schedule 'ref_3'"):
        Keep.named("ref_3")
    with pytest.raises(OptionError, match="keeps block number 8 of a network that has 2"):
        remove(network("spikingjelly"), Keep.named("ref_1"))
    with pytest.raises(OptionError, match=r"repair must be 'auto', .* for blocks, 'reinit', not 'project'"):
        remove(network("spikingjelly"), Fire(), repair="project")
    for criterion, why in (("svs", "criterion 'svs' removes no blocks"), (None, "there is no criterion")):
        with pytest.raises(OptionError, match=f"layers behind a removed block, and {why}. Take 'membrane'"):
            remove(network("spikingjelly"), criterion, repair="reinit")
    plain = nn.Sequential(layer.Linear(3, 4), neuron.LIFNode(), layer.Linear(4, 5))
    with pytest.raises(ModelError, match="no block whose place a wire could take"):
        snncompress.apply(plain, "ablation", 0.5, None, data=(torch.rand(4, 3), torch.arange(4)), timesteps=2)
    masked = remove(network("spikingjelly"), "weight_random", 0.5)
    with pytest.raises(PlanError, match="Remove blocks first, then single weights"):
        remove(masked, Ablation(blocks=("2", "6")), 0.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"name": "99"}, {"fresh": "yes"}, {"resized": [{"layer": "3.squeeze", "before": 5, "after": 8}]},
        {"resized": [{"layer": "3.squeeze", "before": 12, "after": 0}]}, {"resized": [{"layer": "1", "before": 12}]},
        {"resized": 3}, {"repair": "glue", "repairs": []}, {"repair": "slice"},
    ],
)  # fmt: skip
def test_damaged_edits_are_refused(damage: dict[str, object]) -> None:
    small = remove(network("spikingjelly"), Keep(keep=(1,), blocks=("2", "3")))
    plan = json.loads(plan_of(small).to_json())
    plan["edits"][0] |= damage
    net = network("spikingjelly")
    before = snapshot(net)
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(plan)).apply(net)
    assert same(before, snapshot(net))


@pytest.mark.parametrize("word", ["project", "slice", "reinit"])
def test_plans_with_the_words_of_earlier_versions_are_read(word: str) -> None:
    small = remove(network("spikingjelly"), Keep(keep=(1,), blocks=("2", "3")), repair="reinit")
    plan = json.loads(plan_of(small).to_json())
    edit = plan["edits"][0]
    edit |= {"repairs": edit.pop("resized"), "repair": word}
    del edit["fresh"]
    old = Plan.from_json(json.dumps(plan))
    (read,) = old.edits
    assert read == snncompress.RemoveBlock("2", (snncompress.Resized("3.squeeze", 12, 8),), fresh=word == "reinit")
    assert Plan.from_json(old.to_json()) == old
    weight = old.apply(network("spikingjelly"))[3].squeeze.weight
    wanted = small[3].squeeze.weight if word == "reinit" else network("spikingjelly")[3].squeeze.weight[:, :8]
    assert torch.equal(weight, wanted)


def test_a_step_traces_once_and_copies_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's copy, and one that meets a sample; per step one that is traced and one that is searched for blocks.

    The result is run once more.

    Repair keeps a copy of what was, and looks at the last network too, which nothing more is removed from.
    """
    counts = {"traces": 0, "copies": 0}
    build, deepcopy = tp.DependencyGraph.build_dependency, copy.deepcopy

    def traced(*args: Any, **options: Any) -> Any:
        counts["traces"] += 1
        return build(*args, **options)

    def copied(thing: Any, *args: Any) -> Any:
        counts["copies"] += isinstance(thing, nn.Module) and len(list(thing.children())) == len(net)
        return deepcopy(thing, *args)

    net = network("spikingjelly")
    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", traced)
    monkeypatch.setattr(copy, "deepcopy", copied)
    remove(net, Ablation(blocks=("2", "3", "6")), 0.34, repair=None)
    assert counts == {"traces": 1, "copies": 5}
    counts.update(traces=0, copies=0)
    remove(net, Ablation(blocks=("2", "3", "6")), 1.0, scheduler=Iterative(steps=3), repair=None)
    assert counts == {"traces": 3, "copies": 9}
    counts.update(traces=0, copies=0)
    remove(net, Ablation(blocks=("2", "3", "6")), 1.0, scheduler=Iterative(steps=3))
    assert counts == {"traces": 4, "copies": 11}
