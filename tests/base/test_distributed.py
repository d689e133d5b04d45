"""Two processes, each with half of the data, make of a network what one makes of it with all of them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import snncompress
from tests.base import two_processes

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found]:
    """What one process found, and each of two."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, two_processes.__file__, str(folder)]
    children = [subprocess.Popen([*command, str(rank), "2"], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            one = two_processes.results(folder / "one")
        said = [child.communicate(timeout=600)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    # DDP has much to say where it isn't asked rightly; that there is no Triton for it torch says in any case
    assert not [line for text in said for line in text.splitlines() if "Triton not available" not in line]
    assert [(folder / str(rank)).exists() for rank in range(2)] == [True, False]  # the checkpoint
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return one, first, second


def near(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(t.double(), other[name].double(), rtol=tolerance, atol=tolerance) for name, t in one.items()
    )


@pytest.mark.parametrize("name", ["svs", "obs", "cqp", "energy"])
def test_the_plan_and_the_repaired_weights_are_those_of_one_process(name: str, found: tuple[Found, ...]) -> None:
    (plan, state), (plan_1, state_1), (plan_2, state_2) = (part[name] for part in found)
    assert plan_1 == plan_2 == plan
    assert near(state_1, state_2, 0.0)
    assert near(state, state_1, 1e-4)


def test_what_is_measured_is_what_one_process_measures(found: tuple[Found, ...]) -> None:
    one, first, second = found
    assert first["profile"] == second["profile"] == one["profile"]
    assert one["profile"].n_samples == 24
    assert first["accuracy"] == second["accuracy"] == one["accuracy"] is not None
    for name in ("kl", "energy_pj", "accuracy", "t_star"):
        values = [torch.tensor(getattr(part["temporal"], name), dtype=torch.float64) for part in found]
        assert torch.equal(values[1], values[2])
        assert torch.allclose(values[0], values[1])
    assert near(one["refresh"], first["refresh"], 1e-5)
    assert near(first["refresh"], second["refresh"], 0.0)
    assert first["flow"] == second["flow"] == pytest.approx(one["flow"], rel=1e-5)
    assert torch.equal(first["scores"], one["scores"][[0, 2, 1, 3]])  # batches 0 and 2 are those of rank 0


def test_a_run_is_resumed_by_all_from_the_file_of_rank_0(found: tuple[Found, ...]) -> None:
    _, first, second = found
    for name in ("first run", "resumed"):
        assert first[name][0] == second[name][0] == first["first run"][0]
        assert near(first[name][1], second[name][1], 0.0)
    assert near(first["first run"][1], first["resumed"][1], 0.0)


def test_training_follows_the_mean_of_all_gradients(found: tuple[Found, ...]) -> None:
    one, first, second = found
    assert near(first["tuned"], second["tuned"], 0.0)
    assert near(one["tuned"], first["tuned"], 1e-5)
    assert first["epochs"] == second["epochs"]
    assert torch.allclose(torch.tensor(first["epochs"]), torch.tensor(one["epochs"]))
    assert near(first["uneven"], second["uneven"], 0.0)


def test_masks_and_grids_hold_in_ddp(found: tuple[Found, ...]) -> None:
    one, first, second = (part["step"] for part in found)
    assert near(first[0], second[0], 0.0)
    assert near(one[0], first[0], 1e-5)
    _, gone, weight = first
    assert int(gone.sum()) > 100
    assert torch.equal(weight[gone], torch.zeros(int(gone.sum())))
    assert all(len(row.unique()) <= 17 for row in weight)  # of 4 bits, and 0 where masked


def test_where_one_fails_all_raise(found: tuple[Found, ...]) -> None:
    _, first, second = found
    kinds = ["DataError", "ModelError", "DataError", "PluginError", "ModelError", "ModelError"]
    assert [[kind for kind, _ in part["failures"]] for part in (first, second)] == [kinds, kinds]
    nan, widths, empty, peak, *wrapped = (text for _, text in first["failures"])
    assert nan.startswith("The process of rank 1 failed: Batch 1 holds NaN")
    assert "0.weight" in widths
    assert "[6, 1, 3, 3], [7, 1, 3, 3]" in widths
    assert second["failures"][2][1] == f"The process of rank 0 failed: {empty}"
    assert "merge" in peak
    assert all("model.module" in text for text in wrapped)


def test_alone_a_process_waits_for_no_other(found: tuple[Found, ...]) -> None:
    _, first, second = found
    assert (first["alone"], second["alone"]) == (0, 12)


def test_a_sampler_is_told_of_every_epoch_and_is_then_as_it_was() -> None:
    data = TensorDataset(torch.arange(8.0).view(8, 1), torch.zeros(8, dtype=torch.long))
    sampler, seen = DistributedSampler(data, num_replicas=2, rank=0), list[list[float]]()

    def forward(model: nn.Module, batch: list[Tensor]) -> Tensor:
        seen.append(batch[0].flatten().tolist())
        return model(batch[0])

    sampler.set_epoch(7)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    snncompress.finetune(nn.Linear(1, 2), loader, epochs=3, forward=forward)
    assert sampler.epoch == 7
    epochs = seen[-3:]
    for number, order in enumerate(epochs, 1):
        sampler.set_epoch(number)
        assert order == [float(index) for index in sampler]
    assert len(set(map(tuple, epochs))) > 1


def test_near_can_tell() -> None:
    assert not near({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 1.1])}, 1e-3)
