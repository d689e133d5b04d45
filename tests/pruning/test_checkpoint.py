"""checkpoint=folder: a run that is killed and called again ends like one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import snncompress
from snncompress import OptionError, SilentNeuronsWarning, StorageError
from snncompress.base.files import write_whole
from tests.pruning import checkpointed_run
from tests.pruning.checkpointed_run import network, result, run

pytestmark = pytest.mark.filterwarnings(f"ignore::{SilentNeuronsWarning.__module__}.{SilentNeuronsWarning.__name__}")


def in_a_process(framework: str, folder: Path, criterion: str, kill_at: object) -> subprocess.CompletedProcess[str]:
    script = checkpointed_run.__file__
    command = [sys.executable, script, framework, str(folder), criterion, str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# One epoch is 3 batches, so 3 events: 3 to quantize and fine-tune, then in each of three steps 3 of calibration and 3
# of fine-tuning. The first process dies in step 2, so the second begins there and dies when it would keep that step;
# the third begins there again and dies in step 3.
@pytest.mark.parametrize(
    ("framework", "criterion"),
    [("spikingjelly", "cqp"), pytest.param("snntorch", "taylor", marks=pytest.mark.slow)],
)
def test_killed_again_and_again_it_ends_with_the_same_plan_and_weights(
    tmp_path: Path, framework: str, criterion: str
) -> None:
    for kill_at in (5, "write", 8):
        killed = in_a_process(framework, tmp_path, criterion, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = in_a_process(framework, tmp_path, criterion, "never")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == result(run(framework, None, criterion))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]  # nothing is left of the write that was cut off


@pytest.mark.parametrize(
    ("framework", "criterion", "scheduler"),
    [
        ("spikingjelly", "cqp", "iterative"), ("snntorch", "svs", "iterative"),
        ("spikingjelly", "sca", "prune_regrow"), ("snntorch", "weight_magnitude", "prune_regrow"),
    ],
)  # fmt: skip
def test_resumed_after_every_step(tmp_path: Path, framework: str, criterion: str, scheduler: str) -> None:
    class StopError(Exception):
        pass

    def stop_at(step: int) -> object:
        def progress(what: str, done: int, total: int | None) -> None:
            if what.startswith(f"step {step}/"):
                raise StopError

        return progress

    for step in (2, 3, 4):
        with pytest.raises(StopError):
            run(framework, str(tmp_path), criterion, stop_at(step), scheduler)
    resumed = run(framework, str(tmp_path), criterion, scheduler=scheduler)
    assert result(resumed) == result(run(framework, None, criterion, scheduler=scheduler))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run("spikingjelly", str(tmp_path), "cqp")

    def progress(what: str, done: int, total: int | None) -> None:
        raise RuntimeError(what)

    assert result(run("spikingjelly", str(tmp_path), "cqp", progress)) == result(first)


def test_the_global_random_state_stays_as_it_was(tmp_path: Path) -> None:
    net = network("spikingjelly")
    for _ in range(2):  # the second call resumes
        torch.manual_seed(7)
        before = torch.get_rng_state()
        with_checkpoint(tmp_path, net)
        assert torch.equal(before, torch.get_rng_state())


def with_checkpoint(folder: Path | str, model: nn.Module | None = None, **options: object) -> nn.Module:
    settings = {"criterion": "weight_magnitude", "ratio": 0.5, "bits": None, **options}
    net = network("spikingjelly") if model is None else model
    return snncompress.apply(net, data=torch.ones(2, 16), timesteps=2, checkpoint=folder, **settings)


def test_another_run_is_refused(tmp_path: Path) -> None:
    with_checkpoint(tmp_path)
    with pytest.raises(OptionError, match=r"another run, which differs in ratio \(0\.5 there, 0\.6 here\)"):
        with_checkpoint(tmp_path, ratio=0.6)
    with pytest.raises(OptionError, match="differs in skip"):
        with_checkpoint(tmp_path, skip=["0"])
    with pytest.raises(OptionError, match="differs in functions"):
        with_checkpoint(tmp_path, loss=print)
    with pytest.raises(OptionError, match="differs in first batch"):
        snncompress.apply(
            network("spikingjelly"), "weight_magnitude", 0.5, None, data=torch.zeros(2, 16), timesteps=2,
            checkpoint=tmp_path,
        )  # fmt: skip
    other = network("spikingjelly")
    other[1].v_threshold = 0.5
    with pytest.raises(OptionError, match="differs in model"):
        with_checkpoint(tmp_path, other)
    other = network("spikingjelly")
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(OptionError, match="differs in model"):
        with_checkpoint(tmp_path, other)


def test_the_order_of_keys_matters_since_the_last_match_counts(tmp_path: Path) -> None:
    with_checkpoint(tmp_path, ratio={"0": 0.5, "*": 0.2})
    with pytest.raises(OptionError, match="differs in order of keys"):
        with_checkpoint(tmp_path, ratio={"*": 0.2, "0": 0.5})


class Augmented(TensorDataset):
    """Draws from Python's generator, numpy's, and its own."""

    rng: np.random.Generator

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return x * (0.5 + random.random()) + np.random.rand() + float(self.rng.random()), y


@pytest.mark.parametrize("seeded", ["sampler", "batch_sampler", "dataset"])
def test_the_datas_own_generators_find_their_places(tmp_path: Path, seeded: str) -> None:
    class StopError(Exception):
        pass

    def apply(folder: Path | None, stop: bool = False) -> nn.Module:
        x, y = torch.rand(48, 16, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 4
        samples: TensorDataset = TensorDataset(x, y)
        order = torch.Generator().manual_seed(2)
        if seeded == "dataset":
            samples = Augmented(x, y)
            samples.rng = np.random.default_rng(3)
        sampler = RandomSampler(samples, generator=order)
        data = (
            DataLoader(samples, 16, sampler=sampler)
            if seeded != "batch_sampler"
            else DataLoader(samples, batch_sampler=BatchSampler(sampler, 16, False))
        )

        def progress(what: str, done: int, total: int | None) -> None:
            if stop and what.startswith("step 3/"):
                raise StopError

        return snncompress.apply(
            network("spikingjelly"), "cqp", 0.6, None, data=data, timesteps=3, scheduler="iterative", finetune=1,
            progress=progress, checkpoint=folder,
        )  # fmt: skip

    with pytest.raises(StopError):
        apply(tmp_path, stop=True)
    assert result(apply(tmp_path)) == result(apply(None))


def test_another_number_of_generators_is_named(tmp_path: Path) -> None:
    def apply(generator: torch.Generator | None) -> None:
        data = DataLoader(TensorDataset(torch.ones(4, 16)), 2, generator=generator)
        snncompress.apply(
            network("spikingjelly"), "weight_magnitude", 0.5, None, data=data, timesteps=2, checkpoint=tmp_path
        )

    apply(torch.Generator())
    with pytest.raises(OptionError, match="4 random generators, this one has 3"):
        apply(None)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, size: int) -> None:
    with_checkpoint(tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(StorageError, match=r"checkpoint\.pt is damaged.*Delete it"):
        with_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": 1, "state": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(StorageError, match="damaged"):
        with_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"checkpoint='.*file' can't be used as a folder"):
        with_checkpoint(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="checkpoint=True can't be used as a folder"):
        with_checkpoint(True)


def test_write_whole_leaves_the_old_file_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def full_disk(file: object) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        write_whole(path, full_disk)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="can't be written"):
        write_whole(tmp_path / "no" / "folder", lambda file: file.write(b"new"))
