"""Plugin: the adapter for SpikingJelly models."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Adapter, hookimpl

from .adapter import SpikingJellyAdapter

__all__ = ["SpikingJellyAdapter"]


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Offer the adapter."""
    register(SpikingJellyAdapter)
