"""The preset "neurobench" gives NeuroBench's own SynapticOperations, to the last operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
pytest.importorskip("neurobench", reason="neurobench is not installed (test extra only: it needs GPL-3 tonic)")

from neurobench.metrics.workload import SynapticOperations  # noqa: E402
from neurobench.models import SNNTorchModel  # noqa: E402

from snncompress.measuring.profiling import profile  # noqa: E402


def leaky(**options: object) -> nn.Module:
    return snn.Leaky(beta=0.8, threshold=0.3, init_hidden=True, **options)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        leaky(),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        leaky(),
        nn.AvgPool2d(2),  # its output is fractions: the next layer costs MACs
        nn.Conv2d(8, 4, 2),
        leaky(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 10),
        leaky(output=True),
    )


def fully_connected() -> nn.Module:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(2 * 16 * 16, 32), leaky(), nn.Linear(32, 24), leaky(), nn.Linear(24, 10),
        leaky(output=True),
    )  # fmt: skip
    with torch.no_grad():
        net[3].weight[torch.rand(24, 32) < 0.5] = 0  # a pruned weight is no synapse for either
    return net


def by_neurobench(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """(ACs, MACs) per sample; ``x`` is [N, T, ...]."""
    model, metric = SNNTorchModel(net), SynapticOperations()
    model.register_hooks()
    result = metric(model, model(x), (x, None))
    model.cleanup_hooks()
    return result["Effective_ACs"], result["Effective_MACs"]


@pytest.mark.parametrize("events", [True, False], ids=["events", "analog"])
@pytest.mark.parametrize("build", [convolutional, fully_connected])
def test_same_counts(build, events):
    torch.manual_seed(0)
    net, steps = build(), 4  # 4 samples too, so that a count per sample is exact in binary
    x = torch.rand(4, 2, 16, 16)
    x = (x < 0.3).float() * torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0) if events else x.relu() * (x > 0.4)
    n_ac, n_mac = by_neurobench(net, x.unsqueeze(1).expand(4, steps, *x.shape[1:]))
    found = profile(net, x, timesteps=steps, conventions="neurobench")
    assert (found.n_ac, found.n_mac) == (n_ac, n_mac)
    assert n_ac > 0
    assert (n_mac == 0) == (events and build is fully_connected)


def test_the_comparison_can_fail():
    torch.manual_seed(0)
    net, x = fully_connected(), torch.rand(4, 2, 16, 16)
    n_ac, _ = by_neurobench(net, x.unsqueeze(1).expand(4, 4, *x.shape[1:]))
    assert profile(net, x, timesteps=4, conventions="spikingjelly").n_ac != n_ac
