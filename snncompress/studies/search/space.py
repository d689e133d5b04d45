"""A search space: which options of ``apply`` are tried, each from a list or a range, and which are given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import Criterion, Quantizer, Scheduler, Target
from snncompress.pruning.budgets import Budget
from snncompress.pruning.selection import per_layer
from snncompress.studies.units import label

PLUGINS: Mapping[str, tuple[str, Any]] = {
    "criterion": ("criterion", Criterion), "quantizer": ("quantizer", Quantizer), "scheduler": ("scheduler", Scheduler),
    "target": ("target", Target),
}  # fmt: skip
SHARES = ("ratio", "budget", "lr")
"""Ranges of these are of real numbers."""
COUNTS = ("bits", "timesteps", "epochs", "finetune", "round_to")
"""Ranges of these are of whole numbers."""
WORDS = ("order", "repair", "rounding", "refresh")
KEYS = (*PLUGINS, *SHARES, *COUNTS, *WORDS)
_HINTS = {
    "truncate": " T is searched as 'timesteps'.",
    "skip": " Give it to search itself: skip=[...].",
    "seed": " Give it to search itself: seed=0.",
}
_LEAST = {"bits": 1, "timesteps": 1, "epochs": 0, "finetune": 0, "round_to": 1}


@dataclass(frozen=True)
class Parameter:
    """One thing that varies: where it stands in the options, and what it may be.

    Fields:
        path: the option, and within a mapping the layer or the kind of budget.
        distribution: Optuna's.
        values: of a list, what each of its labels stands for.
    """

    path: tuple[str, ...]
    distribution: Any
    values: Mapping[Any, Any]

    @property
    def name(self) -> str:
        """As tables have it: ``ratio`` or ``ratio[conv1]``."""
        return self.path[0] + "".join(f"[{part}]" for part in self.path[1:])


@dataclass(frozen=True)
class Space:
    """The parameters that vary, and the options as they were given, with those left out."""

    parameters: tuple[Parameter, ...]
    given: Mapping[str, Any]

    @classmethod
    def of(cls, asked: Any) -> Space:
        """Check what a user wrote; raises OptionError."""
        if not isinstance(asked, Mapping) or not asked:
            raise OptionError(
                f"space must be a mapping such as {{'ratio': (0.2, 0.9), 'bits': [2, 4, 8]}}, not {asked!r}."
            )
        for key in asked:
            if key not in KEYS:
                hint = _HINTS.get(key, "")
                raise OptionError(f"space names {key!r}, which can't be searched. Keys: {', '.join(KEYS)}.{hint}")
        if "lr" in asked and "epochs" not in asked:
            raise OptionError(
                "space names 'lr' without 'epochs': it is the learning rate of the fine-tuning after compression, and "
                "there is none. Add 'epochs', such as (1, 3), or leave 'lr' out."
            )
        found = tuple(part for key, value in asked.items() for part in _parameters((key,), value))
        if not found:
            raise OptionError(
                "Nothing in space varies: every option has one value. Give a list of choices, or a range (low, high)."
            )
        given = {key: value for key, value in asked.items() if _is_fixed(value) or isinstance(value, Mapping)}
        if isinstance(budget := given.get("budget"), Mapping):
            Budget.of({key: _least(value) for key, value in budget.items()})
        return cls(found, given)

    def options(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What ``apply`` and ``finetune`` are called with where the parameters, by name, have these values.

        >>> space = Space.of({"ratio": {"conv*": [0.25, 0.5], "fc": 0.5}, "bits": 4})
        >>> space.options({"ratio[conv*]": 0.25})
        {'ratio': {'conv*': 0.25, 'fc': 0.5}, 'bits': 4}
        """
        found: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in self.given.items()}
        for parameter in self.parameters:
            value = chosen[parameter.name]
            place = found
            for part in parameter.path[:-1]:
                place = place[part]
            place[parameter.path[-1]] = parameter.values[value] if parameter.values else value
        return found

    def check_layers(self, names: Collection[str]) -> None:
        """Raise OptionError where a ratio or a bit width is for layers that there aren't."""
        for key in ("ratio", "bits"):
            choices = [v for one in self.parameters if one.path == (key,) for v in one.values.values()]
            for value in (self.given.get(key), *choices):
                if isinstance(value, Mapping):
                    per_layer(value, names, f"space[{key!r}]", lambda number, _: number)

    def described(self) -> dict[str, str]:
        """Plain text, to tell one space from another."""
        varied = {parameter.name: repr(parameter.distribution) for parameter in self.parameters}
        return {**varied, **{f"given {key}": _text(value) for key, value in _leaves(self.given)}}


def _parameters(path: tuple[str, ...], value: Any) -> Iterator[Parameter]:
    from optuna import distributions

    name = path[0]
    if isinstance(value, Mapping):
        if len(path) > 1 or name not in ("ratio", "bits", "budget"):
            raise OptionError(f"space[{name!r}] can't be a mapping: {value!r}.")
        for key, inner in value.items():
            yield from _parameters((*path, str(key)), inner)
    elif isinstance(value, distributions.BaseDistribution):
        yield Parameter(path, value, {})
    elif isinstance(value, list):
        if not value:
            raise OptionError(f"space[{name!r}] is an empty list. Give the choices, or leave it out.")
        for choice in value:
            _check(name, choice)
        values = {_label(choice): choice for choice in value}
        if len(values) < len(value):
            raise OptionError(f"space[{name!r}] has a choice twice: {value!r}.")
        yield Parameter(path, distributions.CategoricalDistribution(list(values)), values)
    elif isinstance(value, tuple):
        yield Parameter(path, _range(name, value), {})
    else:
        _check(name, value)


def _range(name: str, value: tuple[Any, ...]) -> Any:
    from optuna import distributions

    if name not in (*SHARES, *COUNTS):
        raise OptionError(f"space[{name!r}] has no range: give a list of choices, not {value!r}.")
    whole = name in COUNTS
    fits = len(value) == 2 and all(
        isinstance(v, (int,) if whole else (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if not fits or value[0] > value[1]:
        kind = "whole numbers" if whole else "numbers"
        raise OptionError(f"space[{name!r}] must be a range (low, high) of {kind}, or a list, not {value!r}.")
    for end in value:
        _check(name, end)
    if whole:
        return distributions.IntDistribution(*value)
    return distributions.FloatDistribution(float(value[0]), float(value[1]), log=name == "lr")


def _check(name: str, value: Any) -> None:
    """Raise OptionError for what can't be, whatever the rest is."""
    if name in PLUGINS:
        if not (name in ("criterion", "target") and value is None):
            registry().resolve(PLUGINS[name][0], value, PLUGINS[name][1])
    elif name == "ratio" and not isinstance(value, Mapping):
        _number(name, value, lambda v: 0 <= v < 1, "from 0 to below 1")
    elif name == "lr":
        _number(name, value, lambda v: 0 < v < math.inf, "above 0")
    elif name in COUNTS and not (name == "bits" and (value in (None, "auto") or isinstance(value, Mapping))):
        if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
            raise OptionError(f"space[{name!r}]: {value!r} must be a whole number from {_LEAST[name]}.")
        if name == "bits" and value > 16:
            raise OptionError(f"space['bits']: {value!r} must be a whole number from 1 to 16.")


def _number(name: str, value: Any, fits: Callable[[float], bool], which: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise OptionError(f"space[{name!r}]: {value!r} must be a number {which}.")


def _is_fixed(value: Any) -> bool:
    from optuna import distributions

    return not isinstance(value, (Mapping, list, tuple, distributions.BaseDistribution))


def _least(value: Any) -> Any:
    """Some value that it may have, to be checked."""
    if isinstance(value, (list, tuple)):
        return value[0]
    choices = getattr(value, "choices", None)
    return choices[0] if choices else getattr(value, "low", value)


def _label(choice: Any) -> Any:
    """A plain value that Optuna can keep."""
    if choice is None or isinstance(choice, (bool, int, float, str)):
        return choice
    return label(choice) if hasattr(choice, "options") else _text(choice)


def _text(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return label(value) if hasattr(value, "options") and hasattr(value, "name") else repr(value)


def _leaves(given: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        name = f"{above}[{key}]" if above else key
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif _is_fixed(value):
            yield name, value
