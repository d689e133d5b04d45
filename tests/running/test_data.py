"""What counts as data, and how a batch is fed."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import snncompress
from snncompress import DataError
from snncompress.contract.detection import find_adapter
from snncompress.running.data import Feed
from snncompress.running.scores import class_scores

X, Y = torch.rand(6, 4), torch.arange(6) % 3
MODEL = nn.Sequential(nn.Linear(4, 5), neuron.IFNode(), nn.Linear(5, 3))
ADAPTER = find_adapter(MODEL)


@pytest.mark.parametrize(
    ("data", "batches", "labels"),
    [
        (X, 1, False),
        ((X, Y), 1, True),
        ([X, Y], 1, True),
        ([X, X], 2, False),
        ([(X, Y), (X, Y)], 2, True),
        (iter([X, X, X]), 3, False),
        (DataLoader(TensorDataset(X, Y), batch_size=2), 3, True),
        (DataLoader(TensorDataset(X), batch_size=2), 3, False),
    ],
)
def test_forms(data: object, batches: int, labels: bool) -> None:
    feed = Feed(ADAPTER, data, 2)
    for _ in range(2):  # every pass sees all batches
        seen = list(feed)
        assert len(seen) == batches
        assert all((batch.y is not None) is labels for batch in seen)
        assert all(batch.x.shape[1:] == (4,) for batch in seen)


def test_constant_current_and_as_it_is() -> None:
    """IF with soft reset on constant current 0.4: no spike, no spike, a spike, no spike, a spike."""
    for mode in "sm":
        model = nn.Sequential(layer.Linear(1, 1, bias=False), neuron.IFNode(v_reset=None))
        model[0].weight.data.fill_(1.0)
        model[0].step_mode = model[1].step_mode = mode
        x = torch.full((1, 1), 0.4)
        feed = Feed(find_adapter(model), x, 5)
        assert feed(model, feed.first()).flatten().tolist() == [0, 0, 1, 0, 1]
        assert feed(model, feed.first()).flatten().tolist() == [0, 0, 1, 0, 1]  # each batch starts from rest
    sequence = Feed(find_adapter(model), x.expand(5, 1, 1), None)
    assert sequence(model, sequence.first()).flatten().tolist() == [0, 0, 1, 0, 1]


def test_snntorch_loops_where_neurons_keep_their_state() -> None:
    """Leaky, β = 1, subtract at the next step: 0.4, 0.8, 1.2 (spike), 0.6, 1.0 (not above threshold)."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), snn.Leaky(beta=1.0, init_hidden=True, output=True))
    model[0].weight.data.fill_(1.0)
    feed = Feed(find_adapter(model), torch.full((1, 1), 0.4), 5)
    spikes, membrane = feed(model, feed.first())
    assert spikes.flatten().tolist() == [0, 0, 1, 0, 0]
    torch.testing.assert_close(membrane.flatten(), torch.tensor([0.4, 0.8, 1.2, 0.6, 1.0]))


def test_class_scores() -> None:
    steps = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(class_scores(steps), steps.mean(0))
    assert torch.equal(class_scores((steps, None)), steps.mean(0))
    assert torch.equal(class_scores(steps[0]), steps[0])
    for wrong in (torch.rand(3), torch.rand(1, 2, 3, 4), None, {}):
        with pytest.raises(DataError, match=r"\[T, N, K\], \[N, T, K\] or \[N, K\]"):
            class_scores(wrong)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_is_no_flaw_of_the_model(error: Exception) -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self[2].in_features < 8:
                raise error
            out: Tensor = super().forward(x)
            return out

    net = Net(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 3))
    with pytest.raises(DataError, match="smaller batches"):
        snncompress.apply(net, "magnitude", 0.5, None, data=torch.rand(3, 4), timesteps=2, skip=[])


def test_indices_of_an_embedding_are_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 8), neuron.IFNode(v_threshold=0.1), nn.Linear(8, 2)
    )
    words = torch.randint(9, (6, 3))
    small = snncompress.apply(net, "firing_rate", 0.5, data=words, timesteps=2, skip=[])
    assert small[2].weight.shape == (4, 12)
    assert snncompress.profile(small, words, timesteps=2).n_params == 9 * 4 + 13 * 4 + 5 * 2
