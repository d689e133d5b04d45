"""A network in whole numbers: between its first layer's output and its readout there is no float."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.errors import ModelError, SNNCompressError
from snncompress.interfaces import Adapter
from snncompress.model.chance import seeded
from snncompress.model.copying import private_copy
from snncompress.model.fixed_point import state_grid
from snncompress.model.modules import tensors_in
from snncompress.model.network import WEIGHT_LAYERS
from snncompress.model.patches import weight_dims
from snncompress.model.spikes import Spikes, counts_of, in_float
from snncompress.running.data import Run
from snncompress.structure.tracing import trace

from .integer_layers import Codes, SumLayer, make_exact, make_integer, make_sums
from .integer_neurons import IntegerGrid, count_in_numbers
from .quickening import Seen, inputs_of, made_constant, noted

M = TypeVar("M", bound=nn.Module)


def integer_network(model: M, adapter: Adapter, run: Run, codes: Mapping[str, Codes | str]) -> M:
    """A network with folded batch norms in whole numbers, in place; ``codes`` are those of its weights, or why not.

    Raises ModelError for layers and neurons that can't be, each with its reason, and where the example gives other
    spikes than in float64.
    """
    network = trace(model, adapter, run, groups=False)
    exact = in_double(private_copy(model, adapter))
    inputs = _inputs(model, adapter, run)
    why: dict[str, str] = {}
    analog: set[str] = set()
    for name in network.layers:
        layer, seen, drives = model.get_submodule(name), inputs.get(name, Seen()), network.drives.get(name)
        first = not network.producers.get(name)
        reason = _codes_reason(codes.get(name))
        if not reason and not seen.whole:
            reason = "its input isn't spikes: averages of them, for one, are fractions"
        if not reason:
            reason = (make_sums if drives else make_integer)(layer, cast(Codes, codes[name]))
        if reason and (first or not drives):  # what comes before the first spikes, and behind the last
            noted(layer, reason)
            reason = ""
            if first and drives:
                analog.add(name)
                reason = make_exact(layer)
                made_constant(layer, seen.inputs)
        if reason:
            why[name] = reason
    for name, neuron in adapter.neurons(model).items():
        drivers = [layer for layer in network.layers if name in network.drives.get(layer, ())]
        reason = _count(name, neuron, model, adapter, drivers, analog)
        if reason and not why.keys() & set(drivers):
            why[name] = reason
    if why:
        raise ModelError(
            f"This {type(model).__name__} can't be a network in whole numbers: "
            f"{'; '.join(f'{name}: {reason}' for name, reason in why.items())}. Quantize weights and states with "
            f"snncompress.apply(…, bits=4, state_bits=8), or take integer='auto', which leaves such layers in float."
        )
    wanted, put_out = heard(exact, adapter, run), _put_out(exact, adapter, run)
    model.register_forward_hook(handed_out)
    _check(model, adapter, run, wanted)
    if not all(map(_near, put_out, _put_out(model, adapter, run))):
        raise ModelError(
            f"This {type(model).__name__} puts out something else in whole numbers than in float64. Likely cause: it "
            f"reads what a neuron remembers (its v or mem), which is a number of steps there. Let the neuron hand its "
            f"state on, or put out spikes."
        )
    return model


def counts_in_integers(model: nn.Module) -> bool:
    """Is this a network that was frozen with ``integer="full"``?"""
    return any(isinstance(module, IntegerGrid) for module in model.modules())


def refuse_integers(model: nn.Module, what: str) -> None:
    """Raise ModelError where a network counts in whole numbers already."""
    if counts_in_integers(model):
        raise ModelError(
            f"This {type(model).__name__} can't be {what}: it counts in whole numbers already. Take the network that "
            f"it was made from."
        )


def in_double(model: M) -> M:
    """A network whose layers multiply in float64, and whose norms take what comes of it, in place."""
    for module in model.modules():
        if isinstance(module, WEIGHT_LAYERS):
            make_exact(module)
        elif isinstance(module, _BatchNorm):
            module.double()
    return model


def handed_out(model: nn.Module, args: Any, output: Any) -> Any:
    """A hook: what a network puts out are floats."""
    return in_float(output)


def heard(model: nn.Module, adapter: Adapter, run: Run) -> dict[str, Tensor]:
    """The spikes of every neuron in an example, by name, in the order of time."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, spikes: Tensor, potential: Tensor | None) -> None:
        found.setdefault(name, []).append(in_float(spikes).bool())

    with torch.no_grad(), seeded(model), ExitStack() as stack:
        for name, neuron in adapter.neurons(model).items():
            stack.callback(adapter.observe(neuron, partial(note, name), membrane=False))
        run(model)
    adapter.reset(model)
    return {name: _joined(spikes) for name, spikes in found.items()}


def _joined(spikes: list[Tensor]) -> Tensor:
    """One after the other; flat where a neuron has been used at several widths."""
    return torch.cat(spikes if len({s.shape[1:] for s in spikes}) == 1 else [s.flatten() for s in spikes])


def _put_out(model: nn.Module, adapter: Adapter, run: Run) -> list[Tensor]:
    """What a network puts out in an example."""
    with torch.no_grad(), seeded(model):
        found = [in_float(t) for t in tensors_in([run(model)])]
    adapter.reset(model)
    return found


def _near(wanted: Tensor, found: Tensor) -> bool:
    """Up to the few spikes that may be others, and rounding."""
    apart = (wanted.double() - found.double()).abs()
    return int((apart > 1e-3 * wanted.abs().amax().double()).sum()) <= 0.02 * apart.numel()


def _inputs(model: nn.Module, adapter: Adapter, run: Run) -> dict[str, Seen]:
    """What each weight layer reads in an example: what comes from neurons is known as spikes, also where none comes."""
    with torch.no_grad(), seeded(model), ExitStack() as stack:
        for neuron in adapter.neurons(model).values():
            stack.callback(neuron.register_forward_hook(_known).remove)
        seen = inputs_of(model, run)
    adapter.reset(model)
    return seen


def _known(neuron: nn.Module, args: Any, output: Any) -> Any:
    """A hook: a neuron's spikes as Spikes."""
    first = output[0] if isinstance(output, tuple) else output
    counts = counts_of(first)
    if counts is None:
        return output
    return (Spikes(counts), *output[1:]) if isinstance(output, tuple) else Spikes(counts)


def _codes_reason(code: Codes | str | None) -> str:
    if isinstance(code, str):
        return code
    return "" if isinstance(code, Codes) else "its weight isn't quantized"


def _count(
    name: str, neuron: nn.Module, model: nn.Module, adapter: Adapter, drivers: list[str], analog: set[str]
) -> str:
    """Let a neuron count in whole numbers, or say why it can't."""
    grid = state_grid(neuron)
    if grid is None:
        return "its state is in float, see state_bits of snncompress.apply"
    if not drivers:
        return "no layer drives it"
    if len(drivers) > 1:
        return f"{len(drivers)} layers add up before it ({', '.join(drivers)}), and their scales differ"
    layer: Any = model.get_submodule(drivers[0])
    if not isinstance(layer, SumLayer) and drivers[0] not in analog:
        return f"its layer {drivers[0]} computes in float"
    wide = int(getattr(layer, "out_channels", getattr(layer, "out_features", 0)))
    unit = layer.unit if isinstance(layer, SumLayer) else torch.ones(wide)
    bias = torch.zeros(wide) if layer.bias is None or drivers[0] in analog else layer.bias
    try:
        equation = adapter.dynamics(neuron)
        if equation.recurrent is not None:
            return "its own spikes, handed on to it, have no form in whole numbers"
        counting = IntegerGrid(name, grid, equation, unit, bias, weight_dims(layer), analog=drivers[0] in analog)
        adapter.step_on(neuron, cast(Any, counting))
    except ModelError as error:
        return str(error)
    count_in_numbers(neuron, counting)
    return ""


def _check(model: nn.Module, adapter: Adapter, run: Run, wanted: Mapping[str, Tensor]) -> None:
    """Raise ModelError where whole numbers fire otherwise than floats of 64 bits."""
    try:
        found = heard(model, adapter, run)
    except ModelError as error:
        raise ModelError(f"This {type(model).__name__} can't be a network in whole numbers: {error}") from error
    except SNNCompressError as error:  # torch's own: the model has just run in float64
        raise ModelError(
            f"This {type(model).__name__} can't be a network in whole numbers: something between a layer and the "
            f"neurons that it drives takes none. Likely cause: a batch norm that can't be folded, as behind a pooling; "
            f"put it right behind its layer. Or take integer='auto', which leaves such layers in float."
        ) from error
    for name, spikes in wanted.items():
        other = found.get(name)
        if other is None or other.shape != spikes.shape or int((other ^ spikes).sum()) > 1e-3 * spikes.numel():
            raise ModelError(
                f"{name} fires otherwise in whole numbers than in float64, on the example that the network was frozen "
                f"with. Likely cause: something between its layer and it computes with numbers, such as a factor or a "
                f"sum. Take integer='auto', which leaves such layers in float."
            )
