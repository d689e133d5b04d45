"""Truth 6: a removed weight is exactly 0.0 after any step of any optimizer, and whatever else is done to the model."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from snncompress_baselines import WeightMagnitude, WeightRandom
from snncompress_cqp import CQP
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR

import snncompress
from snncompress import MaskWeights
from snncompress.contract.detection import find_adapter
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.running.data import Feed
from snncompress.running.scores import cross_entropy
from tests.equivalence import outputs

T = 3
IMAGES, TARGETS = (torch.from_numpy(array[:48]) for array in load_digits(return_X_y=True))
DATA = IMAGES.float().view(-1, 1, 8, 8) / 16, TARGETS


def spikingjelly_net() -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1, bias=False), layer.BatchNorm2d(6), neuron.LIFNode(), layer.MaxPool2d(2),
        layer.Conv2d(6, 8, 3, padding=1), neuron.IFNode(v_threshold=0.3), layer.Flatten(),
        layer.Linear(128, 20), neuron.ParametricLIFNode(v_threshold=0.1), layer.Linear(20, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def snntorch_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), snn.Leaky(beta=0.5, init_hidden=True),
        nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), snn.Leaky(beta=0.9, threshold=0.5, init_hidden=True),
        nn.Flatten(), nn.Linear(128, 20), snn.Synaptic(alpha=0.5, beta=0.9, threshold=0.2, init_hidden=True),
        nn.Linear(20, 10),
    )  # fmt: skip


BUILD: dict[str, Callable[[], nn.Module]] = {"spikingjelly": spikingjelly_net, "snntorch": snntorch_net}
FRAMEWORKS = pytest.mark.parametrize("framework", list(BUILD))
MODELS = pytest.mark.parametrize(("framework", "bits"), list(itertools.product(BUILD, [None, 4])))

CRITERIA = {c.name: c(scope="layer") for c in (CQP, WeightMagnitude, WeightRandom)}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
}
REMEMBERING = [name for name in OPTIMIZERS if name not in ("adagrad", "adadelta", "rprop")]  # earlier gradients


def loss_of(model: nn.Module) -> Tensor:
    feed = Feed(find_adapter(model), DATA, T)
    return cross_entropy(feed(model, feed.first()), feed.first().y)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(loss.detach())

    return float(optimizer.step(closure))  # type: ignore[arg-type]


def copied(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Built once for each set of arguments; every caller gets a copy."""
    built = functools.cache(build)
    return lambda *arguments: copy.deepcopy(built(*arguments))


@copied
def trained(framework: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[framework]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        step(model, optimizer)
    find_adapter(model).reset(model)
    return model.eval()


@copied
def compressed(framework: str, bits: int | None, criterion: str = "cqp", ratio: float = 0.7) -> nn.Module:
    return snncompress.apply(trained(framework), CRITERIA[criterion], ratio, bits, data=DATA, timesteps=T, skip=[])


def removed(model: nn.Module) -> dict[str, Tensor]:
    """layer → where its weights are gone, as the plan has it."""
    return {e.layer: ~e.mask() for e in snncompress.plan_of(model).edits if isinstance(e, MaskWeights)}


def dead(model: nn.Module, gone: dict[str, Tensor] | None = None) -> bool:
    """Are all weights that the plan removed exactly 0.0, and is something left in every layer?"""
    gone = removed(model) if gone is None else gone
    weights = {name: model.get_submodule(name).weight for name in gone}
    return bool(gone) and all(
        bool((w[gone[n]] == 0).all()) and bool(gone[n].any()) and bool((w[~gone[n]] != 0).any())
        for n, w in weights.items()
    )


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names and in the order that they had before anything was parametrized."""
    found = {k.replace("parametrizations.weight.original", "weight"): p for k, p in model.named_parameters()}
    return dict(sorted(found.items()))


def moved(model: nn.Module) -> bool:
    """Did anything change what is stored for a removed weight, so that without the mask it would be back?"""
    parameters = stored(model)
    return any(bool((parameters[f"{name}.weight"][gone] != 0).any()) for name, gone in removed(model).items())


def noise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model


@FRAMEWORKS
@pytest.mark.parametrize("name", REMEMBERING)
def test_masking_gradients_is_not_enough(framework: str, name: str) -> None:
    """The failure: weights set to 0, their gradients to 0, and one step of the same optimizer brings them back."""
    model = trained(framework).train()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    gone = {}
    for layer_name, module in model.named_modules():
        if isinstance(module, WEIGHT_LAYERS):
            size = module.weight.detach().abs()
            gone[layer_name] = size < size.flatten().kthvalue(int(0.7 * size.numel()) + 1).values
            module.weight.data[gone[layer_name]] = 0.0
            module.weight.register_hook(lambda grad, g=gone[layer_name]: grad.masked_fill(g, 0.0))
    assert dead(model, gone)
    step(model, optimizer)
    assert all(bool((model.get_submodule(n).weight.grad[g] == 0).all()) for n, g in gone.items())
    assert not dead(model, gone)


@MODELS
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_optimizer_brings_a_removed_weight_back(framework: str, bits: int | None, name: str) -> None:
    """With the optimizer's state of before pruning, a schedule, weight decay and gradient clipping."""
    before = trained(framework).train()
    earlier = OPTIMIZERS[name](list(stored(before).values()))
    for _ in range(3):
        step(before, earlier)
    model = compressed(framework, bits).train()
    optimizer = OPTIMIZERS[name](list(stored(model).values()))
    optimizer.load_state_dict(earlier.state_dict())
    cyclic = {"betas", "momentum"} & optimizer.defaults.keys()
    schedule = OneCycleLR(optimizer, 0.05, 5) if cyclic else CosineAnnealingWarmRestarts(optimizer, 2)
    for _ in range(4):
        step(model, optimizer)
        schedule.step()
        assert dead(model)
    assert moved(model) == (name in REMEMBERING)  # the mask had something to do


@MODELS
@pytest.mark.parametrize("criterion", ["cqp", "weight_magnitude"])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_update_loop_of_the_users_own(framework: str, bits: int | None, criterion: str, mixed: bool) -> None:
    """It moves every parameter, by the gradient and by noise; also with gradients of mixed precision."""
    model = compressed(framework, bits, criterion).train()
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_of(model)
            assert dead(model)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        assert dead(model)
        assert dead(noise(model))
    assert moved(model)


@MODELS
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("criterion", "ratio"), [("weight_magnitude", 0.2), ("weight_random", 0.7)])
def test_no_state_dict_changes_the_masks(
    framework: str, bits: int | None, assign: bool, criterion: str, ratio: float
) -> None:
    """Neither one of a less sparse model, nor of one with other masks, nor one full of NaN."""
    model, other = compressed(framework, bits), compressed(framework, bits, criterion, ratio)
    assert not any("mask" in key for key in model.state_dict())
    gone = removed(model)
    assert not dead(other, gone)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert moved(model)
    assert dead(model)
    broken = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(broken, assign=assign)
    assert dead(model)


@MODELS
def test_training_still_learns_and_removed_weights_have_no_gradient(framework: str, bits: int | None) -> None:
    model = compressed(framework, bits).train()
    parameters = stored(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = [step(model, optimizer)]
    for name, gone in removed(model).items():
        gradient = parameters[f"{name}.weight"].grad
        assert bool((gradient[gone] == 0).all())
        assert bool((gradient[~gone] != 0).any())
    losses += [step(model, optimizer) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert dead(model)


@MODELS
@pytest.mark.parametrize("scheduler", ["iterative", "gradual"])
def test_fine_tuning_between_pruning_steps(framework: str, bits: int | None, scheduler: str) -> None:
    seen: list[dict[str, Tensor]] = []

    def tune(model: nn.Module) -> None:
        zeros = {n: m.weight == 0 for n, m in model.named_modules() if isinstance(m, WEIGHT_LAYERS)}
        pruned = all(bool(z.any()) for z in zeros.values())
        optimizer = OPTIMIZERS["sgd"](model.train().parameters())
        for _ in range(2):
            step(model, optimizer)
            assert dead(model, zeros) == pruned
        seen.extend([zeros] if pruned else [])

    options: Any = {"data": DATA, "timesteps": T, "skip": [], "scheduler": scheduler, "finetune": tune}
    model = snncompress.apply(trained(framework), CRITERIA["cqp"], 0.7, bits, **options)
    assert dead(model)
    assert len(seen) == 3
    for earlier, later in itertools.pairwise([*seen, removed(model)]):
        assert all(bool((later[n] | ~earlier[n]).all()) for n in earlier)  # what was gone stays gone


@MODELS
def test_saved_and_loaded(framework: str, bits: int | None) -> None:
    model = compressed(framework, bits)
    step(noise(model).train(), OPTIMIZERS["adam"](model.parameters()))
    file = io.BytesIO()
    torch.save({"plan": snncompress.plan_of(model).to_json(), "weights": model.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file)
    again = snncompress.Plan.from_json(kept["plan"]).apply(BUILD[framework]())
    again.load_state_dict(kept["weights"])
    assert dead(again)
    feed = Feed(find_adapter(model), DATA, T)
    assert torch.equal(outputs(model.eval(), feed)[0], outputs(again.eval(), feed)[0])


def averaged(model: nn.Module) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(model)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector + 0.1, model.parameters())
    average.update_parameters(model)
    return average.module


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.half().to("cpu", torch.float32),
    "copied": copy.deepcopy,
    "averaged": averaged,
    "train": lambda m: m.eval().train(),
    "frozen": lambda m: m.requires_grad_(False),
}


@MODELS
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
@pytest.mark.parametrize("cached", [False, True])
def test_conversions_of_the_model(framework: str, bits: int | None, conversion: str, cached: bool) -> None:
    model = noise(compressed(framework, bits))
    converted = CONVERSIONS[conversion](model)
    assert moved(converted)
    with parametrize.cached() if cached else nullcontext():
        assert dead(converted)
        first = converted[7].weight
        assert (first is converted[7].weight) == cached
        x = torch.rand(2, 128, dtype=next(converted.parameters()).dtype)
        output = converted[7](x)
    assert torch.equal(output, converted[7](x))
    assert output.dtype == x.dtype
    assert dead(converted)


def train_step(model: nn.Module) -> nn.Module:
    step(model.train(), OPTIMIZERS["nadam"](model.parameters()))
    return model.eval()


def quantize(model: nn.Module) -> nn.Module:
    if any("quantize" in e.kind for e in snncompress.plan_of(model).edits):
        return model
    return snncompress.apply(model, None, bits=3, data=DATA, timesteps=T, skip=[])


def prune(model: nn.Module) -> nn.Module:
    share = max(float(gone.double().mean()) for gone in removed(model).values())
    return snncompress.apply(model, CRITERIA["weight_random"], (1 + share) / 2, None, data=DATA, timesteps=T, skip=[])


@settings(max_examples=8)
@given(
    st.sampled_from(list(BUILD)),
    st.lists(st.sampled_from([noise, train_step, quantize, prune, copy.deepcopy]), min_size=2, max_size=4),
)
def test_any_sequence_of_what_can_happen(framework: str, events: list[Callable[[nn.Module], nn.Module]]) -> None:
    model = compressed(framework, None)
    first = removed(model)
    for event in events:
        find_adapter(model).reset(model)
        model = event(model)
        assert dead(model)
        assert dead(model, first)
