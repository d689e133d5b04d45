"""What the checks share: error texts, names, options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from snncompress.errors import PluginError
from snncompress.interfaces import Criterion, EnergyModel, Quantizer, Scheduler, Target


def broken(plugin: object, what: str) -> PluginError:
    """The error to raise, with the plugin's class in front."""
    return PluginError(f"{type(plugin).__name__}: {what}")


@contextmanager
def calling(plugin: object, what: str) -> Iterator[None]:
    """Turns any exception of the plugin into a PluginError that says what it was asked for."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        raise broken(plugin, f"{what} failed: {type(error).__name__}: {error}") from error


def check_name(plugin: object, attribute: str = "name") -> None:
    """The class has the name that users write."""
    name = getattr(type(plugin), attribute, None)
    if not isinstance(name, str) or not name:
        raise broken(plugin, f"{attribute!r} must be the name that users write, not {name!r}.")


def check_options(plugin: Criterion | Quantizer | Scheduler | EnergyModel | Target) -> dict[str, Any]:
    """The options are the same after a round trip through JSON; returns them."""
    with calling(plugin, "options()"):
        options = plugin.options()
    try:
        again = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise broken(plugin, f"its options {options!r} can't be stored as JSON: {error}") from error
    if not isinstance(options, dict) or again != options:
        raise broken(plugin, f"its options {options!r} come back from JSON as {again!r}: use plain values.")
    return options
