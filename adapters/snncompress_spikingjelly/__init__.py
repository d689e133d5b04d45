"""SpikingJelly models for snncompress."""

from snncompress import hookimpl

from .adapter import SpikingJellyAdapter

__all__ = ["SpikingJellyAdapter"]


@hookimpl
def register_adapters(register):  # type: ignore[no-untyped-def]
    register(SpikingJellyAdapter)
