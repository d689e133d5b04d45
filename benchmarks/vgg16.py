"""The spiking VGG-16 of QP-SNN (ICLR 2025): 13 convolutions without bias, each with batch norm and LIF."""

from __future__ import annotations

from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
POOL_AFTER = {2, 4, 7, 10}


def vgg16(classes: int = 10, step_mode: str = "m", widths: list[int] | None = None) -> nn.Sequential:
    """Convolutions are named conv1 … conv13, the classifier fc."""
    parts: dict[str, nn.Module] = {}
    before = 3
    for number, width in enumerate(widths or WIDTHS, start=1):
        parts[f"conv{number}"] = layer.Conv2d(before, width, 3, padding=1, bias=False)
        parts[f"bn{number}"] = layer.BatchNorm2d(width)
        parts[f"lif{number}"] = neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
        if number in POOL_AFTER:
            parts[f"pool{number}"] = layer.MaxPool2d(2)
        before = width
    parts |= {"pool": layer.AvgPool2d(2), "flatten": layer.Flatten(), "fc": layer.Linear(before, classes)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    functional.set_step_mode(model, step_mode)
    return model
