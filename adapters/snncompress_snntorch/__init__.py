"""snnTorch models for snncompress."""

from snncompress import hookimpl

from .adapter import SNNTorchAdapter

__all__ = ["SNNTorchAdapter"]


@hookimpl
def register_adapters(register):  # type: ignore[no-untyped-def]
    register(SNNTorchAdapter)
