"""The loss that gradients come from: cross-entropy, or the user's own."""

from __future__ import annotations

import pytest
import snntorch.functional as SF
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snncompress
from snncompress import DataError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from tests.pruning.checkpointed_run import network

X, Y = 6 * torch.rand(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4


def compress(framework: str, criterion: str, loss: object, **options: object) -> nn.Module:
    net = network(framework)
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.weight.abs_()  # so that every neuron fires
    return snncompress.apply(net, criterion, 0.5, None, data=(X, Y), timesteps=3, loss=loss, skip=[], **options)


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
@pytest.mark.parametrize("criterion", ["cqp", "taylor"])
def test_cross_entropy_by_hand_is_the_default(framework: str, criterion: str) -> None:
    def by_hand(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.mean(0), y)

    plans = [snncompress.plan_of(compress(framework, criterion, loss)).edits for loss in (None, by_hand)]
    assert plans[0] == plans[1]


def test_another_loss_finds_other_weights_critical() -> None:
    def first_class_only(output: Tensor, y: Tensor) -> Tensor:
        return output[..., 0].square().mean()

    small = compress("spikingjelly", "weight_gradient", first_class_only)
    last = small[5].weight  # the readout: no gradient reaches classes 1 to 3, so class 0 is kept where neurons fire
    assert int(last[0].ne(0).sum()) >= 6
    other = compress("spikingjelly", "weight_gradient", None)
    assert not torch.equal(last.eq(0), other[5].weight.eq(0))


def test_snntorch_losses_fit() -> None:
    small = compress("snntorch", "cqp", SF.ce_rate_loss(), finetune=1)
    assert sum(int((small[i].weight == 0).sum()) for i in (0, 3, 5)) == (16 * 12 + 12 * 8 + 8 * 4) // 2


def test_the_trainer_minimises_the_loss_it_is_given() -> None:
    net = network("spikingjelly")

    def output_to_three(output: Tensor, y: Tensor) -> Tensor:
        return (output.mean(0) - 3).square().mean()

    def distance() -> float:
        feed = Feed(find_adapter(net), (X, Y), 3)
        with torch.no_grad():
            return float(output_to_three(feed(net, feed.first()), Y))

    before = distance()
    snncompress.finetune(net, (X, Y), epochs=60, lr=0.02, timesteps=3, loss=output_to_three)
    assert distance() < 0.2 * before


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, y: output, r"scalar that depends on the model's weights, not shape \[3, 12, 4\]"),
        (lambda output, y: 1.0, "not float"),
        (lambda output, y: output.mean().detach(), r"not shape \[\].*detached"),
        (lambda output, y: output[99], r"loss\(output, y\) failed: IndexError"),
        ("cross_entropy", r"loss must be callable as loss\(output, y\), not 'cross_entropy'"),
    ],
)
def test_what_is_no_loss(loss: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        compress("spikingjelly", "cqp", loss)


def test_a_loss_needs_labels() -> None:
    with pytest.raises(DataError, match="needs labels, and these data have none"):
        snncompress.finetune(network("spikingjelly"), X, timesteps=3, loss=lambda output, y: output.mean())
