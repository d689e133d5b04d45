"""The networks and data that a command is about."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from snncompress.errors import ModelError, OptionError, StorageError
from snncompress.model.own_neurons import named_neurons
from snncompress.saving.storage import load

from .importing import built
from .options import Option, Options, UsageError

MODEL = Option("model", str | None, "The network: package.module:name of a function that builds it, or of the network.")
WEIGHTS = Option("weights", str | None, "A file with its state_dict, as torch.save or safetensors wrote it.")


def network(values: Mapping[str, Any]) -> nn.Module:
    """The model that was named, with the weights that were named; raises UsageError where none was."""
    if not values["model"]:
        raise UsageError("--model is missing: package.module:name of a function that builds the network.")
    model = built("--model", values["model"])
    if not isinstance(model, nn.Module):
        raise OptionError(f"--model: {values['model']} gives a {type(model).__name__}, not a torch.nn.Module.")
    if values["weights"]:
        state = _state(values["weights"])
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"--weights: {values['weights']} doesn't fit the model: {error}") from error
    return model


def compressed(file: str, model: nn.Module, options: Options, values: Mapping[str, Any]) -> nn.Module:
    """The network in a file, on the structure of ``model``."""
    return load(file, into=model, adapter=framework(options, values))


def framework(options: Options, values: Mapping[str, Any]) -> Any:
    """The adapter that ``--adapter``, or ``--neurons`` and ``--time_dim``, tell of; None where nothing does."""
    adapter, neurons, time_dim = (options.resolved(name, values[name]) for name in ("adapter", "neurons", "time_dim"))
    return named_neurons(adapter, neurons, time_dim)


def several(data: Any) -> Any:
    """Data that can be gone through more than once."""
    return list(data) if isinstance(data, Iterator) else data


def _state(path: str) -> Mapping[str, Any]:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        why = f"{error}" if isinstance(error, OSError) else "it holds no tensors of torch.save or safetensors"
        raise StorageError(f"--weights: {path} can't be read: {why}.") from error
    inner = state.get("state_dict", state) if isinstance(state, Mapping) else state  # as trainers keep it
    if not isinstance(inner, Mapping):
        raise StorageError(f"--weights: {path} holds a {type(inner).__name__}, not a state_dict.")
    return inner
