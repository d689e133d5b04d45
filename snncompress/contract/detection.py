"""Finds the adapter of a model's framework."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter

from .plain import PlainAdapter
from .registry import adapters, registry


def find_adapter(model: nn.Module, adapter: Adapter | str | None = None, *, plain: bool = False) -> Adapter:
    """The adapter that knows the model's neurons; ``adapter`` names one, or is one, to settle it by hand.

    With ``plain``, a network in which no adapter knows a neuron is an ordinary one and gets a :class:`PlainAdapter`.
    Raises ModelError where the model has no spiking neuron, neurons of two frameworks, or uninitialised layers.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ModelError(f"{lazy[0]} is not initialised yet (a lazy layer). Run the model once on a batch first.")
    if isinstance(adapter, str):
        candidates: list[Adapter] = [registry().find("adapter", adapter)()]
    elif adapter is not None and not isinstance(adapter, Adapter):
        raise OptionError(f"adapter must be the name of a framework or a snncompress.extend.Adapter, not {adapter!r}.")
    else:
        candidates = list(adapters()) if adapter is None else [adapter.beside(model, adapters())]
    found = {a.framework: (a, neurons) for a in candidates if (neurons := a.neurons(model))}
    if len(found) == 1:
        return next(iter(found.values()))[0]
    if found:
        examples = ", ".join(f"{name} ({framework})" for framework, (_, ns) in found.items() for name in list(ns)[:1])
        raise ModelError(
            f"{type(model).__name__} mixes neurons of several frameworks: {examples}. Compress the parts one by one, "
            f"or pass adapter= to treat it as one framework's model."
        )
    if why := next((why for a in candidates if (why := a.refusal(model))), ""):
        raise ModelError(f"{type(model).__name__} can't be taken: {why}")
    if plain:
        return PlainAdapter()
    names = ", ".join(a.framework for a in candidates) or "none installed"
    known = f"{type(model).__name__} has no spiking neuron of a known framework ({names})."
    if like := neuron_like(model):
        raise ModelError(f"{known} {described(like)} may be some of your own: {HOW_TO_NAME}")
    raise ModelError(
        f"{known} An ordinary network must be converted to spikes first; neurons of your own are named: {HOW_TO_NAME} "
        f"What forward computes itself, without a module for it, wants one."
    )


HOW_TO_NAME = (
    "neurons=LIFSpike names their class, time_dim=1 the axis of time in what it takes; where a call has no neurons=, "
    "adapter=snncompress.OwnNeurons(LIFSpike, 1) does."
)
_NAMES = re.compile(r"lif|i_?f_?(node|neuron|cell|spike)|psn|spik|neuron|izhikevich|integrate", re.IGNORECASE)


def neuron_like(model: nn.Module) -> dict[str, str]:
    """Modules that go by the name of a neuron and hold no layers: name → class."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name
        and _NAMES.search(type(module).__name__)
        and type(module).__module__.partition(".")[0] != "torch"
        and not any(parameter.dim() > 1 for parameter in module.parameters())
    }


def described(modules: Mapping[str, str]) -> str:
    """A few of them, with their classes.

    >>> described({"a": "LIF", "b": "LIF"}), described(dict.fromkeys("abcde", "LIF"))
    ("'a', 'b' (LIF)", "'a', 'b', 'c' and 2 more (LIF)")
    """
    names = list(modules)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more} ({', '.join(dict.fromkeys(modules.values()))})"
