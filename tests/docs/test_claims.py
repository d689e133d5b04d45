"""What the documentation says of compressed models in other hands is so."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from torch import nn

import snncompress


def compressed() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), snn.Leaky(beta=0.9, init_hidden=True, threshold=0.3),
        nn.Linear(12, 4), snn.Leaky(beta=0.9, init_hidden=True, threshold=0.3, output=True),
    )  # fmt: skip
    x = torch.rand(5, 6)
    return net, snncompress.apply(net, "weight_magnitude", 0.8, 4, data=x, timesteps=4, skip=[]), x


def test_an_init_that_writes_to_the_computed_weight_changes_nothing() -> None:
    _, small, _ = compressed()
    before = small[0].weight.clone()

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    small.apply(init)
    assert torch.equal(small[0].weight, before)
    nn.init.ones_(small[0].parametrizations.weight.original)
    assert not torch.equal(small[0].weight, before)


def test_names_of_stored_weights() -> None:
    net, small, _ = compressed()
    names = {name.replace("parametrizations.weight.original", "weight") for name, _ in small.named_parameters()}
    assert names == {name for name, _ in net.named_parameters()}


def test_neurobench_counts_frozen_networks_right() -> None:
    neurobench = pytest.importorskip("neurobench.metrics.workload", reason="neurobench is not installed")
    models = pytest.importorskip("neurobench.models")
    _, small, x = compressed()
    right = snncompress.profile(small, x, timesteps=4, conventions="neurobench")

    def counted(net: nn.Module) -> tuple[float, float]:
        model, metric = models.SNNTorchModel(net), neurobench.SynapticOperations()
        model.register_hooks()
        steps = x.unsqueeze(1).expand(5, 4, 6)
        result = metric(model, model(steps), (steps, None))
        model.cleanup_hooks()
        return result["Effective_ACs"], result["Effective_MACs"]

    frozen = snncompress.freeze(small, x, timesteps=4)
    assert counted(frozen) == pytest.approx((right.n_ac, right.n_mac))
