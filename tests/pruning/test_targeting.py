"""A network taken to a chip by one call, or an error that says what stands in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from snncompress_rescaw import ReScaW
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snncompress
from snncompress import FoldNorm, OptionError, Plan, PlanError, fits, plan_of

EVENTS = torch.rand(2, 1, 2, 32, 32, generator=torch.Generator().manual_seed(0)).round()


def net(*, norms: bool = False, leaky: bool = False) -> nn.Module:
    """96 channels of 32 × 32 are 96 Ki neurons, 96 · 40 kernels of 3 × 3 take 96 · 64 · 16 words: 96 Ki."""
    torch.manual_seed(0)

    def block(into: int, out: int) -> list[nn.Module]:
        spiking = neuron.LIFNode(v_threshold=0.2) if leaky else neuron.IFNode(v_threshold=0.2)
        norm = [layer.BatchNorm2d(out)] if norms else []
        return [layer.Conv2d(into, out, 3, padding=1, bias=False), *norm, spiking, layer.AvgPool2d(4)]

    head = [layer.Flatten(), layer.Linear(40 * 4, 10, bias=False), neuron.IFNode(v_threshold=0.2)]
    model = nn.Sequential(*block(2, 96), *block(96, 40), *head)
    functional.set_step_mode(model, "m")
    return model.eval()


def applied(model: nn.Module, **options: Any) -> nn.Module:
    usual = {"criterion": "magnitude", "data": EVENTS, "target": "speck", "repair": None}
    return snncompress.apply(model, **{**usual, **options})


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model if isinstance(m, nn.Conv2d)]


def test_only_what_the_chip_cannot_hold_goes() -> None:
    """64 channels of 1 Ki neurons; then 64 · f · 16 words fit 64 Ki with all 40, which take the addresses of 64."""
    model = net()
    small = applied(model)
    assert not fits(model, "speck", data=EVENTS)
    assert fits(small, "speck", data=EVENTS)
    assert widths(small) == [64, 40]
    assert plan_of(small).skipped["3"] == "the target takes nothing from it"
    bits = {edit.layer: edit.bits for edit in plan_of(small).edits if isinstance(edit, snncompress.QuantizeWeights)}
    assert bits == {"0": 7, "3": 4, "7": 7}  # as asked, and what is held of the first and the last
    assert plan_of(small).origin["target"] == {"name": "speck", "options": {}}


def test_states_count_in_what_weights_do() -> None:
    """Of averages of 4 × 4 spikes one is a sixteenth of the weights' step; 2^15 of them are more than 16 bits hold."""
    model = net()
    model[4].v_threshold = 1e6
    small = applied(model)
    assert not hasattr(small[4], "state_grid")
    for weights, fires, count in ((0, 1, 1), (7, 8, 16)):
        least = small[weights].weight.abs().min()  # odd numbers, the least of which is 1
        assert small[fires].state_grid.bits == 16
        assert torch.allclose(small[fires].state_grid.step * count, least, rtol=1e-5)


def test_with_a_budget_both_hold() -> None:
    small = applied(net(), budget={"params": 0.3})
    dense, now = (snncompress.profile(model, EVENTS).n_params for model in (net(), small))
    assert now <= 0.3 * dense
    assert fits(small, "speck", data=EVENTS)
    assert widths(small)[0] <= 64


def test_what_may_go_may_be_too_little() -> None:
    with pytest.raises(OptionError, match=r"'speck' can't be met: with all gone that may go.*words of neuron memory"):
        applied(net(), ratio=0.1)
    with pytest.raises(OptionError, match=r"with all gone that may go"):
        applied(net(), criterion="weight_magnitude", ratio=0.9)  # what is 0 takes its word, too
    with pytest.raises(OptionError, match=r"few bits alone, and skip= leaves '0' at 32"):
        applied(net(), skip={"quantize": ["0"], "prune": []})


@pytest.mark.parametrize(
    ("criterion", "cause"),
    [(None, "criterion=None removes nothing"), ("weight_magnitude", "'weight_magnitude' removes single weights")],
)
def test_what_does_not_narrow_layers_is_the_cause(criterion: str | None, cause: str) -> None:
    with pytest.raises(OptionError, match=f"too much still: .*Likely cause: .*{cause}"):
        applied(net(), criterion=criterion)


def test_what_compression_cannot_change_is_said_first() -> None:
    with pytest.raises(OptionError, match=r"What is left to do: '0', '3': neurons lif, the chip has if"):
        applied(net(leaky=True), finetune=lambda model: pytest.fail("too late"))


def test_batch_norms_are_folded_where_a_layer_has_one_scale() -> None:
    model = net(norms=True)
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
    small = applied(model, bits=None)
    assert plan_of(small).edits[:2] == (FoldNorm("0", "1"), FoldNorm("4", "5"))
    assert fits(small, "speck", data=EVENTS)
    fresh = plan_of(small).apply(net(norms=True))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh.eval()(EVENTS), small(EVENTS))
    wide = model.double()
    folded = Plan(plan_of(small).edits[:2]).apply(wide)
    assert isinstance(folded[1], nn.Identity)
    assert torch.equal(folded(EVENTS.double()), wide(EVENTS.double()))


def test_folds_are_kept_in_files_and_checkpoints(tmp_path: Path) -> None:
    small = applied(net(norms=True), checkpoint=tmp_path / "run")
    again = applied(net(norms=True), checkpoint=tmp_path / "run")
    assert plan_of(again) == plan_of(small)
    snncompress.save(small, tmp_path / "small.safetensors")
    loaded = snncompress.load(tmp_path / "small.safetensors", into=net(norms=True)).eval()
    wanted = small(EVENTS)
    assert torch.equal(again(EVENTS), wanted)
    assert torch.equal(loaded(EVENTS), wanted)


def test_a_fold_is_refused_elsewhere() -> None:
    with pytest.raises(PlanError, match="can't be folded into 0"):
        FoldNorm("0", "1").check(net())
    with pytest.raises(PlanError, match="no plain weight any more"):
        FoldNorm("0", "1").check(snncompress.apply(net(norms=True), None, data=EVENTS, skip=[], repair=None))


def test_a_quantizer_of_ones_own_is_left_as_it_is() -> None:
    with pytest.raises(OptionError, match="scales of its weights one per channel"):
        applied(net(), quantizer=ReScaW())


def test_a_chip_that_holds_floats_asks_for_no_bits() -> None:
    small = applied(net(), bits=None, target="spinnaker2")
    assert plan_of(small).edits == ()
