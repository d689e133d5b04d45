"""Images with boxes: scenes made from MNIST's digits, COCO and Pascal VOC as published, and mAP by pycocotools.

A sample is (image [C, S, S] in [0, 1], boxes [n, 5]); a row of boxes is (class, left, top, right, bottom) in pixels.
``Batches(samples, 32)`` yields (images [N, C, S, S], list of N tensors of boxes), as snncompress takes them with a
``loss=``.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PAGES = {"COCO": "https://cocodataset.org/#download", "VOC": "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"}
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

Sample = tuple[Tensor, Tensor]


@dataclass
class Batches:
    """Batches of samples, in another order each time where ``shuffle`` says so."""

    samples: Sequence[Sample]
    size: int = 32
    shuffle: bool = False

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        order = torch.randperm(len(self.samples)) if self.shuffle else torch.arange(len(self.samples))
        for part in order.split(self.size):
            images, boxes = zip(*(self.samples[i] for i in part.tolist()), strict=True)
            yield torch.stack(images), list(boxes)


def scenes(folder: Path, split: str, count: int, size: int = 64, most: int = 4, seed: int = 0) -> list[Sample]:
    """One to ``most`` of MNIST's digits, 14 to 28 pixels high, on a black canvas; boxes are drawn tightly around them.

    Digits overlap where they happen to by no more than two pixels. Training and test scenes have no digit in common.
    """
    images, labels = datasets.mnist(folder, split)
    random = np.random.default_rng(seed)
    return [_scene(images, labels, size, most, random) for _ in range(count)]


def _scene(images: Any, labels: Any, size: int, most: int, random: np.random.Generator) -> Sample:
    canvas, boxes = torch.zeros(1, size, size), []
    for _ in range(int(random.integers(1, most + 1))):
        number, side = int(random.integers(len(images))), int(random.integers(14, 29))
        digit = torch.from_numpy(images[number].astype(np.float32))[None, None] / 255
        digit = F.interpolate(digit, (side, side), mode="bilinear", antialias=True)[0, 0]
        ink = digit > 0.2
        down, right = (torch.nonzero(ink.any(axis)).flatten() for axis in (1, 0))
        digit = digit[down[0] : down[-1] + 1, right[0] : right[-1] + 1]
        for _ in range(10):  # places are tried until one is free
            top, left = (int(random.integers(0, size - length + 1)) for length in digit.shape)
            bottom, end = top + digit.shape[0], left + digit.shape[1]
            if all(min(end, b[3]) - max(left, b[1]) <= 2 or min(bottom, b[4]) - max(top, b[2]) <= 2 for b in boxes):
                canvas[0, top:bottom, left:end] = canvas[0, top:bottom, left:end].maximum(digit)
                boxes.append([int(labels[number]), left, top, end, bottom])
                break
    return canvas, torch.tensor(boxes, dtype=torch.float32)


@dataclass
class Pictures(Sequence[Sample]):
    """Files of images with the boxes in them, read when asked for, and stretched to ``size`` × ``size``."""

    size: int
    classes: tuple[str, ...]
    found: list[tuple[Path, list[list[float]]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, number: Any) -> Any:
        from PIL import Image

        path, boxes = self.found[number]
        with Image.open(path) as image:
            wide, high = image.size
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), np.float32) / 255
        scaled = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        scaled[:, 1:] *= torch.tensor([self.size / wide, self.size / high]).repeat(2)
        return torch.from_numpy(pixels).permute(2, 0, 1), scaled


def coco(folder: Path, split: str = "val2017", size: int = 416) -> Pictures:
    """folder/annotations/instances_val2017.json and folder/val2017/*.jpg; classes are numbered by their ids' order.

    Boxes of crowds, and images without a box, are left out.
    """
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise _missing("COCO", path)
    notes = json.loads(path.read_text())
    categories = sorted(notes["categories"], key=lambda category: category["id"])
    number = {category["id"]: place for place, category in enumerate(categories)}
    boxes: dict[int, list[list[float]]] = {}
    for note in notes["annotations"]:
        left, top, wide, high = note["bbox"]
        if not note.get("iscrowd", 0) and wide > 0 and high > 0:
            box = [number[note["category_id"]], left, top, left + wide, top + high]
            boxes.setdefault(note["image_id"], []).append(box)
    found = [(folder / split / i["file_name"], boxes[i["id"]]) for i in notes["images"] if i["id"] in boxes]
    return Pictures(size, tuple(category["name"] for category in categories), found)


def voc(folder: Path, split: str = "val", size: int = 416) -> Pictures:
    """folder (VOC2012) with Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/val.txt.

    Boxes that are marked as difficult are left out. Pixels are counted from 1 there, the last one included.
    """
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise _missing("VOC", path)
    found = []
    for name in path.read_text().split():
        boxes = []
        for thing in ElementTree.parse(folder / "Annotations" / f"{name}.xml").iter("object"):
            if thing.findtext("difficult", "0").strip() == "1":
                continue
            left, top, right, bottom = (
                float(thing.findtext(f"bndbox/{at}", "")) for at in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append([float(VOC_CLASSES.index(thing.findtext("name", ""))), left - 1, top - 1, right, bottom])
        found.append((folder / "JPEGImages" / f"{name}.jpg", boxes))
    return Pictures(size, VOC_CLASSES, found)


def _missing(name: str, path: Path) -> datasets.DataMissingError:
    return datasets.DataMissingError(
        f"No {path}. Get {name} from {PAGES[name]}, unpack it, and name the folder that it makes."
    )


def mean_average_precision(found: Sequence[Tensor], wanted: Sequence[Tensor], overlap: float = 0.5) -> float:
    """mAP at this overlap, in [0, 1]: COCO's evaluation, over the classes that are there.

    ``found`` are for each image the rows (class, score, left, top, right, bottom), ``wanted`` its boxes. Needs
    pycocotools (``pip install "snncompress[detection]"``).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def lying(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
        return {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}

    truths = [
        {"image_id": image, "category_id": int(kind), "iscrowd": 0, **lying(*place)}
        for image, boxes in enumerate(wanted)
        for kind, *place in boxes.tolist()
    ]
    guesses = [
        {"image_id": image, "category_id": int(kind), "score": score, **lying(*place)}
        for image, rows in enumerate(found)
        for kind, score, *place in rows.tolist()
    ]
    if not guesses or not truths:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image} for image in range(len(wanted))],
            "categories": [{"id": kind} for kind in sorted({truth["category_id"] for truth in truths})],
            "annotations": [{"id": number, **truth} for number, truth in enumerate(truths, start=1)],
            "info": {},
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(guesses), "bbox")
        evaluation.params.iouThrs = np.array([overlap])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # [recalls, classes], -1 where a class isn't there
    return float(precision[:, (precision > -1).any(0)].mean())
