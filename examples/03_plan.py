"""The plan: what was done to a network, as data. Read it, keep it as JSON, replay it on a fresh network."""

import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snncompress
from snncompress import Plan, plan_of


def network() -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), neuron.LIFNode(),
        layer.MaxPool2d(2),
        layer.Conv2d(8, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(16 * 4 * 4, 32), neuron.LIFNode(),
        layer.Linear(32, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
batches = list(zip(x.split(64), y.split(64), strict=True))

model = snncompress.finetune(network(), batches, epochs=2, timesteps=4)
small = snncompress.apply(model, "svs", 0.5, bits=4, data=batches, timesteps=4)

# What was done, and why some layers kept all their channels.
plan = plan_of(small)
print(plan)
for name, channels in plan.removed_channels().items():
    print(f"layer {name} lost its output channels {channels}")
print(f"criterion {plan.origin['criterion']}, seed {plan.origin['seed']}")

# A plan is plain JSON: keep it next to the weights.
text = plan.to_json()
assert Plan.from_json(text) == plan
print(f"{len(text)} characters of JSON: {text[:80]}...")

# Replayed on a fresh network it gives the same structure, so the trained weights fit.
fresh = Plan.from_json(text).apply(network())
fresh.load_state_dict(small.state_dict())
current = x[:8].repeat(4, 1, 1, 1, 1)  # [T, N, C, H, W]
with torch.no_grad():
    assert torch.equal(fresh.eval()(current), small.eval()(current))
print("The replayed network computes exactly the same.")
