"""Every set of blocks measured, the greedy path, and the Pareto front."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snncompress_fire import Ablation
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import BlockSearch, Candidate, OptionError, block_search, evaluate, plan_of, profile
from tests.equivalence import same, snapshot
from tests.structure.test_blocks import DATA, MODELS, network


def point(accuracy: float, energy: float) -> Candidate:
    return Candidate((), accuracy, energy, 1, energy / 0.9, 0.0)


@MODELS
def test_every_candidate_is_what_apply_makes(framework: str, multi_step: bool) -> None:
    net = network(framework, multi_step)
    before, state = snapshot(net), torch.get_rng_state()
    result = block_search(net, DATA, Ablation(), timesteps=4, remove=(0, 1, 3), repair=None)
    assert same(before, snapshot(net))
    assert torch.equal(state, torch.get_rng_state())
    assert result.blocks == ("2", "3", "6")  # behind 5, a residual sum wants its width
    sets = [(), ("2",), ("2", "3", "6"), ("3",), ("6",)]
    assert [c.removed for c in result.candidates] == sets
    for candidate in result.candidates:
        small = net
        if candidate.removed:
            criterion = Ablation(blocks=candidate.removed)
            small = snncompress.apply(net, criterion, 1.0, None, data=DATA, timesteps=4, repair=None)
            assert [e.name for e in plan_of(small).edits] == list(candidate.removed)
        measured = profile(small, DATA, timesteps=4)
        assert candidate.accuracy == evaluate(small, DATA, timesteps=4).accuracy
        assert (candidate.energy_pj, candidate.n_params) == (measured.energy_pj, measured.n_params)
        assert (candidate.n_ac, candidate.n_mac) == (measured.n_ac, measured.n_mac)


def test_greedy_takes_the_path_of_the_iterative_scheduler() -> None:
    net = network("spikingjelly")
    result = block_search(net, DATA, method="greedy", timesteps=4)
    assert [len(c.removed) for c in result.candidates] == [0, 1, 2, 3]
    small = snncompress.apply(net, "ablation", 0.67, None, data=DATA, timesteps=4, scheduler="iterative")
    assert {e.name for e in plan_of(small).edits} == set(result.candidates[2].removed)


@pytest.mark.parametrize("method", ["exhaustive", "greedy"])
def test_what_reads_a_removed_block_is_repaired(method: str) -> None:
    """Linear blocks, and labels as the whole network gives them: what they did moves into the weights behind."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2))
    net = nn.Sequential(
        nn.Linear(5, 8), neuron.IFNode(), one, nn.Linear(8, 8), neuron.IFNode(), other, nn.Linear(8, 8),
        neuron.IFNode(), nn.Linear(8, 2),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 3
    x = 2 * torch.randn(64, 5)
    with torch.no_grad():
        y = sum(net(x) for _ in range(4)).argmax(1)
    functional.reset_net(net)
    found = {
        kind: block_search(net, (x, y), Ablation(blocks=("2", "5")), method=method, timesteps=4, repair=kind)
        for kind in (None, "membrane", "current")
    }
    assert y.bincount().min() > 5
    assert all(candidate.accuracy == 1 for kind in ("membrane", "current") for candidate in found[kind].candidates)
    assert all(candidate.accuracy < 0.9 for candidate in found[None].candidates if candidate.removed)
    assert found["membrane"].budget == "repair='membrane', no fine-tuning, 64 samples"


def test_new_weights_behind_every_removed_block() -> None:
    """As ``apply`` draws them: the same candidates."""
    net = network("spikingjelly")
    result = block_search(net, DATA, Ablation(blocks=("2", "3")), timesteps=4, repair="reinit")
    small = snncompress.apply(net, Ablation(blocks=("2",)), 1.0, None, data=DATA, timesteps=4, repair="reinit")
    bare = snncompress.apply(net, Ablation(blocks=("2",)), 1.0, None, data=DATA, timesteps=4, repair=None)
    measured, other = (profile(one, DATA, timesteps=4).energy_pj for one in (small, bare))
    candidate = next(c for c in result.candidates if c.removed == ("2",))
    assert candidate.energy_pj == measured != other


def test_the_budget_is_spent_and_said() -> None:
    """The data hold six samples of five classes: with some epochs every candidate learns most of them."""
    net = network("spikingjelly", multi_step=True)
    options = {"timesteps": 4, "remove": [0, 3], "test": DATA}
    plain, tuned = (block_search(net, DATA * 5, epochs=epochs, lr=1e-2, **options) for epochs in (0, 6))
    assert plain.budget == "repair='membrane', no fine-tuning, 6 samples"
    assert tuned.budget == "repair='membrane', 6 epochs of fine-tuning at 0.01, 6 samples"
    assert [c.removed for c in tuned.candidates] == [(), ("2", "3", "6")]
    assert all(a.accuracy > b.accuracy for a, b in zip(tuned.candidates, plain.candidates, strict=True))


def test_same_seed_same_result() -> None:
    """Fine-tuning on shuffled batches: the order comes from the seed, not from torch's random state outside."""
    net = network("spikingjelly", multi_step=True)
    samples = DataLoader(TensorDataset(*DATA[0]), batch_size=2, shuffle=True)
    options = {"timesteps": 4, "remove": 2, "epochs": 2, "lr": 1e-2, "test": DATA}
    first, second, other = (block_search(net, samples, seed=seed, **options) for seed in (3, 3, 4))
    assert first == second
    assert len(first.candidates) == 3
    assert first != other


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.sampled_from([1.0, 2.0, 3.0])), min_size=1))
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    """Nobody on the front is beaten, and everybody else is: at most the energy, at least the accuracy."""
    result = BlockSearch(tuple(point(*p) for p in points), (), "")
    front = {(c.accuracy, c.energy_pj) for c in result.front}
    beaten = {(a, e) for a, e in points if any((b >= a and f <= e) and (b, f) != (a, e) for b, f in points)}
    assert front == set(points) - beaten
    assert [c.energy_pj for c in result.front] == sorted(c.energy_pj for c in result.front)


def test_table_and_picture() -> None:
    whole = Candidate((), 0.9, 4000.0, 40, 0.0, 0.0)
    less = Candidate(("a", "b"), 0.8, 1000.0, 30, 0.0, 0.0)
    worse = Candidate(("b",), 0.7, 2000.0, 20, 0.0, 0.0)
    result = BlockSearch((whole, less, worse), ("a", "b"), "no fine-tuning, 10 samples", "Net")
    text = str(result)
    assert "Net without some of its blocks a, b; each: no fine-tuning, 10 samples" in text
    assert [line.split()[-1] == "*" for line in text.splitlines()[3:6]] == [True, False, True]
    many = BlockSearch((whole, less, *[worse] * 20), ("a", "b"), "no fine-tuning, 10 samples")
    assert "22 networks measured; shown: the Pareto front" in str(many)
    assert " 70.0 " not in str(many)
    ax = result.plot()
    assert ax.collections[0].get_offsets().tolist() == [[4, 90], [1, 80], [2, 70]]
    assert ax.get_lines()[0].get_xydata().tolist() == [[1, 80], [4, 90]]
    assert result.to_dict()["candidates"][1]["removed"] == ("a", "b")


def test_progress_counts_the_sets() -> None:
    seen: list[tuple[str, int, int | None]] = []
    block_search(network("spikingjelly"), DATA, timesteps=2, progress=lambda *args: seen.append(args))
    assert [done for what, done, total in seen if what == "measuring sets of blocks"] == list(range(8))
    assert {total for what, _, total in seen if what == "measuring sets of blocks"} == {8}


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("spikingjelly")
    with pytest.raises(OptionError, match="'svs' scores channels; block_search removes whole blocks"):
        block_search(net, DATA, "svs", timesteps=4)
    with pytest.raises(OptionError, match="method must be one of exhaustive, greedy, not 'best'"):
        block_search(net, DATA, timesteps=4, method="best")
    for remove in (4, -1, [], "2", [1, True], 1.0):
        with pytest.raises(OptionError, match="numbers of blocks from 0 to 3"):
            block_search(net, DATA, timesteps=4, remove=remove)
    with pytest.raises(OptionError, match="epochs must be"):
        block_search(net, DATA, timesteps=4, epochs=-1)
    with pytest.raises(OptionError, match=r"repair must be 'auto', .* for blocks, 'reinit', not 'slice'"):
        block_search(net, DATA, timesteps=4, repair="slice")
    inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4), neuron.LIFNode()))
    nested = nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(), inner, nn.Linear(4, 2))
    with pytest.raises(OptionError, match=r"Block '2.0' is a part of block '2'"):
        block_search(nested, (torch.rand(4, 3), torch.arange(4) % 2), Ablation(blocks=("2", "2.0")), timesteps=4)
    monkeypatch.setattr("snncompress.studies.searching.MOST_BLOCKS", 2)
    with pytest.raises(OptionError, match=r"3 blocks, 2, 3, 6, so 2\^3 sets .*method='greedy'"):
        block_search(net, DATA, timesteps=4)
    assert len(block_search(net, DATA, timesteps=2, method="greedy").candidates) == 4
