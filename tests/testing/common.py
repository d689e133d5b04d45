"""What the tests of all checks share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from snncompress import PluginError
from snncompress.contract.registry import Entry


def named(entry: Entry) -> str:
    return entry.name


def broken(check: Callable[..., object], *arguments: object) -> str:
    """What the check says of a plugin that must fail it; the global random state must be as before."""
    state = torch.get_rng_state()
    with pytest.raises(PluginError) as raised:
        check(*arguments)
    assert torch.equal(state, torch.get_rng_state())
    return str(raised.value)
