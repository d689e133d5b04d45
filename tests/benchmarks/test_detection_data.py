"""Scenes, COCO's and VOC's formats on tiny files, mAP by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for its scripts
import detection_data as detection  # noqa: E402
from datasets import DataMissingError  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from tests.benchmarks.test_datasets import idx  # noqa: E402


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Two images: a full square, and a bar of 10 × 4 pixels."""
    images = np.zeros((2, 28, 28), np.uint8)
    images[0] = 255
    images[1, 4:14, 8:12] = 255
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([3, 8], np.uint8)))
    return tmp_path


def test_scenes(digits: Path) -> None:
    samples = detection.scenes(digits, "train", 40, size=48, most=3)
    again = detection.scenes(digits, "train", 40, size=48, most=3)
    assert {len(boxes) for _, boxes in samples} == {1, 2, 3}
    for (canvas, boxes), (same, _) in zip(samples, again, strict=True):
        assert torch.equal(canvas, same)
        inked = torch.zeros(48, 48, dtype=torch.bool)
        for kind, left, top, right, bottom in boxes.int().tolist():
            ink = canvas[0, top:bottom, left:right] > 0.2
            assert all(bool(edge.any()) for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))  # tight
            assert kind in (3, 8)
            if kind == 3:
                assert right - left == bottom - top >= 14
            inked[top:bottom, left:right] = True
        assert not bool(((canvas[0] > 0.2) & ~inked).any())


def test_batches() -> None:
    samples = [(torch.full((1, 2, 2), float(n)), torch.full((n, 5), float(n))) for n in range(5)]
    batches = detection.Batches(samples, 2)
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert len(batches) == 3
    assert [len(boxes) for _, y in batches for boxes in y] == [0, 1, 2, 3, 4]
    torch.manual_seed(1)
    shuffled = [int(x) for images, _ in detection.Batches(samples, 2, shuffle=True) for x in images[:, 0, 0, 0]]
    assert sorted(shuffled) == [0, 1, 2, 3, 4] != shuffled


def picture(path: Path, wide: int, high: int) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((high, wide, 3), np.uint8)
    pixels[:, : wide // 2] = [255, 0, 0]
    image.fromarray(pixels).save(path)


def test_coco(tmp_path: Path) -> None:
    picture(tmp_path / "val2017" / "a.jpg", 40, 20)
    notes = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "empty.jpg"}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [10, 4, 20, 8], "iscrowd": 0},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(notes))
    pictures = detection.coco(tmp_path, size=80)
    assert (len(pictures), pictures.classes) == (1, ("person", "toothbrush"))
    image, boxes = pictures[0]
    assert boxes.tolist() == [[1, 20, 16, 60, 48]]  # twice as wide, four times as high
    assert image.shape == (3, 80, 80)
    assert image[:, 40, 10].tolist() == pytest.approx([1, 0, 0], abs=0.1)
    assert image[:, 40, 70].tolist() == pytest.approx([0, 0, 0], abs=0.1)
    with pytest.raises(DataMissingError, match=r"cocodataset\.org"):
        detection.coco(tmp_path, "train2017")


def test_voc(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "b.jpg", 20, 10)

    def thing(name: str, box: tuple[int, int, int, int], difficult: int) -> str:
        places = "".join(f"<{at}>{v}</{at}>" for at, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        parts = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        return f"<object><name>{name}</name>{parts}<difficult>{difficult}</difficult><bndbox>{places}</bndbox></object>"

    text = thing("dog", (1, 1, 10, 5), 0) + thing("person", (2, 2, 4, 4), 1)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "b.xml").write_text(f"<annotation>{text}</annotation>")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    pictures = detection.voc(tmp_path, size=20)
    assert pictures[0][1].tolist() == [[11, 0, 0, 10, 10]]
    assert pictures.classes[11] == "dog"
    with pytest.raises(DataMissingError, match="VOC"):
        detection.voc(tmp_path, "train")


def test_mean_average_precision_by_hand() -> None:
    """Two classes. 0: two boxes, found second after a miss; 1: one, found at an overlap of 8/10.

    Precision of class 0 after each guess: 0, 1/2, 1/3 (a second guess at a box that is taken), so it is 1/2 up to
    recall 1/2, which are 51 of COCO's 101 recalls, and 0 beyond. Class 1 has 1 throughout.
    """
    pytest.importorskip("pycocotools")
    wanted = [torch.tensor([[0.0, 0, 0, 10, 10], [0, 20, 0, 30, 10]]), torch.tensor([[1.0, 0, 0, 10, 10]])]
    found = [
        torch.tensor([[0, 0.9, 0, 20, 10, 30], [0, 0.8, 0, 0, 10, 10], [0, 0.7, 1, 0, 10, 10]]),
        torch.tensor([[1, 0.3, 0, 0, 10, 8], [2, 0.9, 0, 0, 10, 10]]),
    ]
    score = detection.mean_average_precision(found, wanted)
    assert score == pytest.approx((0.5 * 51 / 101 + 1) / 2)
    stricter = detection.mean_average_precision(found, wanted, overlap=0.85)
    assert stricter == pytest.approx(0.5 * 51 / 101 / 2)
    assert detection.mean_average_precision([torch.zeros(0, 6)] * 2, wanted) == 0
