"""An own adapter's test: does it keep the contract, and what comes of a model?"""

import pytest
import torch
from snncompress_sinabs import SinabsAdapter
from torch import nn

import snncompress
from snncompress.testing import check_adapter

layers = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
activation = pytest.importorskip("sinabs.activation", reason="sinabs is not installed")


def lively(model):
    """Positive weights, so that positive currents make every layer fire."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.abs_().mul_(2.0)
    return model.eval()


def convolutions(**size):
    """The usual squeezed model; every channel has a threshold of its own."""
    torch.manual_seed(0)

    def neuron(channels):
        return layers.IAFSqueeze(spike_threshold=torch.linspace(0.5, 1.5, channels)[:, None, None], **size)

    return lively(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), neuron(8), nn.AvgPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), neuron(12), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(12 * 2 * 2, 10), layers.LIFSqueeze(tau_mem=20.0, norm_input=False, **size),
            nn.Linear(10, 3), layers.ExpLeakSqueeze(tau_mem=20.0, **size),
        )
    )  # fmt: skip


def unsqueezed(**options):
    torch.manual_seed(0)
    options = {"tau_mem": torch.linspace(5.0, 30.0, 8), "norm_input": False, **options}
    return lively(nn.Sequential(nn.Linear(4, 8), layers.LIF(**options), nn.Linear(8, 6), layers.IAF()))


IMAGES, VECTORS = torch.rand(5, 2, 8, 8), torch.rand(5, 4)
MODELS = {
    "squeezed, batch size": (lambda: convolutions(batch_size=5), IMAGES, 4),
    "squeezed, timesteps": (lambda: convolutions(num_timesteps=4), IMAGES, 4),
    "squeezed, as it is": (lambda: convolutions(num_timesteps=4), torch.rand(12, 2, 8, 8), None),
    "unsqueezed": (unsqueezed, VECTORS, 4),
    "unsqueezed, as it is": (unsqueezed, torch.rand(5, 4, 4), None),
    "single spikes": (lambda: unsqueezed(spike_fn=activation.SingleSpike), VECTORS, 4),
    "reset to zero": (lambda: unsqueezed(reset_fn=activation.MembraneReset()), VECTORS, 4),
    "synapses": (lambda: unsqueezed(tau_syn=5.0), VECTORS, 4),
}


@pytest.mark.parametrize(("make", "x", "timesteps"), MODELS.values(), ids=MODELS)
def test_sinabs_keeps_the_contract(make, x, timesteps):
    report = check_adapter(SinabsAdapter(), make(), x, timesteps)
    assert {"remove_channels", "states"} <= set(report.checked)
    assert {what.partition(":")[0].partition(" ")[0] for what in report.missing} - {"remove_channels"} == {
        "books", "conversion", "export", "equations", "inference", "fixed",
    }  # fmt: skip


def run(model, x, timesteps):
    adapter = SinabsAdapter()
    adapter.reset(model)
    with torch.no_grad():
        return adapter.run(model, x, timesteps).clone()


@pytest.mark.parametrize("size", [{"batch_size": 5}, {"num_timesteps": 4}], ids=str)
def test_what_is_left_is_the_silenced_original(size):
    model = convolutions(**size)
    options = {"data": IMAGES, "timesteps": 4, "skip": [], "repair": None, "progress": False}
    small = snncompress.apply(model, "svs", 0.5, None, **options)
    assert [tuple(small[i].weight.shape) for i in (0, 3, 7)] == [(4, 2, 3, 3), (6, 4, 3, 3), (5, 24)]
    assert [tuple(small[i].spike_threshold.shape) for i in (1, 4)] == [(4, 1, 1), (6, 1, 1)]
    drives = {"0": 1, "3": 4, "7": 8}
    for layer, gone in snncompress.plan_of(small).removed_channels().items():
        model[drives[layer]].register_forward_hook(lambda m, args, y, gone=gone: y.index_fill(1, torch.tensor(gone), 0))
    expected = run(model, IMAGES, 4)
    assert expected.shape == (4, 5, 3)
    assert expected.abs().max() > 0
    torch.testing.assert_close(run(small, IMAGES, 4), expected)


def test_four_bits_in_a_file(tmp_path):
    """The example of the documentation; what the neurons remember of the last run isn't in the file."""
    small = snncompress.apply(
        convolutions(batch_size=5), "svs", 0.5, 4, data=IMAGES, timesteps=4, skip=[], progress=False
    )
    for i in (0, 3, 7, 9):  # a grid per channel
        assert all(len(channel.unique()) <= 16 for channel in small[i].weight)
    expected = run(small, IMAGES, 4)
    assert small[1].v_mem.shape == (5, 4, 8, 8)
    snncompress.save(small, tmp_path / "small.safetensors")
    fresh = convolutions(batch_size=5)
    run(fresh, IMAGES[:2], 4)
    again = snncompress.load(tmp_path / "small.safetensors", into=fresh)
    assert "1.v_mem" in small.state_dict()
    assert torch.equal(run(again, IMAGES, 4), expected)
    row = snncompress.profile(again, data=IMAGES, timesteps=4)
    assert row.n_params < snncompress.profile(fresh, data=IMAGES, timesteps=4).n_params
