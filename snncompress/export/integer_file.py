"""A network in whole numbers as a plain file: safetensors, and JSON that says what is done with them."""

from __future__ import annotations

import json

import safetensors.torch

from snncompress.version import __version__

from .integer_program import Program


def integer_file(program: Program) -> bytes:
    """The file; docs/integer.md describes it."""
    metadata = {"integer_network": json.dumps(program.header()), "snncompress": __version__}
    return safetensors.torch.save(program.tensors, metadata)
