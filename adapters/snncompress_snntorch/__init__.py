"""Plugin: the adapter for snnTorch models."""

from __future__ import annotations

from collections.abc import Callable

from snncompress.extend import Adapter, hookimpl

from .adapter import SNNTorchAdapter

__all__ = ["SNNTorchAdapter"]


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Offer the adapter."""
    register(SNNTorchAdapter)
