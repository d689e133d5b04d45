"""convert(): what can't be converted, and wrong arguments, are errors that name the module or the argument."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn import functional as F

import snncompress
from snncompress import DataError, ModelError, OptionError, UnknownNameError
from snncompress.contract.detection import find_adapter
from snncompress.conversion.converting import convert
from tests.equivalence import same, snapshot


class Branching(nn.Module):
    """torch.fx can't follow a decision that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) if x.sum() > 0 else x


class BranchingWith(nn.Module):
    """The same with a module."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if x.sum() > 0 else x


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_hidden(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(4, 4), act=nn.ReLU(), hidden=module, fc2=nn.Linear(4, 2)))


def diverged() -> nn.Module:
    net = with_hidden(nn.ReLU())
    nn.init.constant_(net.fc2.bias, torch.nan)
    return net


class TwiceTheBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.relu(x) if self.training else x)


class Doubled(nn.ReLU):
    """What is derived from a ReLU need not be one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Undecided(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("cnn", "said"),
    [
        (with_hidden(nn.Sigmoid()), r"hidden \(Sigmoid\) can't be converted\. Only ReLU, ReLU6, SiLU"),
        (with_hidden(nn.Sequential(nn.GELU())), r"hidden\.0 \(GELU\)"),
        (with_hidden(nn.Softmax(1)), r"hidden \(Softmax\)"),
        (with_hidden(nn.LSTM(4, 4)), r"hidden \(LSTM\)"),
        (with_hidden(nn.MultiheadAttention(4, 1)), r"hidden \(MultiheadAttention\)"),
        (with_hidden(Calls(F.gelu)), r"hidden \(Calls\) calls gelu"),
        (with_hidden(Calls(torch.tanh)), r"hidden \(Calls\) calls tanh"),
        (with_hidden(Calls(lambda x: x.sigmoid())), r"hidden \(Calls\) calls sigmoid"),
        (with_hidden(Branching()), r"hidden \(Branching\) calls relu, and torch\.fx can't trace it: TraceError"),
        (
            with_hidden(BranchingWith(nn.ReLU())),
            r"How hidden\.act \(ReLU\) is used can't be seen.* hidden \(BranchingWith",
        ),
        (with_hidden(Undecided()), r"hidden \(Undecided\) has a forward of its own, and torch\.fx can't trace it"),
        (with_hidden(BranchingWith(nn.Tanh())), r"hidden\.act \(Tanh\) can't be converted"),
        (TwiceTheBlock(), r"block \(Sequential\) runs 2 times in one pass"),
        (with_hidden(OnlyInTraining()), r"hidden \(OnlyInTraining\) uses other activations in training"),
        (nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), "Sequential uses no activation"),
        (nn.Sequential(nn.Linear(2, 2), neuron.LIFNode()), r"1 \(LIFNode\) is a spikingjelly neuron already"),
        (nn.Sequential(nn.LazyLinear(2), nn.ReLU()), r"0\.weight is not initialised"),
        (diverged(), r"fc2\.bias of this Sequential holds 2 NaN or infinite values of 2"),
        ("resnet18", "must be a torch.nn.Module, not str"),
    ],
)
def test_what_cannot_be_converted(cnn: nn.Module, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        convert(cnn)


def test_an_activation_on_the_output_stays() -> None:
    for last in (nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()):
        model = convert(nn.Sequential(with_hidden(nn.Identity()), nn.Sequential(nn.Identity(), last)))
        assert type(model[1][1]) is type(last)


@pytest.mark.parametrize(
    ("between", "by"),
    [
        (Calls(lambda x: x.clamp(max=0.2)), "fc2"), (nn.GroupNorm(2, 4), "fc2"), (Calls(lambda x: x * x), "fc2"),
        (Calls(torch.sqrt), "fc2"), (nn.BatchNorm1d(4), ""),
        (Doubled(), ""), (Calls(lambda x: F.max_pool1d(x[:, None], 2).squeeze(1).repeat(1, 2) + x), ""),
    ],
)  # fmt: skip
def test_what_rates_cannot_stand_for_is_warned_of(between: nn.Module, by: str) -> None:
    torch.manual_seed(0)
    cnn, x = with_hidden(between).eval(), torch.rand(8, 4)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = convert(cnn, neuron="if", data=x, timesteps=256, percentile=100)
    assert [str(w.message).split(" isn't")[0] for w in warned] == [f"What {by} (Linear) reads"] * bool(by)
    with torch.no_grad():
        off = torch.stack([model(x) for _ in range(256)]).mean(0) - cnn(x)
    assert (float(off.abs().max()) > 0.01) == bool(by)


class InPlaceTwice(nn.Module):
    """Relies on an in-place ReLU to change its input as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.relu(x) + x


X = torch.linspace(-1, 1, 20).view(5, 4)


@pytest.mark.parametrize(
    ("cnn", "options", "kind", "said"),
    [
        (with_hidden(nn.SiLU()), {"neuron": "if", "data": X}, ModelError, r"hidden \(SiLU\) has negative values"),
        (InPlaceTwice(), {"neuron": "if", "data": X}, ModelError, "in-place ReLU whose input is used again"),
        (with_hidden(nn.ReLU()), {"data": X}, OptionError, "LIF neuron's rate is no ReLU.*neuron='if'"),
        (with_hidden(nn.ReLU()), {"neuron": "if", "data": X[:, :3]}, DataError, r"failed on .* shape \[5, 3\]"),
        (with_hidden(nn.ReLU()), {"neuron": "if", "data": X.double()}, DataError, "torch.float64"),
        (with_hidden(nn.ReLU()), {"neuron": "if", "data": X / 0}, DataError, "NaN or infinite"),
        (with_hidden(nn.ReLU()), {"neuron": "alif"}, OptionError, "neuron must be 'lif', 'if' or a callable"),
        (with_hidden(nn.ReLU()), {"neuron": nn.ReLU}, OptionError, "must make a neuron of spikingjelly, not ReLU"),
        (with_hidden(nn.ReLU()), {"timesteps": 0}, OptionError, "timesteps must be None or a whole number"),
        (with_hidden(nn.ReLU()), {"percentile": 101}, OptionError, "percentile must be a number over 0"),
        (with_hidden(nn.ReLU()), {"framework": "norse"}, UnknownNameError, "no adapter 'norse'.*spikingjelly"),
        (with_hidden(nn.ReLU()), {"framework": 3}, OptionError, "framework must be the name"),
        (
            with_hidden(nn.ReLU()), {"framework": "snntorch", "neuron": lambda: snn.Leaky(beta=0.5)},
            OptionError, "init_hidden=True",
        ),
        (with_hidden(nn.ReLU()).double(), {"framework": "snntorch"}, ModelError, r"cnn\.float\(\)"),
    ],
)  # fmt: skip
def test_wrong_arguments(cnn: nn.Module, options: dict[str, object], kind: type[Exception], said: str) -> None:
    before = snapshot(cnn)
    with pytest.raises(kind, match=said):
        convert(cnn, **options)
    assert same(before, snapshot(cnn))


def test_an_adapter_that_makes_no_neurons_says_so() -> None:
    adapter = find_adapter(nn.Sequential(neuron.IFNode()))
    silent = type("Silent", (type(adapter),), {"make_neuron": snncompress.extend.Adapter.make_neuron})()
    with pytest.raises(ModelError, match="The adapter of spikingjelly makes no neurons"):
        convert(with_hidden(nn.ReLU()), silent)
