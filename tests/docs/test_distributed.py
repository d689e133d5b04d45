"""docs/distributed.md: its code runs as it is written, in Lightning and in Accelerate."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import snncompress

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text()
SETUP, LIGHTNING, ACCELERATE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def imported(name: str) -> None:
    """Skips, with the reason, where it can't be; what it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} isn't installed: pip install {name}")


@pytest.mark.parametrize(
    ("name", "block"),
    [pytest.param("lightning", LIGHTNING, marks=pytest.mark.slow), ("accelerate", ACCELERATE)],  # slow to import
)
def test_apply_finetune_and_load_inside(
    name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision_ops: None
) -> None:
    imported(name)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "page"}
    exec(SETUP, space)
    original = {key: value.clone() for key, value in space["model"].state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of workers and loggers
        exec(block, space)
    small = space["small"]
    assert small.layers[0].out_channels == 4
    assert all(len(channel.unique()) <= 16 for channel in small.layers[2].weight)
    assert all(torch.equal(value, original[key]) for key, value in space["model"].state_dict().items())
    bare = snncompress.apply(space["model"], "svs", ratio=0.5, bits=4, data=space["loader"], skip=[])
    assert not torch.equal(bare.layers[5].weight, small.layers[5].weight)  # it was trained
    again = snncompress.load(tmp_path / "small.safetensors", space["Net"]())
    assert torch.equal(again(space["images"]), small(space["images"]))
