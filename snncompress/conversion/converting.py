"""convert(): a CNN becomes a spiking network; every use of an activation becomes a neuron of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from snncompress.base.distributed import no_sync
from snncompress.contract.registry import adapters, registry
from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter
from snncompress.model.chance import held, undisturbed
from snncompress.model.copying import private_copy, refuse_broken, refuse_compiled, refuse_wrapped
from snncompress.running.data import Feed
from snncompress.running.precision import full_precision
from snncompress.structure.fx_graphs import called

from .activations import separate
from .rate_coding import CalibratedNeuron, RateMaxPool, calibrate

M = TypeVar("M", bound=nn.Module)


def convert(
    cnn: M,
    framework: str | Adapter = "spikingjelly",
    *,
    neuron: Literal["lif", "if"] | Callable[[], nn.Module] = "lif",
    data: Any = None,
    timesteps: int | None = None,
    percentile: float = 99.9,
) -> M:
    """Turn a CNN into a spiking network: ReLU, ReLU6, SiLU and Hardswish become neurons; the CNN stays as it was.

    Without ``data``, a starting point for training: neurons with threshold 1 in place of the activations, all weights
    and module names kept. An LIF neuron doesn't compute what a ReLU does (it leaks, and its reset drops what exceeds
    the threshold), so the network must be trained before it is of any use.

    With ``data`` and ``neuron="if"``, the CNN's function is kept: a neuron without leak, reset by subtraction, that is
    driven by x/λ for T steps fires ⌊T·x/λ⌋ spikes for x in [0, λ], a ReLU in steps of λ/T. λ is the ``percentile`` of
    the layer's activations on the data; each spike stands for λ, a factor which moves into the weights of the next
    layer, or stays behind the neuron (its ``scale``) where spikes are added to currents, as in a residual network.
    ``timesteps`` = T adds 1/(2T) to the normalized current, which rounds instead of cutting off. Max-pooling
    becomes max-pooling of rates (:class:`snncompress.conversion.rate_coding.RateMaxPool`), since the maximum of spikes
    isn't that of their rates. Compare in eval mode, on the time average of the output. Not kept is the function of
    layers that aren't linear over time: group or layer normalization, products of activations, a clamp. A
    NonlinearWarning names what reads the first of these.

    The result is run step by step: ``timesteps=T`` of :func:`snncompress.apply`, ``profile`` and ``finetune``.

    Args:
        cnn: any network of torch modules. Functional activations are found where torch.fx can trace the module that
            calls them; such a module gets submodules for them (``relu``, ``relu_1`` …), as do further uses of the same
            activation module. Everything else (pooling, batch normalization, dropout, a softmax on the output) stays.
        framework: "spikingjelly", "snntorch", another adapter's name, or an adapter.
        neuron: "lif" (τ = 2.0, reset to 0) or "if" (no leak, reset by subtraction), with ATan surrogate gradient; or a
            callable that makes a neuron of the framework (snnTorch: with ``init_hidden=True``; with ``data``: with
            threshold 1 and reset by subtraction).
        data: calibration data, as for :func:`snncompress.apply`: static samples like those that the CNN was
            trained on.
        timesteps: T the calibrated network will run for; without ``data`` nothing depends on it.
        percentile: over 0, up to 100 (the maximum). Less lets the largest activations saturate, and resolves the others
            finer.

    Returns:
        A new network of the CNN's class (of a subclass of it where ``forward`` had to be rewritten), which
        :func:`snncompress.apply` takes.

    Raises:
        ModelError: something can't be converted; the message names the module.
        DataError: the data don't fit the CNN.
        OptionError: an argument has a wrong value; UnknownNameError: no such framework.

    Calibration is that of Rueckauer et al., Frontiers in Neuroscience 2017 (and of SpikingJelly's ann2snn), the
    rounding that of Deng & Gu, ICLR 2021.

    >>> cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> lif = convert(cnn)[1]
    >>> lif.tau, lif.v_threshold, lif.v_reset
    (2.0, 1.0, 0.0)
    >>> x = torch.rand(5, 1, 8, 8)
    >>> snn = convert(cnn, neuron="if", data=x, timesteps=32, percentile=100)
    >>> rates = torch.stack([snn(x) for _ in range(32)]).mean(0)
    >>> bool((rates - cnn(x)).abs().max() < 0.1)
    True
    """
    adapter = _adapter(framework)
    _check(cnn, adapter, neuron, data, timesteps, percentile)
    with no_sync(), undisturbed(cnn), torch.inference_mode(False), full_precision():  # a DataLoader draws numbers
        return _convert(cnn, adapter, neuron, data, timesteps, percentile)


def _convert(cnn: M, adapter: Adapter, neuron: Any, data: Any, timesteps: int | None, percentile: float) -> M:
    model = private_copy(cnn, adapter)
    names, pools = separate(model, pools=data is not None)
    if data is not None:
        feed = Feed(adapter, data, on=cnn)
        with held(feed.generators()):
            levels, scales = calibrate(model, private_copy(cnn, adapter), names, pools, feed, percentile)
    for name in pools:
        _replace(model, name, RateMaxPool(model.get_submodule(name)))
    probe = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0)).detach().new_zeros(1, 1)
    for name in names:
        new = _checked(neuron() if callable(neuron) else adapter.make_neuron(neuron), adapter, probe)
        if data is not None:
            new = CalibratedNeuron(new, 1 / levels[name], 0.5 / timesteps if timesteps else 0.0, scales[name])
        _replace(model, name, new.to(probe.device))
    adapter.reset(model)
    adapter.adopt(model)
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    new.train(model.get_submodule(name).training)
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = new


def _adapter(framework: str | Adapter) -> Adapter:
    if isinstance(framework, Adapter):
        return framework
    if not isinstance(framework, str):
        raise OptionError(
            f"framework must be the name of a framework or a snncompress.extend.Adapter, not {framework!r}."
        )
    found: Adapter = registry().find("adapter", framework)()
    return found


def _check(cnn: Any, adapter: Adapter, neuron: Any, data: Any, timesteps: Any, percentile: Any) -> None:
    if not isinstance(cnn, nn.Module):
        raise ModelError(f"cnn must be a torch.nn.Module, not {type(cnn).__name__}.")
    if not (callable(neuron) or neuron in ("lif", "if")):
        raise OptionError(f"neuron must be 'lif', 'if' or a callable that makes a neuron, not {neuron!r}.")
    if data is not None and neuron == "lif":
        raise OptionError(
            "An LIF neuron's rate is no ReLU, so calibration can't keep the CNN's function. Pass neuron='if' with "
            "data, or leave data out and train the network."
        )
    if timesteps is not None and (isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1):
        raise OptionError(f"timesteps must be None or a whole number of at least 1, not {timesteps!r}.")
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
        raise OptionError(f"percentile must be a number over 0 and up to 100, not {percentile!r}.")
    refuse_wrapped(cnn)
    refuse_compiled(cnn)
    for name, parameter in cnn.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"{name} is not initialised yet (a lazy layer). Run the CNN once on a batch first.")
    refuse_broken(cnn)
    for known in {a.framework: a for a in (*adapters(), adapter)}.values():
        for name in known.neurons(cnn):
            raise ModelError(f"{called(cnn, name)} is a {known.framework} neuron already: this is no CNN.")


def _checked(neuron: Any, adapter: Adapter, probe: Tensor) -> nn.Module:
    if not isinstance(neuron, nn.Module) or not adapter.is_neuron(neuron):
        raise OptionError(f"neuron() must make a neuron of {adapter.framework}, not {type(neuron).__name__}.")
    with torch.no_grad():
        spikes = neuron.to(probe.device)(probe)
    if not isinstance(spikes, Tensor) or spikes.shape != probe.shape:
        raise OptionError(
            f"{type(neuron).__name__} must take a current and return spikes alone, of the same shape. Likely cause: it "
            f"doesn't keep its own state; snnTorch's neurons do with init_hidden=True, output=False."
        )
    if spikes.dtype != probe.dtype:
        raise ModelError(
            f"{type(neuron).__name__} answers {probe.dtype} currents with {spikes.dtype} spikes. Convert the CNN "
            f"first: cnn.float()."
        )
    return neuron
