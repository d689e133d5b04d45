"""What can't be saved or loaded, and where: always said at the door."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from snncompress import ModelError, OptionError, PlanError, StorageError, load, save
from tests.equivalence import same, snapshot
from tests.saving.test_storage import bits, channels
from tests.structure.test_blocks import network


def test_folders_full_disks_and_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, small = tmp_path / "small", bits(4)(network("spikingjelly"))
    with pytest.raises(StorageError, match=r"is a folder. Give the name of a file"):
        save(small, tmp_path)
    with pytest.raises(StorageError, match="can't be written"):
        save(small, tmp_path / "nowhere" / "small")
    save(small, path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device. What was there before is still there"):
            save(channels(network("spikingjelly")), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_what_is_not_finite_and_state_that_is_no_tensor(tmp_path: Path) -> None:
    for small, value in ((network("spikingjelly"), torch.nan), (channels(network("spikingjelly")), torch.inf)):
        with torch.no_grad():
            small[7].bias[0] = value
        with pytest.raises(ModelError, match=r"7.bias of this Sequential holds 1 NaN or infinite values of"):
            save(small, tmp_path / "net")
    small[7].bias = nn.Parameter(torch.zeros_like(small[7].bias))
    small[3].register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # of an attention, for one
    save(small, tmp_path / "net")
    (tmp_path / "net").unlink()

    class Secret(nn.Module):
        def get_extra_state(self) -> str:
            return "secret"

        def set_extra_state(self, state: str) -> None:
            pass

    with pytest.raises(ModelError, match=r"0._extra_state of this Sequential isn't a tensor"):
        save(nn.Sequential(Secret(), layer.Linear(2, 2), neuron.IFNode()), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_without_a_model_it_says_which(tmp_path: Path) -> None:
    save(channels(network("spikingjelly")), tmp_path / "small")
    with pytest.raises(OptionError, match=r"Sequential of spikingjelly, with tensors for 0, 10, .*into=model"):
        load(tmp_path / "small")


def test_files_of_others(tmp_path: Path) -> None:
    net = network("spikingjelly")
    with pytest.raises(StorageError, match="can't be read: FileNotFoundError"):
        load(tmp_path / "nothing", into=net)
    with pytest.raises(StorageError, match="can't be read"):
        load(tmp_path, into=net)
    torch.save(net.state_dict(), tmp_path / "pickle")
    with pytest.raises(StorageError, match="can't be read: SafetensorError"):
        load(tmp_path / "pickle", into=net)
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(StorageError, match=r"wasn't written by snncompress.save"):
        load(tmp_path / "plain", into=net)
    for text, says in (
        ('{"format": 3}', r"has format 3; this version reads 1 and 2. Upgrade"),
        ('{"format": 1, "plan": ' + "[" * 100_000, "can't be read: RecursionError"),
        ("[]", "can't be read: TypeError"),
        ("{", "can't be read: JSONDecodeError"),
    ):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "new", {"snncompress": text})
        with pytest.raises(StorageError, match=says):
            load(tmp_path / "new", into=net)


def test_another_architecture(tmp_path: Path) -> None:
    save(channels(network("spikingjelly")), tmp_path / "small")
    other = nn.Sequential(nn.Linear(3, 3), neuron.IFNode())
    before = snapshot(other)
    with pytest.raises(PlanError, match="architecture"):
        load(tmp_path / "small", into=other)
    assert same(before, snapshot(other))
    save(network("spikingjelly"), tmp_path / "whole")
    with pytest.raises(
        StorageError, match=r"doesn't fit this Sequential: (The file|The model) has no .*test_blocks|Sequential"
    ):
        load(tmp_path / "whole", into=other)
    wider = nn.Sequential(nn.Linear(3, 4), neuron.IFNode())
    save(other, tmp_path / "other")
    with pytest.raises(
        StorageError, match=r"0.weight is float32 \[3, 3\] in the file and float32 \[4, 3\] in the model"
    ):
        load(tmp_path / "other", into=wider)
