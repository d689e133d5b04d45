"""What all tests share: one thread, a fixed seed, the data folder, SpikingJelly's model zoo."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# The networks are so small that a second thread costs more than it saves; and sums don't depend on the machine.
torch.set_num_threads(1)

# No deadlines: the first example pays for lazy imports. In CI the same examples at every run.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with mnist/, cifar10/, nmnist/ and ecg/: $SNNCOMPRESS_DATA, or ../shared/data."""
    path = Path(os.environ.get("SNNCOMPRESS_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no data at {path}; SNNCOMPRESS_DATA names the folder that has them")
    return path


@pytest.fixture(scope="session")
def torchvision_ops() -> Iterator[None]:
    """Makes SpikingJelly's spiking_vgg, sew_resnet and spiking_resnet importable with the CPU build of torch.

    They import torchvision, whose wheel is compiled against a CUDA build: elsewhere its operators don't load and the
    import fails. None of those models uses an operator, so declaring the two that are looked up is enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        yield  # the operators live as long as `library`
        del library
    else:
        yield
