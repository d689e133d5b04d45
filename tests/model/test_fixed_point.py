"""A neuron in fixed point does what a few lines of whole numbers do, in every framework, step mode and reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from snncompress import Plan, PlanError, QuantizeStates
from snncompress.model.fixed_point import FixedPoint, nearest

STEP = 0.25
CURRENTS = (torch.randint(-20, 60, (7, 3, 4), generator=torch.Generator().manual_seed(1)) / 16.0).contiguous()
"""Whole numbers of a quarter of the step, ties among them."""


def whole(leak: float, theta: float, reset: str, *, late: bool = False, above: bool = False, shift: int | None = None,
          wrap: bool = False, bits: int = 4) -> Tensor:  # fmt: skip
    """Spikes of q ← q - leak · q + x, to the nearest, ties towards 0, in whole numbers of 2^-14 of the step."""
    one, kept = 2**14, round((1 - leak) * 2**12)
    low, top, t = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, round(theta / STEP)
    q, owed = np.zeros(CURRENTS.shape[1:], dtype=np.int64), np.zeros(CURRENTS.shape[1:], dtype=np.int64)
    spikes = []
    for x in (CURRENTS / STEP * one).numpy().astype(np.int64):
        made = (q - (q >> shift)) * one if shift is not None else q * kept * 4
        made = made + x - owed * one
        q = np.sign(made) * ((np.abs(made) + one // 2 - 1 - 4) // one)  # a tie ends 2^-12 later
        q = (q - low) % (2 * (top + 1)) + low if wrap else q.clip(low, top)
        fired = q > t if above else q >= t
        owed = fired * t if late else owed
        if not late:
            q = np.where(fired, q - t if reset == "subtract" else 0, q) if reset != "none" else q
        spikes.append(fired)
    return torch.tensor(np.stack(spikes)).float()


def jelly(**options: Any) -> Callable[[], nn.Module]:
    return lambda: neuron.LIFNode(decay_input=False, **options)


def leaky(**options: Any) -> Callable[[], nn.Module]:
    return lambda: snn.Leaky(init_hidden=True, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Tensor]] = {
    "LIF": (jelly(tau=2.0), {}, whole(0.5, 1.0, "zero")),
    "LIF, subtracting": (jelly(tau=3.0, v_reset=None), {}, whole(1 / 3, 1.0, "subtract")),
    "LIF, wrapping": (jelly(tau=2.0), {"overflow": "wrap"}, whole(0.5, 1.0, "zero", wrap=True)),
    "LIF, by a shift": (jelly(tau=3.4), {"leak": "shift"}, whole(0.25, 1.0, "zero", shift=2)),
    "PLIF": (
        lambda: neuron.ParametricLIFNode(init_tau=4.0, decay_input=False, v_threshold=0.7),
        {}, whole(0.25, 0.75, "zero"),
    ),
    "IF": (lambda: neuron.IFNode(v_reset=None, v_threshold=0.5), {}, whole(0.0, 0.5, "subtract")),
    "Leaky": (leaky(beta=0.75), {}, whole(0.25, 1.0, "subtract", late=True, above=True)),
    "Leaky, to zero": (
        leaky(beta=0.75, reset_mechanism="zero"), {}, whole(0.25, 1.0, "zero", above=True),
    ),
    "Leaky, at once": (
        leaky(beta=0.75, reset_mechanism="zero", reset_delay=False), {}, whole(0.25, 1.0, "zero", above=True),
    ),
    "Leaky, never": (leaky(beta=0.75, reset_mechanism="none"), {}, whole(0.25, 1.0, "none", above=True)),
    "Lapicque": (
        lambda: snn.Lapicque(R=1.0, C=4.0, time_step=1.0, threshold=0.25, init_hidden=True),
        {"step": (0.0625,)}, whole(0.25, 1.0, "subtract", late=True, above=True),  # a quarter of input, step and θ
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "wanted"), CASES.values(), ids=CASES)
def test_spikes_are_those_of_whole_numbers(make: Any, options: dict[str, Any], wanted: Tensor) -> None:
    net = Plan((QuantizeStates("0", 4, **{"step": (STEP,), **options}),)).apply(nn.Sequential(make()))
    assert 0.05 < float(wanted.mean()) < 0.9
    with torch.no_grad():
        assert torch.equal(torch.stack([net(x) for x in CURRENTS]), wanted)
    if not isinstance(net[0], snn.SpikingNeuron):
        functional.reset_net(net)
        functional.set_step_mode(net, "m")
        assert torch.equal(net(CURRENTS), wanted)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_synaptic_on_a_fine_grid_and_on_a_coarse_one(reset: str) -> None:
    """A current and a potential; where all are whole numbers of quarters anyway, rounding changes nothing."""
    net = nn.Sequential(snn.Synaptic(1.0, 1.0, threshold=2.0, init_hidden=True, reset_mechanism=reset))
    fixed = Plan((QuantizeStates("0", 12, (STEP,)),)).apply(net)
    rounded = (CURRENTS / STEP).round() * STEP - 0.25
    for x in rounded:
        assert torch.equal(fixed(x), net(x))
    assert torch.equal(fixed[0].mem, net[0].mem)
    fixed(torch.full((3, 4), 0.3))
    assert torch.equal(fixed[0].syn, net[0].syn + 0.25)


def test_a_step_for_each_channel() -> None:
    """θ = 1 is 4, 2 and 1 of these steps; a current of 0.45 is 2, 1 and 0 of them."""
    net = Plan((QuantizeStates("0", 8, (0.25, 0.5, 1.0), -3),)).apply(nn.Sequential(neuron.IFNode()))
    spikes = torch.stack([net(torch.full((1, 3, 2, 2), 0.45)) for _ in range(4)])
    assert spikes[:, 0, :, 0, 0].T.tolist() == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert net[0].v[0, :, 0, 0].tolist() == [0, 0, 0]


def test_gradients_pass_straight_through() -> None:
    """v = 0.75 x to the nearest quarter, with the gradient of 0.75 x, saturated or not; θ and leak have theirs."""
    grid, x = FixedPoint(torch.tensor(0.25), 4), torch.tensor([0.9, 9.0], requires_grad=True)
    theta, leak = torch.tensor(0.9, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    v = grid.charge(torch.tensor(1.0), x, grid.leak(leak), 0.75)
    assert v.tolist() == [1.25, 1.75]
    (grid.fire(v, theta, lambda d: 2 * d)).sum().backward()
    assert [t.grad.tolist() for t in (x, theta, leak)] == [[1.5, 1.5], -4.0, -4.0]


def test_a_wide_state_is_exact_where_sums_in_float32_are_not() -> None:
    """Next to 2^19 floats of 32 bits lie a 32nd apart: half a step and 2^-9 more or less would be the same to them."""
    grid = FixedPoint(torch.tensor(1.0), 20)
    v = torch.tensor(2.0**19 - 1)
    assert grid.charge(v, torch.tensor(-(0.5 + 2.0**-9)), grid.leak(0.0), 1.0).item() == 2.0**19 - 2
    assert grid.charge(v, torch.tensor(-(0.5 - 2.0**-9)), grid.leak(0.0), 1.0).item() == 2.0**19 - 1
    assert nearest(torch.tensor(-0.2)).item() == 0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"neuron": "2"}, "no module '2'"),
        ({"neuron": "1"}, "'1' can't be put on a grid: of snnTorch's neurons Leaky, Lap.*; Alpha keeps no potential"),
        ({"bits": 2}, "3 to 32 bits, not 2"),
        ({"step": (0.0,)}, "positive number"),
        ({"overflow": "explode"}, "not 'explode'"),
        ({"axis": 1}, "from -64 to -1"),
    ],
)
def test_what_cant_be_is_refused(edit: dict[str, Any], said: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), snn.Alpha(0.9, 0.8, init_hidden=True))
    data = {"neuron": "1", "bits": 8, "step": [0.5], **edit}
    with pytest.raises(PlanError, match=said):
        Plan((QuantizeStates(**{k: tuple(v) if k == "step" else v for k, v in data.items() if k != "edit"}),)).apply(
            net
        )


def test_not_twice() -> None:
    edit = QuantizeStates("0", 8, (0.5,))
    with pytest.raises(PlanError, match="8 bits already"):
        Plan((edit, edit)).apply(nn.Sequential(neuron.IFNode()))
