"""Products that round their operands, as GPUs' convolutions do, must not change what is found out about a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import snncompress
from snncompress.running import precision
from snncompress.running.precision import full_precision, rounding_as_outside


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_on_gpus", lambda: True)


class TensorFloat32(TorchFunctionMode):
    """A device whose convolutions round their operands to ten bits where the settings let them and the widths fit."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.conv2d:
            x, weight, *others = args
            fits = weight.shape[0] % 4 == weight.shape[1] % 4 == 0
            self.rounded.append(fits and torch.backends.cudnn.allow_tf32)
            if self.rounded[-1]:
                args = (ten_bits(x), ten_bits(weight), *others)
        return func(*args, **(kwargs or {}))


def ten_bits(x: Tensor) -> Tensor:
    """23 bits of mantissa to 10; the gradient goes straight through."""
    near = ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x + (near - x).detach()


def test_ten_bits() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-12, 3.0])
    assert ten_bits(x).tolist() == [1 + 2**-10, 1.0, 3.0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        layer.Conv2d(3, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Conv2d(16, 32, 3, padding=1), layer.BatchNorm2d(32), neuron.LIFNode(),
        layer.Conv2d(32, 32, 3, padding=1), layer.BatchNorm2d(32), neuron.LIFNode(),
        layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(32, 10),
    )  # fmt: skip
    functional.set_step_mode(made, "m")
    return made


def test_a_network_shrinks_as_much_where_convolutions_round() -> None:
    x = torch.rand(4, 3, 8, 8)
    wanted = snncompress.apply(net(), "magnitude", 0.4, None, data=x, timesteps=2, repair=None)
    with TensorFloat32() as device:
        found = snncompress.apply(net(), "magnitude", 0.4, None, data=x, timesteps=2, repair=None)
    assert device.rounded
    assert not any(device.rounded)
    assert snncompress.plan_of(found).edits == snncompress.plan_of(wanted).edits


def test_training_and_measuring_round_as_ever() -> None:
    data = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    with TensorFloat32() as device:
        snncompress.evaluate(net(), data, timesteps=2)
        assert any(device.rounded)
        snncompress.apply(net(), "magnitude", 0.5, None, data=data, timesteps=2, repair=None, refresh=False)
        device.rounded.clear()
        snncompress.apply(
            net(), "magnitude", 0.5, None, data=data, timesteps=2, repair=None, finetune=1, progress=False
        )
    assert any(device.rounded)


@pytest.fixture
def settings() -> Iterator[Callable[[], list[Any]]]:
    """What torch says of its settings; afterwards they are what they were."""
    backends = torch.backends

    def read() -> list[Any]:
        ask = [lambda: backends.cudnn.allow_tf32, lambda: backends.cuda.matmul.allow_tf32]
        ask.append(torch.get_float32_matmul_precision)
        kinds = [kind.fp32_precision for kind in precision._kinds()]
        return [precision._asked(one) for one in ask] + kinds

    before = precision._Rounding()
    yield read
    before.put()


def high() -> None:
    torch.set_float32_matmul_precision("high")


def no_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = False


def by_kind() -> None:
    if not precision._kinds():
        pytest.skip("this torch has no settings for kinds of products")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("said", [lambda: None, high, no_tf32, by_kind])
def test_settings_are_exact_inside_and_as_before_afterwards(
    said: Callable[[], None], settings: Callable[[], list[Any]]
) -> None:
    said()
    before = settings()
    with full_precision():
        exact = settings()
        assert exact[1:3] == [False, "highest"]
        assert not exact[0]  # None where the user said it by kind
        assert set(exact[3:]) <= {"ieee", "none"}
        with full_precision(), rounding_as_outside():
            assert settings() == before
        assert settings() == exact
    assert settings() == before


def test_where_nothing_is_rounded_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that was told once no longer follows what is told of all kinds."""

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(precision, "_on_gpus", lambda: False)
    for setter in ("_set_fp32_precision_setter", "_set_cudnn_allow_tf32", "_set_float32_matmul_precision"):
        if hasattr(torch._C, setter):
            monkeypatch.setattr(torch._C, setter, never)
    with full_precision(), rounding_as_outside():
        assert torch.backends.cudnn.allow_tf32


def test_frozen_settings_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)
    with full_precision():
        assert [kind.fp32_precision for kind in precision._kinds()[:2]] in ([], ["ieee", "ieee"])
