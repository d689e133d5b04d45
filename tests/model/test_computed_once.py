"""Compressed weights are computed once per call of the network, with the gradients of computing them each time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snncompress
from snncompress.model.computed_once import computed_once, evaluating
from snncompress.model.parametrizations import CompressedWeight, compute_once_per_call, mask_weight

KEPT = torch.tensor([[True, False, True], [True, True, False]])
X = torch.tensor([[1.0, 2.0, 3.0]])


class Loop(nn.Module):
    """A network that asks for its weight at each of three timesteps; ``between`` happens after each."""

    def __init__(self, between: Callable[[Loop, Tensor], object] = lambda net, y: None) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        self.between = between
        with torch.no_grad():
            self.fc.weight.copy_(torch.arange(6.0).view(2, 3))
        mask_weight(self.fc, KEPT)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for _ in range(3):
            y = self.fc(x)
            self.between(self, y)
            total = total + (y * y).sum()
        return total

    @property
    def stored(self) -> nn.Parameter:
        found: nn.Parameter = self.fc.parametrizations.weight.original  # type: ignore[union-attr]
        return found


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per weight that was computed."""
    found: list[int] = []
    compute = CompressedWeight._computed
    monkeypatch.setattr(CompressedWeight, "_computed", lambda self, w: (found.append(1), compute(self, w))[1])
    return found


def both(between: Callable[[Loop, Tensor], object] = lambda net, y: None) -> tuple[Loop, Loop]:
    """The same network, its weights kept during a call and not."""
    kept, plain = Loop(between), Loop(between)
    compute_once_per_call(kept)
    return kept, plain


def test_once_per_call_with_the_same_outputs_and_gradients(computations: list[int]) -> None:
    # y = (0·1 + 2·3, 3·1 + 4·2) = (6, 11), three times: 3 · (36 + 121); ∂/∂w = 3 · 2 · y xᵀ where the mask is
    kept, plain = both()
    for net, times in ((kept, 1), (plain, 3)):
        computations.clear()
        loss = net(X)
        assert len(computations) == times
        loss.backward()
        assert loss == 3 * 157
        assert torch.equal(net.stored.grad, 6 * torch.tensor([[6.0], [11.0]]) * X * KEPT)  # type: ignore[arg-type]
    kept.stored.data.zero_()  # which no counter of versions sees
    assert kept(X) == 0
    assert copy.deepcopy(kept)(X) == 0
    assert kept.fc.weight is not kept.fc.weight  # outside


def test_what_happens_between_timesteps_counts() -> None:
    def learn(net: Loop, y: Tensor) -> None:
        y.sum().backward()
        with torch.no_grad():
            net.stored.sub_(net.stored.grad, alpha=0.1)  # type: ignore[arg-type]

    def differentiate(net: Loop, y: Tensor) -> None:
        y.sum().backward()

    def look(net: Loop, y: Tensor) -> None:
        with torch.no_grad():
            net.fc(X)

    for between in (learn, differentiate, look):
        kept, plain = both(between)
        losses = [net(X) for net in (kept, plain)]
        assert torch.equal(*losses)
        if between is look:
            for loss in losses:
                loss.backward()
        assert torch.equal(kept.stored.grad, plain.stored.grad)  # type: ignore[arg-type]


def test_a_weight_that_was_computed_without_gradients_isn_t_used_with_them() -> None:
    class LooksFirst(Loop):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.fc(x)
            return super().forward(x)

    net = LooksFirst()
    compute_once_per_call(net)
    net(X).backward()
    assert torch.equal(net.stored.grad, 6 * torch.tensor([[6.0], [11.0]]) * X * KEPT)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_and_outside(reentrant: bool) -> None:
    class Checkpointed(Loop):
        def forward(self, x: Tensor) -> Tensor:
            steps = [checkpoint(self.fc, x, use_reentrant=reentrant) for _ in range(3)]
            return sum(((y * y).sum() for y in steps), x.new_zeros(()))

    inside, outside = Checkpointed(), Loop()
    for net in (inside, outside):
        compute_once_per_call(net)
    x = X.clone().requires_grad_()
    inside(x).backward()
    checkpoint(outside, x, use_reentrant=reentrant).backward()
    assert torch.equal(inside.stored.grad, 6 * torch.tensor([[6.0], [11.0]]) * X * KEPT)  # type: ignore[arg-type]
    assert torch.equal(outside.stored.grad, inside.stored.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_breaks_off_leaves_nothing_behind(error: type[BaseException], computations: list[int]) -> None:
    def stop(net: Loop, y: Tensor) -> None:
        raise error

    kept, _ = both(stop)
    with pytest.raises(error):
        kept(X)
    kept.stored.data.zero_()
    kept.between = lambda net, y: None
    assert kept(X) == 0
    computations.clear()
    kept.fc(X), kept.fc(X)
    assert len(computations) == 2


def test_a_network_in_another_and_a_network_that_calls_itself(computations: list[int]) -> None:
    inner, _ = both()
    outer = Loop(lambda net, y: inner(X))
    compute_once_per_call(outer)
    assert outer(X) == inner(X) == 3 * 157
    inner.between = lambda net, y: net(X) if len(computations) < 20 else None
    assert inner(X) == 3 * 157


def test_once_per_pass_until_it_is_written_to(computations: list[int]) -> None:
    kept, _ = both()
    with evaluating(kept):
        kept(X), kept(X)
        assert len(computations) == 1
        kept.stored.mul_(2)
        assert kept(X) == 12 * 157
        assert len(computations) == 2
    with computed_once(), torch.inference_mode():
        kept(X), kept(X)
    assert len(computations) == 3


def test_networks_that_apply_plans_and_files_make(tmp_path: object, computations: list[int]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), neuron.IFNode(), nn.Linear(4, 2))

    small = snncompress.apply(build(), None, bits=2, skip=[], quantizer="uniform", data=X, timesteps=2)
    snncompress.save(small, f"{tmp_path}/net.snn")
    again = snncompress.apply(small, "weight_magnitude", 0.5, repair=None, data=X, timesteps=2)
    replayed = snncompress.plan_of(small).apply(build())
    for net in (small, again, replayed, snncompress.load(f"{tmp_path}/net.snn", build()), copy.deepcopy(small)):
        hooks = len(net._forward_pre_hooks), len(net._forward_hooks), len(net._forward_hooks_always_called)
        assert hooks == (1, 1, 1)
        computations.clear()
        net[0].register_forward_hook(lambda layer, args, y: layer.weight.sum() * 0 + y)
        net(X)
        assert len(computations) == 2
    frozen = snncompress.freeze(small, X, timesteps=2)
    assert not frozen._forward_hooks
    assert not frozen._forward_pre_hooks


def test_compiled_networks_compute_what_the_others_do() -> None:
    kept, plain = both()
    compiled = torch.compile(kept, backend="eager", fullgraph=True)
    loss = compiled(X)
    loss.backward()
    assert loss == plain(X)
    assert kept.stored.grad is not None
