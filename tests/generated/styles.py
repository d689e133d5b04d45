"""In which framework a network is written, and how it goes through time: what layers and neurons are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from .formats import Format
from .own import OwnFire, OwnFireFirst, OwnFireSoft, Spike

SAMPLES = 2
"""In a batch."""
NORMS = ("batch", "batch", "batch", "plain", "group", "instance", "nostats")


class Unfolded(nn.Module):
    """A neuron that wants time on an axis of its own, in a network that has folded it into the samples."""

    def __init__(self, inner: nn.Module, steps: int, axis: int = 0) -> None:
        super().__init__()
        self.inner, self.steps, self.axis = inner, steps, axis

    def forward(self, x: Tensor) -> Tensor:
        apart = (self.steps, -1) if self.axis == 0 else (-1, self.steps)
        return self.inner(x.unflatten(0, apart)).flatten(0, 1)


class Explicit(nn.Module):
    """A neuron of snnTorch's whose state is handed in and out, as in a loop over timesteps."""

    def __init__(self, inner: nn.Module, state: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.inner = inner
        self.state = self.first = state

    def forward(self, x: Tensor) -> Tensor:
        spikes, *rest = self.inner(x, *self.state)
        self.state = (spikes, *rest) if isinstance(self.inner, (snn.RLeaky, snn.RSynaptic)) else tuple(rest)
        return spikes


class FirstOf(nn.Module):
    """The spikes of a neuron that returns its membrane too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Samples(nn.Module):
    """Folds time into the samples for a layer that knows no time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Double(nn.Module):
    """Back to float64, from neurons that compute in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Theta(neuron.SimpleBaseNode):
    """A threshold for each channel, held as a memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_memory("theta", 0.3 + torch.rand(shape, dtype=torch.float64))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.5 + x

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.theta)


class Style:
    """Makes layers and neurons; ``lead`` axes stand before channels and sizes, ``steps`` timesteps are run."""

    lead: ClassVar[int] = 1
    loops: ClassVar[bool] = False
    """The model goes through the timesteps itself, one by one."""
    whole: ClassVar[bool] = False
    """All timesteps are in what the stages see."""
    first: ClassVar[int] = 0
    """The axis of time, where they are."""

    def __init__(self, rng: random.Random, steps: int) -> None:
        self.rng, self.steps = rng, steps

    @property
    def batch(self) -> int:
        """As many samples as stages see."""
        return SAMPLES * (self.steps if self.whole else 1)

    def odds(self, chance: float) -> bool:
        return self.rng.random() < chance

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def layer(self, name: str, *args: Any, **options: Any) -> nn.Module:
        """A layer of torch's by its class's name."""
        return getattr(nn, name)(*args, **options)

    def wrap(self, module: nn.Module) -> nn.Module:
        """What sees samples on one axis alone."""
        return module

    def conv(self, fmt: Format, after: int, kernel: int = 3, *, transposed: bool = False, **options: Any) -> nn.Module:
        options = {"padding": kernel // 2, "bias": self.odds(0.5), **options}
        name = f"Conv{'Transpose' if transposed else ''}{fmt.dims}d"
        return self.layer(name, fmt.channels, after, kernel, **options)

    def linear(self, before: int, after: int, *, bias: bool | None = None) -> nn.Module:
        return self.layer("Linear", before, after, bias=self.odds(0.6) if bias is None else bias)

    def norm(self, fmt: Format, kind: str | None = None) -> nn.Module:
        kind = kind or self.rng.choice(NORMS)
        dims, c = max(1, fmt.dims), fmt.channels
        if fmt.kind != "maps" and kind in ("group", "instance"):
            return nn.LayerNorm(c, elementwise_affine=self.odds(0.7))
        if kind == "group":
            groups = self.rng.choice([g for g in range(1, c + 1) if c % g == 0])
            return drawn(self.wrap(nn.GroupNorm(groups, c, affine=self.odds(0.7))))
        if kind == "instance" and fmt.flat > c:
            stats = self.odds(0.3)
            name = f"InstanceNorm{dims}d"
            return drawn(self.wrap(getattr(nn, name)(c, affine=self.odds(0.5), track_running_stats=stats)))
        options = {"affine": kind != "plain", "track_running_stats": kind != "nostats"}
        if fmt.kind == "tokens":
            return drawn(AcrossTokens(self.wrap(nn.BatchNorm1d(c, **options))))
        return drawn(self.layer(f"BatchNorm{dims}d", c, **options))

    def fire(self, fmt: Format) -> nn.Module:
        raise NotImplementedError

    def finish(self, model: nn.Module) -> None:
        """What is set on the whole model."""

    def reset(self, model: nn.Module) -> None:
        """Called by a model that goes through time itself, before it does."""

    def per_channel(self, fmt: Format, low: float, high: float) -> Tensor:
        """A number for each channel."""
        return low + (high - low) * torch.rand(fmt.channels, *[1] * (-1 - fmt.axis))


class AcrossTokens(nn.Module):
    """A batch normalization of [..., L, C]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(-1, -2)).transpose(-1, -2)


def drawn(module: nn.Module) -> nn.Module:
    """With statistics and scales that aren't those of a new norm."""
    for m in module.modules():
        for name, low, high in (("weight", 0.6, 1.6), ("bias", -0.3, 0.4), ("running_mean", -0.3, 0.3)):
            tensor = getattr(m, name, None)
            if isinstance(tensor, Tensor):
                nn.init.uniform_(tensor, low, high)
        if isinstance(getattr(m, "running_var", None), Tensor):
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return module


class SpikingJelly(Style):
    """Its neurons, with all that can be set about them."""

    mode: ClassVar[str] = "s"

    def node(self, fmt: Format) -> nn.Module:
        v_reset = self.pick(0.0, None, -0.1)
        basic = {"v_threshold": self.pick(0.3, 0.6, 1.0), "detach_reset": self.odds(0.3)}
        common = {**basic, "v_reset": v_reset}
        decay = {"decay_input": self.odds(0.5)}
        shape = (fmt.channels, *[1] * (-1 - fmt.axis))
        makers: list[Callable[[], nn.Module]] = [
            lambda: neuron.IFNode(**common),
            lambda: neuron.IFNode(**common, store_v_seq=True) if self.mode == "m" else neuron.IFNode(**common),
            lambda: neuron.LIFNode(tau=self.pick(1.5, 2.0, 4.0), **decay, **common),
            lambda: neuron.LIFNode(tau=self.pick(1.5, 2.0), **decay, **common),
            lambda: neuron.ParametricLIFNode(init_tau=self.pick(1.5, 2.0), **decay, **common),
            lambda: neuron.KLIFNode(
                scale_reset=self.odds(0.5), **decay, **(common | {"v_reset": self.pick(0.0, None)})
            ),
            lambda: neuron.QIFNode(**common),
            lambda: neuron.EIFNode(**common),
            lambda: neuron.IzhikevichNode(a=0.1, b=0.1, **(common | {"v_reset": 0.0})),
            lambda: neuron.CUBALIFNode(v_threshold=0.4, v_reset=self.pick(0.0, None)),
            lambda: neuron.ComplementaryLIFNode(v_threshold=0.5),
            lambda: neuron.SimpleLIFNode(2.0, self.odds(0.5), v_threshold=0.4),
            lambda: neuron.SimpleIFNode(v_threshold=0.5),
            lambda: neuron.LIAFNode(torch.relu, self.odds(0.5), v_threshold=0.4),
            lambda: neuron.ILIFNode(v_threshold=0.5),
            lambda: neuron.TernaryIFNode(v_threshold=0.5),
            lambda: neuron.SLTTLIFNode(v_threshold=0.5),
            lambda: neuron.RAFNode(v_threshold=0.5),
            lambda: neuron.HalfThresholdIFNode(v_threshold=0.5),
            lambda: Theta(shape),
        ]
        if self.mode == "m":
            makers += [
                lambda: neuron.PSN(self.steps), lambda: neuron.MaskedPSN(min(2, self.steps), self.steps),
                lambda: neuron.SlidingPSN(2),
                lambda: nn.Sequential(neuron.DSRIFNode(self.steps, v_threshold=1.0), Double()),
                lambda: nn.Sequential(neuron.DSRLIFNode(self.steps), Double()),
            ]  # fmt: skip
            if fmt.dims == 2:  # it takes no others
                makers.append(lambda: neuron.GatedLIFNode(self.steps, self.pick(None, fmt.channels)))
        common_kinds = self.odds(0.5)
        return self.rng.choice(makers[:5] if common_kinds else makers)()

    def fire(self, fmt: Format) -> nn.Module:
        return self.node(fmt)

    def finish(self, model: nn.Module) -> None:
        kinds = (neuron.BaseNode, neuron.SimpleBaseNode, neuron.NonSpikingBaseNode, neuron.SlidingPSN, neuron.MaskedPSN)
        for m in model.modules():
            if isinstance(m, kinds) and self.mode == "m":
                m.step_mode = "m"

    def reset(self, model: nn.Module) -> None:
        functional.reset_net(model)


class Single(SpikingJelly):
    """One timestep a call, in torch's own layers or SpikingJelly's."""

    def __init__(self, rng: random.Random, steps: int) -> None:
        super().__init__(rng, steps)
        self.foreign = self.odds(0.5)

    def layer(self, name: str, *args: Any, **options: Any) -> nn.Module:
        return getattr(layer if self.foreign and hasattr(layer, name) else nn, name)(*args, **options)


class Loop(Single):
    """The same, in a loop over timesteps that the model writes itself."""

    loops = True


class Multi(SpikingJelly):
    """[T, N, ...] in layers of SpikingJelly's."""

    lead = 2
    whole = True
    mode = "m"

    def layer(self, name: str, *args: Any, **options: Any) -> nn.Module:
        if name == "Linear" and self.odds(0.5):
            return nn.Linear(*args, **options)
        made = getattr(layer, name, None)
        return made(*args, **options, step_mode="m") if made else self.wrap(getattr(nn, name)(*args, **options))

    def wrap(self, module: nn.Module) -> nn.Module:
        return layer.SeqToANNContainer(module)


class Folded(SpikingJelly):
    """[T·N, ...] in torch's layers; neurons unfold it."""

    whole = True
    mode = "m"

    def fire(self, fmt: Format) -> nn.Module:
        return Unfolded(self.node(fmt), self.steps)


class SnnTorch(Style):
    """Its neurons, with all that can be set about them."""

    hidden: ClassVar[bool] = True

    def node(self, fmt: Format, *, output: bool = False) -> nn.Module:
        kind = self.pick("Leaky", "Leaky", "Leaky", "Synaptic", "Alpha", "Lapicque", "RLeaky", "RSynaptic")
        tensor = self.odds(0.4)
        learn = self.odds(0.3) and kind != "Lapicque"  # deepcopy can't take what it makes of a learned beta

        def value(low: float, high: float) -> Any:
            return self.per_channel(fmt, low, high) if tensor else low

        options: dict[str, Any] = {
            "beta": 0.6 if kind == "Lapicque" else value(0.5, 0.9), "threshold": value(0.3, 0.7),
            "learn_beta": learn, "learn_threshold": self.odds(0.3), "init_hidden": self.hidden,
            "spike_grad": Spike.apply, "output": output,
            "reset_mechanism": self.pick("subtract", "zero", "none"),
        }  # fmt: skip
        if kind in ("Synaptic", "Alpha", "RSynaptic"):
            options["alpha"] = value(0.92, 0.98) if kind == "Alpha" else value(0.5, 0.9)
        if kind in ("Leaky", "Synaptic", "RLeaky"):
            options["reset_delay"] = self.odds(0.7)
        if kind == "Leaky" and self.odds(0.2):
            options["graded_spikes_factor"] = self.pick(0.5, 2.0)
        if kind.startswith("R"):
            options["all_to_all"] = everything = self.odds(0.4) and fmt.kind != "tokens" and fmt.dims in (0, 2)
            if not everything:
                options["V"] = value(0.2, 0.5)
            elif fmt.kind == "vector":
                options["linear_features"] = fmt.channels
            else:
                options |= {"conv2d_channels": fmt.channels, "kernel_size": 3}
        if self.odds(0.04) and fmt.dims == 2:
            own = {key: options[key] for key in ("init_hidden", "spike_grad", "output")}
            return snn.SConv2dLSTM(fmt.channels, fmt.channels, 3, threshold=0.1, **own)
        return getattr(snn, kind)(**options)

    def fire(self, fmt: Format) -> nn.Module:
        return FirstOf(self.node(fmt, output=True)) if self.odds(0.15) else self.node(fmt)

    def reset(self, model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, snn.SpikingNeuron) and callable(getattr(m, "reset_mem", None)):
                m.reset_mem()


class Hidden(SnnTorch):
    """One timestep a call; states are the neurons' own."""


class HiddenLoop(SnnTorch):
    """The same, in a loop that the model writes itself."""

    loops = True


class ExplicitLoop(SnnTorch):
    """States are handed in and out, in a loop that the model writes itself."""

    loops = True
    hidden = False

    def fire(self, fmt: Format) -> nn.Module:
        return Explicit(self.node(fmt))

    def reset(self, model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, Explicit):
                m.state = m.first


class SharedLoop(ExplicitLoop):
    """The same, with one neuron object behind all layers, which begins with what the last one left, or with nothing."""

    def __init__(self, rng: random.Random, steps: int) -> None:
        super().__init__(rng, steps)
        self.state = () if self.odds(0.3) else (torch.zeros(0),)
        learn = {"learn_beta": self.odds(0.3), "learn_threshold": self.odds(0.3)}
        reset = self.pick("subtract", "zero", "none")
        self.one = snn.Leaky(0.7, threshold=0.4, spike_grad=Spike.apply, reset_mechanism=reset, **learn)

    def fire(self, fmt: Format) -> nn.Module:
        return Explicit(self.one, self.state)


class Parallel(SnnTorch):
    """[T, N, C] in neurons of snnTorch's that run all timesteps at once."""

    lead = 2
    whole = True

    def wrap(self, module: nn.Module) -> nn.Module:
        return Samples(module)

    def layer(self, name: str, *args: Any, **options: Any) -> nn.Module:
        made = super().layer(name, *args, **options)
        return made if name == "Linear" else self.wrap(made)

    def fire(self, fmt: Format) -> nn.Module:
        c = fmt.channels
        if self.odds(0.5):
            return snn.LeakyParallel(c, c, beta=self.pick(0.5, 0.9), threshold=0.3, spike_grad=Spike.apply)
        return FirstOf(snn.StateLeaky(0.6, c, threshold=0.3, spike_grad=Spike.apply))


class Own(Style):
    """Neurons of the user's own that take one timestep."""

    neurons: ClassVar[type[nn.Module]] = OwnFire
    time_dim: ClassVar[int | None] = None

    def node(self, fmt: Format) -> nn.Module:
        threshold = self.per_channel(fmt, 0.2, 0.6) if self.odds(0.4) else self.pick(0.3, 0.5)
        return self.neurons(self.pick(0.5, 0.9, 0.0), threshold, learn=self.odds(0.5))

    def fire(self, fmt: Format) -> nn.Module:
        return self.node(fmt)


class OwnLoop(Own):
    """The same, in a loop that the model writes itself."""

    loops = True

    def reset(self, model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, OwnFire):
                m.reset()


class OwnBatchFirst(Own):
    """[N·T, ...] folded; neurons take [N, T, ...]."""

    whole = True
    first = 1
    neurons = OwnFireSoft
    time_dim = 1

    def fire(self, fmt: Format) -> nn.Module:
        return Unfolded(self.node(fmt), self.steps, 1)


class OwnTimeFirst(Own):
    """[T·N, ...] folded; neurons take [T, N, ...]."""

    whole = True
    neurons = OwnFireFirst
    time_dim = 0

    def fire(self, fmt: Format) -> nn.Module:
        return Unfolded(self.node(fmt), self.steps, 0)


STYLES: dict[type[Style], int] = {
    Single: 3, Loop: 2, Multi: 5, Folded: 5, Hidden: 4, HiddenLoop: 2, ExplicitLoop: 4, SharedLoop: 1, Parallel: 1,
    Own: 1, OwnLoop: 1, OwnBatchFirst: 2, OwnTimeFirst: 1,
}  # fmt: skip
"""With their weights."""
