"""The version, in the one place that code reads."""

__version__ = "0.1.0"
