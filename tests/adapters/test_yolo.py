"""The spiking detector of ``examples/networks``: its sizes, its boxes by hand, compressed with boxes as labels."""

from __future__ import annotations

import math

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

import snncompress
from examples.networks.yolo import Anchors, overlaps, yolo
from tests.end_to_end.test_truths import prune
from tests.equivalence import largest_difference
from tests.networks import Case, liven

ANCHORS = Anchors(32, (((16.0, 16.0),), ((8.0, 8.0), (4.0, 12.0))))  # 4 cells of 16 pixels, 16 of 8 pixels, twice
IMAGES = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[1.0, 2, 3, 18, 20], [3, 20, 20, 28, 29]]), torch.zeros(0, 5)] * 2


def detector() -> nn.Module:
    torch.manual_seed(0)
    net = yolo(num_classes=4, in_channels=1, width=4, anchors=(1, 2))
    functional.set_step_mode(net, "m")
    return net


def test_parameters_at_full_size() -> None:
    def conv(before: int, after: int, kernel: int = 3) -> int:
        return kernel**2 * before * after + 2 * after

    def out(before: int) -> int:
        return (before + 1) * 3 * 15

    backbone = conv(3, 64) + 2 * conv(64, 64)
    backbone += sum(conv(w, 2 * w) + conv(2 * w, 2 * w) + conv(w, 2 * w, 1) for w in (64, 128, 256))
    head = conv(512, 256, 1) + conv(256, 512) + out(512) + conv(256, 128, 1) + conv(384, 256) + out(256)
    with torch.device("meta"):
        assert sum(p.numel() for p in yolo().parameters()) == backbone + head
    assert f"{backbone + head:,} parameters" in (yolo.__doc__ or "")


def test_mask_equivalence() -> None:
    """Everything shrinks but the two layers that put out the boxes."""
    net = detector().double()
    case = liven(Case(net, IMAGES[:2].double(), 2))
    small = prune(case, "firing_rate", ratio=0.4, repair=None)
    assert largest_difference(net, small, case.feed) <= 1e-9
    skipped = snncompress.plan_of(small).skipped
    assert set(skipped) == {"coarse.out", "fine.out"}
    assert all("is the classifier" in why for why in skipped.values())


def test_boxes_are_labels() -> None:
    """Scores from gradients, fine-tuning and training take lists of boxes through ``loss=``, and the loss falls."""
    net = detector()
    liven(Case(net, IMAGES, 2))
    batches = [(IMAGES[:2], BOXES[:2]), (IMAGES[2:], BOXES[2:])]
    options = {"data": batches, "timesteps": 2, "loss": ANCHORS.loss}
    small = snncompress.apply(net, "taylor", {"layer*": 0.5}, 4, finetune=1, repair=None, progress=False, **options)
    assert small.layer4.conv2.weight.shape[:2] == (16, 16)
    assert small.coarse.out.weight.shape == net.coarse.out.weight.shape

    def loss() -> float:
        functional.reset_net(small)
        return float(ANCHORS.loss(small(IMAGES.expand(2, *IMAGES.shape)).detach(), BOXES))

    small.eval()
    before = loss()
    snncompress.finetune(small, batches, epochs=3, lr=1e-2, timesteps=2, loss=ANCHORS.loss, progress=False)
    assert loss() < before


def output_for(wanted: dict[int, tuple[float, ...]], classes: int = 4) -> Tensor:
    """Rows that are sure of nothing but these (x, y, w, h, class)."""
    output = torch.zeros(1, 36, 5 + classes)
    output[..., 4] = -20
    for row, (x, y, w, h, kind) in wanted.items():
        output[0, row, :5] = torch.tensor([math.log(x / (1 - x)), math.log(y / (1 - y)), math.log(w), math.log(h), 20])
        output[0, row, 5 + int(kind)] = 20
    return output


def test_rows_and_pixels_by_hand() -> None:
    """Row 3 is the last cell of stride 16; rows 4 to 19 the first anchor of stride 8, rows 20 to 35 the second."""
    priors = ANCHORS.priors()
    assert priors.shape == (36, 5)
    assert priors[3].tolist() == [16, 16, 16, 16, 16]
    assert priors[4 + 6].tolist() == [16, 8, 8, 8, 8]  # second row, third column
    assert priors[20 + 6].tolist() == [16, 8, 8, 4, 12]
    output = output_for({3: (0.5, 0.25, 1.0, 0.75, 2), 26: (0.75, 0.5, 1.0, 1.0, 0)})
    decoded = ANCHORS.decode(output)
    assert torch.allclose(decoded[0, 3], torch.tensor([16.0, 14, 32, 26]), atol=1e-4)  # centre (24, 20), 16 × 12
    assert torch.allclose(decoded[0, 26], torch.tensor([20.0, 6, 24, 18]), atol=1e-4)  # centre (22, 12), 4 × 12
    (found,) = ANCHORS.detect(output.expand(2, 1, 36, 9))  # as at both timesteps
    assert found[:, 0].sort().values.tolist() == [0, 2]
    assert torch.allclose(found[:, 1], torch.ones(2), atol=1e-4)


def test_loss_by_hand() -> None:
    """What is right in all but the places costs their entropy: x and y are σ(…) = 1/2, 1/4, 3/4, 1/2."""
    output = output_for({3: (0.5, 0.25, 1.0, 0.75, 2), 26: (0.75, 0.5, 1.0, 1.0, 0)})
    boxes = torch.tensor([[2.0, 16, 14, 32, 26], [0, 20, 6, 24, 18]])
    entropy = sum(-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.5, 0.25, 0.75, 0.5))

    def loss(boxes: Tensor) -> float:
        return float(ANCHORS.loss(output, [boxes]))

    assert math.isclose(loss(boxes), entropy, rel_tol=1e-5)
    wrong = boxes.clone()
    wrong[0, 0] = 1  # the class: ln(e^20 + 3) more, and no less than 20
    assert math.isclose(loss(wrong) - entropy, 20, rel_tol=1e-5)
    smaller = boxes.clone()
    smaller[1, 1:4:2] = torch.tensor([20.5, 23.5])  # 3 × 12 about the same centre
    assert math.isclose(loss(smaller) - entropy, math.log(4 / 3) ** 2, rel_tol=1e-4)
    # without a box of its own, a row is told that it is wrong (softplus(20) = 20); a look-alike isn't
    assert math.isclose(loss(boxes[:1]) - sum([math.log(2), 0.562335]), 20, rel_tol=1e-4)
    twin = output.clone()
    twin[0, 4 + 10] = output_for({14: (0.999, 0.5, 2.0, 1.5, 2)})[0, 14]  # the third row's cell: about 16 × 12 too
    assert float(overlaps(ANCHORS.decode(twin)[0, 14:15], boxes[:1, 1:])) > 0.5
    assert math.isclose(float(ANCHORS.loss(twin, [boxes])), entropy, rel_tol=1e-4)
    assert float(ANCHORS.loss(output, [torch.zeros(0, 5)])) == pytest.approx(40, rel=1e-5)


def test_of_boxes_that_overlap_the_best_stays() -> None:
    output = output_for({3: (0.5, 0.25, 1.0, 0.75, 2), 14: (0.999, 0.5, 2.0, 1.5, 2), 26: (0.75, 0.5, 1.0, 1.0, 0)})
    output[0, 14, 4] = 1.0
    (found,) = ANCHORS.detect(output)
    assert len(found) == 2
    output[0, 14, 5:] = output[0, 14, 5:].roll(1)  # of another class
    (found,) = ANCHORS.detect(output)
    assert found[:, 0].tolist()[2] == 3
    assert found[2, 1] == pytest.approx(float(torch.tensor(1.0).sigmoid()), rel=1e-4)
    assert ANCHORS.detect(torch.full((1, 36, 9), -9.0))[0].shape == (0, 6)
