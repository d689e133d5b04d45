"""What is masked may come back: exactly as many as the schedule says, by the gradient, and for good in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snncompress_schedules import PruneRegrow
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snncompress
from snncompress import DataError, OptionError, PluginError
from snncompress.extend import Scheduler
from snncompress.model.parametrizations import stored_weight, weight_mask
from snncompress.model.silencing import Silencer
from tests.equivalence import largest_difference, same, snapshot
from tests.networks import Case
from tests.structure.test_streams import ms_resnet
from tests.toy import Charge, ToyAdapter

HALF = PruneRegrow(regrow=0.5, decay="constant")


def toy() -> tuple[nn.Module, dict[str, Any]]:
    """One input of 1, four neurons with weights 1, 2, 3, 4 that all fire once, one output that adds them by weights c.

    The loss is the output, the surrogate gradient 1: ∂L/∂w_f = c_f for the weight of neuron f, which is also the
    gradient of a scale of 1 on it, over w_f.
    """
    net = nn.Sequential(nn.Linear(1, 4, bias=False), Charge(0.5), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        net[2].weight.copy_(torch.tensor([[0.1, 1.0, 0.2, 0.1]]))
    data = torch.ones(1, 1, 1), torch.zeros(1)
    options = {"data": data, "loss": lambda out, y: out.sum(), "adapter": ToyAdapter(), "bits": None, "skip": []}
    return net, options | {"repair": None, "progress": False}


def test_channels_go_and_come_back_by_hand() -> None:
    """Half of 4 channels: 0.5 · 19/27 and 0.5 · 26/27 of 4 make 2 in every step; ⌊0.5 · 2⌋ = 1 is exchanged.

    Step 1: magnitude masks 0, 1, 2, whose scales have gradients 0.1, 2, 0.6: 1 comes back. Then c_2 becomes 5. Step 2:
    0 and 2 stay masked and 1, the lower of 1 and 3, goes; gradients 0.1, 2, 15: 2 comes back. Step 3 cuts 0 and 1.
    """
    net, options = toy()
    heard: list[float] = []

    def tune(model: nn.Module) -> None:
        heard.append(round(model(torch.ones(1, 1, 1)).item(), 4))
        if len(heard) == 1:
            assert torch.equal(model[0].weight, net[0].weight)  # their state is kept
            with torch.no_grad():
                model[2].weight[0, 2] = 5.0

    before = snapshot(net)
    with torch.no_grad():
        small = snncompress.apply(net, "magnitude", 0.5, scheduler=HALF, finetune=tune, **options)
    assert heard == [1.1, 5.1, 5.1]  # c_1 + c_3 while 0 and 2 are silent, c_2 + c_3 while 0 and 1 are, or are gone
    assert same(before, snapshot(net))
    plan = snncompress.plan_of(small)
    assert [type(edit).__name__ for edit in plan.edits] == ["RemoveChannels"]
    assert plan.removed_channels()["0"] == [0, 1]
    assert small[0].weight.tolist() == [[3.0], [4.0]]
    assert not any(isinstance(hook, Silencer) for m in small.modules() for hook in m._forward_hooks.values())
    assert plan.apply(net, ToyAdapter())[2].weight.shape == (1, 2)


def test_single_weights_go_and_come_back_by_hand() -> None:
    """0.75 of 4 weights: ⌊0.75 · 19/27 · 4⌋ = 2, ⌊0.75 · 26/27 · 4⌋ = 2 and 3.

    As above, but by gradients 0.1, 1, 0.2, and then 5. What comes back in a later step starts from 0.
    """
    net, options = toy()
    weights: list[list[float]] = []

    def tune(model: nn.Module) -> None:
        weights.append(model[0].weight.flatten().tolist())
        with torch.no_grad():
            model[2].weight[0, 2] = 5.0
            stored_weight(model[0])[2] = 7.0  # no optimizer knows of masks
        assert model[0].weight[2].item() == (0.0 if len(weights) == 1 else 7.0)

    small = snncompress.apply(net, "weight_magnitude", {"0": 0.75}, scheduler=HALF, finetune=tune, **options)
    assert weights == [[0.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 7.0, 0.0]]
    plan = snncompress.plan_of(small)
    assert len(plan.edits) == 1
    assert weight_mask(plan.apply(net, ToyAdapter())[0]).flatten().tolist() == [False, False, True, False]


def test_what_an_earlier_call_removed_stays_away() -> None:
    """Weight 0 is gone before; of 0, 1 and 2 it has the largest gradient, and 1 comes back."""
    net, options = toy()
    with torch.no_grad():
        net[2].weight[0, 0] = 9.0
    sparse = snncompress.apply(net, "weight_magnitude", {"0": 0.25}, **options)
    kept: list[list[bool]] = []
    again = snncompress.apply(
        sparse, "weight_magnitude", {"0": 0.75}, scheduler=HALF, **options,
        finetune=lambda model: kept.append(weight_mask(model[0]).flatten().tolist()),
    )  # fmt: skip
    assert kept[0] == [False, True, False, True]
    replayed = snncompress.plan_of(again).apply(net, ToyAdapter())
    assert torch.equal(weight_mask(replayed[0]), weight_mask(again[0]))


def silent_channels(model: nn.Module) -> dict[str, int]:
    return {
        name: len(hook.indices)
        for name, m in model.named_modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if isinstance(hook, Silencer)
    }


def test_coupled_layers_of_a_stream_are_masked_and_brought_back_as_one() -> None:
    net = ms_resnet().double().eval()
    functional.set_step_mode(net, "s")
    case = Case(net, torch.rand(4, 1, 8, 8, dtype=torch.float64), 3)
    seen: list[tuple[dict[str, int], dict[str, Tensor]]] = []

    def look(model: nn.Module) -> None:
        seen.append((silent_channels(model), {k: v.clone() for k, v in model.state_dict().items()}))

    small = snncompress.apply(
        net, "sca", 0.5, None, data=(case.x, torch.arange(4) % 3), timesteps=3, finetune=look, repair=None, skip=[],
        scheduler=PruneRegrow(steps=2, regrow=0.9), progress=False,
    )  # fmt: skip
    # ⌈0.4375 · 6⌉ = 3 of the first stream, which two neurons and a shortcut read, ⌈0.4375 · 8⌉ = 4 of the second
    assert {n: seen[0][0][n] for n in ("1.body.0", "2.body.0", "2.down.0", "3.body.0", "4")} == {
        "1.body.0": 3, "2.body.0": 3, "2.down.0": 3, "3.body.0": 4, "4": 4,
    }  # fmt: skip
    assert all(torch.equal(seen[0][1][k], v) for k, v in net.state_dict().items())
    assert seen[1][0] == {}
    assert small[3].body[3][0].weight.shape == (4, 4, 3, 3)
    assert largest_difference(net, small, case.feed) < 1e-9


def test_repair_leaves_alone_what_reads_silent_channels() -> None:
    """All four fire every time and make 1.4. 0 and 2 are silent first: 1 and 3 take on 0.15 each. Then 1 goes too."""
    net, options = toy()
    weights: list[Tensor] = []
    options |= {"repair": "current", "data": (torch.rand(64, 1, 1) + 0.5, torch.zeros(64))}
    small = snncompress.apply(
        net, "magnitude", 0.55, scheduler=PruneRegrow(steps=2, regrow=0.5, decay="constant"), **options,
        finetune=lambda m: weights.append(m[2].weight.detach().clone()),
    )  # fmt: skip
    assert torch.equal(weights[0][:, [0, 2]], net[2].weight[:, [0, 2]])
    assert weights[0][0, [1, 3]].tolist() == pytest.approx([1.15, 0.25], rel=0.01)
    assert small[2].weight.tolist() == [[pytest.approx(1.4, rel=0.01)]]


def made(**attributes: Any) -> Scheduler:
    return type("Made", (PruneRegrow,), {"name": "made", **attributes})()


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"finetune": None}, OptionError, "lets what it brings back prove itself in training.*pass finetune="),
        ({"finetune": 0}, OptionError, "there is none: pass finetune="),
        ({"data": torch.ones(1, 1, 1)}, DataError, "no labels.*'prune_regrow', which brings back by gradients"),
        ({"criterion": "ablation"}, OptionError, "brings back channels or single weights.*'ablation' removes blocks"),
        ({"scheduler": made(regrown=lambda *_: 2)}, PluginError, "says that 2 comes back in step 1 of 3"),
        ({"scheduler": made(regrown=lambda *_: 1 / 0)}, PluginError, r"failed in regrown\(\) at step 1.*ZeroDivision"),
        ({"scheduler": made(grows={"channel": "lamp"})}, PluginError, "by 'lamp', which scores a 'weight'"),
        ({"scheduler": made(grows={"channel": "lam"})}, OptionError, "There is no criterion 'lam'"),
    ],
)
def test_what_cannot_be(how: dict[str, Any], error: type[Exception], said: str) -> None:
    net, options = toy()
    settings = {"criterion": "magnitude", "scheduler": "prune_regrow", "finetune": lambda model: None, **options, **how}
    with pytest.raises(error, match=said):
        snncompress.apply(net, ratio=0.5, **settings)


@pytest.mark.parametrize("criterion", ["sca", "weight_magnitude"])
def test_trained_in_between_it_is_exact_and_the_same_every_time(criterion: str) -> None:
    def run() -> tuple[nn.Module, list[int]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 20), neuron.IFNode(), nn.Linear(20, 10), neuron.IFNode(), nn.Linear(10, 3))
        out: list[int] = []

        def tune(model: nn.Module) -> None:
            masks = [weight_mask(model[number]) for number in (0, 2, 4)]
            silent = silent_channels(model)
            out.append(sum(silent.get(n, 0) for n in "13") + sum(int((~m).sum()) for m in masks if m is not None))
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                functional.reset_net(model)
                nn.functional.cross_entropy(sum(model(x) for _ in range(4)), y).backward()
                optimizer.step()

        x, y = 2 * torch.rand(16, 8), torch.arange(16) % 3
        small = snncompress.apply(
            net, criterion, 0.5, None, data=(x, y), timesteps=4, scheduler=PruneRegrow(steps=3, regrow=0.5),
            finetune=tune, skip=[], progress=False,
        )  # fmt: skip
        return small, out

    (a, counts), (b, _) = run(), run()
    # shares 0.5 · 19/27 and 0.5 · 26/27: of 20 and 10 channels 8 + 4 and 10 + 5; of 390 weights 137, 187 and 195
    assert counts == ([12, 15, 0] if criterion == "sca" else [137, 187, 195])
    assert snncompress.plan_of(a) == snncompress.plan_of(b)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
