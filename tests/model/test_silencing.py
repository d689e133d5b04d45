"""Channels that are silent for a while: the network without them, though nothing is cut and their weights stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

from snncompress import PlanError, RemoveChannels
from snncompress.contract.detection import find_adapter
from snncompress.model.copying import private_copy
from snncompress.model.edits import SilenceChannels, edit_from_dict
from snncompress.model.network import ChannelGroup, without
from snncompress.model.parametrizations import mask_weight
from snncompress.model.silencing import give_voice, gradients_through_masks, silence_spikes
from snncompress.structure.tracing import trace
from tests.networks import Case
from tests.structure.test_streams import ms_resnet, padded_by_a_map, without_a_neuron_at_the_end


def recurrent() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), snn.RLeaky(beta=0.5, threshold=0.1, linear_features=12, init_hidden=True),
        nn.Linear(12, 5),
    )  # fmt: skip


def norm_behind_the_neuron() -> nn.Module:
    """Silent channels reach the last layer as constants, which the cut puts on its bias."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), neuron.IFNode(v_threshold=0.1), layer.BatchNorm1d(12), nn.Linear(12, 5)
    )


def removed(model: nn.Module, adapter: object, silent: list[tuple[ChannelGroup, Tensor]]) -> nn.Module:
    groups = [group for group, _ in silent]
    for number, (_, positions) in enumerate(silent):
        RemoveChannels.of(model, groups[number], positions).apply(model, adapter)
        groups = without(groups, number, positions)
    return model


NETS = [padded_by_a_map, without_a_neuron_at_the_end, recurrent, norm_behind_the_neuron]


@pytest.mark.parametrize("build", NETS)
def test_silent_is_removed_and_speaking_again_is_as_before(build: Callable[[], nn.Module]) -> None:
    dtype = torch.float32 if build is recurrent else torch.float64  # snnTorch makes its states in float32
    case = Case(build().to(dtype).eval(), torch.rand(3, 1, 8, 8, dtype=dtype), 4)
    adapter = find_adapter(case.model)
    network = trace(case.model, adapter, case.feed.example())
    assert network.groups
    silent = [(group, torch.randperm(group.size)[: group.size // 2].sort().values) for group in network.groups]
    work = private_copy(case.model, adapter)

    def out(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = case.feed(model, case.feed.first())
        adapter.reset(model)
        return result

    dense = out(work)
    edit = SilenceChannels.of(work, silent, network.direct)
    edit_from_dict(edit.to_dict()).apply(work, adapter)  # as from a checkpoint
    cut = removed(private_copy(case.model, adapter), adapter, silent)

    quiet = out(work)
    torch.testing.assert_close(quiet, out(cut), rtol=1e-5, atol=1e-6)
    with gradients_through_masks(work):
        assert torch.equal(out(work), quiet)
    assert not torch.allclose(quiet, dense)
    SilenceChannels(()).apply(work, adapter)
    assert torch.equal(out(work), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in work.modules())


def test_gradients_reach_what_is_masked_only_where_they_pass() -> None:
    """One neuron, two, one output, all fire: s = 1, out = Σ v s with v = (2, 3), and every neuron is a bent wire.

    So ∂out/∂v = s = (1, 1); ∂out/∂w = v for the two weights w = (1, 1), and Σ v w for the first, over those who speak.
    """

    def wire() -> nn.Module:
        return neuron.IFNode(v_threshold=1.0, surrogate_function=lambda x: (x >= 0).to(x) + x - x.detach())

    net = nn.Sequential(
        nn.Linear(1, 1, bias=False), wire(), nn.Linear(1, 2, bias=False), wire(), nn.Linear(2, 1, bias=False)
    )
    with torch.no_grad():
        for number, weight in ((0, [[1.0]]), (2, [[1.0], [1.0]]), (4, [[2.0, 3.0]])):
            net[number].weight.copy_(torch.tensor(weight))
    adapter = find_adapter(net)
    network = trace(net, adapter, Case(net, torch.ones(1, 1), 1).feed.example())
    group = next(group for group in network.groups if group.size == 2)

    def gradients() -> tuple[float, list[float], list[float], list[float]]:
        net.zero_grad()
        adapter.reset(net)
        value = net(torch.ones(1, 1))
        value.sum().backward()
        return float(value.detach()), *(p.grad.flatten().tolist() for p in net.parameters())

    assert gradients() == (5.0, [5.0], [2.0, 3.0], [1.0, 1.0])
    SilenceChannels.of(net, [(group, torch.tensor([1]))], network.direct).apply(net, adapter)
    assert gradients() == (2.0, [2.0], [2.0, 0.0], [1.0, 0.0])
    with gradients_through_masks(net):
        assert gradients() == (2.0, [2.0], [2.0, 3.0], [1.0, 0.0])
    give_voice(net)
    mask_weight(net[4], torch.tensor([[True, False]]))  # as RigL has it: the weight is 0, its gradient the spike's
    assert gradients() == (2.0, [2.0], [2.0, 0.0], [1.0, 0.0])
    with gradients_through_masks(net):
        assert gradients() == (2.0, [2.0], [2.0, 0.0], [1.0, 1.0])
    assert gradients() == (2.0, [2.0], [2.0, 0.0], [1.0, 0.0])


def test_another_architecture_is_refused() -> None:
    net = ms_resnet()
    adapter = find_adapter(net)
    network = trace(net, adapter, Case(net, torch.rand(1, 1, 8, 8), 1).feed.example())
    edit = SilenceChannels.of(net, [(network.groups[0], torch.tensor([1]))], network.direct)
    assert edit.describe() == "channels silent: 0.0: 1 of 6, 1.body.3.0: 1 of 6"
    wider = SilenceChannels(tuple(replace(piece, width=9) for piece in edit.slices))
    with pytest.raises(PlanError, match=r"0\.0 is a Conv2d without 9 output channels"):
        wider.apply(net, adapter)
    with pytest.raises(PlanError, match="has no module"):
        edit.apply(recurrent(), adapter)


@pytest.mark.parametrize(("time", "axis"), [(-1, 1), (3, 1), (0, 2), (None, 1)])
def test_spikes_fall_silent_wherever_time_stands(time: int | None, axis: int) -> None:
    """-2 in [N, C, L] of one timestep is 1 in [N, C, L, T], and 2 in [T, N, C, L]."""
    module, x = nn.Identity(), torch.ones((2, 4, 4) if time is None else (4, 4, 4, 4))
    silence_spikes(module, torch.tensor([0, 3]), -2, time)
    assert torch.equal(module(x).movedim(axis, 0)[[0, 3]], torch.zeros_like(x.movedim(axis, 0)[[0, 3]]))
    assert module(x).movedim(axis, 0)[[1, 2]].eq(1).all()
