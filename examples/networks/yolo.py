"""A spiking detector: ResNet10 with a YOLOv3 head of two scales (Redmon and Farhadi, 2018, as in YOLOv3-tiny).

The pair that the papers use for remote sensing (EMS-YOLO, Su et al., ICCV 2023; QP-SNN). The network puts out
currents, one row of 5 + K numbers for every anchor of every cell; what they mean in pixels, and the loss, is in
:class:`Anchors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import CHANNELS, Neuron, Residual, add_conv, convs, undivided_lif

STRIDES = (16, 8)


@dataclass(frozen=True)
class Anchors:
    """Boxes that predictions are relative to: for each scale, of stride 16 and 8, widths and heights in pixels.

    Row r of the network's output is (x, y, w, h, objectness, K classes) relative to row r of :meth:`priors`: the
    centre is cell + stride · σ(x, y), the size anchor · exp(w, h). Boxes are rows (class, left, top, right, bottom)
    in pixels.
    """

    image_size: int
    sizes: tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]

    def priors(self) -> Tensor:
        """(left, top, stride, width, height) of every row: the cell's corner and stride, the anchor's size."""
        found = []
        for stride, sizes in zip(STRIDES, self.sizes, strict=True):
            ends = torch.arange(0, self.image_size, stride)
            top, left = torch.meshgrid(ends, ends, indexing="ij")
            cells = torch.stack([left, top, torch.full_like(top, stride)], -1).float()
            found += [torch.cat([cells, cells.new_tensor(s).expand(*cells.shape[:2], 2)], -1) for s in sizes]
        return torch.cat([scale.flatten(0, 1) for scale in found])

    def decode(self, output: Tensor) -> Tensor:
        """(left, top, right, bottom) [N, R, 4] of an output [N, R, 5 + K]."""
        priors = self.priors().to(output)
        centre = priors[:, :2] + priors[:, 2:3] * output[..., :2].sigmoid()
        half = priors[:, 3:] * output[..., 2:4].clamp(max=4).exp() / 2
        return torch.cat([centre - half, centre + half], -1)

    def loss(self, output: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """YOLOv3's: cross-entropy of objectness in every row; of place and class, and squared log-sizes, at a box.

        A box belongs to the anchor that is most like it in shape, in the cell that holds its centre. Rows that
        overlap a box by more than half without being its own aren't told that they are wrong. Per image of the batch.
        """
        output = _time_averaged(output)
        wanted, own, spared = self._targets(output, boxes)
        objectness = F.binary_cross_entropy_with_logits(output[..., 4], own.to(output), reduction="none")
        mine, theirs = output[own], wanted[own]
        place = F.binary_cross_entropy_with_logits(mine[:, :2], theirs[:, :2], reduction="sum")
        size = F.mse_loss(mine[:, 2:4], theirs[:, 2:4], reduction="sum")
        kind = F.cross_entropy(mine[:, 5:], theirs[:, 4].long(), reduction="sum")
        return (objectness[~spared].sum() + place + size + kind) / len(output)

    def _targets(self, output: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(x, y, log w, log h, class) of every row, which rows own a box, and which are neither right nor wrong."""
        priors, predicted = self.priors().to(output), self.decode(output.detach())
        wanted = output.new_zeros(*output.shape[:2], 5)
        own = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
        spared = own.clone()
        for image, some in enumerate(boxes):
            if not len(some):
                continue
            some = some.to(output)
            middle, size = (some[:, 1:3] + some[:, 3:]) / 2, (some[:, 3:] - some[:, 1:3]).clamp_min(1)
            smaller = torch.minimum(size[:, None], priors[None, :, 3:]).prod(-1)
            alike = smaller / (size.prod(-1)[:, None] + priors[:, 3:].prod(-1) - smaller)
            offset = (middle[:, None] - priors[:, :2]) / priors[:, 2:3]
            inside = ((offset >= 0) & (offset < 1)).all(-1)
            row = alike.masked_fill(~inside, -1).argmax(1)
            spared[image] = (overlaps(predicted[image], some[:, 1:]) > 0.5).any(1)
            at = offset[torch.arange(len(some)), row].clamp(0, 1)
            wanted[image, row] = torch.cat([at, (size / priors[row, 3:]).log(), some[:, :1]], 1)
            own[image, row] = True
        return wanted, own, spared & ~own

    def detect(self, output: Tensor, least: float = 0.05, overlap: float = 0.5, most: int = 100) -> list[Tensor]:
        """For each image the boxes (class, score, left, top, right, bottom), best first.

        The score is σ(objectness) times the softmax of the class. Of boxes of one class that overlap by more than
        ``overlap`` the best stays.
        """
        output = _time_averaged(output)
        found = []
        for scores, places in zip(
            output[..., 4:5].sigmoid() * output[..., 5:].softmax(-1), self.decode(output), strict=True
        ):
            score, kind = scores.max(-1)
            order = score.argsort(descending=True)[:most]
            order = order[score[order] >= least]
            rows = torch.cat(
                [kind[order, None].to(scores), score[order, None], places[order].clamp(0, self.image_size)], 1
            )
            rivals = (overlaps(rows[:, 2:], rows[:, 2:]) > overlap) & (rows[:, :1] == rows[:, 0])
            stays = torch.ones(len(rows), dtype=torch.bool)
            for row in range(len(rows)):
                if stays[row]:
                    stays[row + 1 :] &= ~rivals[row, row + 1 :].cpu()
            found.append(rows[stays.to(rows.device)])
        return found


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [A, B] of boxes (left, top, right, bottom)."""
    common = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp_min(0).prod(-1)
    both = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1) for boxes in (a, b)]
    return common / (both[0][:, None] + both[1] - common).clamp_min(1e-9)


def _time_averaged(output: Tensor) -> Tensor:
    return output.mean(0) if output.dim() == 4 else output


class Scale(nn.Module):
    """A 3×3 convolution, and a 1×1 convolution that puts out 5 + K currents per anchor, [..., rows, 5 + K]."""

    def __init__(self, before: int, between: int, anchors: int, numbers: int, neuron: Neuron) -> None:
        super().__init__()
        add_conv(self, 1, before, between, 3, neuron=neuron)
        self.anchors, self.out = anchors, layer.Conv2d(between, anchors * numbers, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.lif1(self.bn1(self.conv1(x))))
        return y.unflatten(-3, (self.anchors, -1)).flatten(-2).transpose(-1, -2).flatten(-3, -2)


class Yolo(nn.Module):
    """Maps of stride 16, and of stride 8 with those of stride 16 beside them, each looked at by a :class:`Scale`."""

    def __init__(
        self, num_classes: int, in_channels: int, width: int, anchors: tuple[int, int], neuron: Neuron
    ) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        add_conv(self, 1, in_channels, width, 3, stride=2, neuron=neuron)
        for number in range(1, 5):
            before, after, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
            shortcut = convs((before, after, 1, stride), neuron=neuron) if number > 1 else None
            body = convs((before, after, 3, stride), (after, after, 3), neuron=neuron)
            self.add_module(f"layer{number}", Residual(body, shortcut))
        self.neck = convs((8 * width, 4 * width, 1), neuron=neuron)
        self.coarse = Scale(4 * width, 8 * width, anchors[0], 5 + num_classes, neuron)
        self.up = convs((4 * width, 2 * width, 1), neuron=neuron)
        self.upsample = layer.Upsample(scale_factor=2)
        self.fine = Scale(6 * width, 4 * width, anchors[1], 5 + num_classes, neuron)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif1(self.bn1(self.conv1(x)))
        eighth = self.layer3(self.layer2(self.layer1(x)))
        sixteenth = self.neck(self.layer4(eighth))
        both = torch.cat([self.upsample(self.up(sixteenth)), eighth], CHANNELS)
        return torch.cat([self.coarse(sixteenth), self.fine(both)], -2)


def yolo(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, anchors: tuple[int, int] = (3, 3),
    neuron: Neuron = undivided_lif,
) -> Yolo:  # fmt: skip
    """conv1, layer1 … layer4 of one residual block each, neck, coarse, up, fine; ``anchors`` at stride 16 and 8.

    7,163,290 parameters with ten classes, for images whose size is a multiple of 16.
    """
    return Yolo(num_classes, in_channels, width, anchors, neuron)
