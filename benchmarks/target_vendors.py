"""What sinabs and Rockpool say of the same networks, without samna.

Both import samna, which downloads a binary where it is imported; :func:`without_samna` puts an empty module in its
place, so that all of theirs runs that is written in Python, and samna's own validate_configuration doesn't.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from typing import Any

import torch
from target_networks import Case
from torch import nn


def without_samna() -> None:
    """Before sinabs' chips, or Rockpool, are imported."""
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


class _Absent(types.ModuleType):
    """A module in which every name is another such module."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ("samna", "samnagui"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> _Absent:
        return _Absent(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def sinabs_says(case: Case) -> tuple[bool | None, str]:
    """Whether sinabs makes a DynapcnnNetwork of it, and finds cores for all layers."""
    import sinabs.layers as sl
    from sinabs.backend.dynapcnn import DynapcnnNetwork
    from sinabs.backend.dynapcnn.chips.speck2f import Speck2FConfigBuilder

    widths = _widths(case)
    parts: list[nn.Module] = []
    for (kind, *args), (i, o) in zip(case.spec, widths, strict=True):
        if kind == "conv":
            parts.append(nn.Conv2d(i, o, args[2], padding=args[3], bias=False))
        elif kind == "linear":
            parts.append(nn.Linear(i, o, bias=False))
        elif kind == "norm":
            parts[-1].bias = nn.Parameter(torch.zeros(parts[-1].out_channels))  # it folds into that
            parts.append(nn.BatchNorm2d(o))
        elif kind == "if":
            parts.append(sl.IAFSqueeze(batch_size=1))
        elif kind == "lif":
            parts.append(sl.LIFSqueeze(tau_mem=20.0, batch_size=1))
        else:
            parts.append({"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "flatten": nn.Flatten}[kind](*args))
    shape = tuple(case.x.shape[2:]) if case.x.dim() == 5 else (case.x.shape[-1], 1, 1)
    try:
        network = DynapcnnNetwork(nn.Sequential(*parts), input_shape=shape, discretize=True)
        Speck2FConfigBuilder.get_valid_mapping(network)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return True, ""


def _widths(case: Case) -> list[tuple[int, int]]:
    """(in, out) of each part, as compressed."""
    if case.framework == "snntorch":
        model: Any = case.model().parts
    else:
        model = case.model()
    found = []
    for part in model:
        one = getattr(part, "in_channels", getattr(part, "in_features", 0))
        other = getattr(part, "out_channels", getattr(part, "out_features", getattr(part, "num_features", 0)))
        found.append((int(one), int(other)))
    return found


def rockpool_says(case: Case, chip: str) -> tuple[bool | None, str]:
    """Whether Rockpool's mapper for that Xylo takes it; None where it can't be written in Rockpool for it."""
    import importlib

    from rockpool.nn.combinators import Sequential
    from rockpool.nn.modules import LIFTorch, LinearTorch

    if any(part[0] not in ("linear", "lif", "flatten") for part in case.spec):
        return None, "no such layers in its graphs for Xylo"
    home = {"xylo_audio2": "syns61201", "xylo_audio3": "syns65302", "xylo_imu": "syns63300"}[chip]
    mapper = importlib.import_module(f"rockpool.devices.xylo.{home}.xylo_mapper").mapper
    parts: list[Any] = []
    for part in case.spec:
        if part[0] == "linear":
            parts += [LinearTorch(part[1:], has_bias=False), LIFTorch((part[2],), dt=1e-3, tau_mem=0.02, tau_syn=0.01)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            mapper(Sequential(*parts).as_graph())
        except Exception as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return False, f"{type(error).__name__}: {' '.join(str(error).split())[:90]}{cause[:60]}"
    rules = [str(warning.message) for warning in said if "DRC" in warning.category.__name__]
    return not rules, rules[0][:90] if rules else ""
